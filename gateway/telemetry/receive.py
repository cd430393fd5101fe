"""What an agent's own OpenTelemetry SDK reports, made safe to keep and to pass on (CONTRACT section 13). Pure.

Whatever a body says about who it is from is dropped, and the run's identity is put in its place; what is left is the
agent's word, marked as such by clrk.component=agent. A TaskAgent's spans all belong to the trace of its invocation:
those of another trace are moved into it, and roots hang below `invoke_agent`, so that an SDK which never heard of
TRACEPARENT is in the right place. A daemon's trace ids stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, ResourceMetrics, ScopeMetrics
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as OtlpStatus

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.receive_points import clean_metric
from clrk.gateway.telemetry.receive_traces import RefusedItemError, Traces, is_plausible
from clrk.gateway.telemetry.receive_values import (
    MAX_KEPT_CHARS,
    MAX_NAME_CHARS,
    bounded_count,
    clean_attributes,
    clean_body,
    clean_resource,
    clean_scope,
    key_values,
    project,
    project_value,
)
from clrk.gateway.telemetry.receive_wire import Encoding, M, RawGroup, ReceiveError, Signal, decode, split
from clrk.gateway.telemetry.spans import (
    AttributeValue,
    Component,
    Identity,
    SpanEvent,
    SpanKind,
    SpanRecord,
    Status,
    StatusCode,
)
from clrk.gateway.telemetry.token_bucket import TokenBucket

_MAX_SPAN_NAME: Final = 1024
_MAX_EVENTS: Final = 128
_MAX_URL_CHARS: Final = 512
_KINDS: Final = {
    Span.SPAN_KIND_SERVER: SpanKind.SERVER,
    Span.SPAN_KIND_CLIENT: SpanKind.CLIENT,
    Span.SPAN_KIND_PRODUCER: SpanKind.PRODUCER,
    Span.SPAN_KIND_CONSUMER: SpanKind.CONSUMER,
}
_CODES: Final = {OtlpStatus.STATUS_CODE_OK: StatusCode.OK, OtlpStatus.STATUS_CODE_ERROR: StatusCode.ERROR}


@dataclass(frozen=True, slots=True)
class AgentSpan:
    """An agent's own span: as the store shows it, and as it is exported (ResourceSpans with this one span)."""

    record: SpanRecord
    otlp: bytes


@dataclass(frozen=True, slots=True)
class AgentLog:
    """A log record of an agent's SDK; otlp is ResourceLogs with this one record. severity is OTLP's SeverityNumber."""

    time_ns: int
    text: str
    severity: int
    trace_id: str
    span_id: str
    otlp: bytes


@dataclass(frozen=True, slots=True)
class AgentMetric:
    """A metric of an agent's SDK; otlp is ResourceMetrics with this one metric."""

    time_ns: int
    otlp: bytes


Received = AgentSpan | AgentLog | AgentMetric


@dataclass(frozen=True, slots=True)
class Batch:
    """What came of one request; rejected counts items (of metrics, data points) by reason."""

    items: list[Received]
    rejected: Counter[str]


