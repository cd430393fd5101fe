"""Turn what was learned about a connection or an exchange into one span each (CONTRACT section 13).

Everything on a span comes from the flow record, from our own sockets, from what the relay parsed, or from an
interpreter; nothing is believed that the agent says about itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from clrk.core.ids import SpanId, TraceId, new_span_id
from clrk.core.wire import FlowRecord, IPAddress
from clrk.gateway.egress.late import record_late
from clrk.gateway.interpret import Facts, RequestHead
from clrk.gateway.redact import KNOWN_SECRETS, Redactor
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import (
    UNSET,
    AttributeValue,
    Component,
    Identity,
    Recorder,
    SpanEvent,
    SpanKind,
    Status,
    StatusCode,
    TraceContext,
)

AGENT_DISCONNECTED: Final = "agent_disconnected"  # error.type
CANCELLED: Final = "cancelled"  # error.type: the run ended
MAX_URL_SIZE: Final = 4096
MAX_TOLD: Final = 256
_LOG: Final = logging.getLogger(__name__)
_REDACTED: Final = frozenset((attr.URL_FULL,))  # when it was made, as URLs are
_TCP: Final[dict[str, AttributeValue]] = {attr.NETWORK_TRANSPORT: "tcp"}
_MALFORMED: Final = {"timeout": "the agent connected and sent nothing for too long, so there was no stamp to check"}
_KNOWN_METHODS: Final = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT QUERY".split())


@dataclass(frozen=True, slots=True)
class Destination:
    """What the agent dialled: name is what the synthetic address stands for, None for a real address."""

    name: str | None
    address: IPAddress
    port: int

    @property
    def host(self) -> str:
        """Return the name, else the address."""
        return self.name or str(self.address)


@dataclass(slots=True)
class Call:
    """One span in the making.

    Shape: peer is the upstream that we connected to, None before that; trace_id None says that the place of the span in
    a trace is not known yet; begun that the store knows of the span already.
    """

    flow: FlowRecord
    destination: Destination
    start_ns: int
    span_id: SpanId = field(default_factory=new_span_id)
    parent_span_id: str | None = None
    trace_id: TraceId | None = None
    begun: bool = False
    recorded: bool = False
    peer: tuple[str, int] | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    attributes: dict[str, AttributeValue] = field(default_factory=dict)


def connect_time_ns(flow: FlowRecord) -> int:
    """Return when the agent called connect(), as CLOCK_REALTIME nanoseconds."""
    return flow.connect_ns + time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def full_url(head: RequestHead, redactor: Redactor) -> str:
    """Return url.full without secrets; there is no userinfo, since requests with it are refused."""
    target = f"{head.path}?{head.query}" if head.query else head.path
    return f"{head.scheme}://{redactor.url(head.authority)}{redactor.url(target)}"[:MAX_URL_SIZE]


def request_attributes(head: RequestHead, redactor: Redactor) -> dict[str, AttributeValue]:
    """Return the attributes of an HTTP client span that are known before the answer."""
    known = head.method in _KNOWN_METHODS
    found: dict[str, AttributeValue] = {
        attr.HTTP_REQUEST_METHOD: head.method if known else "_OTHER",
        attr.URL_FULL: full_url(head, redactor),
        attr.SERVER_ADDRESS: head.host,
        attr.SERVER_PORT: head.port,
        attr.NETWORK_PROTOCOL_NAME: "http",
    }
    if not known:
        found[attr.HTTP_REQUEST_METHOD_ORIGINAL] = head.method
    return found


def http_span_name(head: RequestHead) -> str:
    """Return `<METHOD> <server.address>`; unknown methods are `HTTP` (semconv 1.41.1, http-spans)."""
    return f"{head.method if head.method in _KNOWN_METHODS else 'HTTP'} {head.host}"


def _beside(call: Call) -> Call:
    """Return another call of the same exchange: what is measured of the exchange itself is on the first one's span."""
    attributes = {name: value for name, value in call.attributes.items() if name != attr.HTTP_REQUEST_METHOD}
    return replace(call, span_id=new_span_id(), begun=False, request_bytes=0, response_bytes=0, attributes=attributes)


