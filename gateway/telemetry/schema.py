"""Tables of the embedded store, and which facts of an item get a column. No I/O beyond the connection it is given."""

from __future__ import annotations

import enum
import sqlite3
from typing import Final

import msgspec

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry import migration
from clrk.gateway.telemetry.items import InvocationItem, LogItem, MetricsItem, SpanItem, is_agents_own
from clrk.gateway.telemetry.spans import Attributes, SpanRecord, StatusCode

SCHEMA_VERSION: Final = 2

# The span itself is its JSON, ready to print; the columns beside it exist to find it. Partial indexes keep the rare
# facts (a denial, an error) cheap to look up and nearly free for all other spans; those on llm, denied and error hold
# all that listings ask about (and the fact itself, or SQLite would test it again in the row): the rows, which are long,
# are read for the page that is shown and no more.
_SPANS: Final = """
CREATE TABLE spans (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invocation_id TEXT NOT NULL,
    trace_id TEXT NOT NULL,
    span_id TEXT NOT NULL DEFAULT '',
    agent_namespace TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    gateway TEXT NOT NULL,
    name TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    system TEXT,
    model TEXT,
    response_model TEXT,
    input_tokens INTEGER,
    llm INTEGER NOT NULL,
    denied INTEGER NOT NULL, -- Denial
    error INTEGER NOT NULL,
    sampled INTEGER NOT NULL DEFAULT 1,
    json BLOB NOT NULL,
    otlp BLOB
);
CREATE INDEX spans_invocation ON spans (invocation_id, start_ns);
CREATE INDEX spans_trace ON spans (trace_id, start_ns);
CREATE INDEX spans_start ON spans (start_ns);
CREATE INDEX spans_agent ON spans (agent_name, start_ns);
"""
SPAN_FACTS: Final = """
CREATE INDEX spans_llm ON spans
    (start_ns, system, model, response_model, input_tokens, agent_name, agent_namespace, invocation_id, llm) WHERE llm;
CREATE INDEX spans_denied ON spans (start_ns, agent_name, agent_namespace, denied) WHERE denied;
CREATE INDEX spans_error ON spans (start_ns, agent_name, agent_namespace, error) WHERE error;
CREATE INDEX spans_agents_own ON spans (seq) WHERE otlp IS NOT NULL;
"""
_LOGS: Final = """
CREATE TABLE logs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invocation_id TEXT NOT NULL,
    agent_namespace TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    stream TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    line BLOB NOT NULL,
    agent_kind TEXT NOT NULL DEFAULT '',
    agent_uid TEXT NOT NULL DEFAULT '',
    agent_revision TEXT NOT NULL DEFAULT '',
    sandbox_id TEXT NOT NULL DEFAULT '',
    caller_fields TEXT NOT NULL DEFAULT '',
    gateway TEXT NOT NULL DEFAULT '',
    trace_id TEXT NOT NULL DEFAULT '',
    span_id TEXT NOT NULL DEFAULT '',
    sampled INTEGER NOT NULL DEFAULT 1,
    severity INTEGER NOT NULL DEFAULT 0,
    otlp BLOB
);
CREATE INDEX logs_invocation ON logs (invocation_id);
CREATE INDEX logs_agent ON logs (agent_name);
CREATE INDEX logs_time ON logs (time_ns);
"""
# A row whose phase is '' holds totals of spans that came before their invocation's record; listings leave it out.
# error_spans counts every span with status Error, errors only failed calls: the first is what `--errors` asks about.
VERSION_2: Final = """
CREATE TABLE invocations (
    seq INTEGER PRIMARY KEY,
    invocation_id TEXT NOT NULL UNIQUE,
    namespace TEXT NOT NULL DEFAULT '',
    agent TEXT NOT NULL DEFAULT '',
    revision TEXT NOT NULL DEFAULT '',
    trigger TEXT NOT NULL DEFAULT '',
    phase TEXT NOT NULL DEFAULT '',
    trace_id TEXT NOT NULL DEFAULT '',
    dispatch_span_id TEXT NOT NULL DEFAULT '',
    run_span_id TEXT NOT NULL DEFAULT '',
    created_ns INTEGER NOT NULL,
    started_ns INTEGER NOT NULL DEFAULT 0,
    ended_ns INTEGER NOT NULL DEFAULT 0,
    caller TEXT NOT NULL DEFAULT '',
    status INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    exit_reason TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '',
    identity TEXT NOT NULL DEFAULT '{}',
    llm_calls INTEGER NOT NULL DEFAULT 0,
    calls INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    cost_usd REAL,
    denials INTEGER NOT NULL DEFAULT 0,
    errors INTEGER NOT NULL DEFAULT 0,
    error_spans INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX invocations_created ON invocations (created_ns, invocation_id);
CREATE INDEX invocations_agent ON invocations (agent, created_ns, invocation_id);
CREATE INDEX invocations_denied ON invocations (created_ns, invocation_id) WHERE denials;
CREATE INDEX invocations_error ON invocations (created_ns, invocation_id) WHERE error_spans;
CREATE INDEX invocations_unfinished ON invocations (phase) WHERE phase IN ('Pending', 'Running');
CREATE TABLE agent_metrics (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invocation_id TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    gateway TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    otlp BLOB NOT NULL
);
CREATE INDEX agent_metrics_time ON agent_metrics (time_ns);
CREATE INDEX logs_agents_own ON logs (seq) WHERE otlp IS NOT NULL;
CREATE TABLE cursors (
    exporter TEXT NOT NULL, signal TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (exporter, signal)
) WITHOUT ROWID;
CREATE TABLE journal_applied (
    only INTEGER PRIMARY KEY CHECK (only = 1), segment INTEGER NOT NULL, offset INTEGER NOT NULL
);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
_NEW_FILE: Final = _SPANS + SPAN_FACTS + _LOGS + VERSION_2


def _insert(table: str, *columns: str) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - fixed


INSERT_SPAN: Final = _insert(
    "spans", "invocation_id", "trace_id", "span_id", "agent_namespace", "agent_name", "gateway", "name", "start_ns",
    "system", "model", "response_model", "input_tokens", "llm", "denied", "error", "sampled", "json", "otlp",
)  # fmt: skip
_ANOTHER_SPAN: Final = ", " + INSERT_SPAN[INSERT_SPAN.rindex("(") :]
INSERT_LOG: Final = _insert(
    "logs", "invocation_id", "agent_namespace", "agent_name", "stream", "time_ns", "line", "agent_kind", "agent_uid",
    "agent_revision", "sandbox_id", "caller_fields", "gateway", "trace_id", "span_id", "sampled", "severity", "otlp",
)  # fmt: skip
INSERT_METRICS: Final = _insert("agent_metrics", "invocation_id", "namespace", "name", "gateway", "time_ns", "otlp")
RECORD_COLUMNS: Final = (
    "invocation_id", "namespace", "agent", "revision", "trigger", "phase", "trace_id", "dispatch_span_id",
    "run_span_id", "created_ns", "started_ns", "ended_ns", "caller", "status", "exit_code", "exit_reason", "message",
    "identity",
)  # fmt: skip
TOTALS_COLUMNS: Final = (
    "llm_calls", "calls", "input_tokens", "output_tokens", "cost_usd", "denials", "errors",
)  # fmt: skip
UPSERT_RECORD: Final = (
    f"{_insert('invocations', *RECORD_COLUMNS)} ON CONFLICT (invocation_id) DO UPDATE SET "
    + ", ".join(f"{column} = excluded.{column}" for column in RECORD_COLUMNS[1:])
)
UPSERT_CURSOR: Final = f"{_insert('cursors', 'exporter', 'signal', 'seq')} ON CONFLICT DO UPDATE SET seq = excluded.seq"
UPSERT_APPLIED: Final = (
    "INSERT INTO journal_applied (only, segment, offset) VALUES (1, ?, ?)"
    " ON CONFLICT DO UPDATE SET segment = excluded.segment, offset = excluded.offset"
)
SELECT_APPLIED: Final = "SELECT segment, offset FROM journal_applied"
END_UNFINISHED: Final = (
    "UPDATE invocations SET phase = 'Failed', message = ?, ended_ns = max(created_ns, started_ns, ?)"
    " WHERE phase IN ('Pending', 'Running')"
)
UPSERT_COUNTER: Final = f"{_insert('counters', 'name', 'value')} ON CONFLICT DO UPDATE SET value = excluded.value"


class Denial(enum.IntEnum):
    """What policy or a budget made of a call: nothing, a refusal, or one in a mode in which it went out."""

    NONE = 0
    DENIED = 1
    WOULD_DENY = 2


_ENCODER: Final = msgspec.json.Encoder()
_DENIED_NAMES: Final = frozenset({attr.SPAN_EGRESS_DIAL_DENIED, attr.SPAN_EGRESS_DNS_DENIED})

Row = tuple[object, ...]


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file, or bring those of version 1 to this one.

    Raises: sqlite3.DatabaseError when the file is not ours, is damaged, or was written by a newer clrk.
    """
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect on a new file only
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last batch, never the file
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version in (0, 1):
        change = _NEW_FILE if version == 0 else migration.from_version_1(SPAN_FACTS, VERSION_2)
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {change} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.rollback()
            raise
    elif version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"schema version {version}, this clrk writes {SCHEMA_VERSION}")
    connection.execute(
        "SELECT seq FROM spans ORDER BY start_ns DESC LIMIT 1"
    ).fetchone()  # touch the pages: finds damage


