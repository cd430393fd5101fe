"""One inbound request as a span: `ingress.dispatch` (CONTRACT section 13; semconv 1.41.1, HTTP server)."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from clrk.core.ids import InvocationId, SandboxId, SpanId, new_span_id, new_trace_id
from clrk.core.resources import TaskAgent
from clrk.gateway.outcome import Outcome
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import (
    UNSET,
    AttributeValue,
    Component,
    Identity,
    Recorder,
    SpanKind,
    Status,
    StatusCode,
    TraceContext,
)
from clrk.gateway.trace_context import parse_trace_context

_METHODS: Final = frozenset("GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH QUERY".split())
_PEER_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Target:
    """The agent a request is for, and how it was named.

    Shape: route is the http.route template, "" where the path does not name the agent. path is what the event says
    instead of the request's own path, "" for that one.
    """

    agent: TaskAgent
    route: str
    trigger: str
    path: str = ""


class Dispatch:
    """The facts of one request, collected on the way and recorded once."""

    def __init__(self, request: web.BaseRequest, target: Target, invocation_id: InvocationId) -> None:
        caller = parse_trace_context(
            request.headers.getall("traceparent", []), request.headers.getall("tracestate", [])
        )
        self.invocation_id = invocation_id
        self.target = target
        self.span_id = new_span_id()
        self.status: int | None = None
        self.response_bytes = 0
        self.disconnected = False
        self.outcome: Outcome | None = None
        self._request = request
        self._parent = caller.span_id if caller else ""
        self._start_ns = time.time_ns()
        self._caller = _caller_attributes(request)
        agent = target.agent
        self.identity = Identity(
            invocation_id=invocation_id,
            agent_kind=agent.kind,
            agent_namespace=agent.metadata.namespace,
            agent_name=agent.metadata.name,
            agent_uid=agent.uid,
            agent_revision=agent.revision,
            sandbox_id=SandboxId(""),
            egress_gateway=f"{agent.metadata.namespace}/{agent.gateway_name}",
            context=TraceContext(
                caller.trace_id if caller else new_trace_id(),
                new_span_id(),
                caller.flags if caller else 1,
                caller.tracestate if caller else "",
            ),
        )

    def record(self, recorder: Recorder) -> None:
        """Record the span; the request is over."""
        recorder.record(
            self.identity,
            component=Component.INGRESS,
            name=attr.SPAN_INGRESS_DISPATCH,
            kind=SpanKind.SERVER,
            start_ns=self._start_ns,
            end_ns=time.time_ns(),
            attributes=self._attributes(),
            status=self._span_status(),
            span_id=SpanId(self.span_id),
            parent_span_id=self._parent,
        )

    def _attributes(self) -> dict[str, AttributeValue]:
        request = self._request
        known = request.method in _METHODS
        attributes: dict[str, AttributeValue] = {
            attr.CLRK_TRIGGER: self.target.trigger,
            attr.HTTP_REQUEST_METHOD: request.method if known else "_OTHER",
            attr.URL_SCHEME: "http",
            attr.URL_PATH: split_target(request)[0],
            attr.NETWORK_PROTOCOL_VERSION: f"{request.version.major}.{request.version.minor}",
            attr.CLRK_RESP_BYTES: self.response_bytes,
            **self._caller,
        }
        if not known:
            attributes[attr.HTTP_REQUEST_METHOD_ORIGINAL] = request.method
        if self.target.route:
            attributes[attr.HTTP_ROUTE] = self.target.route
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
        return "truncated" if self._truncated else None

    @property
    def _truncated(self) -> bool:
        return self.outcome is not None and not self.outcome.succeeded and self.status is not None and self.status < 400

    def _span_status(self) -> Status:
        if self.disconnected:
            return Status(StatusCode.ERROR, "the caller went away")
        if self._truncated or (self.status is not None and self.status >= 500):
            return Status(StatusCode.ERROR, self.outcome.message if self.outcome is not None else "")
        return UNSET


def split_target(request: web.BaseRequest) -> tuple[str, str]:
    """Return path and query of the request target as they were sent; of the absolute form too (RFC 9112, 3.2.2)."""
    path, _, query = request.raw_path.partition("?")
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path, query


def _caller_attributes(request: web.BaseRequest) -> dict[str, AttributeValue]:
    """Say who called: an address and port, or, on the admin socket, the uid and pid that the kernel vouches for."""
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    local = transport.get_extra_info("sockname") if transport is not None else None
    attributes: dict[str, AttributeValue] = {}
    if isinstance(peer, tuple):
        attributes |= {attr.CLIENT_ADDRESS: str(peer[0]), attr.CLIENT_PORT: int(peer[1])}
    if isinstance(local, tuple):
        attributes |= {attr.SERVER_ADDRESS: str(local[0]), attr.SERVER_PORT: int(local[1])}
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is not None and sock.family == socket.AF_UNIX:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(raw)
        attributes |= {attr.NETWORK_TRANSPORT: "unix", attr.CLRK_CALLER_UID: uid}
        if pid:  # 0: a process that the gateway's pid namespace can not see
            attributes[attr.CLRK_CALLER_PID] = pid
    return attributes