class EgressSpans:
    """Records the egress spans of one sandbox: without secrets, whoever wrote them into a call."""

    def __init__(
        self, identity: Identity, recorder: Recorder, redactor: Redactor = KNOWN_SECRETS, late_s: float = 60.0
    ) -> None:
        self.identity = identity
        self.redactor = redactor
        self._recorder = recorder
        self._late_s = late_s
        self._told: set[tuple[str, int, str]] = set()  # of the log: a destination is told once in a run

    def begin_http(self, call: Call, head: RequestHead) -> None:
        """The request is about to go upstream, as HTTP/1.1; call has request_attributes and its peer."""
        call.attributes[attr.NETWORK_PROTOCOL_VERSION] = "1.1"
        self._begin(call, http_span_name(head), {})

    def begin_tcp(self, call: Call) -> None:
        """The tunnel is about to carry bytes."""
        self._begin(call, attr.SPAN_EGRESS_TCP, dict(_TCP))

    def http(
        self,
        call: Call,
        head: RequestHead,
        status: int | None,
        facts: Facts | None,
        *,
        error: str | None = None,
        message: str = "",
        events: Sequence[SpanEvent] = (),
    ) -> None:
        """One exchange that went upstream; status is None when no response came. call has request_attributes.

        An exchange whose answer comes on another one is recorded when it has come, or late_s later.
        """
        left = error in (AGENT_DISCONNECTED, CANCELLED)
        if facts is not None and (facts.elsewhere or (facts.answered and left)):  # who has it does not read to the end
            error, message = None, ""
        if facts is not None and facts.later is not None and error is None:
            record_late(facts.later, lambda late: self._http(call, head, status, late, events=events), self._late_s)
        else:
            self._http(call, head, status, facts, error=error, message=message, events=events)

    def _http(
        self,
        call: Call,
        head: RequestHead,
        status: int | None,
        facts: Facts | None,
        *,
        error: str | None = None,
        message: str = "",
        events: Sequence[SpanEvent] = (),
    ) -> None:
        for other in facts.also if facts is not None else ():
            self._http(_beside(call), head, status, other, error=error, message=message)
        found: dict[str, AttributeValue] = {}
        if status is not None:
            found[attr.HTTP_RESPONSE_STATUS_CODE] = status
        if facts is not None:
            found.update(facts.attributes)
            error = error or facts.error_type
            message = message or facts.status_message
        if error is None and status is not None and status >= 400:
            error = str(status)
        if attr.CLRK_EGRESS_DENY_REASON in call.attributes:
            found.pop(attr.CLRK_BODY_USAGE_VISIBLE, None)  # nobody was asked
        name = (facts.name if facts is not None else "") or http_span_name(head)
        self._record(call, name, found, error, message, events=events)

    def tcp(self, call: Call, error: str | None = None, message: str = "") -> None:
        """One tunnel."""
        self._record(call, attr.SPAN_EGRESS_TCP, dict(_TCP), error, message)

    def denied(self, call: Call, reason: str, message: str, rule: str = "", hint: str = "") -> None:
        """A connection or request that policy, or the gateway's own rules, refused. hint: the rule to add, if any."""
        found: dict[str, AttributeValue] = {attr.CLRK_EGRESS_DENY_REASON: reason, **_decided(rule, hint)}
        self._record(call, attr.SPAN_EGRESS_DIAL_DENIED, found, reason, message)

    def would_deny(self, call: Call, reason: str, rule: str = "", hint: str = "") -> None:
        """Note what a gateway that enforces would refuse here; the call goes on, and its span says so."""
        call.attributes |= {attr.CLRK_EGRESS_WOULD_DENY: reason, **_decided(rule, hint)}
        host, port = call.destination.host, call.destination.port
        where = (host, port, reason)
        if where not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(where)
            text = "%s/%s: %s:%d would be denied (%s) if the EgressGateway enforced"
            identity = self.identity
            _LOG.info(text, identity.agent_namespace, identity.agent_name, self.redactor.text(host), port, reason)

    def failed(self, call: Call, error: str, message: str, events: Sequence[SpanEvent] = ()) -> None:
        """The upstream could not be reached or did not answer."""
        self._record(call, attr.SPAN_EGRESS_DIAL_FAILED, {}, error, message, events=events)

    def malformed(self, call: Call, code: str) -> None:
        """A connection that did not begin with the header that the kernel must have stamped."""
        found: dict[str, AttributeValue] = {attr.CLRK_PROXY_ERROR_CODE: code}
        self._record(
            call, attr.SPAN_EGRESS_PROXY_MALFORMED, found, code, _MALFORMED.get(code, f"stamp refused: {code}")
        )

    def place(self, call: Call, parent: TraceContext | None = None) -> TraceContext:
        """Hang the span below parent, else where calls of this run hang; return that parent."""
        context = parent or self.identity.call_context()
        call.trace_id, call.parent_span_id = context.trace_id, context.span_id
        return context

    def _begin(self, call: Call, name: str, found: dict[str, AttributeValue]) -> None:
        """Let the span outlive this process: what an upstream may see from now on has a span."""
        if call.begun:  # sent again on another connection
            return
        call.begun = True
        if call.trace_id is None:
            self.place(call)
        self._recorder.begin(
            self.identity,
            component=Component.GATEWAY,
            name=self.redactor.text(name),
            kind=SpanKind.CLIENT,
            start_ns=call.start_ns,
            span_id=call.span_id,
            parent_span_id=call.parent_span_id,
            trace_id=call.trace_id,
            attributes=self.redactor.attributes(_attributes(call, found), _REDACTED),
        )

    def _record(
        self,
        call: Call,
        name: str,
        found: dict[str, AttributeValue],
        error: str | None,
        message: str,
        *,
        events: Sequence[SpanEvent] = (),
    ) -> None:
        call.recorded = True
        if call.trace_id is None:  # refused before anybody asked where it belongs
            self.place(call)
        attributes = _attributes(call, found)
        if error is not None:
            attributes[attr.ERROR_TYPE] = error
        self._recorder.record(
            self.identity,
            component=Component.GATEWAY,
            name=self.redactor.text(name),
            kind=SpanKind.CLIENT,
            start_ns=call.start_ns,
            end_ns=time.time_ns(),
            attributes=self.redactor.attributes(attributes, _REDACTED),
            status=UNSET if error is None else Status(StatusCode.ERROR, self.redactor.text(message)),
            events=events,
            span_id=call.span_id,
            parent_span_id=call.parent_span_id,
            trace_id=call.trace_id,
        )


def _decided(rule: str, hint: str) -> dict[str, AttributeValue]:
    """Return what decided about a call, and what would decide otherwise."""
    found: dict[str, AttributeValue] = {}
    if rule:
        found[attr.CLRK_EGRESS_ROUTE] = rule
    if hint:
        found[attr.CLRK_EGRESS_ADD_RULE] = hint
    return found


def _attributes(call: Call, found: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
    flow, destination = call.flow, call.destination
    address, port = call.peer or (str(destination.address), destination.port)
    attributes: dict[str, AttributeValue] = {
        attr.PROCESS_PID: flow.tgid,
        attr.PROCESS_EXECUTABLE_NAME: flow.comm.decode("utf-8", "replace"),
        attr.NETWORK_PEER_ADDRESS: address,
        attr.NETWORK_PEER_PORT: port,
        attr.CLRK_DST_NAME: destination.host,
        attr.CLRK_REQ_BYTES: call.request_bytes,
        attr.CLRK_RESP_BYTES: call.response_bytes,
        attr.SERVER_ADDRESS: destination.host,
        attr.SERVER_PORT: destination.port,
    }
    attributes.update(found)
    attributes.update(call.attributes)
    return attributes
