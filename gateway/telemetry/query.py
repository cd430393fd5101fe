"""Reading the embedded store: filters to SQL, and one short-lived read-only connection per question.

Invocations are asked for in invocation_query.py, what exporters read in outbox.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from clrk.gateway.telemetry.call_filter import CallFilter
from clrk.gateway.telemetry.schema import Denial

PAGE_SIZE: Final = 500
_BUSY_TIMEOUT_S: Final = 5.0

# Position in a listing: (start time, seq) of the last row seen.
Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SpanFilter(CallFilter):
    """What `clrk traces` may ask for: calls, by the span's start; empty fields do not filter."""

    invocation_id: str = ""
    trace_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A span's JSON and where it stands.

    Shape: gateway is namespace/name of its EgressGateway, or empty. sampled False: kept, and not to be exported. otlp
    is a serialised ResourceSpans when an agent reported the span itself: exported as it is.
    """

    seq: int
    start_ns: int
    gateway: str
    json: bytes
    sampled: bool = True
    otlp: bytes | None = None


class LogLine(msgspec.Struct, frozen=True):
    """One line that an agent wrote; bytes that are not UTF-8 show as U+FFFD.

    Shape: stream is stdout, stderr, clrk (our own word), or otlp with an OTLP SeverityNumber (0: unspecified).
    """

    seq: int
    invocation_id: str
    agent_namespace: str
    agent_name: str
    stream: str
    time_unix_nano: int
    line: str
    severity: int = 0


def _conditions(wanted: SpanFilter) -> tuple[list[str], list[object]]:
    clauses: list[str] = []
    values: list[object] = []

    def add(clause: str, *parameters: object) -> None:
        clauses.append(clause)
        values.extend(parameters)

    namespace, _, agent_name = wanted.agent.rpartition("/")
    if agent_name:
        add("agent_name = ?", agent_name)
    if namespace:
        add("agent_namespace = ?", namespace)
    for column, value in (
        ("invocation_id", wanted.invocation_id),
        ("trace_id", wanted.trace_id),
        ("name", wanted.name),
        ("system", wanted.system),
    ):
        if value:
            add(f"{column} = ?", value)
    if wanted.model:
        clause, models = wanted.by_model()
        add(clause, *models)
    if wanted.since_ns is not None:
        add("start_ns >= ?", wanted.since_ns)
    if wanted.until_ns is not None:
        add("start_ns < ?", wanted.until_ns)
    if wanted.min_input_tokens is not None:
        add("input_tokens >= ?", wanted.min_input_tokens)
    if wanted.denied or wanted.would_deny:
        add("denied")
        if not (wanted.denied and wanted.would_deny):
            add("denied = ?", Denial.DENIED if wanted.denied else Denial.WOULD_DENY)
    if wanted.model or wanted.system or wanted.min_input_tokens is not None:
        add("llm")  # says that the index spans_llm holds the answer
    if wanted.errors:
        add("error")
    return clauses, values


@contextmanager
def reader(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the store for reading and close it again. Raises: sqlite3.Error when it is not there or is damaged."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def select_spans(
    connection: sqlite3.Connection,
    wanted: SpanFilter,
    *,
    order: Literal["oldest", "newest"],
    after: Position | None = None,
    limit: int = PAGE_SIZE,
) -> list[StoredSpan]:
    """Return the next page of matching spans by start time, beginning behind `after`."""
    clauses, values = _conditions(wanted)
    if after is not None:
        clauses.append("(start_ns, seq) > (?, ?)" if order == "oldest" else "(start_ns, seq) < (?, ?)")
        values.extend(after)
    where = " AND ".join(clauses) or "TRUE"
    direction = "ASC" if order == "oldest" else "DESC"
    sql = (
        f"SELECT seq, start_ns, gateway, json, sampled, otlp FROM spans {_index(wanted)}"  # noqa: S608 - fixed texts
        f" WHERE {where} ORDER BY start_ns {direction}, seq {direction} LIMIT ?"
    )
    return [_stored_span(row) for row in connection.execute(sql, (*values, limit))]


def _index(wanted: SpanFilter) -> str:
    # Without statistics SQLite would walk an index that does not hold the fact, and read every long row to look at it.
    if wanted.invocation_id or wanted.trace_id:
        return ""
    if wanted.model or wanted.system or wanted.min_input_tokens is not None:
        return "INDEXED BY spans_llm"
    if wanted.denied or wanted.would_deny:
        return "INDEXED BY spans_denied"
    return "INDEXED BY spans_error" if wanted.errors else ""


def _stored_span(row: tuple[int, int, str, bytes, int, bytes | None]) -> StoredSpan:
    seq, start_ns, gateway, json, sampled, otlp = row
    return StoredSpan(seq, start_ns, gateway, json, bool(sampled), otlp)


def select_invocations(connection: sqlite3.Connection, prefix: str, limit: int = 20) -> list[str]:
    """Return invocation ids that begin with prefix, which holds hex digits and `-` only."""
    # Ranges, not LIKE: they walk an index. "g" sorts behind every hex digit.
    sql = """
        SELECT invocation_id FROM (SELECT DISTINCT invocation_id FROM spans
            WHERE invocation_id >= :first AND invocation_id < :end ORDER BY invocation_id LIMIT :limit)
        UNION SELECT invocation_id FROM (SELECT invocation_id FROM invocations
            WHERE invocation_id >= :first AND invocation_id < :end ORDER BY invocation_id LIMIT :limit)
        ORDER BY invocation_id LIMIT :limit
    """
    return [row[0] for row in connection.execute(sql, {"first": prefix, "end": prefix + "g", "limit": limit})]


def select_logs(
    connection: sqlite3.Connection,
    *,
    agent: str,
    invocation_id: str = "",
    after_seq: int = 0,
    tail: int = 10_000,
    head: bool = False,
) -> list[LogLine]:
    """Return the last `tail` lines of an agent (`namespace/name`), or of one invocation of it, oldest first.

    Shape: head asks for the first `tail` lines after after_seq instead.
    """
    namespace, _, agent_name = agent.rpartition("/")
    clauses, values = ["agent_namespace = ?", "agent_name = ?", "seq > ?"], [namespace, agent_name, after_seq]
    hint = "INDEXED BY logs_agent"
    if invocation_id:
        clauses.append("invocation_id = ?")
        values.append(invocation_id)
        hint = "INDEXED BY logs_invocation"
    sql = (
        "SELECT seq, invocation_id, agent_namespace, agent_name, stream, time_ns, line, severity"  # noqa: S608 - fixed
        f" FROM logs {hint} WHERE {' AND '.join(clauses)} ORDER BY seq {'ASC' if head else 'DESC'} LIMIT ?"
    )
    rows = connection.execute(sql, (*values, tail)).fetchall()
    return [
        LogLine(row_seq, invocation, ns, name, stream, time_ns, line.decode("utf-8", "replace"), severity)
        for row_seq, invocation, ns, name, stream, time_ns, line, severity in (rows if head else reversed(rows))
    ]
