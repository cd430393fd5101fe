"""The embedded store: filters, retention, restart, damage, bounds."""

import asyncio
import collections
import logging
import os
import sqlite3
import time
from concurrent.futures import Future

import msgspec
import pytest
from span_samples import MS, identity, record
from stored_records import names

from clrk.gateway.telemetry import outbox, query, schema
from clrk.gateway.telemetry.items import Barrier, CursorItem, LogItem, SpanItem
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.spans import SpanKind, SpanRecord
from clrk.gateway.telemetry.store import StoreError, TraceStore
from clrk.gateway.telemetry.store_file import StoreFile
from clrk.gateway.telemetry.writer import StoreWriter


@pytest.fixture
async def store(tmp_path):
    opened = TraceStore(tmp_path / "traces.db", retention_s=86_400)
    yield opened
    await opened.close()


def into(store):
    return Telemetry(store, {})


async def test_each_filter_finds_its_spans_and_no_others(store):
    now = time.time_ns()
    first, second = identity("support"), identity("support", "team-b")
    record(
        into(store), first, "a", start_ns=now - 50 * MS, gen_ai__system="anthropic", gen_ai__request__model="claude-x",
        gen_ai__response__model="claude-x-1", gen_ai__usage__input_tokens=100,
    )  # fmt: skip
    record(into(store), first, "b", start_ns=now - 40 * MS, error="boom")
    record(into(store), second, "egress.dns.denied", start_ns=now - 30 * MS, error="nxdomain")
    record(into(store), second, "c", start_ns=now - 20 * MS, gen_ai__provider__name="openai",
           gen_ai__request__model="gpt", gen_ai__usage__input_tokens=7, clrk__budget__denied=True)  # fmt: skip
    record(into(store), identity("other"), "d", start_ns=now - 10 * MS, clrk__egress__deny_reason="no_rule")
    record(into(store), identity("watched"), "e", start_ns=now - 5 * MS, clrk__egress__would_deny="no_rule",
           gen_ai__request__model="gpt")  # fmt: skip
    for wanted, expected in (
        (SpanFilter(), ["a", "b", "egress.dns.denied", "c", "d", "e"]),
        (SpanFilter(agent="support"), ["a", "b", "egress.dns.denied", "c"]),
        (SpanFilter(agent="default/support"), ["a", "b"]),
        (SpanFilter(agent="nobody"), []),
        (SpanFilter(invocation_id=second.invocation_id), ["egress.dns.denied", "c"]),
        (SpanFilter(trace_id=first.context.trace_id), ["a", "b"]),
        (SpanFilter(name="c"), ["c"]),
        (SpanFilter(since_ns=now - 40 * MS, until_ns=now - 20 * MS), ["b", "egress.dns.denied"]),
        (SpanFilter(system="anthropic"), ["a"]),
        (SpanFilter(system="openai"), ["c"]),
        (SpanFilter(model="claude-x"), ["a"]),
        (SpanFilter(model="claude-x-1"), ["a"]),
        (SpanFilter(model="claude"), []),
        (SpanFilter(model="c*-x?1"), ["a"]),
        (SpanFilter(model="*"), ["a", "c", "e"]),
        (SpanFilter(denied=True), ["egress.dns.denied", "c", "d"]),
        (SpanFilter(would_deny=True), ["e"]),
        (SpanFilter(would_deny=True, model="gpt"), ["e"]),
        (SpanFilter(would_deny=True, agent="support"), []),
        (SpanFilter(would_deny=True, denied=True), ["egress.dns.denied", "c", "d", "e"]),
        (SpanFilter(errors=True), ["b", "egress.dns.denied"]),
        (SpanFilter(errors=True, denied=True, agent="support"), ["egress.dns.denied"]),
        (SpanFilter(min_input_tokens=7), ["a", "c"]),
        (SpanFilter(min_input_tokens=8), ["a"]),
        (SpanFilter(min_input_tokens=0, agent="default/support"), ["a"]),
    ):
        assert await names(store, wanted) == expected, wanted
        assert await names(store, wanted, order="newest") == expected[::-1], wanted
    assert await names(store, SpanFilter(), order="newest", limit=2) == ["e", "d"]


