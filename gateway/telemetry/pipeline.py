"""Telemetry: takes finished spans and log lines from all of the gateway, completes, keeps and exports them."""

from __future__ import annotations

import collections
import logging
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, Self
from urllib.parse import unquote

import msgspec

from clrk import __version__
from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import InvocationId, SpanId, TraceId, new_span_id
from clrk.core.messages import Counters
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.exporters import Exporters, ExportStatus
from clrk.gateway.telemetry.items import STREAM_OTLP, LogItem, MetricsItem
from clrk.gateway.telemetry.metrics_meters import Metrics
from clrk.gateway.telemetry.metrics_prometheus import render
from clrk.gateway.telemetry.own_spans import OwnSpans
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import (
    UNSET,
    Attributes,
    AttributeValue,
    Component,
    Identity,
    SpanEvent,
    SpanKind,
    SpanRecord,
    Status,
)
from clrk.gateway.telemetry.store import FILE_NAME, TraceStore

_log = logging.getLogger(__name__)

MAX_VALUE_CHARS: Final = 8192
MAX_BODY_CHARS: Final = 5 * 2**20  # captureBody.maxBytes goes up to 4 MiB, and redacting may add to it
_BODIES: Final = frozenset((attr.HTTP_REQUEST_BODY_CONTENT, attr.HTTP_RESPONSE_BODY_CONTENT))
MAX_ATTRIBUTES: Final = 256
MAX_LINE_BYTES: Final = 16_384
MAX_LOG_BYTES: Final = 1024 * 1024  # per invocation
_MAX_LOG_LINES: Final = 20_000  # per invocation
_DAEMON_WINDOW_NS: Final = 60 * 10**9  # a daemon may say that much in each minute
_MAX_LOG_METERS: Final = 4096
_INT64: Final = 2**63
_EXPORT_GRACE_S: Final = 2.0


