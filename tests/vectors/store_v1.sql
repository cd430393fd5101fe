-- The embedded store as clrk 0.1 made it (schema version 1).
PRAGMA user_version = 1;
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
