"""Spans of one realistic invocation, recorded through the real pipeline."""

import time

from clrk.core.egress_resources import EgressGateway
from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import SandboxId, new_invocation_id, new_span_id, new_trace_id
from clrk.core.resources import RuntimeSpec, TaskAgent
from clrk.gateway.agent_status import AgentStates
from clrk.gateway.health import Health, RuntimeNews
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Component, Identity, SpanKind, Status, StatusCode, TraceContext

MS = 1_000_000


def config(gateways=(), agents=(), retention=7 * 86_400.0, environment=None):
    return GatewayConfig(
        runtime=RuntimeSpec(retention=retention),
        agents=list(agents),
        gateways=list(gateways),
        routes=[],
        ca_cert_pem="",
        ca_key_pem="",
        environment=environment or {},
    )


def gateway(endpoint=None, name="default", **otlp):
    spec = {"otlp": {"endpoint": endpoint, **otlp}} if endpoint else {}
    return EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": name}, "spec": spec})


def agent(name="support", namespace="default"):
    return TaskAgent.model_validate(
        {
            "kind": "TaskAgent",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"template": {"spec": {"command": ["/bin/agent"], "env": [{"name": "KEY", "value": "s3cret"}]}}},
        }
    )


def identity(name="support", namespace="default", invocation_id=None, gateway_name="default", trace_id=None):
    return Identity(
        invocation_id=invocation_id or new_invocation_id(),
        agent_kind="TaskAgent",
        agent_namespace=namespace,
        agent_name=name,
        agent_uid="11111111-2222-5333-8444-555555555555",
        agent_revision="0123456789ab",
        sandbox_id=SandboxId("deadbeef"),
        egress_gateway=gateway_name,
        context=TraceContext(trace_id or new_trace_id(), new_span_id()),
    )


class Running:
    """Counts invocations in flight, as Invocations does."""

    def __init__(self):
        self.counts = {}

    def running(self, namespace, agent):
        return self.counts.get((namespace, agent), 0)


def admin_sources(telemetry, news=None, running=None):
    """Return what build_admin_app needs beside store, catalogue and run_task."""
    news = news or RuntimeNews()
    states = AgentStates(running or Running(), lambda: news.counters.warm_agents)
    return {"health": Health(news, telemetry, lambda: True), "states": states}


def invocation_record(who, **more):
    """Return the record of an invocation that has ended well."""
    now_ns = time.time_ns()
    facts = {
        "phase": Phase.SUCCEEDED, "created_ns": now_ns - 2_000 * MS, "started_ns": now_ns - 1_900 * MS,
        "ended_ns": now_ns - 500 * MS, "trigger": "http", "caller": "203.0.113.7:40000", "exit_code": 0, "status": 200,
    } | more  # fmt: skip
    return InvocationRecord(
        invocation_id=who.invocation_id, namespace=who.agent_namespace, agent=who.agent_name,
        revision=who.agent_revision, trace_id=who.context.trace_id, dispatch_span_id=new_span_id(),
        run_span_id=who.context.span_id, **facts,
    )  # fmt: skip


def record(telemetry, who, name="GET tools.internal", *, start_ns=None, length_ns=5 * MS, error="", **more):
    """Record one span; more are attributes with `__` for `.`."""
    start_ns = time.time_ns() if start_ns is None else start_ns
    parent, span_id = more.pop("parent", None), more.pop("span_id", None)
    kind, component = more.pop("kind", SpanKind.CLIENT), more.pop("component", Component.GATEWAY)
    telemetry.record(
        who,
        component=component,
        name=name,
        kind=kind,
        start_ns=start_ns,
        end_ns=start_ns + length_ns,
        attributes={key.replace("__", "."): value for key, value in more.items()},
        status=Status(StatusCode.ERROR, error) if error else Status(),
        span_id=span_id,
        parent_span_id=parent,
    )


def record_invocation(telemetry, who, *, phase="Succeeded", exit_code=0, remote_parent="", start_ns=None):
    """Record the spans that one request of the demo agent causes."""
    start_ns = time.time_ns() - 3_000 * MS if start_ns is None else start_ns
    dispatch = new_span_id()
    record(
        telemetry, who, "chat claude-sonnet-5", start_ns=start_ns + 20 * MS, length_ns=900 * MS,
        gen_ai__operation__name="chat", gen_ai__system="anthropic", gen_ai__request__model="claude-sonnet-5",
        gen_ai__usage__input_tokens=320, gen_ai__usage__output_tokens=85, clrk__cost__usd=0.0022,
        http__response__status_code=200, process__pid=4711, process__executable__name="python3",
    )  # fmt: skip
    record(
        telemetry, who, "tools/call refund_policy", start_ns=start_ns + 950 * MS, length_ns=40 * MS,
        mcp__method__name="tools/call", gen_ai__tool__name="refund_policy", process__pid=4711,
    )  # fmt: skip
    record(
        telemetry, who, "egress.dial.denied", start_ns=start_ns + 1000 * MS, length_ns=2 * MS,
        error="no rule allows it",
        http__request__method="DELETE", server__address="tools.internal", server__port=80,
        url__full="http://tools.internal/orders/1042?key=hidden", clrk__egress__deny_reason="no_rule",
        process__pid=4712, process__executable__name="curl",
    )  # fmt: skip
    record(
        telemetry, who, f"invoke_agent {who.agent_name}", start_ns=start_ns + 10 * MS, length_ns=1100 * MS,
        kind=SpanKind.INTERNAL, component=Component.RUNTIME, span_id=who.context.span_id, parent=dispatch,
        clrk__phase=phase, clrk__exit_code=exit_code,
    )  # fmt: skip
    record(
        telemetry, who, attr.SPAN_INGRESS_DISPATCH, start_ns=start_ns, length_ns=1200 * MS, kind=SpanKind.SERVER,
        component=Component.INGRESS, span_id=dispatch, parent=remote_parent, clrk__trigger="http",
        http__request__method="POST", url__path="/agents/support", http__response__status_code=200,
        client__address="203.0.113.7", client__port=40_000,
    )  # fmt: skip
