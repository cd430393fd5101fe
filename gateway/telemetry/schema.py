"""Tables of the embedded store, and which facts of a span get a column. No I/O beyond the connection it is given."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import Attributes, SpanRecord, StatusCode

SCHEMA_VERSION: Final = 1

# The span itself is its JSON, ready to print; the columns beside it exist to find it. Partial indexes keep the rare
# facts (a denial, an error) cheap to look up and nearly free for all other spans; spans_llm answers the questions about
# models and tokens without reading the rows, which are long.
_DDL: Final = """
CREATE TABLE spans (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invocation_id TEXT NOT NULL,
    trace_id TEXT NOT NULL,
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
    denied INTEGER NOT NULL,
    error INTEGER NOT NULL,
    json BLOB NOT NULL
);
CREATE INDEX spans_invocation ON spans (invocation_id, start_ns);
CREATE INDEX spans_trace ON spans (trace_id, start_ns);
CREATE INDEX spans_start ON spans (start_ns);
CREATE INDEX spans_agent ON spans (agent_name, start_ns);
CREATE INDEX spans_llm ON spans (start_ns, system, model, response_model, input_tokens) WHERE llm;
CREATE INDEX spans_denied ON spans (start_ns) WHERE denied;
CREATE INDEX spans_error ON spans (start_ns) WHERE error;
CREATE TABLE logs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invocation_id TEXT NOT NULL,
    agent_namespace TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    stream TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    line BLOB NOT NULL
);
CREATE INDEX logs_invocation ON logs (invocation_id);
CREATE INDEX logs_agent ON logs (agent_name);
CREATE INDEX logs_time ON logs (time_ns);
CREATE TABLE export_cursors (gateway TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
"""

INSERT_SPAN: Final = (
    "INSERT INTO spans (invocation_id, trace_id, agent_namespace, agent_name, gateway, name, start_ns,"
    " system, model, response_model, input_tokens, llm, denied, error, json) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
INSERT_LOG: Final = (
    "INSERT INTO logs (invocation_id, agent_namespace, agent_name, stream, time_ns, line) VALUES (?,?,?,?,?,?)"
)
UPSERT_CURSOR: Final = (
    "INSERT INTO export_cursors (gateway, seq) VALUES (?, ?) ON CONFLICT (gateway) DO UPDATE SET seq = excluded.seq"
)

_ENCODER: Final = msgspec.json.Encoder()
_DENIED_NAMES: Final = frozenset({attr.SPAN_EGRESS_DIAL_DENIED, attr.SPAN_EGRESS_DNS_DENIED})

SpanRow = tuple[
    str, str, str, str, str, str, int, str | None, str | None, str | None, int | None, bool, bool, bool, bytes
]


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file.

    Raises: sqlite3.DatabaseError when the file is not ours, is damaged, or was written by a newer clrk.
    """
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect on a new file only
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last batch, never the file
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        connection.executescript(f"BEGIN; {_DDL} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    elif version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"schema version {version}, this clrk writes {SCHEMA_VERSION}")
    connection.execute(
        "SELECT seq FROM spans ORDER BY start_ns DESC LIMIT 1"
    ).fetchone()  # touch the pages: finds damage


def span_row(record: SpanRecord, gateway: str) -> SpanRow:
    """Return the values of INSERT_SPAN. gateway is namespace/name of the EgressGateway, or empty."""
    attributes = record.attributes
    tokens = attributes.get(attr.GEN_AI_USAGE_INPUT_TOKENS)
    system = _text(attributes, attr.GEN_AI_SYSTEM) or _text(attributes, attr.GEN_AI_PROVIDER_NAME)
    model = _text(attributes, attr.GEN_AI_REQUEST_MODEL) or _text(attributes, attr.GEN_AI_RESPONSE_MODEL)
    return (
        _text(attributes, attr.INVOCATION_ID) or "",
        record.trace_id,
        _text(attributes, attr.AGENT_NAMESPACE) or "",
        _text(attributes, attr.AGENT_NAME) or "",
        gateway,
        record.name,
        record.start_time_unix_nano,
        system,
        model,
        _text(attributes, attr.GEN_AI_RESPONSE_MODEL),
        tokens if isinstance(tokens, int) else None,
        system is not None or model is not None or tokens is not None,
        is_denied(record),
        record.status.code is StatusCode.ERROR,
        _ENCODER.encode(record),
    )


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