def insert_spans(count: int) -> str:
    """Return INSERT_SPAN for several rows, whose values follow each other."""
    return INSERT_SPAN + _ANOTHER_SPAN * (count - 1)


def span_row(item: SpanItem) -> Row:
    """Return the values of INSERT_SPAN. What an agent says of its own models and denials is not found by those."""
    record, attributes = item.record, item.record.attributes
    own = not is_agents_own(item)
    tokens = attributes.get(attr.GEN_AI_USAGE_INPUT_TOKENS)
    system = _text(attributes, attr.GEN_AI_SYSTEM) or _text(attributes, attr.GEN_AI_PROVIDER_NAME)
    model = _text(attributes, attr.GEN_AI_REQUEST_MODEL) or _text(attributes, attr.GEN_AI_RESPONSE_MODEL)
    return (
        _text(attributes, attr.INVOCATION_ID) or "",
        record.trace_id,
        record.span_id,
        _text(attributes, attr.AGENT_NAMESPACE) or "",
        _text(attributes, attr.AGENT_NAME) or "",
        item.gateway,
        record.name,
        record.start_time_unix_nano,
        system,
        model,
        _text(attributes, attr.GEN_AI_RESPONSE_MODEL),
        tokens if isinstance(tokens, int) else None,
        own and (system is not None or model is not None or tokens is not None),
        _denial(record) if own else Denial.NONE,
        record.status.code is StatusCode.ERROR,
        item.sampled,
        _ENCODER.encode(record),
        item.otlp,
    )