async def test_filter_values_are_values_and_never_sql(store):
    record(into(store), identity(), "a", gen_ai__request__model="m", gen_ai__system="s")
    for text in ("' OR 1=1 --", '"; DROP TABLE spans; --', "%", "_"):
        for wanted in (SpanFilter(agent=text), SpanFilter(system=text), SpanFilter(model=text), SpanFilter(name=text)):
            assert await names(store, wanted) == []
    assert await names(store, SpanFilter()) == ["a"]


async def test_pages_keep_order_and_lose_nothing_when_many_spans_start_at_once(store):
    who, now = identity(), time.time_ns()
    for index in range(query.PAGE_SIZE * 2 + 7):
        record(into(store), who, f"s{index}", start_ns=now)
    found = await names(store, SpanFilter())
    assert found == [f"s{index}" for index in range(query.PAGE_SIZE * 2 + 7)]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (SpanFilter(invocation_id="x"), "spans_invocation"),
        (SpanFilter(trace_id="x"), "spans_trace"),
        (SpanFilter(agent="a", since_ns=1), "spans_agent"),
        (SpanFilter(since_ns=1), "spans_start"),
        (SpanFilter(model="m"), "spans_llm"),
        (SpanFilter(model="m*", since_ns=1), "spans_llm"),
        (SpanFilter(system="s"), "spans_llm"),
        (SpanFilter(min_input_tokens=1), "spans_llm"),
        (SpanFilter(denied=True), "spans_denied"),
        (SpanFilter(would_deny=True), "spans_denied"),
        (SpanFilter(errors=True), "spans_error"),
    ],
)
async def test_every_filter_walks_an_index(store, wanted, index):
    await store.flush()
    with query.reader(store.path) as connection:
        plans = []
        connection.set_trace_callback(plans.append)
        query.select_spans(connection, wanted, order="newest")
        connection.set_trace_callback(None)
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {plans[-1]}"))
    assert index in plan
    assert "B-TREE FOR ORDER BY" not in plan  # spans that start in the same nanosecond may be sorted, no more


async def test_reading_goes_on_while_writing(store):
    who, telemetry = identity(), into(store)

    async def write():
        for round_ in range(30):
            for index in range(20):
                record(telemetry, who, f"{round_}.{index}")
            await store.flush()

    async def read():
        sizes = []
        while not writer.done():
            sizes.append(sum([len(page) async for page in store.spans(SpanFilter())]))
        return sizes

    await store.flush()
    writer = asyncio.create_task(write())
    sizes = await read()
    await writer
    assert sizes == sorted(sizes)
    assert len(await names(store, SpanFilter())) == 600


async def test_a_restart_keeps_spans_logs_and_cursors(tmp_path):
    path, who, now = tmp_path / "traces.db", identity(), time.time_ns()
    first = TraceStore(path, retention_s=86_400)
    record(Telemetry(first, {}), who, "kept")
    first.add_log(LogItem(who.invocation_id, "default", "support", "stderr", now, b"caf\xe9 \xff"))
    first.set_cursor("default/default", "traces", 41)
    await first.close()
    second = TraceStore(path, retention_s=86_400)
    assert await names(second, SpanFilter()) == ["kept"]
    assert await second.cursors() == {"default/default": 41}
    assert second.seen_invocation(who.invocation_id)
    assert not second.seen_invocation(identity().invocation_id)
    (line,) = await second.logs("default/support", invocation_id=who.invocation_id)
    assert (line.stream, line.time_unix_nano, line.line) == ("stderr", now, "caf\ufffd \ufffd")
    assert await second.logs("default/other") == []
    await second.close()


async def test_the_file_is_readable_by_its_owner_only(store):
    await store.flush()
    for suffix in ("", "-wal", "-shm"):
        assert os.stat(f"{store.path}{suffix}").st_mode & 0o077 == 0


