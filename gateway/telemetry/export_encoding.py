"""Our spans and log lines as OTLP messages (opentelemetry-proto). Pure; for a thread beside the event loop.

The three export requests have one shape: field 1, repeated, holds what one resource said. Such groups are encoded here
one by one and joined as bytes, so that what an agent's SDK sent goes out as it came, between ours and in its order.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Final, TypeVar

import msgspec
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs, SeverityNumber
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, SpanFlags
from opentelemetry.proto.trace.v1.trace_pb2 import Status as SpanStatus

from clrk import __version__
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.outbox import StoredLog
from clrk.gateway.telemetry.query import StoredSpan
from clrk.gateway.telemetry.spans import AttributeValue, Component, SpanRecord, StatusCode

_RESOURCE_FIELD: Final = b"\x0a"  # field 1, length-delimited, of every Export…ServiceRequest
_SCOPE: Final = InstrumentationScope(name="clrk", version=__version__)
_DECODER: Final = msgspec.json.Decoder(SpanRecord)
_SAMPLED: Final = 1  # W3C trace flag: what is not sampled is not exported
_SHORT: Final = 64
_IOSTREAMS: Final = ("stdout", "stderr")

T = TypeVar("T")

ResourceItems = tuple[tuple[str, AttributeValue], ...]


def join_groups(groups: Iterable[bytes]) -> bytes:
    """Return the export request that holds these serialised ResourceSpans, ResourceLogs or ResourceMetrics."""
    parts: list[bytes] = []
    for group in groups:
        parts += (_RESOURCE_FIELD, _varint(len(group)), group)
    return b"".join(parts)


def span_groups(rows: Iterable[StoredSpan]) -> Iterator[bytes]:
    """Yield serialised ResourceSpans for spans, and for what agents' SDKs sent as it came.

    Order is kept to the letter: neighbours of one resource share a group, and nothing overtakes.
    """
    decoded = ((row.otlp, None if row.otlp is not None else _DECODER.decode(row.json)) for row in rows)
    for _, run in groupby(enumerate(decoded), key=_resource_key):
        members = [member for _, member in run]
        otlp, first = members[0]
        if first is None:
            yield otlp or b""
            continue
        spans = [encode_span(record) for record in _unhurried(record for _, record in members) if record is not None]
        scope = ScopeSpans(scope=_SCOPE, spans=spans, schema_url=attr.SCHEMA_URL)
        resource = encode_resource(frozen_items(first.resource))
        yield ResourceSpans(resource=resource, scope_spans=[scope], schema_url=attr.SCHEMA_URL).SerializeToString()


def _unhurried(rows: Iterable[T]) -> Iterator[T]:
    """Give the interpreter away between rows: the event loop would otherwise wait 5 ms for it, and calls with it."""
    for row in rows:
        time.sleep(0)
        yield row


def _resource_key(item: tuple[int, tuple[bytes | None, SpanRecord | None]]) -> object:
    index, (_, record) = item
    return index if record is None else frozen_items(record.resource)


def encode_span(record: SpanRecord) -> Span:
    """Convert one record; ids, times, kinds, types and order of events are kept."""
    flags = _SAMPLED | SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
    if record.parent_span_id and record.kind == "SPAN_KIND_SERVER":
        flags |= SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK  # only an inbound request has its parent elsewhere
    return Span(
        trace_id=bytes.fromhex(record.trace_id),
        span_id=bytes.fromhex(record.span_id),
        parent_span_id=bytes.fromhex(record.parent_span_id),
        flags=flags,
        name=record.name,
        kind=Span.SpanKind.Value(record.kind),
        start_time_unix_nano=record.start_time_unix_nano,
        end_time_unix_nano=record.end_time_unix_nano,
        attributes=encode_attributes(record.attributes),
        events=[
            Span.Event(
                time_unix_nano=event.time_unix_nano, name=event.name, attributes=encode_attributes(event.attributes)
            )
            for event in record.events
        ],
        status=SpanStatus(
            code=SpanStatus.StatusCode.Value(record.status.code),
            message=record.status.message if record.status.code is StatusCode.ERROR else "",
        ),
    )


def log_groups(rows: Iterable[StoredLog], base: Mapping[str, AttributeValue]) -> Iterator[bytes]:
    """Yield serialised ResourceLogs for lines, and for what agents' SDKs sent as it came; order is kept.

    Shape: base is the resource without component and gateway.
    """
    for _, run in groupby(enumerate(rows), key=lambda item: item[1].gateway if item[1].otlp is None else item[0]):
        lines = [line for _, line in run]
        if lines[0].otlp is not None:
            yield lines[0].otlp
            continue
        records = [_log_record(line) for line in _unhurried(lines)]
        scope = ScopeLogs(scope=_SCOPE, log_records=records, schema_url=attr.SCHEMA_URL)
        resource = encode_resource(resource_items(base, Component.RUNTIME, lines[0].gateway))
        yield ResourceLogs(resource=resource, scope_logs=[scope], schema_url=attr.SCHEMA_URL).SerializeToString()


def _log_record(line: StoredLog) -> LogRecord:
    """What an agent writes is INFO on either stream: programs write to stderr whatever is no answer, also progress."""
    ours = line.stream not in _IOSTREAMS  # clrk's own remark, that lines were left out
    attributes = line.identity if ours else line.identity | {attr.LOG_IOSTREAM: line.stream}
    return LogRecord(
        time_unix_nano=line.time_ns,
        observed_time_unix_nano=line.time_ns,
        severity_number=SeverityNumber.SEVERITY_NUMBER_WARN if ours else SeverityNumber.SEVERITY_NUMBER_INFO,
        severity_text="WARN" if ours else "INFO",
        body=AnyValue(string_value=line.line.decode("utf-8", "replace")),
        attributes=encode_attributes(attributes),
        flags=_SAMPLED if line.sampled and line.trace_id else 0,
        trace_id=bytes.fromhex(line.trace_id),
        span_id=bytes.fromhex(line.span_id),
    )


def resource_items(base: Mapping[str, AttributeValue], component: Component, egress_gateway: str) -> ResourceItems:
    """Return the resource of what a component says about a gateway's agents (CONTRACT section 13)."""
    resource = {**base, attr.CLRK_COMPONENT: component.value}
    if egress_gateway:
        resource[attr.CLRK_EGRESS_GATEWAY] = egress_gateway
    return frozen_items(resource)


