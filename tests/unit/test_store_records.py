"""Records of invocations with their totals, their listings, what exporters read, and files of version 1."""

import sqlite3
import time
from pathlib import Path

import msgspec
import pytest
from span_samples import MS, identity, record, record_invocation
from stored_records import OTLP, daemon, listed, names, pending

from clrk.core.ids import new_invocation_id, new_trace_id
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry import invocation_query, pipeline, query, schema
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.records import InvocationFilter, InvocationTotals
from clrk.gateway.telemetry.spans import Identity, SpanKind, SpanRecord, TraceContext
from clrk.gateway.telemetry.store import TraceStore

VERSION_1 = (Path(__file__).parents[1] / "vectors/store_v1.sql").read_text()


@pytest.fixture
async def store(tmp_path):
    opened = TraceStore(tmp_path / "traces.db", retention_s=86_400)
    yield opened
    await opened.close()


@pytest.fixture
def telemetry(store):
    return Telemetry(store, {})


# --- totals -----------------------------------------------------------------------------------------------------------


async def test_totals_are_what_the_spans_add_up_to(store, telemetry):
    who = identity()
    record_invocation(telemetry, who)
    telemetry.record_invocation(pending(who, phase=Phase.SUCCEEDED))
    record(telemetry, who, "GET tools.internal", error="timeout", clrk__cost__usd=0.0)
    record(telemetry, who, "chat other", gen_ai__provider__name="openai", gen_ai__usage__input_tokens=2**62,
           gen_ai__usage__output_tokens=-5)  # fmt: skip
    record(telemetry, who, "chat denied", error="budget", gen_ai__system="openai", clrk__budget__denied=True)
    await store.flush()
    totals = (await store.find_invocation(who.invocation_id)).totals
    assert totals.cost_usd == pytest.approx(0.0022)
    assert msgspec.structs.replace(totals, cost_usd=None) == InvocationTotals(
        llm_calls=2, calls=4, input_tokens=320 + 2**40, output_tokens=85, denials=2, errors=1
    )


async def test_an_agents_own_spans_never_count(store, telemetry):
    who = identity()
    telemetry.record_invocation(pending(who))
    own = SpanRecord(
        who.context.trace_id, "e" * 16, who.context.span_id, "chat m", SpanKind.CLIENT, time.time_ns(), time.time_ns(),
        attributes={**pipeline.identity_attributes(who), attr.GEN_AI_REQUEST_MODEL: "m", attr.CLRK_COST_USD: 9.0,
                    attr.GEN_AI_USAGE_INPUT_TOKENS: 7, attr.CLRK_EGRESS_DENY_REASON: "forged"},
        resource={attr.CLRK_COMPONENT: "agent"},
    )  # fmt: skip
    telemetry.record_agent_span(who, own, OTLP)
    assert await names(store) == ["chat m"]
    assert (await store.find_invocation(who.invocation_id)).totals == InvocationTotals()
    assert await names(store, SpanFilter(denied=True)) == await names(store, SpanFilter(model="m")) == []
    assert await listed(store, denied=True) == await listed(store, model="m") == []
    (row,) = await store.after("traces", 0, 10)
    assert (row.otlp, row.sampled, row.gateway) == (OTLP, True, "default/default")


async def test_totals_that_come_before_the_record_are_kept_and_not_listed_yet(store, telemetry):
    who = identity()
    record_invocation(telemetry, who)
    assert await listed(store) == []
    assert await store.find_invocation(who.invocation_id) is None
    telemetry.record_invocation(pending(who))
    assert await listed(store) == [who.invocation_id]
    assert (await store.find_invocation(who.invocation_id)).totals.calls == 2


async def test_the_last_record_written_counts_and_every_field_comes_back(store, telemetry):
    who = identity()
    last = pending(
        who, phase=Phase.TIMEOUT, started_ns=5, ended_ns=6, status=504, exit_code=137, exit_reason="timeout",
        message='it did "not" finish', identity={"tenant": "acme"},
    )  # fmt: skip
    telemetry.record_invocation(pending(who))
    telemetry.record_invocation(msgspec.structs.replace(last, phase=Phase.RUNNING))
    telemetry.record_invocation(last)
    await store.flush()
    assert (await store.find_invocation(who.invocation_id)).record == last
    assert store.seen_invocation(who.invocation_id)


