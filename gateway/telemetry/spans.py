"""The span as we keep it, and the identity that every span carries. Pure values, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from clrk.core.ids import InvocationId, SandboxId, SpanId, TraceId, new_trace_id

AttributeValue = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, AttributeValue]


class SpanKind(enum.StrEnum):
    """OTLP enum names (opentelemetry-proto trace/v1/trace.proto, Span.SpanKind). The last two: of agents' own."""

    INTERNAL = "SPAN_KIND_INTERNAL"
    SERVER = "SPAN_KIND_SERVER"
    CLIENT = "SPAN_KIND_CLIENT"
    PRODUCER = "SPAN_KIND_PRODUCER"
    CONSUMER = "SPAN_KIND_CONSUMER"


class StatusCode(enum.StrEnum):
    """OTLP enum names (trace.proto, Status.StatusCode)."""

    UNSET = "STATUS_CODE_UNSET"
    OK = "STATUS_CODE_OK"
    ERROR = "STATUS_CODE_ERROR"


class Component(enum.StrEnum):
    """Resource attribute clrk.component (CONTRACT section 13). AGENT marks an agent's own word."""

    INGRESS = "ingress"
    GATEWAY = "gateway"
    RUNTIME = "runtime"
    AGENT = "agent"


class Status(msgspec.Struct, frozen=True):
    """Outcome of a span; message only with ERROR."""

    code: StatusCode = StatusCode.UNSET
    message: str = ""


UNSET: Final = Status()


class SpanEvent(msgspec.Struct, frozen=True):
    """Something that happened during the span."""

    name: str
    time_unix_nano: int
    attributes: dict[str, AttributeValue] = {}


class SpanRecord(msgspec.Struct, frozen=True):
    """One finished span; its JSON is the output of `clrk trace --json` (CONTRACT section 14).

    Shape: ids in lower-case hex, parent_span_id empty for a root. Units: CLOCK_REALTIME nanoseconds.
    """

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    kind: SpanKind
    start_time_unix_nano: int
    end_time_unix_nano: int
    status: Status = Status()
    attributes: dict[str, AttributeValue] = {}
    events: list[SpanEvent] = []
    resource: dict[str, AttributeValue] = {}


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A W3C trace context: the span that children are attached to. tracestate and baggage are kept to the letter."""

    trace_id: TraceId
    span_id: SpanId
    flags: int = 1
    tracestate: str = ""
    baggage: str = ""

    @property
    def sampled(self) -> bool:
        """Say whether spans are exported; the embedded store keeps them in any case."""
        return bool(self.flags & 1)

    @property
    def traceparent(self) -> str:
        """Header value, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a span belongs to; on every span of an invocation (CONTRACT section 13).

    Shape: context is the span context of `invoke_agent`, the parent of everything that the agent causes. sandbox_id is
    empty until a sandbox was assigned. A DaemonAgent's run has no invocation_id (""), and its calls are roots of traces
    of their own: see call_context. caller_fields are the values of agent.identity.<field> (CONTRACT section 12).
    """

    invocation_id: InvocationId
    agent_kind: str
    agent_namespace: str
    agent_name: str
    agent_uid: str
    agent_revision: str
    sandbox_id: SandboxId
    egress_gateway: str
    context: TraceContext
    caller_fields: tuple[tuple[str, str], ...] = ()

    def call_context(self) -> TraceContext:
        """Return the context that a new call of the agent hangs below; span_id is "" when it is a root."""
        if self.invocation_id:
            return self.context
        return TraceContext(new_trace_id(), SpanId(""))


class Recorder(Protocol):
    """Takes finished spans: never raises, never blocks, never changes the caller's data."""

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
        """Add identity and resource attributes, and keep the span.

        Shape: span_id None makes a new one; parent_span_id None means identity.context.span_id, "" a root; trace_id
        None means identity.context.trace_id.
        """

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
        """Note durably that a span has begun, before what it stands for can be seen from outside.

        `record` with the same span_id ends it. Should this process die in between, the next one records the span as
        it stands here, with status Error: a call that was made is never without its span.
        """
