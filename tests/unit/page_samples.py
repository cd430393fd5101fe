"""What the page shows in tests: a store filled through the real pipeline, with ordinary and hostile invocations."""

from __future__ import annotations

import time
from dataclasses import replace

from span_samples import MS, agent, config, gateway, identity, record

from clrk.core.ids import new_span_id
from clrk.core.messages import Counters
from clrk.core.resources import DaemonAgent
from clrk.gateway.agent_status import AgentStatus, DaemonStatus
from clrk.gateway.health import DaemonHealth
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.exporters import ExportStatus
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Component, SpanEvent, SpanKind, Status, StatusCode

# Each would run, break out or mislead in some place of a page: text, attribute, script, style, address, bidi, NUL.
PAYLOADS = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "' onmouseover=window.pwned=1 x='",
    "</script><script>window.pwned=1</script>",
    "</title></textarea></style></pre><svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "{{ 7 * 191 }}{% raw %}${window.pwned=1}`",
    "user\u202egnp.exe\u2066\u200b\u2028",
    "nul\x00esc\x1b[31m\x9bred\x7f",
    "&lt;b&gt;&amp;#60;script&amp;#62;",
    "A" * 30_000,
)
HOSTILE = " ".join(PAYLOADS[:-1])

REQUEST_BODY = (
    '{"model":"claude-sonnet-5","max_tokens":1024,"messages":[{"role":"user","content":"Where is order 1042?"}]}'
)
RESPONSE_BODY = """event: message_start
data: {"type":"message_start"}

event: message_stop
data: {"type":"message_stop"}
"""
REQUEST_HEADERS = {
    "http.request.header.content-type": "application/json", "http.request.header.x-api-key": "[redacted]",
}  # fmt: skip
CAPTURED = (  # events of a span: name, when in ms, attributes
    ("http.request.headers", 80, REQUEST_HEADERS),
    ("http.request.body", 81, {"http.request.body.content": REQUEST_BODY, "http.request.body.size": len(REQUEST_BODY)}),
    ("gen_ai.first_chunk", 300, {"gen_ai.response.time_to_first_chunk": 0.22}),
    ("http.response.headers", 300, {"http.response.header.content-type": "text/event-stream"}),
    ("http.response.body", 520, {"http.response.body.content": RESPONSE_BODY}),
)


def invocation_record(who, *, phase=Phase.SUCCEEDED, created_ns, took_ns=1200 * MS, trigger="http", **more):
    """Return the record that belongs to the spans of record_run."""
    ended = 0 if phase in (Phase.PENDING, Phase.RUNNING) else created_ns + took_ns
    fields = {"caller": "203.0.113.7:40000", "status": 200, "exit_code": 0, "exit_reason": "exited"}
    if not ended:
        fields |= {"status": 0, "exit_code": None, "exit_reason": ""}
    return InvocationRecord(
        invocation_id=who.invocation_id,
        namespace=who.agent_namespace,
        agent=who.agent_name,
        revision=who.agent_revision,
        trigger=trigger,
        phase=phase,
        trace_id=who.context.trace_id,
        dispatch_span_id="00f067aa0ba902b7",
        run_span_id=who.context.span_id,
        created_ns=created_ns,
        started_ns=created_ns + 30 * MS,
        ended_ns=ended,
        identity=dict(who.caller_fields),
        **(fields | more),
    )


def record_run(telemetry, who, start_ns, *, dispatch=None, phase="Succeeded", error=""):
    """Record the spans that are clrk's own in every run; return the id of `ingress.dispatch`."""
    dispatch = dispatch or new_span_id()
    inner = {"kind": SpanKind.INTERNAL, "component": Component.RUNTIME}
    for name, start_ms, length_ms in (
        (attr.SPAN_SANDBOX_ACQUIRE, 2, 8), (attr.SPAN_SANDBOX_SPAWN, 10, 24), (attr.SPAN_SANDBOX_TEARDOWN, 1130, 60),
    ):  # fmt: skip
        start, length = start_ns + start_ms * MS, length_ms * MS
        record(telemetry, who, name, start_ns=start, length_ns=length, clrk__sandbox__warm=True, **inner)
    record(
        telemetry, who, f"invoke_agent {who.agent_name}", start_ns=start_ns + 2 * MS, length_ns=1128 * MS, error=error,
        span_id=who.context.span_id, parent=dispatch, clrk__phase=phase, clrk__exit_code=0, clrk__cpu_time=0.41,
        clrk__memory__peak=48_234_496, gen_ai__operation__name="invoke_agent", **inner,
    )  # fmt: skip
    record(
        telemetry, who, attr.SPAN_INGRESS_DISPATCH, start_ns=start_ns, length_ns=1200 * MS, kind=SpanKind.SERVER,
        component=Component.INGRESS, span_id=dispatch, parent="", clrk__trigger="http", error=error,
        http__request__method="POST", url__path=f"/agents/{who.agent_name}", http__response__status_code=200,
        client__address="203.0.113.7", client__port=40_000,
    )  # fmt: skip
    return dispatch


def record_calls(telemetry, who, start_ns):
    """Record what a support agent does: two models, a tool, a denial, a failure, its own spans, captured bodies."""
    own = new_span_id()
    record(
        telemetry, who, "answer_ticket", start_ns=start_ns + 60 * MS, length_ns=980 * MS, kind=SpanKind.INTERNAL,
        component=Component.AGENT, span_id=own, ticket__id="T-1042", ticket__priority=2,
    )  # fmt: skip
    chat = {
        "gen_ai__operation__name": "chat", "http__request__method": "POST", "http__response__status_code": 200,
        "process__pid": 4711, "process__executable__name": "python3", "network__peer__address": "198.51.100.20",
        "network__peer__port": 443, "clrk__req__bytes": 1894, "clrk__resp__bytes": 2311,
    }  # fmt: skip
    telemetry.record(
        who, component=Component.GATEWAY, name="chat claude-sonnet-5", kind=SpanKind.CLIENT,
        start_ns=start_ns + 80 * MS, end_ns=start_ns + 520 * MS, parent_span_id=own, status=Status(),
        attributes={key.replace("__", "."): value for key, value in chat.items()} | {
            "gen_ai.system": "anthropic", "gen_ai.provider.name": "anthropic",
            "gen_ai.request.model": "claude-sonnet-5", "gen_ai.response.model": "claude-sonnet-5-20260701",
            "gen_ai.usage.input_tokens": 1834, "gen_ai.usage.output_tokens": 212, "clrk.cost.usd": 0.00868,
            "gen_ai.response.finish_reasons": ["tool_use"], "server.address": "api.anthropic.com",
            "url.full": "https://api.anthropic.com/v1/messages",
        },
        events=[SpanEvent(name, start_ns + at_ms * MS, values) for name, at_ms, values in CAPTURED],
    )  # fmt: skip
    record(
        telemetry, who, "tools/call lookup_order", start_ns=start_ns + 540 * MS, length_ns=64 * MS, parent=own,
        mcp__method__name="tools/call", gen_ai__tool__name="lookup_order", process__pid=4711,
        server__address="mcp.internal",
    )  # fmt: skip
    record(
        telemetry, who, "GET tools.internal", start_ns=start_ns + 620 * MS, length_ns=180 * MS, parent=own,
        error="502 Bad Gateway", error__type="502", http__response__status_code=502, http__request__method="GET",
        server__address="tools.internal", url__full="http://tools.internal/orders/1042", process__pid=4713,
        process__executable__name="curl",
    )  # fmt: skip
    record(
        telemetry, who, "egress.dial.denied", start_ns=start_ns + 820 * MS, length_ns=2 * MS,
        error="no rule allows DELETE tools.internal/orders/1042", http__request__method="DELETE",
        server__address="tools.internal", server__port=80, url__full="http://tools.internal/orders/1042",
        clrk__egress__deny_reason="no_rule", process__pid=4713, process__executable__name="curl",
    )  # fmt: skip
    record(
        telemetry, who, "chat gpt-5-mini", start_ns=start_ns + 840 * MS, length_ns=190 * MS, parent=own,
        gen_ai__system="openai", gen_ai__request__model="gpt-5-mini", gen_ai__usage__input_tokens=640,
        gen_ai__usage__output_tokens=88, clrk__cost__usd=0.00034, server__address="api.openai.com",
        url__full="https://api.openai.com/v1/chat/completions", **chat,
    )  # fmt: skip


def record_hostile(telemetry, start_ns):
    """Record an invocation in which everything that an agent, a caller or an upstream can choose is hostile."""
    who = replace(identity(), caller_fields=(("tenant", HOSTILE),))
    telemetry.record_invocation(
        invocation_record(
            who, phase=Phase.FAILED, created_ns=start_ns, trigger=HOSTILE, caller=HOSTILE, exit_code=3,
            exit_reason=HOSTILE, message=HOSTILE,
        )
    )  # fmt: skip
    record_run(telemetry, who, start_ns, phase="Failed", error=HOSTILE)
    for number, payload in enumerate(PAYLOADS):
        telemetry.record(
            who, component=Component.AGENT if number % 2 else Component.GATEWAY, name=payload, kind=SpanKind.CLIENT,
            start_ns=start_ns + (100 + number) * MS, end_ns=start_ns + (200 + number) * MS,
            status=Status(StatusCode.ERROR, payload),
            attributes={
                payload: payload, "gen_ai.request.model": payload, "gen_ai.system": payload, "url.full": payload,
                "server.address": payload, "error.type": payload, "process.executable.name": payload,
                "list": [payload, payload], "http.request.method": payload, "gen_ai.tool.name": payload,
            },
            events=[
                SpanEvent(payload, start_ns, {payload: payload}),
                SpanEvent("http.request.headers", start_ns, {f"http.request.header.{payload}": [payload, payload]}),
                SpanEvent("http.request.body", start_ns, {"http.request.body.content": payload}),
                SpanEvent("http.response.body", start_ns, {"http.response.body.content": payload * 3}),
            ],
        )  # fmt: skip
        telemetry.record_log(who, "stderr" if number % 2 else "stdout", payload.encode(), start_ns + number * MS)
    telemetry.record_log(who, "stdout", b"invalid \xff\xfe utf-8 \xed\xa0\x80", start_ns)
    return who


def daemon_agent(name="watcher"):
    """Return a DaemonAgent."""
    return DaemonAgent.model_validate(
        {"kind": "DaemonAgent", "metadata": {"name": name}, "spec": {"template": {"spec": {"command": ["/bin/watch"]}}}}
    )


def page_config():
    """Return a configuration with agents of both kinds."""
    return config([gateway()], [agent(), agent("nightly-report"), agent("orders", "team-b")]).model_copy(
        update={"daemons": [daemon_agent()]}
    )


class States:
    """Knows how agents stand, as invocations.py and daemons.py would."""

    def __init__(self) -> None:
        self.now_ns = time.time_ns()

    def agent_status(self, agent):
        if isinstance(agent, DaemonAgent):
            return AgentStatus(running=1, daemon=DaemonStatus(
                "BackOff", restarts=3, since_ns=self.now_ns - 90_000 * MS, next_start_ns=self.now_ns + 7_000 * MS,
                last_exit=f"exited with code 1 {HOSTILE}", sandbox_id="deadbeef"))  # fmt: skip
        if agent.metadata.name == "nightly-report":
            return AgentStatus(0, 0, self.now_ns + 3_600_000 * MS, self.now_ns - 82_800_000 * MS, 2)
        return AgentStatus(running=1, warm=2)


class Health:
    """Knows how the daemon stands."""

    def __init__(self) -> None:
        self.problems = [f"/etc/clrk/agents.yaml:14: spec.template.spec.command: missing {HOSTILE}"]
        self.now_ns = time.time_ns()

    async def health(self):
        return DaemonHealth(
            ready=True, started_ns=self.now_ns - 86_400_000 * MS,
            counters=Counters(
                {"stamp_pushed": 18_233, "stamp_push_failed": 0, "record_lost": 2, "udp_refused": 41},
                {"ready": 2, "warm": 3, "running": 4}, {"default/support": 2, "team-b/orders": 1},
            ),
            reload_problems=self.problems,
            exporters=[
                ExportStatus("default/default", "traces", "http://127.0.0.1:4318/v1/traces",
                             18_233, 0, 18_233, 0, 0, 0, ""),
                ExportStatus("team-b/default", "traces", "https://otlp.example.net/v1/traces",
                             17_029, 1204, 9000, 17, 12, self.now_ns - 600_000 * MS,
                             f"503 Service Unavailable {HOSTILE}"),
            ],
        )  # fmt: skip


def fill(telemetry):
    """Fill the store; returns the identities of the invocations by what they are."""
    now = time.time_ns()
    made = {}
    agents = (("support", "default", "http"), ("orders", "team-b", "http"), ("nightly-report", "default", "cron"))
    ends = (
        (Phase.SUCCEEDED, 0), (Phase.SUCCEEDED, 0), (Phase.FAILED, 1), (Phase.SUCCEEDED, 0), (Phase.TIMEOUT, 137),
        (Phase.CANCELLED, 143),
    )  # fmt: skip
    for number in range(60):
        start = now - (number * 97_000 + 400_000) * MS
        name, namespace, trigger = agents[number % 3]
        phase, code = ends[number % 6]
        who = identity(name, namespace)
        telemetry.record_invocation(
            invocation_record(
                who, phase=phase, created_ns=start, trigger=trigger, exit_code=code,
                caller="" if trigger == "cron" else f"198.51.100.{number}:{40_000 + number}",
                status=0 if trigger == "cron" else 200, message="" if code == 0 else f"the run ended: {phase}",
            )
        )  # fmt: skip
        record_run(telemetry, who, start)
        if number % 3 == 0:
            record_calls(telemetry, who, start)
        made["old"] = who
    who = replace(identity(), caller_fields=(("tenant", "acme"), ("user", "jane@acme.example")))
    start = now - 240_000 * MS
    telemetry.record_invocation(invocation_record(who, created_ns=start, caller="203.0.113.7:40112"))
    record_run(telemetry, who, start)
    record_calls(telemetry, who, start)
    for index in range(40):
        stream = "stderr" if index % 7 == 3 else "stdout"
        line = f"step {index}: looked at order {1000 + index}"
        telemetry.record_log(who, stream, line.encode(), start + (60 + index * 20) * MS)
    made["plain"] = who
    made["hostile"] = record_hostile(telemetry, now - 120_000 * MS)
    running = identity()
    telemetry.record_invocation(invocation_record(running, phase=Phase.RUNNING, created_ns=now - 4_000 * MS))
    record(
        telemetry, running, "chat claude-sonnet-5", start_ns=now - 3_500 * MS, length_ns=900 * MS,
        gen_ai__request__model="claude-sonnet-5", gen_ai__system="anthropic", gen_ai__usage__input_tokens=320,
    )  # fmt: skip
    made["running"] = running
    daemon = replace(identity("watcher"), invocation_id="", agent_kind="DaemonAgent")
    record(
        telemetry, daemon, "GET tools.internal", start_ns=now - 9_000 * MS, parent="", http__request__method="GET",
        url__full="http://tools.internal/queue", http__response__status_code=200,
    )  # fmt: skip
    telemetry.record_log(daemon, "stdout", b"watching the queue", now - 9_000 * MS)
    made["daemon"] = daemon
    return made


def record_many(telemetry, count):
    """Record an invocation with so many spans of its agent, nested and flat."""
    who = identity()
    start = time.time_ns() - 60_000 * MS
    telemetry.record_invocation(invocation_record(who, created_ns=start, took_ns=20_000 * MS))
    record_run(telemetry, who, start)
    parent = who.context.span_id
    for number in range(count):
        span_id = new_span_id()
        record(telemetry, who, f"step {number}", start_ns=start + (50 + number) * MS, length_ns=3 * MS, span_id=span_id,
               parent=parent, component=Component.AGENT, kind=SpanKind.INTERNAL, step=number)  # fmt: skip
        parent = span_id if number % 50 else who.context.span_id
    return who
