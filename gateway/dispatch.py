"""What an invocation looks like from outside: the span `ingress.dispatch` and the first state of its record.

The same for every way in (CONTRACT section 13; semconv 1.41.1, HTTP server): an Origin says what is particular to a
request, and a schedule has an empty one.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from aiohttp import web

from clrk.core.ids import InvocationId, SpanId, new_span_id, new_trace_id
from clrk.core.resources import TaskAgent
from clrk.gateway.agents import identity_of
from clrk.gateway.envelope import EventContext
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.redact import redact_url
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import (
    UNSET,
    AttributeValue,
    Component,
    Recorder,
    SpanKind,
    Status,
    StatusCode,
    TraceContext,
)
from clrk.gateway.trace_context import parse_baggage, parse_trace_context

_METHODS: Final = frozenset("GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH QUERY".split())
_PEER_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Target:
    """The agent to invoke, and how it was named.

    Shape: route is the http.route template, "" where the path does not name the agent. path is what the event says
    instead of the request's own path, "" for that one. by_operator: asked on the admin socket, by somebody who may do
    anything with the agent, and whom its identity extractors are not about.
    """

    agent: TaskAgent
    route: str = ""
    trigger: str = "http"
    path: str = ""
    by_operator: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked, and how.

    Shape: caller is what the record keeps, "" for nobody. context is the trace to continue, None for a new one.
    attributes are those of the span that are known from the start. answered says whether somebody waits for an answer.
    """

    caller: str = ""
    context: TraceContext | None = None
    baggage: str = ""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    answered: bool = False


class Dispatch:
    """The facts of one invocation, collected on the way and recorded once."""

    def __init__(self, origin: Origin, target: Target, invocation_id: InvocationId) -> None:
        self.invocation_id = invocation_id
        self.target = target
        self.span_id = new_span_id()
        self.start_ns = time.time_ns()
        self.status: int | None = None
        self.response_bytes = 0
        self.disconnected = False
        self.outcome: Outcome | None = None
        self._origin = origin
        caller = origin.context or TraceContext(new_trace_id(), new_span_id())
        context = replace(caller, span_id=new_span_id(), baggage=origin.baggage)
        self.identity = identity_of(target.agent, invocation_id, context)

    def identify(self, caller_fields: tuple[tuple[str, str], ...]) -> None:
        """Say who the caller is (CONTRACT section 12); before anything runs."""
        self.identity = replace(self.identity, caller_fields=caller_fields)

    def event_context(self, moment: datetime, *, method: str = "", path: str = "", query: str = "") -> EventContext:
        """Return what clrk itself says in the event; without a method there was no HTTP request."""
        identity = self.identity
        return EventContext(
            namespace=identity.agent_namespace,
            agent=identity.agent_name,
            revision=identity.agent_revision,
            invocation_id=self.invocation_id,
            trigger=self.target.trigger,
            traceparent=identity.context.traceparent,
            tracestate=identity.context.tracestate,
            method=method,
            path=path,
            query=query,
            time=moment,
            identity=identity.caller_fields,
        )

    def pending(self) -> InvocationRecord:
        """Return the record of an invocation of which nothing has happened yet."""
        identity = self.identity
        return InvocationRecord(
            invocation_id=self.invocation_id,
            namespace=identity.agent_namespace,
            agent=identity.agent_name,
            revision=identity.agent_revision,
            trigger=self.target.trigger,
            phase=Phase.PENDING,
            trace_id=identity.context.trace_id,
            dispatch_span_id=self.span_id,
            run_span_id=identity.context.span_id,
            created_ns=self.start_ns,
            caller=self._origin.caller,
        )

    def begin(self, recorder: Recorder) -> None:
        """Note that the invocation was admitted; `record` ends what this begins."""
        recorder.begin(
            self.identity,
            component=Component.INGRESS,
            name=attr.SPAN_INGRESS_DISPATCH,
            kind=SpanKind.SERVER,
            start_ns=self.start_ns,
            span_id=SpanId(self.span_id),
            parent_span_id=self._parent_span_id,
            attributes=self._first_attributes(),
        )

    def record(self, recorder: Recorder) -> None:
        """Record the span; the answer is out, or there will be none."""
        recorder.record(
            self.identity,
            component=Component.INGRESS,
            name=attr.SPAN_INGRESS_DISPATCH,
            kind=SpanKind.SERVER,
            start_ns=self.start_ns,
            end_ns=time.time_ns(),
            attributes=self._attributes(),
            status=self._span_status(),
            span_id=SpanId(self.span_id),
            parent_span_id=self._parent_span_id,
        )

    @property
    def _parent_span_id(self) -> str:
        return self._origin.context.span_id if self._origin.context is not None else ""

    def _first_attributes(self) -> dict[str, AttributeValue]:
        return {attr.CLRK_TRIGGER: self.target.trigger, **self._origin.attributes}

    def _attributes(self) -> dict[str, AttributeValue]:
        attributes = self._first_attributes()
        if self._origin.answered:
            attributes[attr.CLRK_RESP_BYTES] = self.response_bytes
        if self.status is not None:
            attributes[attr.HTTP_RESPONSE_STATUS_CODE] = self.status
        if self.outcome is not None:
            attributes[attr.CLRK_PHASE] = self.outcome.phase.value
        if (error := self._error_type()) is not None:
            attributes[attr.ERROR_TYPE] = error
        return attributes

    def _error_type(self) -> str | None:
        if self.disconnected:
            return "client_disconnected"
        if self.status is not None and self.status >= 500:
            return str(self.status)
        if not self._failed:
            return None
        return "truncated" if self._origin.answered or self.outcome is None else self.outcome.phase.value.lower()

    @property
    def _failed(self) -> bool:
        """Say whether the run failed without a status that says so: the caller has half an answer, or nobody asked."""
        if self.outcome is None or self.outcome.succeeded:
            return False
        return self.status < 400 if self.status is not None else not self._origin.answered

    def _span_status(self) -> Status:
        if self.disconnected:
            return Status(StatusCode.ERROR, "the caller went away")
        if self._failed or (self.status is not None and self.status >= 500):
            return Status(StatusCode.ERROR, self.outcome.message if self.outcome is not None else "")
        return UNSET