async def test_daemons_have_spans_and_lines_and_no_invocation(store, telemetry):
    record(telemetry, daemon(), "GET tools.internal", clrk__cost__usd=1.0)
    telemetry.record_log(daemon(), "stdout", b"tick", time.time_ns())
    assert await names(store, SpanFilter(agent="default/watcher")) == ["GET tools.internal"]
    assert await listed(store) == []
    assert not store.seen_invocation("")
    (line,) = await store.logs("default/watcher")
    assert (line.invocation_id, line.line) == ("", "tick")
    with query.reader(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM invocations").fetchone() == (0,)


async def test_an_id_is_known_as_soon_as_it_is_recorded_and_after_a_restart(tmp_path, store, telemetry):
    who = identity()
    telemetry.record_invocation(pending(who))
    assert store.seen_invocation(who.invocation_id)
    await store.close()
    again = TraceStore(store.path, retention_s=86_400)
    assert again.seen_invocation(who.invocation_id)
    assert not again.seen_invocation(new_invocation_id())
    await again.close()


# --- listings ---------------------------------------------------------------------------------------------------------


async def test_each_filter_finds_its_invocations_newest_first(store, telemetry):
    now = time.time_ns()
    people = {
        "a": identity("support"), "b": identity("support", "team-b"), "c": identity("other"), "d": identity("other")
    }  # fmt: skip
    for age, (name, who) in enumerate(people.items()):
        telemetry.record_invocation(
            pending(who, created_ns=now - age * MS, trigger="cron" if name == "d" else "http",
                    phase=Phase.FAILED if name == "c" else Phase.SUCCEEDED)
        )  # fmt: skip
    record(telemetry, people["a"], "chat", gen_ai__system="anthropic", gen_ai__request__model="claude-x",
           gen_ai__usage__input_tokens=100)  # fmt: skip
    record(telemetry, people["b"], "chat", gen_ai__system="openai", gen_ai__request__model="gpt",
           gen_ai__response__model="gpt-1", gen_ai__usage__input_tokens=7)  # fmt: skip
    record(telemetry, people["b"], "egress.dns.denied", error="no")
    record(telemetry, people["d"], "GET x", clrk__egress__would_deny="no_rule")
    record(telemetry, people["c"], "invoke_agent other", error="exit", kind=SpanKind.INTERNAL)
    for wanted, expected in (
        ({}, "abcd"), ({"agent": "support"}, "ab"), ({"agent": "team-b/support"}, "b"), ({"agent": "nobody"}, ""),
        ({"phase": "Failed"}, "c"), ({"trigger": "cron"}, "d"), ({"since_ns": now - MS}, "ab"),
        ({"until_ns": now - MS}, "cd"), ({"system": "anthropic"}, "a"), ({"model": "gpt-1"}, "b"),
        ({"model": "*"}, "ab"), ({"model": "claude"}, ""), ({"min_input_tokens": 8}, "a"), ({"denied": True}, "b"),
        ({"would_deny": True}, "d"), ({"would_deny": True, "since_ns": now - MS}, ""),
        ({"would_deny": True, "agent": "other"}, "d"), ({"would_deny": True, "denied": True}, "bd"),
        ({"errors": True}, "bc"), ({"errors": True, "agent": "other"}, "c"), ({"system": "' OR 1 --"}, ""),
    ):  # fmt: skip
        assert await listed(store, **wanted) == [people[name].invocation_id for name in expected], wanted


async def test_pages_neither_skip_nor_repeat_when_many_begin_at_once(store, telemetry):
    now, everyone = time.time_ns(), set()
    for number in range(60):
        who = identity()
        everyone.add(who.invocation_id)
        telemetry.record_invocation(pending(who, created_ns=now - number // 20))
    await store.flush()
    pages, before = [], None
    while page := await store.list_invocations(InvocationFilter(), limit=7, before=before):
        pages += page
        before = page[-1].position
    assert {summary.record.invocation_id for summary in pages} == everyone
    assert len(pages) == 60
    assert [p.position for p in pages] == sorted((p.position for p in pages), reverse=True)


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({}, "invocations_created"),
        ({"agent": "a", "phase": "Failed"}, "invocations_agent"),
        ({"since_ns": 1, "trigger": "cron"}, "invocations_created"),
        ({"denied": True}, "invocations_denied"),
        ({"errors": True}, "invocations_error"),
        ({"model": "m"}, "COVERING INDEX spans_llm"),
        ({"system": "s", "agent": "a"}, "COVERING INDEX spans_llm"),
        ({"min_input_tokens": 1}, "COVERING INDEX spans_llm"),
    ],
)
async def test_every_listing_walks_an_index_in_its_order(store, wanted, index):
    await store.flush()
    plan = plan_of(store, lambda c: invocation_query.select_listing(c, InvocationFilter(**wanted), limit=5))
    assert index in plan
    assert "SCAN invocations USING INDEX" in plan or "SEARCH invocations USING INDEX" in plan
    assert "B-TREE" not in plan


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (SpanFilter(agent="a", model="m"), "spans_llm"),
        (SpanFilter(agent="a", denied=True), "spans_denied"),
        (SpanFilter(agent="default/a", errors=True, since_ns=1), "spans_error"),
        (SpanFilter(invocation_id="i", model="m"), "spans_invocation"),
    ],
)
async def test_rare_calls_of_an_agent_are_found_without_reading_its_other_spans(store, wanted, index):
    await store.flush()
    assert index in plan_of(store, lambda c: query.select_spans(c, wanted, order="newest"))


