"""Reading the embedded store: filters to SQL, and one short-lived read-only connection per question."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

PAGE_SIZE: Final = 500
_BUSY_TIMEOUT_S: Final = 5.0

# Position in a listing: (start time, seq) of the last row seen.
Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SpanFilter:
    """What `clrk traces` may ask for; empty fields do not filter.

    Shape: agent is `name` (any namespace) or `namespace/name`; system and model match whole values, model also with
    the wildcards `*` and `?`. Units: since_ns inclusive, until_ns exclusive, on the span's start, CLOCK_REALTIME.
    """

    agent: str = ""
    invocation_id: str = ""
    trace_id: str = ""
    name: str = ""
    since_ns: int | None = None
    until_ns: int | None = None
    system: str = ""
    model: str = ""
    denied: bool = False
    errors: bool = False
    min_input_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A span's JSON and where it stands."""

    seq: int
    start_ns: int
    gateway: str
    json: bytes


class LogLine(msgspec.Struct, frozen=True):
    """One line that an agent wrote; bytes that are not UTF-8 show as U+FFFD."""

    seq: int
    invocation_id: str
    agent_namespace: str
    agent_name: str
    stream: str
    time_unix_nano: int
    line: str


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
        operator = "GLOB" if set(wanted.model) & set("*?") else "="
        add(f"(model {operator} ? OR response_model {operator} ?)", wanted.model, wanted.model)
    if wanted.since_ns is not None:
        add("start_ns >= ?", wanted.since_ns)
    if wanted.until_ns is not None:
        add("start_ns < ?", wanted.until_ns)
    if wanted.min_input_tokens is not None:
        add("input_tokens >= ?", wanted.min_input_tokens)
    if wanted.denied:
        add("denied")
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
    # Without statistics SQLite would walk spans_start and read every long row to look at its model.
    narrow = wanted.agent or wanted.invocation_id or wanted.trace_id
    hint = "INDEXED BY spans_llm" if "llm" in clauses and not narrow else ""
    sql = (
        f"SELECT seq, start_ns, gateway, json FROM spans {hint} WHERE {where}"  # noqa: S608 - fixed clauses, bound values
        f" ORDER BY start_ns {direction}, seq {direction} LIMIT ?"
    )
    return [StoredSpan(*row) for row in connection.execute(sql, (*values, limit))]


def select_after(connection: sqlite3.Connection, seq: int, limit: int) -> list[StoredSpan]:
    """Return spans in the order they were stored, for exporters."""
    sql = "SELECT seq, start_ns, gateway, json FROM spans WHERE seq > ? ORDER BY seq LIMIT ?"
    return [StoredSpan(*row) for row in connection.execute(sql, (seq, limit))]


def select_invocations(connection: sqlite3.Connection, prefix: str, limit: int = 20) -> list[str]:
    """Return invocation ids that begin with prefix, which holds hex digits and `-` only."""
    # A range, not LIKE: it walks the index. "g" sorts behind every hex digit.
    sql = "SELECT DISTINCT invocation_id FROM spans WHERE invocation_id >= ? AND invocation_id < ? LIMIT ?"
    return [row[0] for row in connection.execute(sql, (prefix, prefix + "g", limit))]


def select_logs(
    connection: sqlite3.Connection, *, agent: str, invocation_id: str = "", after_seq: int = 0, tail: int = 10_000
) -> list[LogLine]:
    """Return the last `tail` lines of an agent (`namespace/name`), or of one invocation of it, oldest first."""
    namespace, _, agent_name = agent.rpartition("/")
    clauses, values = ["agent_namespace = ?", "agent_name = ?", "seq > ?"], [namespace, agent_name, after_seq]
    if invocation_id:
        clauses.insert(0, "invocation_id = ?")
        values.insert(0, invocation_id)
    sql = (
        "SELECT seq, invocation_id, agent_namespace, agent_name, stream, time_ns, line FROM logs"  # noqa: S608 - fixed
        f" WHERE {' AND '.join(clauses)} ORDER BY seq DESC LIMIT ?"
    )
    rows = connection.execute(sql, (*values, tail)).fetchall()
    return [
        LogLine(row_seq, invocation, ns, name, stream, time_ns, line.decode("utf-8", "replace"))
        for row_seq, invocation, ns, name, stream, time_ns, line in reversed(rows)
    ]


def select_cursors(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how far each exporter has come."""
    return dict(connection.execute("SELECT gateway, seq FROM export_cursors").fetchall())


def select_last_seq(connection: sqlite3.Connection) -> int:
    """Return the seq of the newest span; it only ever grows, also over a purge."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'spans'").fetchone()
    return int(row[0]) if row else 0
