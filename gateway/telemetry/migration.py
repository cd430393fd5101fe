"""How a file of schema version 1 becomes one of version 2, in place. Pure: SQL."""

from __future__ import annotations

from typing import Final

_COLUMNS: Final = """
ALTER TABLE spans ADD COLUMN span_id TEXT NOT NULL DEFAULT '';
ALTER TABLE spans ADD COLUMN sampled INTEGER NOT NULL DEFAULT 1;
ALTER TABLE spans ADD COLUMN otlp BLOB;
ALTER TABLE logs ADD COLUMN agent_kind TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN agent_uid TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN agent_revision TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN sandbox_id TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN caller_fields TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN gateway TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN trace_id TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN span_id TEXT NOT NULL DEFAULT '';
ALTER TABLE logs ADD COLUMN sampled INTEGER NOT NULL DEFAULT 1;
ALTER TABLE logs ADD COLUMN severity INTEGER NOT NULL DEFAULT 0;
ALTER TABLE logs ADD COLUMN otlp BLOB;
DROP INDEX spans_llm;
DROP INDEX spans_denied;
DROP INDEX spans_error;
"""
# What an invocation of version 1 came to is told from its spans, once. One without a last word died with its gateway.
_RECORDS: Final = r"""
INSERT INTO cursors (exporter, signal, seq) SELECT gateway, 'traces', seq FROM export_cursors;
DROP TABLE export_cursors;
INSERT INTO invocations (
    invocation_id, namespace, agent, revision, trigger, phase, trace_id, dispatch_span_id, run_span_id,
    created_ns, started_ns, ended_ns, caller, status, exit_code, exit_reason, message,
    llm_calls, calls, input_tokens, output_tokens, cost_usd, denials, errors, error_spans)
SELECT invocation_id, agent_namespace, agent_name,
    coalesce(max(document ->> '$.attributes."agent.revision"'), ''),
    coalesce(max(document ->> '$.attributes."clrk.trigger"'), ''),
    coalesce(max(CASE WHEN whole THEN document ->> '$.attributes."clrk.phase"' END),
        max(CASE WHEN whole THEN iif(error, 'Failed', 'Succeeded') END), 'Failed'),
    max(trace_id),
    coalesce(max(CASE WHEN whole THEN document ->> '$.span_id' END), ''),
    coalesce(max(CASE WHEN run THEN document ->> '$.span_id' END), ''),
    min(start_ns), coalesce(max(CASE WHEN run THEN start_ns END), 0), max(document ->> '$.end_time_unix_nano'),
    coalesce(max(document ->> '$.attributes."client.address"'), ''),
    coalesce(max(CASE WHEN whole THEN document ->> '$.attributes."http.response.status_code"' END), 0),
    max(document ->> '$.attributes."clrk.exit_code"'),
    coalesce(max(document ->> '$.attributes."clrk.exit_reason"'), ''),
    coalesce(max(CASE WHEN whole OR run THEN document ->> '$.status.message' END), ''),
    sum(call AND llm), sum(call), coalesce(sum(input_tokens), 0),
    coalesce(sum(document ->> '$.attributes."gen_ai.usage.output_tokens"'), 0),
    sum(document ->> '$.attributes."clrk.cost.usd"'), sum(denied), sum(call AND error), sum(error)
FROM (
    SELECT *, CAST(json AS TEXT) AS document, name = 'ingress.dispatch' AS whole,
        name LIKE 'invoke\_agent %' ESCAPE '\' AS run,
        NOT denied AND instr(CAST(json AS TEXT), '"kind":"SPAN_KIND_CLIENT"') > 0 AS call
    FROM spans WHERE invocation_id != ''
)
GROUP BY invocation_id;
"""


def from_version_1(span_facts: str, version_2: str) -> str:
    """Return the statements, with the definitions that version 2 makes anew."""
    return _COLUMNS + span_facts + version_2 + _RECORDS