class Intake:
    """Reads the requests of one run, one after another.

    Shape: resource are the attributes that clrk alone sets on the resource, beside clrk.component; identity those of
        every item.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        identity_attributes: Mapping[str, AttributeValue],
        host_name: str,
        bucket: TokenBucket,
    ) -> None:
        self._bucket = bucket
        self._traces = Traces(identity)
        self._identity_values = dict(identity_attributes)
        self._identity_pairs = key_values(identity_attributes)
        ours: dict[str, AttributeValue] = {attr.CLRK_COMPONENT: Component.AGENT.value, attr.HOST_NAME: host_name}
        if identity.egress_gateway:
            ours[attr.CLRK_EGRESS_GATEWAY] = identity.egress_gateway
        self._resource_pairs = key_values(ours)

    def read(self, body: bytes, signal: Signal, encoding: Encoding, *, now_ns: int) -> Batch:
        """Take a plain body apart. Cost: bounded by receive_wire's limits and the bucket.

        Raises: ReceiveError when the body is no request at all.
        """
        batch = Batch([], Counter())
        linked: list[tuple[bytes, _Head]] = []
        for group in split(body, signal, encoding):
            head = self._head(group, signal, encoding)
            for raw in group.items:
                if not self._take(raw, head, signal, encoding, batch, now_ns=now_ns, links=False):
                    linked.append((raw, head))
        for raw, head in linked:  # only now all trace ids are known that links may lead to
            self._take(raw, head, signal, encoding, batch, now_ns=now_ns, links=True)
        return batch

    def _head(self, group: RawGroup, signal: Signal, encoding: Encoding) -> _Head:
        """Clean what stands above the items; what can not be read is as good as absent."""
        resource = _decode_head(group.resource, Resource(), encoding)
        scope = _decode_head(group.scope, InstrumentationScope(), encoding)
        ours = self._resource_pairs
        if signal is Signal.METRICS:  # on the resource: on every point they would multiply the series of a backend
            ours = [*ours, *self._identity_pairs]
        cleaned = clean_resource(resource, ours)
        return _Head(
            cleaned, _url(group.resource_schema), clean_scope(scope), _url(group.scope_schema),
            project(cleaned.attributes) if signal is Signal.TRACES else {},
        )  # fmt: skip

    def _take(
        self,
        raw: bytes,
        head: _Head,
        signal: Signal,
        encoding: Encoding,
        batch: Batch,
        *,
        now_ns: int,
        links: bool,
    ) -> bool:
        """Read one item into the batch; False when it is a span with links, and those are not asked for yet."""
        if not self._bucket.is_open:
            batch.rejected["over this run's limit"] += 1
            return True
        made: Received
        try:
            match signal:
                case Signal.TRACES:
                    span = decode(raw, Span(), encoding)
                    if span.links and not links:
                        self._traces.note(span.trace_id)
                        return False
                    made = self._span(span, head, now_ns)
                case Signal.LOGS:
                    made = self._log(decode(raw, LogRecord(), encoding), head, now_ns)
                case Signal.METRICS:
                    made = self._metric(decode(raw, Metric(), encoding), head, now_ns, batch)
        except ReceiveError as exc:
            batch.rejected[str(exc)] += 1
            return True
        except RefusedItemError as exc:
            batch.rejected[str(exc)] += exc.count
            return True
        self._bucket.take(len(made.otlp))
        batch.items.append(made)
        return True

    # --- spans ------------------------------------------------------------------------------------------------------

    def _span(self, span: Span, head: _Head, now_ns: int) -> AgentSpan:
        self._traces.place(span)
        if not is_plausible(span.start_time_unix_nano, now_ns):
            raise RefusedItemError("start time out of range")
        if span.end_time_unix_nano < span.start_time_unix_nano or not is_plausible(span.end_time_unix_nano, now_ns):
            span.end_time_unix_nano = span.start_time_unix_nano
        span.name = span.name[:_MAX_SPAN_NAME]
        span.status.message = span.status.message[:MAX_KEPT_CHARS]
        cleaned = clean_attributes(span.attributes)
        del span.attributes[:]
        span.attributes.extend([*cleaned.values, *self._identity_pairs])
        span.dropped_attributes_count = bounded_count(span.dropped_attributes_count + cleaned.dropped)
        _clean_events(span, now_ns)
        self._traces.clean_links(span)
        otlp = ResourceSpans(
            resource=head.resource,
            schema_url=head.resource_schema,
            scope_spans=[ScopeSpans(scope=head.scope, schema_url=head.scope_schema, spans=[span])],
        ).SerializeToString()
        return AgentSpan(self._record(span, cleaned.values, head), otlp)

    def _record(self, span: Span, theirs: list[KeyValue], head: _Head) -> SpanRecord:
        code = _CODES.get(span.status.code, StatusCode.UNSET)
        return SpanRecord(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex(),
            name=span.name,
            kind=_KINDS.get(span.kind, SpanKind.INTERNAL),
            start_time_unix_nano=span.start_time_unix_nano,
            end_time_unix_nano=span.end_time_unix_nano,
            status=Status(code, span.status.message if code is StatusCode.ERROR else ""),
            attributes=project(theirs) | self._identity_values,
            events=[SpanEvent(event.name, event.time_unix_nano, project(event.attributes)) for event in span.events],
            resource=head.projected,
        )

    # --- logs -------------------------------------------------------------------------------------------------------

    def _log(self, log: LogRecord, head: _Head, now_ns: int) -> AgentLog:
        if not log.observed_time_unix_nano or not is_plausible(log.observed_time_unix_nano, now_ns):
            log.observed_time_unix_nano = now_ns
        time_ns = log.time_unix_nano or log.observed_time_unix_nano
        if not is_plausible(time_ns, now_ns):
            raise RefusedItemError("time out of range")
        self._traces.place_log(log)
        if log.severity_number not in range(25):
            log.severity_number = 0  # type: ignore[assignment]  # the enum's stub does not take its own zero
        log.severity_text = log.severity_text[:64]
        log.event_name = log.event_name[:MAX_NAME_CHARS]
        log.body.CopyFrom(clean_body(log.body))
        cleaned = clean_attributes(log.attributes)
        del log.attributes[:]
        log.attributes.extend([*cleaned.values, *self._identity_pairs])
        log.dropped_attributes_count = bounded_count(log.dropped_attributes_count + cleaned.dropped)
        otlp = ResourceLogs(
            resource=head.resource,
            schema_url=head.resource_schema,
            scope_logs=[ScopeLogs(scope=head.scope, schema_url=head.scope_schema, log_records=[log])],
        ).SerializeToString()
        text = str(project_value(log.body)) or log.event_name
        return AgentLog(time_ns, text, int(log.severity_number), log.trace_id.hex(), log.span_id.hex(), otlp)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _metric(self, metric: Metric, head: _Head, now_ns: int, batch: Batch) -> AgentMetric:
        time_ns = clean_metric(metric, self._traces, now_ns=now_ns, rejected=batch.rejected)
        otlp = ResourceMetrics(
            resource=head.resource,
            schema_url=head.resource_schema,
            scope_metrics=[ScopeMetrics(scope=head.scope, schema_url=head.scope_schema, metrics=[metric])],
        ).SerializeToString()
        return AgentMetric(time_ns, otlp)


@dataclass(frozen=True, slots=True)
class _Head:
    """What the items of one group share, cleaned; projected is the resource as a span record has it."""

    resource: Resource
    resource_schema: str
    scope: InstrumentationScope
    scope_schema: str
    projected: dict[str, AttributeValue]


def _decode_head(raw: bytes, empty: M, encoding: Encoding) -> M:
    try:
        return decode(raw, empty, encoding)
    except ReceiveError:
        empty.Clear()
        return empty


def _clean_events(span: Span, now_ns: int) -> None:
    kept = []
    for event in _first(span, _MAX_EVENTS):
        cleaned = clean_attributes(event.attributes)
        time_ns = event.time_unix_nano
        kept.append(
            Span.Event(
                time_unix_nano=time_ns if is_plausible(time_ns, now_ns) else span.start_time_unix_nano,
                name=event.name[:MAX_NAME_CHARS],
                attributes=cleaned.values,
                dropped_attributes_count=bounded_count(event.dropped_attributes_count + cleaned.dropped),
            )
        )
    span.dropped_events_count = bounded_count(span.dropped_events_count + len(span.events) - len(kept))
    del span.events[:]
    span.events.extend(kept)


def _first(span: Span, count: int) -> Iterator[Span.Event]:
    for index in range(min(count, len(span.events))):
        yield span.events[index]


def _url(text: str) -> str:
    return text if len(text) <= _MAX_URL_CHARS else ""
