"""What an agent's calls cost, by UTC day."""

import time

import msgspec
import pytest
from span_samples import MS, identity, record

from clrk.gateway.telemetry.daily_cost import DAY_NS, DAYS
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.store import TraceStore


@pytest.fixture
async def store(tmp_path):
    opened = TraceStore(tmp_path / "traces.db", retention_s=30 * 86_400)
    yield opened
    await opened.close()


def call(store, who, start_ns, **more):
    known = {"gen_ai__system": "openai", "gen_ai__request__model": "m"}
    record(Telemetry(store, {}), who, "chat m", start_ns=start_ns, **(known | more))


async def test_days_are_summed_and_calls_without_a_price_are_said(store, monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)  # it stays today
    today = now // DAY_NS * DAY_NS
    who, other = identity("support"), identity("support", "team-b")
    call(store, who, today, gen_ai__usage__input_tokens=100, gen_ai__usage__output_tokens=10, clrk__cost__usd=0.25)
    call(store, who, now, gen_ai__usage__input_tokens=5, gen_ai__usage__output_tokens=1, clrk__cost__unknown=True)
    call(store, who, today - MS, clrk__cost__usd=0.5)
    call(store, who, today - (DAYS - 1) * DAY_NS, clrk__cost__usd=1)
    call(store, who, today - (DAYS - 1) * DAY_NS - MS, clrk__cost__usd=64)  # too long ago
    call(store, other, now, clrk__cost__usd=128)
    call(store, who, now, clrk__cost__usd=32, clrk__budget__denied=True)  # never sent
    record(Telemetry(store, {}), who, "GET tools.internal", start_ns=now)
    await store.flush()
    found = await store.spending("default", "support")
    assert [msgspec.structs.astuple(day)[1:] for day in found] == [
        (2, 105, 11, 0.25, 1), (1, 0, 0, 0.5, 0), (1, 0, 0, 1.0, 0),
    ]  # fmt: skip
    assert [day.day for day in found[:2]] == [
        time.strftime("%Y-%m-%d", time.gmtime((today - back) // 10**9)) for back in (0, DAY_NS)
    ]
    assert set(msgspec.to_builtins(found[0])) == {
        "day", "llmCalls", "inputTokens", "outputTokens", "costUsd", "unpricedCalls",
    }  # fmt: skip
    assert await store.spending("default", "nobody") == []


async def test_costs_beside_many_spans_are_found_by_the_index(store):
    import sqlite3

    from clrk.gateway.telemetry import daily_cost

    await store.flush()
    with sqlite3.connect(store.path) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {daily_cost._SELECT}", (0, "a", "b")).fetchall()
    assert any("USING INDEX spans_llm (start_ns>?" in row[3] for row in plan), plan
