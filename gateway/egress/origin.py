"""What an exchange knows before it begins: the way out of its sandbox, and the connection it came on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from clrk.core.wire import FlowRecord, IPAddress
from clrk.gateway.credential_hosts import Credentials
from clrk.gateway.egress.capture import Capture
from clrk.gateway.egress.record import Call, Destination, EgressSpans
from clrk.gateway.egress.tunnels import OpenTunnels
from clrk.gateway.egress.upstream import Target, Upstream
from clrk.gateway.govern import ErrorWriter, Govern, ungoverned
from clrk.gateway.interpret import Allowance, Interpreter, RequestHead
from clrk.gateway.policy import EgressPolicy
from clrk.gateway.secret_values import SecretValues

_MAX_OPEN: Final = 1024

Recognise = Callable[[RequestHead], Interpreter | None]


@dataclass(frozen=True, slots=True)
class Exit:
    """What the connections of one run share.

    Shape: new_capture is there where headers and bodies are to be kept. http_only says of a host, by any of its names,
    that every exchange with it has to be judged, so that nothing but HTTP may pass. find_client_errors finds who words
    errors for the SDK that sent a request. tunnels, names and conversations
    outlive it: other rules make another Exit.
    """

    policy: EgressPolicy
    upstream: Upstream
    spans: EgressSpans
    recognise: Recognise
    request_timeout_s: float
    allowance: Allowance
    new_capture: Callable[[], Capture] | None = None
    govern: Govern = ungoverned
    credentials: Credentials = field(default_factory=lambda: Credentials(SecretValues()))
    http_only: Callable[..., bool] = lambda *_: False
    tunnels: OpenTunnels = field(default_factory=OpenTunnels)
    find_client_errors: Callable[[RequestHead], ErrorWriter | None] = lambda _: None
    _open: dict[tuple[str | None, IPAddress | None, int], bool] = field(default_factory=dict)

    def is_open(self, name: str | None, address: IPAddress | None, port: int) -> bool:
        """Say whether every request to the destination is allowed, so that none needs to be judged by itself."""
        key = (name, address, port)
        if (known := self._open.get(key)) is None:
            verdict = self.policy.connect(name, address, port)
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            known = self._open[key] = verdict.allowed and not verdict.needs_http
        return known


@dataclass(frozen=True)
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

    @cached_property
    def target(self) -> Target:
        """Return where what comes on it goes, and what the upstream must prove there."""
        destination = self.destination
        server_name = (self.name or str(destination.address)) if self.is_tls else None
        return Target(destination.name, destination.address, destination.port, server_name)

    def call(self, start_ns: int) -> Call:
        """Begin a span of this connection."""
        return Call(self.flow, self.destination, start_ns)
