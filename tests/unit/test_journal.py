"""The journal: SIGKILL at any moment, torn and damaged files, a full disk. Everything acknowledged is there once."""

import collections
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import pytest
from span_samples import config, identity, record

from clrk.core.ids import new_span_id
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry import query
from clrk.gateway.telemetry import writer as writer_module
from clrk.gateway.telemetry.items import BeginItem, CursorItem, LogItem, SpanItem, encode
from clrk.gateway.telemetry.journal import Position
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Component, SpanKind, SpanRecord, StatusCode
from clrk.gateway.telemetry.store import TraceStore
from clrk.gateway.telemetry.writer import StoreWriter

HERE = Path(__file__).parent
ROUNDS = 5
CHILD = textwrap.dedent(
    """
    import asyncio, os, sys, time
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from span_samples import config, identity, record
    from test_journal import running
    from clrk.core.ids import new_span_id
    from clrk.gateway.telemetry import journal
    from clrk.gateway.telemetry.pipeline import Telemetry
    from clrk.gateway.telemetry.spans import Component, SpanKind

    journal.SEGMENT_BYTES = int(sys.argv[3])

    def say(kind, what):
        os.write(1, f"{kind} {what}\\n".encode())

    async def main():
        telemetry = Telemetry.open(Path(sys.argv[2]), config())
        say("opened", os.getpid())
        number = 0
        while True:
            who = identity()
            telemetry.record_invocation(running(who))
            say("invocation", who.invocation_id)
            for _ in range(5):
                span_id, now = new_span_id(), time.time_ns()
                telemetry.begin(who, component=Component.GATEWAY, name="begun", kind=SpanKind.CLIENT, start_ns=now,
                                span_id=span_id, attributes={"url.full": "http://tools.internal/"})
                say("begun", span_id)
                if number % 3:
                    record(telemetry, who, "begun", start_ns=now, span_id=span_id, clrk__cost__usd=0.5)
                    say("span", span_id)
                telemetry.record_log(who, "stdout", b"line %d" % number, now)
                say("line", number)
                number += 1
            await asyncio.sleep(0)

    asyncio.run(main())
    """
)


def running(who, phase=Phase.RUNNING):
    return InvocationRecord(
        invocation_id=who.invocation_id, namespace=who.agent_namespace, agent=who.agent_name, revision="r",
        trigger="http", phase=phase, trace_id=who.context.trace_id, dispatch_span_id="d" * 16,
        run_span_id=who.context.span_id, created_ns=time.time_ns(),
    )  # fmt: skip


def rows(path, sql):
    with query.reader(path) as connection:
        return connection.execute(sql).fetchall()


async def reopened(tmp_path):
    """Open and close the store, so that everything that can be recovered is."""
    telemetry = Telemetry.open(tmp_path, config())
    assert await telemetry.flush()
    await telemetry.close()
    return telemetry.store