def http_origin(request: web.BaseRequest, route: str, *, joins_trace: bool = True) -> Origin:
    """Return the origin of a request; without joins_trace the caller's trace context does not count."""
    context = parse_trace_context(request.headers.getall("traceparent", []), request.headers.getall("tracestate", []))
    caller, peer = _peer(request)
    known = request.method in _METHODS
    attributes: dict[str, AttributeValue] = {
        attr.HTTP_REQUEST_METHOD: request.method if known else "_OTHER",
        attr.URL_SCHEME: "http",
        attr.URL_PATH: redact_url(split_target(request)[0]),
        attr.NETWORK_PROTOCOL_VERSION: f"{request.version.major}.{request.version.minor}",
        **peer,
    }
    if not known:
        attributes[attr.HTTP_REQUEST_METHOD_ORIGINAL] = request.method
    if route:
        attributes[attr.HTTP_ROUTE] = route
    if not joins_trace:
        return Origin(caller, attributes=attributes, answered=True)
    return Origin(caller, context, parse_baggage(request.headers.getall("baggage", [])), attributes, answered=True)


def split_target(request: web.BaseRequest) -> tuple[str, str]:
    """Return path and query of the request target as they were sent; of the absolute form too (RFC 9112, 3.2.2)."""
    path, _, query = request.raw_path.partition("?")
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path, query


def _peer(request: web.BaseRequest) -> tuple[str, dict[str, AttributeValue]]:
    """Say who called: an address and port, or, on the admin socket, the uid and pid that the kernel vouches for."""
    transport = request.transport
    if transport is None:
        return "", {}
    peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    caller, attributes = "", dict[str, AttributeValue]()
    if isinstance(peer, tuple):
        host, port = str(peer[0]), int(peer[1])
        caller = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        attributes |= {attr.CLIENT_ADDRESS: host, attr.CLIENT_PORT: port}
    if isinstance(local, tuple):
        attributes |= {attr.SERVER_ADDRESS: str(local[0]), attr.SERVER_PORT: int(local[1])}
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(raw)
        caller = f"uid {uid}"
        attributes |= {attr.NETWORK_TRANSPORT: "unix", attr.CLRK_CALLER_UID: uid}
        if pid:  # 0: a process that the gateway's pid namespace can not see
            attributes[attr.CLRK_CALLER_PID] = pid
    return caller, attributes
