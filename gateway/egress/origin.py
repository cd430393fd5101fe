"""What an exchange knows before it begins: the way out of its sandbox, and the connection it came on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clrk.core.wire import FlowRecord
from clrk.gateway.egress.record import Call, Destination, EgressSpans
from clrk.gateway.egress.upstream import Upstream
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.policy import EgressPolicy

Recognise = Callable[[RequestHead], Interpreter | None]


@dataclass(frozen=True, slots=True)
class Exit:
    """What the connections of one run share."""

    policy: EgressPolicy
    upstream: Upstream
    spans: EgressSpans
    recognise: Recognise
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class Origin:
    """One agent connection: who dialled what, and what TLS said. server_name is the SNI; None without TLS or SNI."""

    flow: FlowRecord
    destination: Destination
    connect_ns: int
    is_tls: bool = False
    server_name: str | None = None

    @property
    def scheme(self) -> str:
        """Return the URL scheme."""
        return "https" if self.is_tls else "http"

    @property
    def name(self) -> str | None:
        """Return the name bound to the connection, by the resolver or by TLS (which the upstream must prove)."""
        return self.destination.name or self.server_name

    def call(self, start_ns: int) -> Call:
        """Begin a span of this connection."""
        return Call(self.flow, self.destination, start_ns)
