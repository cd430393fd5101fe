"""What a finished span measures: which instruments, with which attributes (CONTRACT section 13). Pure.

Names, units and buckets of the first five are those of semconv 1.41.1 (gen-ai-metrics, mcp, http-metrics). Each has the
agent's namespace and name beside the attributes that the convention lists. An agent's own spans measure nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from opentelemetry.semconv._incubating.metrics import gen_ai_metrics, mcp_metrics
from opentelemetry.semconv.metrics import http_metrics

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.schema import is_denied
from clrk.gateway.telemetry.spans import SpanKind, SpanRecord

GEN_AI_CLIENT_TOKEN_USAGE: Final = gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE
GEN_AI_CLIENT_OPERATION_DURATION: Final = gen_ai_metrics.GEN_AI_CLIENT_OPERATION_DURATION
GEN_AI_CLIENT_TIME_TO_FIRST_CHUNK: Final = gen_ai_metrics.GEN_AI_CLIENT_OPERATION_TIME_TO_FIRST_CHUNK
HTTP_CLIENT_REQUEST_DURATION: Final = http_metrics.HTTP_CLIENT_REQUEST_DURATION
MCP_CLIENT_OPERATION_DURATION: Final = mcp_metrics.MCP_CLIENT_OPERATION_DURATION
CLRK_SANDBOX_SPAWN_DURATION: Final = "clrk.sandbox.spawn.duration"
CLRK_EGRESS_DENIED: Final = "clrk.egress.denied"
CLRK_EGRESS_WOULD_DENY: Final = "clrk.egress.would_deny"
CLRK_COST_USD: Final = "clrk.cost.usd"

_MAX_VALUE_CHARS: Final = 256
_TOKEN_BUCKETS: Final = tuple(float(4**power) for power in range(14))
_GEN_AI_BUCKETS: Final = tuple(0.01 * 2**power for power in range(14))
_HTTP_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_MCP_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SPAWN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. buckets are the upper bounds of a histogram."""

    name: str
    kind: Literal["histogram", "counter"]
    unit: str
    description: str
    buckets: tuple[float, ...] = ()


INSTRUMENTS: Final = (
    Instrument(GEN_AI_CLIENT_TOKEN_USAGE, "histogram", "{token}", "Tokens of an LLM call, by type", _TOKEN_BUCKETS),
    Instrument(GEN_AI_CLIENT_OPERATION_DURATION, "histogram", "s", "Duration of an LLM call", _GEN_AI_BUCKETS),
    Instrument(
        GEN_AI_CLIENT_TIME_TO_FIRST_CHUNK, "histogram", "s", "Time to the first chunk of a streamed LLM call",
        _GEN_AI_BUCKETS,
    ),
    Instrument(
        HTTP_CLIENT_REQUEST_DURATION, "histogram", "s", "Duration of an agent's HTTP call, LLM and MCP calls included",
        _HTTP_BUCKETS,
    ),
    Instrument(MCP_CLIENT_OPERATION_DURATION, "histogram", "s", "Duration of an MCP call", _MCP_BUCKETS),
    Instrument(
        CLRK_SANDBOX_SPAWN_DURATION, "histogram", "s", "Time until a sandbox's first process existed", _SPAWN_BUCKETS
    ),
    Instrument(CLRK_EGRESS_DENIED, "counter", "{denial}", "Calls, names and requests that were refused, by reason"),
    Instrument(CLRK_EGRESS_WOULD_DENY, "counter", "{call}", "Calls that a gateway that enforces would refuse"),
    Instrument(CLRK_COST_USD, "counter", "{USD}", "Cost of LLM calls whose price is known"),
)  # fmt: skip

