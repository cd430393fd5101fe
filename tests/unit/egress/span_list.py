"""A Recorder that keeps spans in a list, for tests that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from clrk.gateway.telemetry.spans import (
    UNSET,
    Attributes,
    Component,
    Identity,
    SpanEvent,
    SpanKind,
    Status,
)


@dataclass(frozen=True)
class Span:
    """One recorded span."""

    name: str
    kind: SpanKind
    component: Component
    start_ns: int
    end_ns: int
    attributes: Attributes
    status: Status
    span_id: str | None
    parent_span_id: str | None
    events: Sequence[SpanEvent] = ()
    trace_id: str | None = None


class SpanList:
    """A Recorder that keeps spans and wakes who waits for them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.begun: list[dict] = []
        self._news = asyncio.Event()

    def record(
        self, identity: Identity, *, component: Component, name: str, kind: SpanKind, start_ns: int, end_ns: int,
        attributes: Attributes, status: Status = UNSET, events: Sequence[SpanEvent] = (), span_id=None,
        parent_span_id=None, trace_id=None,
    ) -> None:  # fmt: skip
        self.spans.append(
            Span(
                name,
                kind,
                component,
                start_ns,
                end_ns,
                dict(attributes),
                status,
                span_id,
                parent_span_id,
                list(events),
                trace_id,
            )
        )
        self._news.set()

    def begin(self, identity: Identity, **facts) -> None:
        self.begun.append(facts)

    async def wait(self, count: int = 1) -> list[Span]:
        async with asyncio.timeout(15):
            while len(self.spans) < count:
                self._news.clear()
                await self._news.wait()
        return self.spans
