"""Which trace an agent's own spans, logs and exemplars belong to. Pure; one object per run keeps what it has seen."""

from __future__ import annotations

from typing import Final

from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Exemplar
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from clrk.gateway.telemetry.receive_values import bounded_count, clean_attributes
from clrk.gateway.telemetry.spans import Identity
from clrk.gateway.trace_context import parse_tracestate

_MAX_LINKS: Final = 128
_MAX_TRACES: Final = 4096  # of a run, that are remembered for links
_PAST_NS: Final = 7 * 86_400 * 10**9
_FUTURE_NS: Final = 3600 * 10**9
_TRACE_FLAGS: Final = 0xFF
_KNOWN_FLAGS: Final = 0x3FF
_REMOTE_PARENT: Final = 0x300  # SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


class RefusedItemError(Exception):
    """An item that is not kept; its text is the reason, one of few. count is how many items that was."""

    def __init__(self, reason: str, count: int = 1) -> None:
        super().__init__(reason)
        self.count = count


def is_plausible(time_ns: int, now_ns: int) -> bool:
    """Say whether a time is near enough to be one of this run: what lies in the far future would never be deleted."""
    return now_ns - _PAST_NS <= time_ns <= now_ns + _FUTURE_NS


def is_id(raw: bytes, size: int) -> bool:
    """Say whether raw is a trace id (16 bytes) or span id (8), not all zero (W3C Trace Context, 3.2.2)."""
    return len(raw) == size and any(raw)


class Traces:
    """Moves everything of a TaskAgent's run into the trace of its invocation."""

    def __init__(self, identity: Identity) -> None:
        context = identity.context
        self._own: bytes | None = None  # the invocation's trace; a daemon has none
        self._parent = b""
        if identity.invocation_id:
            self._own = bytes.fromhex(context.trace_id)
            self._parent = bytes.fromhex(context.span_id)
        self._moved: set[bytes] = set()

    def note(self, trace_id: bytes) -> None:
        """Remember a trace id of the agent's, so that links to it are moved with it."""
        if self._own is not None and trace_id != self._own and len(self._moved) < _MAX_TRACES:
            self._moved.add(trace_id)

    def place(self, span: Span) -> None:
        """Give a span its trace and parent. Raises: RefusedItemError for ids that are none, or not the agent's."""
        if not is_id(span.trace_id, 16) or not is_id(span.span_id, 8):
            raise RefusedItemError("trace or span id is malformed")
        if not is_id(span.parent_span_id, 8):
            if any(span.parent_span_id):
                raise RefusedItemError("parent span id is malformed")
            span.parent_span_id = b""
        if span.parent_span_id == span.span_id:
            span.parent_span_id = b""
        span.trace_state = parse_tracestate([span.trace_state])
        span.flags &= _KNOWN_FLAGS
        if self._own is None:
            return
        if span.span_id == self._parent:
            raise RefusedItemError("span id is that of a span of clrk")
        self.note(span.trace_id)
        span.trace_id = self._own
        if not span.parent_span_id:
            span.parent_span_id = self._parent
            span.flags = (span.flags & _TRACE_FLAGS) | _REMOTE_PARENT

    def place_log(self, log: LogRecord) -> None:
        """Give a log record its trace; one that names no span belongs to the run."""
        names_span = is_id(log.trace_id, 16) and is_id(log.span_id, 8)
        log.flags &= _TRACE_FLAGS
        if self._own is not None:
            log.trace_id = self._own
            log.span_id = log.span_id if names_span else self._parent
        elif not is_id(log.trace_id, 16):
            log.trace_id = log.span_id = b""
        elif not names_span:
            log.span_id = b""

    def place_exemplar(self, exemplar: Exemplar) -> None:
        """Give an exemplar its trace; one without is left without."""
        if not (is_id(exemplar.trace_id, 16) and is_id(exemplar.span_id, 8)):
            exemplar.trace_id = exemplar.span_id = b""
        elif self._own is not None:
            exemplar.trace_id = self._own

    def clean_links(self, span: Span) -> None:
        """Bound the links, and move those that lead to a trace that was moved."""
        kept = []
        for index in range(min(_MAX_LINKS, len(span.links))):
            link = span.links[index]
            if not is_id(link.trace_id, 16) or not is_id(link.span_id, 8):
                continue
            cleaned = clean_attributes(link.attributes)
            kept.append(
                Span.Link(
                    trace_id=self._own if self._own is not None and link.trace_id in self._moved else link.trace_id,
                    span_id=link.span_id,
                    trace_state=parse_tracestate([link.trace_state]),
                    attributes=cleaned.values,
                    dropped_attributes_count=bounded_count(link.dropped_attributes_count + cleaned.dropped),
                    flags=link.flags & _KNOWN_FLAGS,
                )
            )
        span.dropped_links_count = bounded_count(span.dropped_links_count + len(span.links) - len(kept))
        del span.links[:]
        span.links.extend(kept)