_AGENT: Final = (attr.AGENT_NAMESPACE, attr.AGENT_NAME)
_SERVER: Final = (attr.SERVER_ADDRESS, attr.SERVER_PORT)
_MODEL: Final = (attr.GEN_AI_REQUEST_MODEL, attr.GEN_AI_RESPONSE_MODEL)
_GEN_AI: Final = (attr.GEN_AI_OPERATION_NAME, attr.GEN_AI_PROVIDER_NAME, *_MODEL, *_SERVER)
_HTTP: Final = (
    attr.HTTP_REQUEST_METHOD, attr.HTTP_RESPONSE_STATUS_CODE, attr.ERROR_TYPE, attr.NETWORK_PROTOCOL_NAME,
    attr.NETWORK_PROTOCOL_VERSION, *_SERVER,
)  # fmt: skip
_MCP: Final = (
    attr.MCP_METHOD_NAME, attr.ERROR_TYPE, attr.GEN_AI_OPERATION_NAME, attr.GEN_AI_TOOL_NAME, attr.GEN_AI_PROMPT_NAME,
    attr.RPC_RESPONSE_STATUS_CODE, attr.MCP_PROTOCOL_VERSION, attr.JSONRPC_PROTOCOL_VERSION,
    attr.NETWORK_PROTOCOL_NAME, attr.NETWORK_PROTOCOL_VERSION, *_SERVER,
)  # fmt: skip
_DENIED_BUDGET: Final = "budget"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value for one instrument."""

    instrument: str
    value: int | float
    attributes: dict[str, str | bool | int | float]


def measure(record: SpanRecord) -> Iterator[Measurement]:
    """Yield what a finished span of clrk's own measures."""
    seconds = (record.end_time_unix_nano - record.start_time_unix_nano) / 1e9
    if record.name == attr.SPAN_SANDBOX_SPAWN:
        yield Measurement(CLRK_SANDBOX_SPAWN_DURATION, seconds, _pick(record, (attr.CLRK_SANDBOX_WARM,)))
    if attr.CLRK_EGRESS_WOULD_DENY in record.attributes:
        yield Measurement(CLRK_EGRESS_WOULD_DENY, 1, _pick(record, (attr.CLRK_EGRESS_WOULD_DENY,)))
    if is_denied(record):
        picked = _pick(record, (attr.CLRK_EGRESS_DENY_REASON,))
        if record.attributes.get(attr.CLRK_BUDGET_DENIED) is True:
            picked.setdefault(attr.CLRK_EGRESS_DENY_REASON, _DENIED_BUDGET)
        elif record.name == attr.SPAN_EGRESS_DNS_DENIED:
            picked.setdefault(attr.CLRK_EGRESS_DENY_REASON, "dns")
        yield Measurement(CLRK_EGRESS_DENIED, 1, picked)
    elif record.kind is SpanKind.CLIENT:
        if attr.HTTP_REQUEST_METHOD in record.attributes:  # of an MCP batch, one span has it
            yield Measurement(HTTP_CLIENT_REQUEST_DURATION, seconds, _pick(record, _HTTP))
        if attr.MCP_METHOD_NAME in record.attributes:
            yield Measurement(MCP_CLIENT_OPERATION_DURATION, seconds, _pick(record, _MCP))
        elif attr.GEN_AI_PROVIDER_NAME in record.attributes:
            yield from _measure_llm(record, seconds)


def _measure_llm(record: SpanRecord, seconds: float) -> Iterator[Measurement]:
    found = record.attributes
    yield Measurement(GEN_AI_CLIENT_OPERATION_DURATION, seconds, _pick(record, (*_GEN_AI, attr.ERROR_TYPE)))
    for kind, name in (("input", attr.GEN_AI_USAGE_INPUT_TOKENS), ("output", attr.GEN_AI_USAGE_OUTPUT_TOKENS)):
        if isinstance(tokens := found.get(name), int):
            yield Measurement(
                GEN_AI_CLIENT_TOKEN_USAGE, tokens, _pick(record, _GEN_AI) | {attr.GEN_AI_TOKEN_TYPE: kind}
            )
    if isinstance(first := found.get(attr.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK), float):
        yield Measurement(GEN_AI_CLIENT_TIME_TO_FIRST_CHUNK, first, _pick(record, (*_GEN_AI, attr.ERROR_TYPE)))
    if isinstance(cost := found.get(attr.CLRK_COST_USD), float) and cost >= 0:
        names = (attr.GEN_AI_OPERATION_NAME, attr.GEN_AI_PROVIDER_NAME, *_MODEL)
        yield Measurement(CLRK_COST_USD, cost, _pick(record, names))


def _pick(record: SpanRecord, names: tuple[str, ...]) -> dict[str, str | bool | int | float]:
    """Return the agent and the named attributes, as far as the span has them; texts are cut."""
    found = record.attributes
    picked: dict[str, str | bool | int | float] = {}
    for name in (*_AGENT, *names):
        value = found.get(name)
        if isinstance(value, str):
            picked[name] = value if len(value) <= _MAX_VALUE_CHARS else value[:_MAX_VALUE_CHARS]
        elif isinstance(value, int | float):  # no list is among the names
            picked[name] = value
    return picked