def row_bytes(row: Row) -> int:
    """Return the size of a span's row without its columns for searching."""
    return sum(len(value) for value in row[-2:] if isinstance(value, bytes))


def log_row(item: LogItem) -> Row:
    """Return the values of INSERT_LOG."""
    fields = _ENCODER.encode(dict(item.caller_fields)).decode() if item.caller_fields else ""
    return (
        item.invocation_id, item.agent_namespace, item.agent_name, item.stream, item.time_ns, item.line,
        item.agent_kind, item.agent_uid, item.agent_revision, item.sandbox_id, fields, item.gateway,
        item.trace_id, item.span_id, item.sampled, item.severity, item.otlp,
    )  # fmt: skip


def metrics_row(item: MetricsItem) -> Row:
    """Return the values of INSERT_METRICS."""
    return (item.invocation_id, item.namespace, item.name, item.gateway, item.time_ns, item.otlp)


def record_row(item: InvocationItem) -> Row:
    """Return the values of UPSERT_RECORD."""
    values = [getattr(item.record, column) for column in RECORD_COLUMNS[:-1]]
    return (*values[:5], item.record.phase.value, *values[6:], _ENCODER.encode(item.record.identity).decode())


def _denial(record: SpanRecord) -> Denial:
    if is_denied(record):
        return Denial.DENIED
    return Denial.WOULD_DENY if attr.CLRK_EGRESS_WOULD_DENY in record.attributes else Denial.NONE


def is_denied(record: SpanRecord) -> bool:
    """Say whether policy or a budget refused what the span stands for."""
    attributes = record.attributes
    return (
        record.name in _DENIED_NAMES
        or attr.CLRK_EGRESS_DENY_REASON in attributes
        or attributes.get(attr.CLRK_BUDGET_DENIED) is True
    )


def _text(attributes: Attributes, name: str) -> str | None:
    value = attributes.get(name)
    return value if isinstance(value, str) else None
