"""What exporters read of the store: the rows of a signal in the order they were stored, and cursors."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final, Literal, overload

import msgspec

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.query import StoredSpan
from clrk.gateway.telemetry.spans import AttributeValue

Signal = Literal["traces", "logs", "metrics"]
SIGNALS: Final[tuple[Signal, ...]] = ("traces", "logs", "metrics")
TABLES: Final[dict[Signal, str]] = {"traces": "spans", "logs": "logs", "metrics": "agent_metrics"}
TIMES: Final[dict[Signal, str]] = {"traces": "start_ns", "logs": "time_ns", "metrics": "time_ns"}


@dataclass(frozen=True, slots=True)
class StoredLog:
    """A line or log record to export.

    Shape: identity is what every span of the run carries as attributes; sampled is the trace flag of the invocation's
    context. otlp is a serialised ResourceLogs when the agent's SDK sent it: exported as it is.
    """

    seq: int
    time_ns: int
    gateway: str
    sampled: bool
    stream: str
    severity: int
    line: bytes
    trace_id: str
    span_id: str
    identity: dict[str, AttributeValue]
    otlp: bytes | None


@dataclass(frozen=True, slots=True)
class StoredMetrics:
    """What an agent's SDK measured: otlp is a serialised ResourceMetrics, exported as it is."""

    seq: int
    time_ns: int
    gateway: str
    invocation_id: str
    namespace: str
    name: str
    otlp: bytes


Stored = StoredSpan | StoredLog | StoredMetrics

_SPANS: Final = "SELECT seq, start_ns, gateway, json, sampled, otlp FROM spans WHERE seq > ? ORDER BY seq LIMIT ?"
_LOGS: Final = (
    "SELECT seq, time_ns, gateway, sampled, stream, severity, line, trace_id, span_id, otlp, invocation_id,"
    " agent_kind, agent_namespace, agent_name, agent_uid, agent_revision, sandbox_id, caller_fields"
    " FROM logs WHERE seq > ? ORDER BY seq LIMIT ?"
)
_METRICS: Final = (
    "SELECT seq, time_ns, gateway, invocation_id, namespace, name, otlp FROM agent_metrics"
    " WHERE seq > ? ORDER BY seq LIMIT ?"
)


@overload
def select_after(
    connection: sqlite3.Connection, signal: Literal["traces"], seq: int, limit: int
) -> list[StoredSpan]: ...
@overload
def select_after(connection: sqlite3.Connection, signal: Literal["logs"], seq: int, limit: int) -> list[StoredLog]: ...
@overload
def select_after(
    connection: sqlite3.Connection, signal: Literal["metrics"], seq: int, limit: int
) -> list[StoredMetrics]: ...
def select_after(
    connection: sqlite3.Connection, signal: Signal, seq: int, limit: int
) -> list[StoredSpan] | list[StoredLog] | list[StoredMetrics]:
    """Return the next rows of a signal behind seq, in the order they were stored."""
    match signal:
        case "traces":
            return [
                StoredSpan(row[0], row[1], row[2], row[3], bool(row[4]), row[5])
                for row in connection.execute(_SPANS, (seq, limit))
            ]
        case "logs":
            return [_stored_log(row) for row in connection.execute(_LOGS, (seq, limit))]
        case "metrics":
            return [StoredMetrics(*row) for row in connection.execute(_METRICS, (seq, limit))]


def _stored_log(row: tuple[Any, ...]) -> StoredLog:
    seq, time_ns, gateway, sampled, stream, severity, line, trace_id, span_id, otlp, *who, fields = row
    names = (
        attr.INVOCATION_ID, attr.AGENT_KIND, attr.AGENT_NAMESPACE, attr.AGENT_NAME, attr.AGENT_UID,
        attr.AGENT_REVISION, attr.CLRK_SANDBOX_ID,
    )  # fmt: skip
    identity: dict[str, AttributeValue] = {name: value for name, value in zip(names, who, strict=True) if value}
    if fields:
        caller = msgspec.json.decode(str(fields), type=dict[str, str])
        identity |= {attr.AGENT_IDENTITY_PREFIX + field: value for field, value in caller.items()}
    return StoredLog(
        seq=seq, time_ns=time_ns, gateway=gateway, sampled=bool(sampled), stream=stream, severity=severity, line=line,
        trace_id=trace_id, span_id=span_id, identity=identity, otlp=otlp,
    )  # fmt: skip


def select_cursors(connection: sqlite3.Connection, signal: Signal) -> dict[str, int]:
    """Return how far each exporter has come with a signal."""
    return dict(connection.execute("SELECT exporter, seq FROM cursors WHERE signal = ?", (signal,)).fetchall())


def select_last_seq(connection: sqlite3.Connection, signal: Signal) -> int:
    """Return the seq of the newest row of a signal; it only ever grows, also over a purge."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (TABLES[signal],)).fetchone()
    return int(row[0]) if row else 0


def count_unexported(
    connection: sqlite3.Connection, signal: Signal, rows: str, parameters: tuple[object, ...], exporters: frozenset[str]
) -> int:
    """Return how many of the rows (a SELECT of seq) some exporter still had to send.

    Shape: an exporter whose name is a gateway's (with a `/`) sends that gateway's rows, any other one the rows of
    gateways that have none. exporters are those that are at work: what a removed one never sent is nobody's loss.
    """
    own = {name for name in exporters if "/" in name}
    cursors = select_cursors(connection, signal)
    sampled = "AND sampled" if signal == "traces" else ""
    sql = f"SELECT gateway, count(*) FROM {TABLES[signal]} WHERE seq IN ({rows}) AND seq > ? {sampled} GROUP BY gateway"  # noqa: S608
    count = 0
    for name in exporters:
        for gateway, pending in connection.execute(sql, (*parameters, cursors.get(name, 0))).fetchall():
            count += pending if gateway == name or ("/" not in name and gateway not in own) else 0
    return count
