"""One run of an agent as the gateway sees it: the value handed from the invocation to its listeners."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from clrk.core.egress_resources import EgressGateway
from clrk.core.resources import Agent
from clrk.gateway.telemetry.spans import Identity


@dataclass(frozen=True, slots=True)
class SandboxSockets:
    """Listening sockets that the runtime opened inside the sandbox's network namespace. Non-blocking; we own them."""

    egress_v4: socket.socket
    egress_v6: socket.socket
    metadata_v4: socket.socket
    metadata_v6: socket.socket
    dns_udp: socket.socket
    dns_tcp: socket.socket
    otlp: socket.socket

    def close(self) -> None:
        """Stop listening. shutdown() first: close() alone leaves a socket listening while an accept is in flight."""
        for sock in (
            self.egress_v4, self.egress_v6, self.metadata_v4, self.metadata_v6, self.dns_udp, self.dns_tcp, self.otlp,
        ):  # fmt: skip
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # ENOTCONN: a datagram socket, or shut down already
                pass
            sock.close()


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that is fixed for the life of one sandbox.

    Shape: header_v4 and header_v6 are the templates that the kernel stamps for this sandbox. gateway is None when the
    agent names no existing EgressGateway: then everything is denied. ca_id names the CA in the sandbox's bundle; "" is
    that of now.
    """

    identity: Identity
    agent: Agent
    gateway: EgressGateway | None
    netns_cookie: int
    header_v4: bytes
    header_v6: bytes
    sockets: SandboxSockets
    ca_id: str = ""