@pytest.mark.parametrize("table", ["spans", "invocations"])
async def test_an_id_is_looked_up_and_not_searched_for(store, table):
    await store.flush()
    plan = plan_of(store, lambda c: query.select_invocations(c, "0a"))
    assert "SCAN spans" not in plan
    plan = plan_of(store, lambda c: invocation_query.is_known(c, "x", 1))
    assert "SCAN" not in plan


@pytest.mark.parametrize(("invocation", "index"), [("", "logs_agent"), ("x", "logs_invocation")])
async def test_lines_are_found_by_the_narrower_index(store, invocation, index):
    await store.flush()
    plan = plan_of(store, lambda c: query.select_logs(c, agent="default/a", invocation_id=invocation, after_seq=7))
    assert index in plan
    assert "B-TREE" not in plan


def plan_of(store, ask):
    with query.reader(store.path) as connection:
        statements = []
        connection.set_trace_callback(statements.append)
        ask(connection)
        connection.set_trace_callback(None)
        return " | ".join(
            row[3] for statement in statements for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")
        )


# --- for exporters ----------------------------------------------------------------------------------------------------


async def test_lines_carry_the_whole_identity_to_exporters(store, telemetry):
    who, now = identity(), time.time_ns()
    who = Identity(**{f: getattr(who, f) for f in who.__slots__} | {"caller_fields": (("tenant", "acme"),)})
    telemetry.record_log(who, "stderr", b"caf\xe9", now)
    telemetry.record_agent_log(
        who, time_ns=now, severity=17, body="sad \ud800", trace_id="f" * 32, span_id="e" * 16, otlp=OTLP
    )
    telemetry.record_log(daemon(), "stdout", b"tick", now)
    await store.flush()
    line, own, tick = await store.after("logs", 0, 10)
    assert (line.seq, line.time_ns, line.gateway, line.stream, line.line) == (
        1,
        now,
        "default/default",
        "stderr",
        b"caf\xe9",
    )
    assert (line.trace_id, line.span_id, line.sampled) == (who.context.trace_id, who.context.span_id, True)
    assert line.identity == pipeline.identity_attributes(who)
    assert line.identity["agent.identity.tenant"] == "acme"
    assert line.otlp is None
    assert (own.severity, own.line, own.trace_id, own.span_id, own.otlp) == (17, b"sad ?", "f" * 32, "e" * 16, OTLP)
    assert own.identity == line.identity
    assert (tick.trace_id, tick.span_id) == ("", "")
    assert "invocation.id" not in tick.identity
    assert [entry.seq for entry in await store.after("logs", 1, 1)] == [2]
    shown = await store.logs("default/support")
    assert [(entry.stream, entry.severity) for entry in shown] == [("stderr", 0), ("otlp", 17)]


async def test_metrics_and_unsampled_spans_reach_exporters_as_such(store, telemetry):
    who, now = identity(), time.time_ns()
    telemetry.record_agent_metrics(who, time_ns=now, otlp=OTLP)
    quiet = Identity(
        **{f: getattr(who, f) for f in who.__slots__} | {"context": TraceContext(new_trace_id(), "a" * 16, 0)}
    )
    record(telemetry, quiet, "unsampled")
    await store.flush()
    (row,) = await store.after("metrics", 0, 5)
    assert (row.seq, row.time_ns, row.gateway, row.otlp) == (1, now, "default/default", OTLP)
    assert (row.invocation_id, row.namespace, row.name) == (who.invocation_id, "default", "support")
    assert [span.sampled for span in await store.after("traces", 0, 5)] == [False]
    assert [await store.last_seq(signal) for signal in ("traces", "logs", "metrics")] == [1, 0, 1]