async def test_what_is_past_retention_is_purged_at_start_and_not_seen(tmp_path):
    path, old, new = tmp_path / "traces.db", identity(), identity()
    first = TraceStore(path, retention_s=86_400)
    record(Telemetry(first, {}), old, "old", start_ns=time.time_ns() - 3600 * 1000 * MS)
    first.add_log(LogItem(old.invocation_id, "default", "support", "stdout", time.time_ns() - 3600 * 1000 * MS, b"x"))
    record(Telemetry(first, {}), new, "new")
    await first.close()
    second = TraceStore(path, retention_s=60)
    assert not second.seen_invocation(old.invocation_id)
    await second.flush()  # the first batch, after which the purge runs …
    await second.flush()  # … before the second one
    assert await names(second, SpanFilter()) == ["new"]
    assert await second.logs("default/support") == []
    last = await second.last_seq()
    record(Telemetry(second, {}), new, "newer")
    await second.flush()
    assert await second.last_seq() == last + 1 == 3, "numbers are never given twice, or exporters would skip spans"
    await second.close()


async def test_over_the_disk_limit_the_oldest_go_first(tmp_path):
    path = tmp_path / "traces.db"
    first = TraceStore(path, retention_s=86_400)
    for index in range(6000):
        record(Telemetry(first, {}), identity(), f"s{index}")
    await first.close()
    second = TraceStore(path, retention_s=86_400, max_file_bytes=3_000_000)
    await second.flush()
    await second.flush()
    left = await names(second, SpanFilter())
    assert 0 < len(left) < 6000
    assert left[-1] == "s5999"
    assert second.counters["dropped_disk_limit"] >= 5000
    await second.close()


@pytest.mark.parametrize("damage", ["garbage", "torn_header", "other_version", "torn_page"])
async def test_a_damaged_file_is_moved_aside_and_telemetry_goes_on(tmp_path, caplog, damage):
    path = tmp_path / "traces.db"
    first = TraceStore(path, retention_s=86_400)
    for index in range(300):
        record(Telemetry(first, {}), identity(), f"s{index}")
    await first.close()
    if damage == "other_version":
        with sqlite3.connect(path) as connection:
            connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
        connection.close()
    else:
        raw = bytearray(path.read_bytes())
        if damage == "torn_page":
            raw[4096:] = os.urandom(len(raw) - 4096)
        else:
            raw[:] = os.urandom(8192) if damage == "garbage" else bytes(100) + raw[100:]
        path.write_bytes(raw)
    with caplog.at_level(logging.ERROR):
        second = TraceStore(path, retention_s=86_400)
        record(Telemetry(second, {}), identity(), "after")
        async with asyncio.timeout(25):
            while "after" not in await safe_names(second):
                await second.committed.wait()
    assert second.counters["damaged_files"] == 1
    assert len(list(tmp_path.glob("traces.db.damaged-*"))) >= 1
    assert "moved to" in caplog.text
    await second.close()


async def safe_names(store):
    try:
        return await names(store, SpanFilter())
    except StoreError:
        return []


async def test_a_state_folder_that_can_not_be_written_breaks_nothing(tmp_path):
    blocker = tmp_path / "state"
    blocker.write_text("a file where the folder should be")
    store = TraceStore(blocker / "traces.db", retention_s=86_400)
    who = identity()
    record(Telemetry(store, {}), who, "a")
    assert store.seen_invocation(who.invocation_id), "known from memory"
    assert await store.flush()
    with pytest.raises(StoreError):
        await store.last_seq()
    assert store.counters["write_failures"] >= 1
    blocker.unlink()  # somebody mends it: what waited is written
    async with asyncio.timeout(25):
        await store.committed.wait()
    assert await names(store, SpanFilter()) == ["a"]
    await store.close()


def test_a_full_disk_is_counted_and_over_when_there_is_room(tmp_path):
    file = StoreFile(tmp_path / "traces.db", collections.Counter())
    connection = file.open()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL, as from a disk without room
    big = [LogItem("i", "default", "a", "stdout", time.time_ns(), b"x" * 9000) for _ in range(50)]
    assert file.write(big) is False
    assert file.counters["write_failures"] == 1
    assert file.path.exists()
    assert file.write(big) is True  # a fresh connection without the limit
    with query.reader(file.path) as reading:
        assert len(query.select_logs(reading, agent="default/a")) == 50
    file.close()