class Telemetry:
    """Implements Recorder over the embedded store. Use from the event loop that opened it."""

    def __init__(self, store: TraceStore, environment: Mapping[str, str]) -> None:
        self.store = store
        self._base_resource = _base_resource(environment)
        self.metrics = Metrics(self._base_resource)
        self._exporters = Exporters(store, self.metrics, environment, self._base_resource)
        self.metrics.host.drops = lambda: dict(store.counters)
        self.metrics.host.exports = self._exporters.totals
        self._own_spans = OwnSpans()
        self._log_meters: collections.OrderedDict[str, list[int]] = collections.OrderedDict()

    @classmethod
    def open(cls, state_dir: Path, config: GatewayConfig) -> Self:
        """Open the store in state_dir and start the exporters. Call inside the running loop.

        Never raises for a disk that is full or read-only: the store keeps trying, and counts what it drops.
        """
        environment = {key: str(value) for key, value in config.environment.items()}
        store = TraceStore(state_dir / FILE_NAME, retention_s=config.runtime.retention)
        telemetry = cls(store, environment)
        telemetry.reconfigure(config)
        return telemetry

    def record(
        self,
        identity: Identity,
        *,
        component: Component,
        name: str,
        kind: SpanKind,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        status: Status = UNSET,
        events: Sequence[SpanEvent] = (),
        span_id: SpanId | None = None,
        parent_span_id: str | None = None,
        trace_id: TraceId | None = None,
    ) -> None:
        """Complete and keep a span; see Recorder. Never raises, never blocks."""
        try:
            record = SpanRecord(
                trace_id=trace_id or identity.context.trace_id,
                span_id=span_id or new_span_id(),
                parent_span_id=identity.context.span_id if parent_span_id is None else parent_span_id,
                name=_clean_text(name),
                kind=kind,
                start_time_unix_nano=start_ns,
                end_time_unix_nano=max(start_ns, end_ns),
                status=Status(status.code, _clean_text(status.message)),
                attributes=clean_attributes(attributes) | identity_attributes(identity),
                events=[SpanEvent(e.name, e.time_unix_nano, clean_attributes(e.attributes)) for e in events],
                resource=self._resource(component, identity.egress_gateway),
            )
            self._own_spans.add(record.trace_id, record.span_id)
            gateway = _gateway_key(identity)
            self.store.add_span(
                record, invocation_id=identity.invocation_id, gateway=gateway, sampled=identity.context.sampled
            )
            self.metrics.take(record, gateway)
        except Exception:  # the telemetry edge: what a span looked like must never break the call it describes
            self.store.counters["dropped_bad_item"] += 1
            _log.exception("span %.64r could not be recorded", name)

    def begin(
        self,
        identity: Identity,
        *,
        component: Component,
        name: str,
        kind: SpanKind,
        start_ns: int,
        span_id: SpanId,
        parent_span_id: str | None = None,
        trace_id: TraceId | None = None,
        attributes: Attributes | None = None,
    ) -> None:
        """Note in the journal that a span has begun; see Recorder. Never raises.

        Cost: one write to a file, some ten microseconds.
        """
        try:
            record = SpanRecord(
                trace_id=trace_id or identity.context.trace_id,
                span_id=span_id,
                parent_span_id=identity.context.span_id if parent_span_id is None else parent_span_id,
                name=_clean_text(name),
                kind=kind,
                start_time_unix_nano=start_ns,
                end_time_unix_nano=start_ns,
                attributes=clean_attributes(attributes or {}) | identity_attributes(identity),
                resource=self._resource(component, identity.egress_gateway),
            )
            self._own_spans.add(record.trace_id, record.span_id)
            self.store.begin_span(record, gateway=_gateway_key(identity), sampled=identity.context.sampled)
        except Exception:  # the telemetry edge, as in record
            self.store.counters["dropped_bad_item"] += 1
            _log.exception("span %.64r could not be begun", name)

    def record_invocation(self, record: InvocationRecord) -> None:
        """Keep the record in place of an earlier one of the same invocation. Never raises, never blocks."""
        self._own_spans.add(record.trace_id, record.dispatch_span_id, record.run_span_id)
        self.store.add_invocation(record)

    def is_own_span(self, trace_id: str, span_id: str) -> bool:
        """Say whether a span id is that of a span of clrk: an agent's may not take it."""
        return self._own_spans.has(trace_id, span_id)

    def count_refused(self, signal: str, count: int) -> None:
        """Count items that an agent's SDK sent and that are not kept. signal: traces, logs or metrics."""
        self.store.counters[f"refused_agent_{signal}"] += count

    def record_agent_span(self, identity: Identity, record: SpanRecord, otlp: bytes) -> None:
        """Keep a span that the agent reported itself. Never raises, never blocks.

        Shape: record has the identity's attributes, and clrk.component `agent` in its resource; otlp is a serialised
        opentelemetry.proto ResourceSpans with this one span, the identity set: exporters send it as it is.
        """
        self.store.add_span(
            record,
            invocation_id=identity.invocation_id,
            gateway=_gateway_key(identity),
            sampled=identity.context.sampled,
            otlp=otlp,
        )

    def record_agent_log(
        self, identity: Identity, *, time_ns: int, severity: int, body: str, trace_id: str, span_id: str, otlp: bytes
    ) -> None:
        """Keep a log record of the agent's SDK; the receiver's Meter bounds them. Never raises, never blocks.

        Shape: severity is an OTLP SeverityNumber, body the record's text; otlp a serialised ResourceLogs.
        """
        line = body[:MAX_LINE_BYTES].encode("utf-8", "replace")[:MAX_LINE_BYTES]
        item = _log_item(identity, STREAM_OTLP, line, time_ns)
        item = msgspec.structs.replace(item, trace_id=trace_id, span_id=span_id, severity=severity, otlp=otlp)
        self.store.add_log(item)

    def record_agent_metrics(self, identity: Identity, *, time_ns: int, otlp: bytes) -> None:
        """Keep what the agent's SDK measured: a serialised ResourceMetrics. Never raises, never blocks."""
        self.store.add_metrics(
            MetricsItem(
                identity.invocation_id, identity.agent_namespace, identity.agent_name, _gateway_key(identity),
                time_ns, otlp,
            )
        )  # fmt: skip

    def record_log(self, identity: Identity, stream: str, line: bytes, time_ns: int) -> None:
        """Keep one line of the agent's output, without its newline. Bounded per invocation; never raises.

        Shape: stream is `stdout` or `stderr`; a line over MAX_LINE_BYTES is cut.
        """
        line = line[:MAX_LINE_BYTES]
        self._keep_log(identity, _log_item(identity, stream, line, time_ns), len(line))

    def _keep_log(self, identity: Identity, item: LogItem, size_bytes: int) -> None:
        """Keep it if the allowance goes so far, and say once where it ends.

        An invocation has one allowance. A daemon, which may live for months, has one in each _DAEMON_WINDOW_NS.
        """
        window = 0 if identity.invocation_id else item.time_ns // _DAEMON_WINDOW_NS
        key = identity.invocation_id or f"{identity.agent_namespace}/{identity.agent_name}"
        meter = self._log_meters.setdefault(key, [0, 0, window])
        if len(self._log_meters) > _MAX_LOG_METERS:
            self._log_meters.popitem(last=False)
        if meter[2] != window:
            meter[:] = [0, 0, window]
        if meter[0] >= MAX_LOG_BYTES or meter[1] >= _MAX_LOG_LINES:
            self.store.counters["dropped_log_lines"] += 1
            return
        meter[0] += size_bytes
        meter[1] += 1
        self.store.add_log(item)
        if meter[0] >= MAX_LOG_BYTES or meter[1] >= _MAX_LOG_LINES:
            text = b"output limit reached: further lines are not kept"
            self.store.add_log(_log_item(identity, "clrk", text, item.time_ns))

    def seen_invocation(self, invocation_id: InvocationId | str) -> bool:
        """Say whether spans of this invocation were recorded within the retention window."""
        return self.store.seen_invocation(invocation_id)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Follow a new configuration: retention, and one exporter per EgressGateway that has `otlp`."""
        self.store.set_retention(config.runtime.retention)
        self._exporters.reconfigure(config)
        self.store.set_exporters(self._exporters.names)

    def watch_host(self, counters: Callable[[], Counters]) -> None:
        """Show what the runtime counts, the kernel's counters and sandboxes, as metrics."""
        self.metrics.host.kernel = lambda: counters().values
        self.metrics.host.sandboxes = lambda: counters().sandboxes

    async def export_status(self) -> list[ExportStatus]:
        """Return how each exporter stands with each signal."""
        return await self._exporters.status()

    def render_prometheus(self) -> tuple[bytes, str]:
        """Return all metrics as Prometheus text, and its Content-Type. Cost: milliseconds; any thread may call it."""
        return render(self.metrics.read(lambda _gateway: True, with_host=True))

    async def flush(self) -> bool:
        """Wait until everything recorded so far is in the store; False when the disk does not follow."""
        return await self.store.flush()

    async def close(self) -> None:
        """Write everything, give healthy backends a moment to take the rest, end all threads. Idempotent."""
        await self.store.flush()
        await self._exporters.close(_EXPORT_GRACE_S)
        await self.store.close()

    def _resource(self, component: Component, egress_gateway: str) -> dict[str, AttributeValue]:
        resource = {**self._base_resource, attr.CLRK_COMPONENT: component.value}
        if egress_gateway:
            resource[attr.CLRK_EGRESS_GATEWAY] = egress_gateway
        return resource