def kill_after(tmp_path, words, segment_bytes):
    """Run a child that writes until it is killed, when it has acknowledged so much; return what it had acknowledged."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(HERE), str(tmp_path), str(segment_bytes)], stdout=subprocess.PIPE
    )
    said = bytearray(b"".join(child.stdout.readline() for _ in range(1 + words)))  # one that it has opened the store
    child.send_signal(signal.SIGKILL)
    said += child.stdout.read()
    child.wait()
    child.stdout.close()
    acknowledged = collections.defaultdict(list)
    for line in bytes(said).decode().splitlines():
        kind, _, what = line.partition(" ")
        acknowledged[kind].append(what)
    return acknowledged


@pytest.mark.parametrize("segment_bytes", [40_000, 16 * 2**20])
async def test_nothing_acknowledged_is_lost_or_doubled_by_sigkill(tmp_path, segment_bytes):
    expected, chance = collections.defaultdict(list), random.Random(segment_bytes)
    for _ in range(ROUNDS):
        for kind, found in kill_after(tmp_path, chance.randrange(2000), segment_bytes).items():
            expected[kind] += found
    store = await reopened(tmp_path)
    spans = [SpanRecord(**document) for document in (msgspec.json.decode(row[0]) for row in
             rows(store.path, "SELECT json FROM spans"))]  # fmt: skip
    ids = collections.Counter(span.span_id for span in spans)
    assert len(expected["span"]) > 100
    assert set(ids.values()) == {1}, "no span twice"
    assert set(expected["span"]) <= set(expected["begun"]) <= set(ids)
    finished, lost = (
        set(expected["span"]),
        {s.span_id for s in spans if s.attributes.get("error.type") == "gateway_lost"},
    )
    assert not finished & lost
    assert set(expected["begun"]) - finished <= lost | {span.span_id for span in spans}
    # The one call in each life whose word did not reach us may be there or not; nothing else may be.
    assert len(set(ids) - set(expected["begun"])) <= ROUNDS
    for span in spans:
        if span.span_id in lost:
            assert span.status["code"] == StatusCode.ERROR
            assert "gateway ended" in span.status["message"]
            assert span.end_time_unix_nano >= span.start_time_unix_nano
            assert span.attributes["url.full"] == "http://tools.internal/"
    lines = collections.Counter(row[0].decode() for row in rows(store.path, "SELECT line FROM logs"))
    acknowledged = collections.Counter(f"line {number}" for number in expected["line"])
    assert not acknowledged - lines
    assert sum((lines - acknowledged).values()) <= ROUNDS
    records = rows(
        store.path, "SELECT invocation_id, phase, message, ended_ns >= created_ns FROM invocations WHERE phase != ''"
    )
    assert set(expected["invocation"]) <= {row[0] for row in records}
    assert {row[1:] for row in records} == {("Failed", "the gateway ended before the invocation did", 1)}
    totals = rows(store.path, "SELECT sum(calls), sum(errors), sum(cost_usd) FROM invocations")
    assert totals == [(len(spans), len(lost), 0.5 * (len(spans) - len(lost)))]


async def test_a_second_recovery_adds_nothing(tmp_path):
    kill_after(tmp_path, 500, 16 * 2**20)
    counts = []
    for _ in range(2):
        store = await reopened(tmp_path)
        counts.append(rows(store.path, "SELECT (SELECT count(*) FROM spans), (SELECT count(*) FROM logs)"))
    assert counts[0] == counts[1] != [(0, 0)]
    assert store.counters["journal_replayed"] == 0


async def test_a_gateway_that_dies_while_it_recovers_leaves_what_had_begun_to_the_next(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "traces.db", retention_s=1e6, max_file_bytes=2**40, on_commit=lambda: None)
    begun = SpanRecord("a" * 32, "b" * 16, "", "begun", SpanKind.CLIENT, time.time_ns(), 0)
    assert writer.begin(BeginItem(begun, "default/default"))
    journaled(tmp_path)  # a second life, with a second segment
    monkeypatch.setattr(writer_module, "_BATCH", 1)
    third = StoreWriter(tmp_path / "traces.db", retention_s=1e6, max_file_bytes=2**40, on_commit=lambda: None)
    writes = iter(range(5))
    write = third._file.write
    monkeypatch.setattr(third._file, "write", lambda *batch: next(writes, None) is not None and write(*batch))
    assert third._recover_once(third._file.open()) is False
    third._file.close()  # dead, with five of ten lines in the store
    monkeypatch.undo()
    store = await reopened(tmp_path)
    assert rows(store.path, "SELECT count(*) FROM logs") == [(10,)]
    (document,) = (msgspec.json.decode(row[0]) for row in rows(store.path, "SELECT json FROM spans"))
    assert (document["name"], document["attributes"]["error.type"]) == ("begun", "gateway_lost")
    assert len(list((tmp_path / "journal").iterdir())) <= 1


def journaled(tmp_path, count=10):
    """Leave a journal as a process that was killed does, with `count` lines that are not in the store."""
    writer = StoreWriter(tmp_path / "traces.db", retention_s=1e6, max_file_bytes=2**40, on_commit=lambda: None)
    for number in range(count):
        assert writer.put(LogItem("i", "default", "a", "stdout", time.time_ns(), b"line %d" % number))
    return max((tmp_path / "journal").iterdir())


async def lines(tmp_path):
    store = await reopened(tmp_path)
    return [row[0] for row in rows(store.path, "SELECT line FROM logs ORDER BY seq")], store.counters


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30])
async def test_a_cut_tail_costs_the_last_frame_only(tmp_path, cut):
    segment = journaled(tmp_path)
    segment.write_bytes(segment.read_bytes()[:-cut])
    kept, counters = await lines(tmp_path)
    assert kept == [b"line %d" % number for number in range(9)]
    assert counters["journal_damaged"] == 1


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 4096, b"\x04\0\0\0\0\0\0\0abcd", os.urandom(999)])
async def test_a_tail_that_is_no_frame_is_left_out(tmp_path, tail):
    segment = journaled(tmp_path)
    segment.write_bytes(segment.read_bytes() + tail)
    kept, counters = await lines(tmp_path)
    assert kept == [b"line %d" % number for number in range(10)]
    assert counters["journal_damaged"] == 1


async def test_a_frame_in_the_middle_that_was_changed_ends_its_segment(tmp_path):
    segment = journaled(tmp_path)
    raw = segment.read_bytes()
    segment.write_bytes(raw.replace(b"line 5", b"line X"))
    assert (await lines(tmp_path))[0] == [b"line %d" % number for number in range(5)]


@pytest.mark.parametrize("raw", [b"", b"clrk", os.urandom(500)])
async def test_a_file_that_is_no_segment_does_no_harm(tmp_path, raw):
    journaled(tmp_path)
    (tmp_path / "journal" / f"{7:016d}").write_bytes(raw)
    (tmp_path / "journal" / "notes.txt").write_bytes(raw)
    kept, _ = await lines(tmp_path)
    assert len(kept) == 10
    assert (tmp_path / "journal" / "notes.txt").exists(), "not ours to delete"


FULL = textwrap.dedent(
    """
    import asyncio, resource, sys, time
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from span_samples import config, identity, record
    from clrk.core.ids import new_span_id
    from clrk.gateway.telemetry.pipeline import Telemetry
    from clrk.gateway.telemetry.spans import Component, SpanKind

    async def main():
        telemetry = Telemetry.open(Path(sys.argv[2]), config())
        await telemetry.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # every file is full at once
        who = identity()
        for number in range(2000):
            record(telemetry, who, f"s{number}", padding="x" * 1000)
            telemetry.begin(who, component=Component.GATEWAY, name="b", kind=SpanKind.CLIENT, start_ns=1,
                            span_id=new_span_id())
        while not telemetry.store.counters["write_failures"]:
            await asyncio.sleep(0.01)
        full = dict(telemetry.store.counters)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        record(telemetry, who, "room again")
        async with asyncio.timeout(20):
            committed = telemetry.store.committed
            while await telemetry.store.last_seq() < 2001:
                await committed.wait()
                committed = telemetry.store.committed
        print(full["journal_errors"] > 1000, full["write_failures"] > 0, await telemetry.store.last_seq())
        await telemetry.close()

    asyncio.run(main())
    """
)


def test_a_full_disk_breaks_nothing_and_what_waited_is_written_when_there_is_room(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", FULL, str(HERE), str(tmp_path)], capture_output=True, text=True, timeout=50,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True", "2001"], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


async def test_an_agent_can_not_end_a_span_of_ours(tmp_path):
    """It knows the id of invoke_agent from its TRACEPARENT, and may report a span with that id."""
    writer = StoreWriter(tmp_path / "traces.db", retention_s=1e6, max_file_bytes=2**40, on_commit=lambda: None)
    store = await reopened(tmp_path / "other")  # its telemetry makes the begin, through the same writer's journal
    who = identity()
    telemetry = Telemetry(store, {})
    store._writer = writer
    telemetry.begin(who, component=Component.RUNTIME, name="invoke_agent support", kind=SpanKind.INTERNAL,
                    start_ns=time.time_ns(), span_id=who.context.span_id, parent_span_id="")  # fmt: skip
    now = time.time_ns()
    claimed = SpanRecord(
        who.context.trace_id, who.context.span_id, "", "all is well", SpanKind.INTERNAL, now, now,
        resource={attr.CLRK_COMPONENT: "agent"},
    )  # fmt: skip
    telemetry.record_agent_span(who, claimed, b"otlp")
    await reopened(tmp_path)
    found = dict(rows(tmp_path / "traces.db", "SELECT name, otlp FROM spans"))
    assert found == {"all is well": b"otlp", "invoke_agent support": None}


async def test_a_span_that_was_stored_while_the_journal_was_full_is_not_called_lost(tmp_path):
    who = identity()
    first = TraceStore(tmp_path / "traces.db", retention_s=1e6)
    telemetry = Telemetry(first, {})
    span_id = new_span_id()
    telemetry.begin(who, component=Component.GATEWAY, name="c", kind=SpanKind.CLIENT, start_ns=1, span_id=span_id)
    first._writer._journal._max_bytes = 0
    record(telemetry, who, "c", span_id=span_id)
    assert await first.flush()
    await first.close()
    assert first.counters["journal_refused"] == 1
    store = await reopened(tmp_path)
    assert rows(store.path, "SELECT count(*) FROM spans") == [(1,)]


async def test_an_invocation_that_was_killed_before_its_record_has_one(tmp_path):
    """The span of the request comes first; a gateway may be killed between the two."""
    writer = StoreWriter(tmp_path / "traces.db", retention_s=1e6, max_file_bytes=2**40, on_commit=lambda: None)
    store = await reopened(tmp_path / "other")
    telemetry, who, start_ns = Telemetry(store, {}), identity(), time.time_ns()
    store._writer = writer
    telemetry.begin(who, component=Component.INGRESS, name=attr.SPAN_INGRESS_DISPATCH, kind=SpanKind.SERVER,
                    start_ns=start_ns, span_id=new_span_id(), parent_span_id="",
                    attributes={attr.CLRK_TRIGGER: "http"})  # fmt: skip
    await reopened(tmp_path)
    sql = "SELECT invocation_id, phase, trigger, agent, created_ns, message FROM invocations"
    ((invocation_id, *rest, message),) = rows(tmp_path / "traces.db", sql)
    assert (invocation_id, *rest) == (who.invocation_id, "Failed", "http", "support", start_ns)
    assert "the gateway ended" in message


async def test_a_store_that_was_damaged_gets_what_the_journal_still_has(tmp_path):
    journaled(tmp_path)
    (tmp_path / "traces.db").write_bytes(os.urandom(9000))
    kept, counters = await lines(tmp_path)
    assert len(kept) == 10
    assert counters["damaged_files"] == 1


async def test_a_journal_that_was_deleted_is_begun_anew_above_what_was_applied(tmp_path):
    segment = journaled(tmp_path)
    await reopened(tmp_path)
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    fresh = journaled(tmp_path)
    assert fresh.name > segment.name
    assert len((await lines(tmp_path))[0]) == 20


async def test_cursors_are_not_in_the_journal_and_a_barrier_waits_for_all_before_it(tmp_path):
    store = TraceStore(tmp_path / "traces.db", retention_s=1e6)
    store._writer._max_queue_bytes = 5000
    for number in range(300):
        record(Telemetry(store, {}), identity(), f"s{number}")
    store.set_cursor("default/default", "logs", 3)
    assert await store.flush()
    assert await store.last_seq() == 300
    assert await store.cursors("logs") == {"default/default": 3}
    assert await store.cursors() == {}
    await store.close()
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encode(LogItem("i", "n", "a", "s", 0, b"")), type=SpanItem)
    assert not isinstance(CursorItem("a", "logs", 1), msgspec.Struct)
    assert Position(2, 5) > Position(1, 9)
