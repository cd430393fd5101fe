"""CONTRACT section 13 as a table: which spans there are, and which attributes, of which type, each of them may carry.

`violations` looks at clrk's own spans; what an agent reports of itself (clrk.component `agent`) is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Types = dict[str, type]

IDENTITY: Types = {
    "agent.kind": str, "agent.namespace": str, "agent.name": str, "agent.uid": str, "agent.revision": str,
}  # fmt: skip
IDENTITY_OPTIONAL: Types = {"invocation.id": str, "clrk.sandbox.id": str}
RESOURCE: Types = {"service.name": str, "service.version": str, "clrk.component": str, "host.name": str}
RESOURCE_OPTIONAL: Types = {"clrk.egress_gateway": str}

DISPATCH: Types = {
    "clrk.trigger": str, "clrk.phase": str, "clrk.resp.bytes": int, "error.type": str,
    "http.request.method": str, "http.request.method_original": str, "http.response.status_code": int,
    "http.route": str, "url.scheme": str, "url.path": str, "network.protocol.version": str,
    "client.address": str, "client.port": int, "server.address": str, "server.port": int,
    "network.transport": str, "clrk.caller.uid": int, "clrk.caller.pid": int,
}  # fmt: skip
RUN: Types = {
    "gen_ai.operation.name": str, "gen_ai.agent.name": str, "clrk.phase": str, "clrk.exit_reason": str,
    "clrk.exit_code": int, "clrk.cpu_time": float, "clrk.memory.peak": int, "error.type": str,
}  # fmt: skip
SANDBOX: Types = {"clrk.sandbox.warm": bool, "process.pid": int}
EGRESS: Types = {
    "process.pid": int, "process.executable.name": str, "network.peer.address": str, "network.peer.port": int,
    "clrk.dst.name": str, "clrk.req.bytes": int, "clrk.resp.bytes": int,
}  # fmt: skip
WOULD_DENY: Types = {"clrk.egress.would_deny": str, "clrk.egress.route": str, "clrk.egress.add_rule": str}
EGRESS_OPTIONAL: Types = WOULD_DENY | {
    "server.address": str, "server.port": int, "error.type": str, "network.transport": str,
}  # fmt: skip
HTTP: Types = {
    "http.request.method": str, "http.request.method_original": str, "http.response.status_code": int,
    "http.request.resend_count": int, "url.full": str, "network.protocol.name": str, "network.protocol.version": str,
    "clrk.tls.intercepted": bool, "tls.protocol.version": str, "tls.client.server_name": str,
    "clrk.credential.policies": list,
}  # fmt: skip
LLM: Types = {
    "gen_ai.system": str, "gen_ai.provider.name": str, "gen_ai.operation.name": str, "gen_ai.request.model": str,
    "gen_ai.request.max_tokens": int, "gen_ai.request.temperature": float, "gen_ai.request.top_p": float,
    "gen_ai.request.top_k": float, "gen_ai.request.stop_sequences": list, "gen_ai.request.stream": bool,
    "gen_ai.request.seed": int, "gen_ai.request.frequency_penalty": float, "gen_ai.request.presence_penalty": float,
    "gen_ai.request.choice.count": int, "gen_ai.output.type": str, "gen_ai.conversation.id": str,
    "gen_ai.response.id": str, "gen_ai.response.model": str, "gen_ai.response.finish_reasons": list,
    "gen_ai.response.time_to_first_chunk": float, "gen_ai.usage.input_tokens": int, "gen_ai.usage.output_tokens": int,
    "gen_ai.usage.cache_read.input_tokens": int, "gen_ai.usage.cache_creation.input_tokens": int,
    "gen_ai.usage.reasoning.output_tokens": int, "clrk.cost.usd": float, "clrk.body.usage_visible": bool,
    "clrk.body.request_rewritten": bool, "openai.api.type": str, "openai.request.service_tier": str,
    "openai.response.service_tier": str, "openai.response.system_fingerprint": str,
    "gen_ai.request.previous_response.id": str, "gen_ai.embeddings.dimension.count": int,
    "gen_ai.request.encoding_formats": list, "clrk.cost.unknown": bool, "clrk.gen_ai.refused": bool,
    "clrk.gen_ai.response.service_tier": str, "clrk.gen_ai.usage.web_searches": int,
    "aws.request_id": str, "aws.bedrock.guardrail.id": str,
}  # fmt: skip
MCP: Types = {
    "mcp.method.name": str, "mcp.session.id": str, "mcp.protocol.version": str, "mcp.resource.uri": str,
    "gen_ai.tool.name": str, "gen_ai.operation.name": str, "gen_ai.prompt.name": str, "jsonrpc.request.id": str,
    "jsonrpc.protocol.version": str, "rpc.response.status_code": str, "clrk.body.usage_visible": bool,
}  # fmt: skip
SESSION: Types = {"mcp.session.id": str, "mcp.protocol.version": str}  # of MCP's streams, which are plain HTTP calls
# Of a call that a budget refused.
BUDGET: Types = {
    "clrk.budget.denied": bool, "clrk.budget.route": str, "clrk.budget.limit": str, "clrk.budget.key": str,
    "clrk.budget.daily_used": float, "clrk.budget.daily_max": float, "clrk.egress.deny_reason": str,
}  # fmt: skip
COUNTED = {"clrk.budget.daily_used", "clrk.budget.daily_max"}  # int, where tokens are short and not dollars
DENIED: Types = {"clrk.egress.deny_reason": str, "clrk.egress.route": str, "clrk.egress.add_rule": str}
TLS_TROUBLE: Types = {"clrk.tls.client_rejected_ca": bool}
CAPTURED: Types = {
    "http.request.body.content": str, "http.response.body.content": str, "http.request.body.size": int,
    "http.response.body.size": int, "clrk.body.truncated": bool, "clrk.body.skipped": str,
}  # fmt: skip
EVENTS = {"http.request.headers", "http.request.body", "http.response.headers", "http.response.body"}

INTERNAL, SERVER, CLIENT = "SPAN_KIND_INTERNAL", "SPAN_KIND_SERVER", "SPAN_KIND_CLIENT"

# name → kind, component, required, optional, status is Error
FIXED: dict[str, tuple[str, str, Types, Types, bool]] = {
    "ingress.dispatch": (SERVER, "ingress", {"clrk.trigger": str}, DISPATCH, False),
    "sandbox.acquire": (INTERNAL, "runtime", {"clrk.sandbox.warm": bool}, SANDBOX, False),
    "sandbox.spawn": (INTERNAL, "runtime", {"clrk.sandbox.warm": bool, "process.pid": int}, SANDBOX, False),
    "sandbox.teardown": (INTERNAL, "runtime", {"clrk.sandbox.warm": bool}, SANDBOX, False),
    "egress.tcp": (CLIENT, "gateway", EGRESS, EGRESS_OPTIONAL | HTTP | TLS_TROUBLE, False),
    "egress.dial.denied": (
        CLIENT, "gateway", EGRESS | {"clrk.egress.deny_reason": str, "error.type": str},
        EGRESS_OPTIONAL | HTTP | DENIED, True,
    ),
    "egress.dial.failed": (CLIENT, "gateway", EGRESS | {"error.type": str}, EGRESS_OPTIONAL | HTTP | TLS_TROUBLE, True),
    "egress.dns.denied": (
        CLIENT, "gateway", {"dns.question.name": str, "clrk.egress.deny_reason": str, "error.type": str},
        EGRESS | EGRESS_OPTIONAL | DENIED | {"clrk.dst.name": str}, True,
    ),
    "egress.proxy.malformed": (
        CLIENT, "gateway", {"clrk.proxy.error_code": str, "error.type": str}, EGRESS | EGRESS_OPTIONAL, True,
    ),
}  # fmt: skip


def violations(spans: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield what a span is, or carries, that the contract does not name."""
    for span in spans:
        if span["resource"].get("clrk.component") != "agent":
            yield from (f"{span['name']}: {problem}" for problem in _problems(span))