def identity_attributes(identity: Identity) -> dict[str, AttributeValue]:
    """Return what every span of an invocation carries (CONTRACT section 13)."""
    values: dict[str, AttributeValue] = {
        attr.AGENT_KIND: identity.agent_kind,
        attr.AGENT_NAMESPACE: identity.agent_namespace,
        attr.AGENT_NAME: identity.agent_name,
        attr.AGENT_UID: identity.agent_uid,
        attr.AGENT_REVISION: identity.agent_revision,
    }
    if identity.invocation_id:  # a daemon has none
        values[attr.INVOCATION_ID] = identity.invocation_id
    if identity.sandbox_id:
        values[attr.CLRK_SANDBOX_ID] = identity.sandbox_id
    for field, value in identity.caller_fields:
        values[attr.AGENT_IDENTITY_PREFIX + field] = value
    return values


def clean_attributes(attributes: Attributes) -> dict[str, AttributeValue]:
    """Return attributes that OTLP and the store can hold: bounded, typed, finite, valid Unicode.

    Values come from agents and upstreams; what does not fit is cut or left out, never an error.
    """
    cleaned: dict[str, AttributeValue] = {}
    for key, value in islice(attributes.items(), MAX_ATTRIBUTES):
        match value:
            case str() if type(value) is str and len(value) <= MAX_VALUE_CHARS and value.isascii():
                cleaned[key] = value  # most are
            case str():
                cleaned[key] = _clean_text(value, MAX_BODY_CHARS if key in _BODIES else MAX_VALUE_CHARS)
            case bool():
                cleaned[key] = value
            case int():
                cleaned[key] = value if -_INT64 <= value < _INT64 else max(-_INT64, min(_INT64 - 1, value))
            case float():
                if math.isfinite(value):
                    cleaned[key] = value
            case _:
                cleaned[key] = [_clean_text(item) for item in value[:MAX_ATTRIBUTES]]
    return cleaned


def _clean_text(text: str, limit: int = MAX_VALUE_CHARS) -> str:
    text = str(text)[:limit]
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, as surrogateescape makes them


def _base_resource(environment: Mapping[str, str]) -> dict[str, AttributeValue]:
    """Return the resource of all spans. Ours win over OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME wins over ours."""
    resource: dict[str, AttributeValue] = {}
    for pair in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, equals, value = pair.partition("=")
        if equals and key.strip():
            resource[key.strip()] = unquote(value.strip())
    resource[attr.SERVICE_NAME] = environment.get("OTEL_SERVICE_NAME") or "clrk"
    resource[attr.SERVICE_VERSION] = __version__
    resource[attr.HOST_NAME] = socket.gethostname()
    return resource


def _gateway_key(identity: Identity) -> str:
    """Return namespace/name of the identity's EgressGateway, which is in the agent's own namespace."""
    gateway = identity.egress_gateway
    return gateway if not gateway or "/" in gateway else f"{identity.agent_namespace}/{gateway}"


def _log_item(identity: Identity, stream: str, line: bytes, time_ns: int) -> LogItem:
    """Return a line of the run; a daemon's belongs to no trace."""
    within = bool(identity.invocation_id)
    return LogItem(
        identity.invocation_id, identity.agent_namespace, identity.agent_name, stream, time_ns, line,
        agent_kind=identity.agent_kind, agent_uid=identity.agent_uid, agent_revision=identity.agent_revision,
        sandbox_id=identity.sandbox_id, caller_fields=identity.caller_fields, gateway=_gateway_key(identity),
        trace_id=identity.context.trace_id if within else "", span_id=identity.context.span_id if within else "",
        sampled=identity.context.sampled,
    )  # fmt: skip
