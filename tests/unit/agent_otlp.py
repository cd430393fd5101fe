"""An identity, and OTLP bodies as an SDK or an attacker would write them, for the tests of the receiver."""

from __future__ import annotations

import json
import time
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from clrk.core.ids import InvocationId, SandboxId, SpanId, TraceId, new_invocation_id
from clrk.gateway.telemetry.pipeline import identity_attributes
from clrk.gateway.telemetry.receive import Batch, Intake
from clrk.gateway.telemetry.receive_wire import Encoding, Signal
from clrk.gateway.telemetry.spans import Identity, TraceContext
from clrk.gateway.telemetry.token_bucket import TokenBucket

NOW = time.time_ns()
TRACE = "0af7651916cd43dd8448eb211c80319c"
RUN_SPAN = "b7ad6b7169203331"
OTHER_TRACE = "ab" * 16
SPAN_ID = "00000000000000ab"
SPAN = bytes.fromhex(SPAN_ID)
IDENTITY = Identity(
    new_invocation_id(), "TaskAgent", "default", "honest", "uid-1", "rev-1", SandboxId("0badcafe"), "default/egress",
    TraceContext(TraceId(TRACE), SpanId(RUN_SPAN)), (("user", "alice"),),
)  # fmt: skip
DAEMON = Identity(
    InvocationId(""), "DaemonAgent", "default", "daemon", "uid-2", "rev-2", SandboxId("0badcafe"), "default/egress",
    TraceContext(TraceId(TRACE), SpanId(RUN_SPAN)),
)  # fmt: skip
OWN_ATTRIBUTES = {
    "invocation.id": IDENTITY.invocation_id,
    "agent.kind": "TaskAgent",
    "agent.namespace": "default",
    "agent.name": "honest",
    "agent.uid": "uid-1",
    "agent.revision": "rev-1",
    "agent.identity.user": "alice",
    "clrk.sandbox.id": "0badcafe",
}
FORGED = {
    "invocation.id": "victim",
    "agent.kind": "victim",
    "agent.namespace": "victim",
    "agent.name": "victim",
    "agent.uid": "victim",
    "agent.revision": "victim",
    "agent.identity.user": "victim",
    "agent.identity.admin": "victim",
    "clrk.sandbox.id": "victim",
    "clrk.component": "victim",
    "clrk.egress_gateway": "victim",
    "clrk.cost.usd": "victim",
    "clrk.budget.denied": "victim",
    "clrk.of.the.future": "victim",
}


def intake(identity: Identity = IDENTITY, bucket: TokenBucket | None = None) -> Intake:
    return Intake(
        identity, identity_attributes=identity_attributes(identity), host_name="host-1", bucket=bucket or TokenBucket()
    )


def any_value(value: Any) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case list():
            return AnyValue(array_value=ArrayValue(values=[any_value(item) for item in value]))
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=pairs(value)))
        case None:
            return AnyValue()
        case _:
            return AnyValue(string_value=value)


def pairs(attributes: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=any_value(value)) for key, value in attributes.items()]


def make_span(attributes: dict[str, Any] | None = None, **fields: Any) -> Span:
    given: dict[str, Any] = {
        "trace_id": bytes.fromhex(TRACE),
        "span_id": bytes.fromhex(SPAN_ID),
        "name": "work",
        "start_time_unix_nano": NOW - 1000,
        "end_time_unix_nano": NOW,
    }
    return Span(**(given | fields), attributes=pairs(attributes or {}))


def traces(
    *spans: Span, resource: dict[str, Any] | None = None, scope: dict[str, Any] | None = None
) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest(
        resource_spans=[
            ResourceSpans(
                resource=Resource(attributes=pairs(resource or {"service.name": "mine"})),
                scope_spans=[
                    ScopeSpans(
                        scope=InstrumentationScope(name="lib", version="1", attributes=pairs(scope or {})), spans=spans
                    )
                ],
            )
        ]
    )


def read(request: Any, signal: Signal = Signal.TRACES, reader: Intake | None = None) -> Batch:
    """Read a protobuf message, bytes of one, or JSON (a dict, or text)."""
    reader = reader or intake()
    if isinstance(request, dict | str):
        text = request if isinstance(request, str) else json.dumps(request)
        return reader.read(text.encode(), signal, Encoding.JSON, now_ns=NOW)
    raw = request if isinstance(request, bytes) else request.SerializeToString()
    return reader.read(raw, signal, Encoding.PROTOBUF, now_ns=NOW)


def exported(batch: Batch, index: int = 0) -> tuple[ResourceSpans, Span]:
    """Return what an exporter sends for one span."""
    sent = ResourceSpans.FromString(batch.items[index].otlp)
    ((span,),) = [scope.spans for scope in sent.scope_spans]
    return sent, span


def plain(attributes: Any) -> dict[str, Any]:
    """Return attributes as a dict; each name once."""
    names = [pair.key for pair in attributes]
    assert len(names) == len(set(names)), names
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in attributes}


def number(**fields: Any) -> NumberDataPoint:
    return NumberDataPoint(**({"time_unix_nano": NOW, "as_int": 1} | fields))


def metrics(*made: Metric, resource: dict[str, Any] | None = None) -> ExportMetricsServiceRequest:
    return ExportMetricsServiceRequest(
        resource_metrics=[
            ResourceMetrics(
                resource=Resource(attributes=pairs(resource or {})), scope_metrics=[ScopeMetrics(metrics=made)]
            )
        ]
    )


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field as it is on the wire."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)
