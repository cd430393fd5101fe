"""Reading the records of invocations, with their totals."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.records import (
    InvocationFilter,
    InvocationPosition,
    InvocationRecord,
    InvocationSummary,
    InvocationTotals,
)
from clrk.gateway.telemetry.schema import RECORD_COLUMNS, TOTALS_COLUMNS, Denial

_COLUMNS: Final = ", ".join((*RECORD_COLUMNS, *TOTALS_COLUMNS))


def select_listing(
    connection: sqlite3.Connection, wanted: InvocationFilter, *, limit: int, before: InvocationPosition | None = None
) -> list[InvocationSummary]:
    """Return the next invocations, the newest first, that are older than `before`."""
    clauses, values = ["phase != ''"], list[object]()
    namespace, _, agent = wanted.agent.rpartition("/")
    for clause, value in (
        ("agent = ?", agent),
        ("namespace = ?", namespace),
        ("phase = ?", wanted.phase),
        ("trigger = ?", wanted.trigger),
        ("created_ns >= ?", wanted.since_ns),
        ("created_ns < ?", wanted.until_ns),
    ):
        if value not in ("", None):
            clauses.append(clause)
            values.append(value)
    if wanted.would_deny:
        clause, times = _with_would_deny(wanted)
        clauses.append(f"({clause} OR denials)" if wanted.denied else clause)
        values += times
    elif wanted.denied:
        clauses.append("denials")
    if wanted.errors:
        clauses.append("error_spans")
    if (calls := _with_calls(wanted)) is not None:
        clauses.append(f"invocation_id IN ({calls[0]})")
        values += calls[1]
    if before is not None:
        clauses.append("(created_ns, invocation_id) < (?, ?)")
        values += before
    sql = (
        f"SELECT {_COLUMNS} FROM invocations {_index(wanted)} WHERE {' AND '.join(clauses)}"  # noqa: S608 - fixed texts
        " ORDER BY created_ns DESC, invocation_id DESC LIMIT ?"
    )
    return [_summary(row) for row in connection.execute(sql, (*values, limit))]


def select_one(connection: sqlite3.Connection, invocation_id: str) -> InvocationSummary | None:
    """Return the invocation, or None when it has no record."""
    sql = f"SELECT {_COLUMNS} FROM invocations WHERE invocation_id = ? AND phase != ''"  # noqa: S608 - fixed texts
    row = connection.execute(sql, (invocation_id,)).fetchone()
    return None if row is None else _summary(row)


def is_known(connection: sqlite3.Connection, invocation_id: str, since_ns: int) -> bool:
    """Say whether the invocation, or a span of it, began at since_ns or later."""
    for table, time in (("invocations", "created_ns"), ("spans", "start_ns")):
        sql = f"SELECT 1 FROM {table} WHERE invocation_id = ? AND {time} >= ? LIMIT 1"  # noqa: S608 - fixed texts
        if connection.execute(sql, (invocation_id, since_ns)).fetchone() is not None:
            return True
    return False


def _index(wanted: InvocationFilter) -> str:
    # The planner would begin with the calls and sort; an index in the order of the listing ends with the page.
    if wanted.agent:
        return "INDEXED BY invocations_agent"
    if wanted.denied and not wanted.would_deny:
        return "INDEXED BY invocations_denied"
    return "INDEXED BY invocations_error" if wanted.errors else "INDEXED BY invocations_created"


def _with_would_deny(wanted: InvocationFilter) -> tuple[str, list[object]]:
    """Return the condition of an invocation with a call that Enforce would have denied."""
    calls = f"SELECT invocation_id FROM spans INDEXED BY spans_denied WHERE denied AND denied = {Denial.WOULD_DENY:d}"  # noqa: S608
    if wanted.since_ns is None:
        return f"invocation_id IN ({calls})", []
    return f"invocation_id IN ({calls} AND start_ns >= ?)", [wanted.since_ns]  # a call begins after its invocation


def _with_calls(wanted: InvocationFilter) -> tuple[str, list[object]] | None:
    """Return the invocations with such a call as SQL; it reads one index and no row."""
    clauses, values = ["llm"], list[object]()
    if wanted.system:
        clauses.append("system = ?")
        values.append(wanted.system)
    if wanted.model:
        clause, models = wanted.by_model()
        clauses.append(clause)
        values += models
    if wanted.min_input_tokens is not None:
        clauses.append("input_tokens >= ?")
        values.append(wanted.min_input_tokens)
    if len(clauses) == 1:
        return None
    if wanted.since_ns is not None:  # a call begins after its invocation
        clauses.append("start_ns >= ?")
        values.append(wanted.since_ns)
    return f"SELECT invocation_id FROM spans INDEXED BY spans_llm WHERE {' AND '.join(clauses)}", values  # noqa: S608


def _summary(row: sqlite3.Row | tuple[object, ...]) -> InvocationSummary:
    record = dict(zip(RECORD_COLUMNS, row, strict=False))
    record["phase"] = Phase(str(record["phase"]))
    record["identity"] = msgspec.json.decode(str(record["identity"]), type=dict[str, str])
    totals = dict(zip(TOTALS_COLUMNS, row[len(RECORD_COLUMNS) :], strict=True))
    return InvocationSummary(
        msgspec.convert(record, InvocationRecord, strict=False), msgspec.convert(totals, InvocationTotals)
    )