def _problems(span: dict[str, Any]) -> Iterator[str]:
    attributes = span["attributes"]
    kind, component, required, optional, is_error = _rule(span)
    if span["kind"] != kind:
        yield f"kind {span['kind']}"
    if span["resource"].get("clrk.component") != component:
        yield f"component {span['resource'].get('clrk.component')}"
    if is_error and span["status"]["code"] != "STATUS_CODE_ERROR":
        yield f"status {span['status']}"
    if span["status"]["code"] == "STATUS_CODE_ERROR" and "error.type" not in attributes:
        yield "status Error without error.type"
    yield from _check(attributes, IDENTITY | required, IDENTITY_OPTIONAL | optional)
    if (attributes.get("agent.kind") == "TaskAgent") != ("invocation.id" in attributes):
        yield f"invocation.id of a {attributes.get('agent.kind')}: {attributes.get('invocation.id')}"
    if span["name"] != "ingress.dispatch" and "clrk.sandbox.id" not in attributes:
        yield "no clrk.sandbox.id"
    yield from _check(span["resource"], RESOURCE, RESOURCE_OPTIONAL)
    for event in span["events"]:
        if event["name"] not in EVENTS:
            yield f"event {event['name']}"
        headers = {
            name for name in event["attributes"] if name.startswith(("http.request.header.", "http.response.header."))
        }
        yield from _check({k: v for k, v in event["attributes"].items() if k not in headers}, {}, CAPTURED)


def _rule(span: dict[str, Any]) -> tuple[str, str, Types, Types, bool]:
    name, attributes = span["name"], span["attributes"]
    if name in FIXED:
        return FIXED[name]
    if name.startswith("invoke_agent "):
        return INTERNAL, "runtime", {"gen_ai.operation.name": str, "gen_ai.agent.name": str}, RUN, False
    base = EGRESS | {"http.request.method": str, "url.full": str}
    if attributes.get("clrk.budget.denied"):
        refused = {"clrk.budget.route": str, "clrk.egress.deny_reason": str, "clrk.egress.route": str}
        return CLIENT, "gateway", base | refused, EGRESS_OPTIONAL | HTTP | LLM | MCP | BUDGET, True
    if "mcp.method.name" in attributes:  # of a batch, one span stands for the HTTP exchange too
        return CLIENT, "gateway", EGRESS | {"url.full": str}, EGRESS_OPTIONAL | HTTP | MCP | DENIED, False
    if "gen_ai.system" in attributes:
        both = {"gen_ai.system": str, "gen_ai.provider.name": str, "gen_ai.operation.name": str}
        return CLIENT, "gateway", base | both, EGRESS_OPTIONAL | HTTP | LLM, False
    return CLIENT, "gateway", base, EGRESS_OPTIONAL | HTTP | SESSION | DENIED, False


def _check(found: dict[str, Any], required: Types, optional: Types) -> Iterator[str]:
    for name in required.keys() - found.keys():
        yield f"{name} is missing"
    for name, value in found.items():
        wanted = required.get(name) or optional.get(name) or (str if name.startswith("agent.identity.") else None)
        if wanted is None:
            yield f"{name} is not in the contract"
        elif type(value) is not wanted and not (name in COUNTED and type(value) is int):
            yield f"{name} is {type(value).__name__}, not {wanted.__name__}: {value!r}"