def unstarted(tmp_path):
    """A writer whose thread does not run: nobody takes from its queue."""
    return StoreWriter(
        tmp_path / "traces.db", retention_s=1e10, max_file_bytes=2**40, on_commit=lambda: None, max_queue_bytes=10_000
    )


LINE = LogItem("i", "default", "a", "stdout", 0, b"x" * 1000)


def test_the_queue_is_bounded_and_drops_are_counted_when_there_is_no_journal_either(tmp_path):
    (tmp_path / "journal").write_text("a file where the folder should be")
    writer = unstarted(tmp_path)
    taken = [writer.put(LINE) for _ in range(20)]
    assert 0 < sum(taken) < 20
    assert writer.counters["dropped_queue_full"] == 20 - sum(taken)
    assert writer.counters["journal_errors"] == 20
    assert writer.queued_bytes <= 10_000
    assert writer.put(CursorItem("g", "traces", 1)), "bookkeeping gets through"


def test_what_does_not_fit_in_the_queue_waits_in_the_journal(tmp_path):
    writer = unstarted(tmp_path)
    items = [msgspec.structs.replace(LINE, time_ns=number) for number in range(50)]
    assert all(writer.put(item) for item in items)
    assert writer.queued_bytes <= 10_000
    done = Future()
    writer.put(Barrier(done))
    writer.start()
    done.result(timeout=10)
    with query.reader(tmp_path / "traces.db") as reading:
        assert [line.time_unix_nano for line in query.select_logs(reading, agent="default/a")] == list(range(50))
    assert writer.put(msgspec.structs.replace(LINE, time_ns=50)), "from here on through the queue again"
    writer.stop()
    writer.join()
    with query.reader(tmp_path / "traces.db") as reading:
        assert [line.time_unix_nano for line in query.select_logs(reading, agent="default/a")] == list(range(51))
    assert writer.counters["dropped_queue_full"] == 0


def test_an_item_that_sqlite_refuses_does_not_take_the_batch_with_it(tmp_path):
    file = StoreFile(tmp_path / "traces.db", collections.Counter())
    good = SpanRecord("a" * 32, "b" * 16, "", "good", SpanKind.CLIENT, 1, 2)
    huge = SpanRecord("a" * 32, "b" * 16, "", "huge", SpanKind.CLIENT, 2**70, 2**70)
    torn = SpanRecord("a" * 32, "b" * 16, "", "\ud800", SpanKind.CLIENT, 1, 2)
    assert file.write([SpanItem(good, ""), SpanItem(huge, ""), SpanItem(torn, ""), SpanItem(good, "")])
    assert file.counters["dropped_bad_item"] == 2
    with query.reader(file.path) as reading:
        assert len(outbox.select_after(reading, "traces", 0, 10)) == 2
    file.close()


@pytest.mark.parametrize("bad", [0, 31, 32, 69])
def test_spans_that_are_written_together_keep_their_order_and_lose_the_bad_one_alone(tmp_path, bad):
    file = StoreFile(tmp_path / "traces.db", collections.Counter())
    called = [f"span {number}" for number in range(70)]
    items = [
        SpanItem(SpanRecord("a" * 32, "b" * 16, "", name, SpanKind.CLIENT, 2**70 if number == bad else 1, 2), "")
        for number, name in enumerate(called)
    ]
    assert file.write(items)
    assert file.counters["dropped_bad_item"] == 1
    with query.reader(file.path) as reading:
        rows = reading.execute("SELECT name FROM spans ORDER BY seq").fetchall()
    assert rows == [(name,) for name in called if name != called[bad]]
    file.close()


async def test_add_after_close_is_dropped_and_counted(tmp_path):
    store = TraceStore(tmp_path / "traces.db", retention_s=1)
    await store.close()
    record(Telemetry(store, {}), identity(), "late")
    assert await store.flush()
    assert store.counters["dropped_queue_full"] >= 1
    with pytest.raises(StoreError):
        await store.last_seq()
    await store.close()
