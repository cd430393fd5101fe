"""What leaves the store: what is old, what is over the disk limit, in which order, and what is counted."""

import time

from span_samples import MS, identity, record
from stored_records import OTLP, listed, pending

from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.spans import Identity, SpanKind, SpanRecord, TraceContext
from clrk.gateway.telemetry.store import TraceStore
from clrk.gateway.telemetry.store_file import StoreFile


def purge(store, *limits):
    """Purge at once, beside the writer's own rounds, with a connection of its own; it counts where the store does."""
    file = StoreFile(store.path, store.counters)
    file.purge(*limits, lambda: False)
    file.close()


async def test_retention_takes_all_that_is_old_except_what_is_not_over(tmp_path):
    first, old = TraceStore(tmp_path / "traces.db", retention_s=86_400), time.time_ns() - 3600 * 1000 * MS
    telemetry = Telemetry(first, {})
    whos = {phase: identity() for phase in Phase}
    for phase, who in whos.items():
        telemetry.record_invocation(pending(who, phase=phase, created_ns=old))
        record(telemetry, who, "old", start_ns=old)
        telemetry.record_log(who, "stdout", b"old", old)
        telemetry.record_agent_metrics(who, time_ns=old, otlp=OTLP)
    fresh = identity()
    telemetry.record_invocation(pending(fresh, phase=Phase.SUCCEEDED))
    await first.flush()
    purge(first, 60, 2**40, frozenset({"default/default"}))
    assert set(await listed(first)) == {
        fresh.invocation_id, whos[Phase.PENDING].invocation_id, whos[Phase.RUNNING].invocation_id
    }  # fmt: skip
    assert [len(await first.after(signal, 0, 50)) for signal in ("traces", "logs", "metrics")] == [0, 0, 0]
    for signal in ("traces", "logs", "metrics"):
        assert first.counters[f"dropped_unexported_{signal}"] == len(Phase)
    await first.close()


async def test_what_was_not_exported_when_it_left_is_counted_and_the_count_survives(tmp_path):
    first, old = TraceStore(tmp_path / "traces.db", retention_s=86_400), time.time_ns() - 3600 * 1000 * MS
    telemetry = Telemetry(first, {})
    for gateway, count in (("default/a", 10), ("default/b", 5), ("", 3)):
        for _ in range(count):
            record(telemetry, identity(gateway_name=gateway), start_ns=old)
    quiet = identity(gateway_name="default/a")
    unsampled = TraceContext(quiet.context.trace_id, quiet.context.span_id, 0)
    record(
        telemetry, Identity(**{f: getattr(quiet, f) for f in quiet.__slots__} | {"context": unsampled}), start_ns=old
    )
    first.set_cursor("default/a", "traces", 4)  # six left to send
    first.set_cursor("default/b", "traces", 10**6)  # all sent
    first.set_cursor("removed/gone", "traces", 0)  # an exporter that is not at work any more
    await first.flush()
    # "environment" has no cursor and takes what no other takes: the three without a gateway.
    purge(first, 60, 2**40, frozenset({"default/a", "default/b", "environment"}))
    assert first.counters["dropped_unexported_traces"] == 6 + 3
    assert await first.flush()
    await first.close()
    second = TraceStore(tmp_path / "traces.db", retention_s=86_400)
    assert await second.flush()
    assert second.counters["dropped_unexported_traces"] == 9
    await second.close()


async def test_over_the_disk_limit_what_agents_say_of_themselves_goes_first(tmp_path):
    """An agent that floods its receiver pushes out its own words, not the calls of others."""
    first = TraceStore(tmp_path / "traces.db", retention_s=1e9)
    telemetry, victim, flooder, now = Telemetry(first, {}), identity(), identity("flooder"), time.time_ns()
    telemetry.record_invocation(pending(victim, phase=Phase.SUCCEEDED))
    record(telemetry, victim, "GET tools.internal")
    telemetry.record_log(victim, "stdout", b"line", now)
    for number in range(200):
        span = SpanRecord(flooder.context.trace_id, f"{number + 1:016x}", "", "mine", SpanKind.INTERNAL, now, now)
        telemetry.record_agent_span(flooder, span, bytes(10_000))
        telemetry.record_agent_metrics(flooder, time_ns=now, otlp=bytes(10_000))
    await first.flush()
    purge(first, 10**9, 1_000_000, frozenset())
    assert [span.otlp for span in await first.after("traces", 0, 500)] == [None]
    assert len(await first.after("logs", 0, 500)) == 1
    assert await first.after("metrics", 0, 500) == []
    assert (await first.find_invocation(victim.invocation_id)).totals.calls == 1
    await first.close()


async def test_over_the_disk_limit_records_go_with_the_spans_they_had(tmp_path, monkeypatch):
    first = TraceStore(tmp_path / "traces.db", retention_s=86_400)
    telemetry, start = Telemetry(first, {}), time.time_ns() - 10_000 * MS
    for number in range(6000):
        who = identity()
        telemetry.record_invocation(pending(who, phase=Phase.SUCCEEDED, created_ns=start + number * MS))
        record(telemetry, who, start_ns=start + number * MS, body="x" * 300)
    assert await first.flush()
    purge(first, 86_400, 3_000_000, frozenset({"default/default"}))
    spans, records = await first.after("traces", 0, 9999), await listed(first, limit=9999)
    assert 0 < len(spans) < 6000
    assert len(spans) == len(records)
    assert first.counters["dropped_unexported_traces"] == 6000 - len(spans)
    assert first.counters["dropped_disk_limit"] == 2 * (6000 - len(spans))
    await first.close()
