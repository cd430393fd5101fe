"""Our span record as the OpenTelemetry SDK's ReadableSpan, the input of the official exporters. Pure."""

from __future__ import annotations

import functools
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace import SpanKind as SdkKind
from opentelemetry.trace.status import Status as SdkStatus
from opentelemetry.trace.status import StatusCode as SdkStatusCode

from clrk import __version__
from clrk.gateway.telemetry.attributes import SCHEMA_URL
from clrk.gateway.telemetry.spans import AttributeValue, SpanKind, SpanRecord, StatusCode

_KINDS: Final = {
    SpanKind.INTERNAL: SdkKind.INTERNAL,
    SpanKind.SERVER: SdkKind.SERVER,
    SpanKind.CLIENT: SdkKind.CLIENT,
}
_CODES: Final = {
    StatusCode.UNSET: SdkStatusCode.UNSET,
    StatusCode.OK: SdkStatusCode.OK,
    StatusCode.ERROR: SdkStatusCode.ERROR,
}
_SCOPE: Final = InstrumentationScope("clrk", __version__, SCHEMA_URL)


def readable_span(record: SpanRecord) -> ReadableSpan:
    """Convert one record; ids, times, kinds, types and order of events are kept."""
    parent = None
    if record.parent_span_id:
        # Only the inbound request's span may have a parent in another process.
        parent = _context(record.trace_id, record.parent_span_id, is_remote=record.kind is SpanKind.SERVER)
    code = _CODES[record.status.code]
    return ReadableSpan(
        name=record.name,
        context=_context(record.trace_id, record.span_id, is_remote=False),
        parent=parent,
        resource=_resource(tuple(sorted(_frozen(record.resource).items()))),
        attributes=_frozen(record.attributes),
        events=[Event(event.name, _frozen(event.attributes), event.time_unix_nano) for event in record.events],
        kind=_KINDS[record.kind],
        # The SDK warns about a description on any other code.
        status=SdkStatus(code, record.status.message if code is SdkStatusCode.ERROR else None),
        start_time=record.start_time_unix_nano,
        end_time=record.end_time_unix_nano,
        instrumentation_scope=_SCOPE,
    )


def _context(trace_id: str, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))


def _frozen(attributes: dict[str, AttributeValue]) -> dict[str, str | bool | int | float | tuple[str, ...]]:
    """Lists become tuples: hashable for the resource cache, and what the SDK expects."""
    return {
        key: value if isinstance(value, str | bool | int | float) else tuple(value) for key, value in attributes.items()
    }


@functools.lru_cache(maxsize=256)
def _resource(items: tuple[tuple[str, str | bool | int | float | tuple[str, ...]], ...]) -> Resource:
    return Resource(dict(items), SCHEMA_URL)
