"""What the store's writer is given; the kinds with a tag are also the frames of the journal. Pure values."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import msgspec

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Component, SpanRecord

STREAM_OTLP: Final = "otlp"  # of log records that came through the sandbox's OTLP receiver

_SPAN_OVERHEAD_BYTES: Final = 2048  # a span without large attributes, as Python objects
_ITEM_OVERHEAD_BYTES: Final = 400


class SpanItem(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A finished span. gateway is namespace/name of its EgressGateway, or empty.

    Shape: otlp is a serialised opentelemetry.proto ResourceSpans with this one span for an agent's own span, which is
    exported as it came (with the identity set); None for clrk's own.
    """

    record: SpanRecord
    gateway: str
    sampled: bool = True
    otlp: bytes | None = None


class BeginItem(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """A span that has begun; its end is not known and no status is set. Only ever in the journal."""

    record: SpanRecord
    gateway: str
    sampled: bool = True


class LogItem(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """A line of an agent's output, or a log record of its SDK (stream STREAM_OTLP, with otlp).

    Shape: severity is an OTLP SeverityNumber, 0 unspecified; otlp a serialised ResourceLogs with this one record.
    """

    invocation_id: str
    agent_namespace: str
    agent_name: str
    stream: str
    time_ns: int
    line: bytes
    agent_kind: str = ""
    agent_uid: str = ""
    agent_revision: str = ""
    sandbox_id: str = ""
    caller_fields: tuple[tuple[str, str], ...] = ()
    gateway: str = ""
    trace_id: str = ""
    span_id: str = ""
    sampled: bool = True
    severity: int = 0
    otlp: bytes | None = None


class MetricsItem(msgspec.Struct, frozen=True, array_like=True, tag="m"):
    """What an agent's SDK measured: a serialised ResourceMetrics, with the identity set."""

    invocation_id: str
    namespace: str
    name: str
    gateway: str
    time_ns: int
    otlp: bytes


class InvocationItem(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    """How an invocation stands now."""

    record: InvocationRecord


@dataclass(frozen=True, slots=True)
class CursorItem:
    """How far an exporter has come with a signal. Not in the journal: an older cursor only sends something again."""

    exporter: str
    signal: str
    seq: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """Resolved when everything put before it is in the file, or can not be."""

    done: Future[None]


@dataclass(frozen=True, slots=True)
class Lost:
    """Every invocation that is not over ended with the gateway that ran it. Units: CLOCK_REALTIME nanoseconds."""

    ended_ns: int


Journaled = SpanItem | BeginItem | LogItem | MetricsItem | InvocationItem
JOURNALED: Final = (SpanItem, LogItem, MetricsItem, InvocationItem)
Item = SpanItem | LogItem | MetricsItem | InvocationItem | CursorItem | Barrier | Lost

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Journaled]] = msgspec.msgpack.Decoder(Journaled)


def encode(item: Journaled) -> bytes:
    """Return the journal's payload. Raises: MsgspecError, OverflowError or UnicodeError for what can not be kept."""
    return _ENCODER.encode(item)


def decode(payload: bytes) -> Journaled:
    """Read a payload back. Raises: MsgspecError, UnicodeError."""
    return _DECODER.decode(payload)


def is_agents_own(item: SpanItem) -> bool:
    """Say whether an agent reported the span itself: then nothing is concluded from it."""
    return item.otlp is not None or item.record.resource.get(attr.CLRK_COMPONENT) == Component.AGENT


def size_bytes(item: Item, payload: bytes | None) -> int:
    """Estimate the memory of an item from its payload; 0 for those that must always get through."""
    if payload is None:
        return 0
    return len(payload) + (_SPAN_OVERHEAD_BYTES if isinstance(item, SpanItem) else _ITEM_OVERHEAD_BYTES)