def frozen_items(attributes: Mapping[str, AttributeValue]) -> ResourceItems:
    """Return attributes in a form that can be compared and kept as a key."""
    return tuple(
        (key, value if isinstance(value, str | bool | int | float) else tuple(value))
        for key, value in sorted(attributes.items())
    )


@functools.lru_cache(maxsize=256)
def encode_resource(items: ResourceItems) -> Resource:
    """Return the message; do not change it, it is shared."""
    return Resource(attributes=encode_attributes(dict(items)))


def encode_attributes(attributes: Mapping[str, AttributeValue]) -> list[KeyValue]:
    """Return the attributes with their types kept; do not change them, some are shared."""
    return [
        _known_pair(key, value)
        if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _SHORT)
        else KeyValue(key=key, value=_any_value(value))
        for key, value in attributes.items()
    ]


@functools.lru_cache(maxsize=8192, typed=True)  # typed: 1, 1.0 and True are equal, and three attributes
def _known_pair(key: str, value: str | bool | int | float) -> KeyValue:
    # Agents, models, hosts and states repeat on every span: making them anew is most of the work.
    return KeyValue(key=key, value=_any_value(value))


def _any_value(value: AttributeValue) -> AnyValue:
    match value:
        case bool():  # before int, which it is too
            return AnyValue(bool_value=value)
        case str():
            return AnyValue(string_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case _:
            return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=item) for item in value]))


def _varint(number: int) -> bytes:
    """Encode a length (protobuf, "Base 128 Varints")."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