async def test_a_daemon_may_write_for_ever_but_not_without_end_in_one_minute(store, telemetry):
    minute = 60 * 10**9
    this_minute = time.time_ns() // minute * minute
    for when in (this_minute, this_minute + minute):
        for _ in range(100):
            telemetry.record_log(daemon(), "stdout", b"x" * pipeline.MAX_LINE_BYTES, when)
    await store.flush()
    lines = await store.logs("default/watcher")
    kept = pipeline.MAX_LOG_BYTES // pipeline.MAX_LINE_BYTES
    assert [line.stream for line in lines] == (["stdout"] * kept + ["clrk"]) * 2
    assert store.counters["dropped_log_lines"] == 200 - 2 * kept


# --- version 1 --------------------------------------------------------------------------------------------------------


def version_1(path, spans, cursors=(), lines=()):
    """Make a file as clrk 0.1 did, with these rows."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(VERSION_1)
        connection.executemany(
            "INSERT INTO spans (invocation_id, trace_id, agent_namespace, agent_name, gateway, name, start_ns, system,"
            " model, response_model, input_tokens, llm, denied, error, json) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            spans,
        )
        connection.executemany(
            "INSERT INTO logs (invocation_id, agent_namespace, agent_name, stream, time_ns, line) VALUES (?,?,?,?,?,?)",
            lines,
        )
        connection.executemany("INSERT INTO export_cursors VALUES (?, ?)", cursors)
    connection.close()


V1_COLUMNS = (
    "invocation_id, trace_id, agent_namespace, agent_name, gateway, name, start_ns, system, model, response_model,"
    " input_tokens, llm, denied, error, json"
)


async def test_a_file_of_version_1_is_brought_to_this_one_with_all_that_it_held(tmp_path, store, telemetry):
    done, lost, now = identity(), identity("other"), time.time_ns()
    record_invocation(telemetry, done, start_ns=now - 2000 * MS)
    record(telemetry, lost, "GET tools.internal", start_ns=now - 1000 * MS, error="timeout")
    telemetry.record_invocation(pending(done))
    telemetry.record_invocation(pending(lost))
    await store.flush()
    with query.reader(store.path) as connection:
        spans = connection.execute(f"SELECT {V1_COLUMNS} FROM spans ORDER BY seq").fetchall()
    path = tmp_path / "old" / "traces.db"
    path.parent.mkdir()
    version_1(path, spans, [("default/default", 4)], [(done.invocation_id, "default", "support", "stderr", now, b"hi")])
    old = TraceStore(path, retention_s=86_400)
    assert sorted(await names(old)) == sorted(await names(store))
    assert await old.cursors() == {"default/default": 4}
    (line,) = await old.logs("default/support")
    assert line.line == "hi"
    (row,) = await old.after("logs", 0, 5)
    assert (row.gateway, row.identity["agent.name"]) == ("", "support")
    for who in (done, lost):
        ours, theirs = await store.find_invocation(who.invocation_id), await old.find_invocation(who.invocation_id)
        assert theirs.totals == ours.totals
        assert (theirs.record.agent, theirs.record.trace_id) == (who.agent_name, who.context.trace_id)
    found = (await old.find_invocation(done.invocation_id)).record
    assert (found.phase, found.trigger, found.exit_code, found.status) == (Phase.SUCCEEDED, "http", 0, 200)
    assert (found.caller, found.run_span_id) == ("203.0.113.7", done.context.span_id)
    assert found.ended_ns >= found.created_ns == now - 2000 * MS
    assert (await old.find_invocation(lost.invocation_id)).record.phase is Phase.FAILED
    assert await names(old, SpanFilter(model="claude-sonnet-5")) == ["chat claude-sonnet-5"]
    assert await listed(old, model="claude-sonnet-5") == [done.invocation_id]
    record(Telemetry(old, {}), done, "new")
    assert "new" in await names(old)
    assert shape(old.path) == shape(store.path)
    assert old.counters["damaged_files"] == 0
    await old.close()


def shape(path):
    """Return tables with their columns, and indexes, without the order of columns."""
    with query.reader(path) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {t: sorted(row[1:5] for row in connection.execute(f"PRAGMA table_info({t})")) for t in sorted(tables)}
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
        ).fetchall()
        return columns, indexes, connection.execute("PRAGMA user_version").fetchone(), schema.SCHEMA_VERSION


async def test_an_empty_file_of_version_1_is_fine(tmp_path):
    version_1(tmp_path / "traces.db", [])
    store = TraceStore(tmp_path / "traces.db", retention_s=86_400)
    assert await names(store) == await listed(store) == []
    await store.close()
