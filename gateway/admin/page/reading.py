"""Reading what a waterfall needs from the store, bounded: an invocation may have any number of spans of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from clrk.gateway.admin.page.waterfall import Axis, Place, Row, SpanLink, tree_order
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.store import TraceStore

MAX_SPANS: Final = 20_000
PAGE_ROWS: Final = 200
_MAX_BYTES: Final = 128 * 2**20
_LINKS: Final = msgspec.json.Decoder(SpanLink)


@dataclass(frozen=True, slots=True)
class SpanSet:
    """The spans of an invocation or of a trace, as JSON, by start time. unread: there are more."""

    raw: Sequence[bytes]
    unread: bool


class Times(Protocol):
    """When an invocation was, from its record. Units: CLOCK_REALTIME nanoseconds, 0: not yet."""

    @property
    def created_ns(self) -> int:
        """Its beginning."""

    @property
    def ended_ns(self) -> int:
        """Its end."""


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The rows of one page of a waterfall. first is the number of rows before them, more of those behind."""

    rows: list[tuple[Row, dict[str, Any]]]
    total: int
    first: int
    more: int
    ticks: list[str]


async def read_spans(store: TraceStore, wanted: SpanFilter) -> SpanSet:
    """Return the spans, as many as a page draws. Raises: StoreError."""
    raw: list[bytes] = []
    size = 0
    async for page in store.spans(wanted, limit=MAX_SPANS + 1):
        raw += [span.json for span in page]
        size += sum(len(span.json) for span in page)
        if len(raw) > MAX_SPANS or size > _MAX_BYTES:
            return SpanSet(raw[:MAX_SPANS], True)
    return SpanSet(raw, False)


async def find_span(store: TraceStore, wanted: SpanFilter, span_id: str) -> dict[str, Any] | None:
    """Return one span of an invocation or trace, or None. Raises: StoreError."""
    needle = msgspec.json.encode(span_id)
    async for page in store.spans(wanted):
        for span in page:
            if needle in span.json and _LINKS.decode(span.json).span_id == span_id:
                return decode_span(span.json)
    return None


def decode_span(raw: bytes) -> dict[str, Any]:
    """Return the document of a span."""
    document: dict[str, Any] = msgspec.json.decode(raw)
    return document


def lay_out(spans: SpanSet, first: int, times: Times | None, now_ns: int) -> Waterfall:
    """Return the rows from `first` on. An invocation that is not over reaches to now."""
    links = [_LINKS.decode(raw) for raw in spans.raw]
    axis = Axis.of(links, times.created_ns, times.ended_ns or now_ns) if times is not None else Axis.of(links)
    places: list[Place] = tree_order(links)
    first = min(first, max(0, len(places) - 1)) // PAGE_ROWS * PAGE_ROWS
    shown = places[first : first + PAGE_ROWS]
    rows = []
    for position, place in enumerate(shown, first):
        document = decode_span(spans.raw[place.index])
        rows.append((Row(document, place, axis, position), document))
    return Waterfall(rows, len(places), first, max(0, len(places) - first - PAGE_ROWS), axis.ticks())
