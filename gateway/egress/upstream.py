"""Connections to upstreams: resolve here, refuse dangerous addresses, dial only what was resolved, verify TLS, pool.

A pool belongs to one run: no two sandboxes ever share an upstream connection, so none can see or upset another's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from aiohappyeyeballs import start_connection

from clrk.core.errors import ClrkError
from clrk.core.wire import IPAddress
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.egress.channel import Channel
from clrk.gateway.egress.resolve import LimitedResolver, Resolver
from clrk.gateway.policy import EgressPolicy

CONNECT_TIMEOUT_S: Final = 10.0
HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # RFC 8305, section 5
POOL_IDLE_S: Final = 30.0
POOL_SIZE: Final = 32  # idle connections of one run

# X509_V_ERR_*: openssl/x509_vfy.h
_TLS_ERRORS: Final = {
    9: "tls_certificate_not_yet_valid",
    10: "tls_certificate_expired",
    18: "tls_unknown_ca",
    19: "tls_unknown_ca",
    20: "tls_unknown_ca",
    21: "tls_unknown_ca",
    62: "tls_wrong_host",
    64: "tls_wrong_host",
}


class DialDeniedError(ClrkError):
    """Policy, or the gateway's own rules, forbid the destination.

    Shape: reason is stable; rule decided; hint is a rule that would allow it.
    """

    def __init__(self, reason: str, message: str, hint: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint
        self.rule = rule


class DialFailedError(ClrkError):
    """The upstream can not be reached. Shape: error_type is stable and low-cardinality."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect. name is resolved here; without one, address is dialled. server_name asks for TLS."""

    name: str | None
    address: IPAddress
    port: int
    server_name: str | None = None

    @property
    def label(self) -> str:
        """Return host:port for people."""
        return f"{self.name or self.address}:{self.port}"


def is_local_address(address: IPAddress) -> bool:
    """Say whether the address is the host's own: only such an address can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def error_type_of(exc: BaseException) -> str:
    """Return the error.type of a failed connection or exchange."""
    match exc:
        case ssl.SSLCertVerificationError():
            return _TLS_ERRORS.get(exc.verify_code, "tls_certificate_invalid")
        case ssl.SSLError():
            return "tls_handshake"
        case socket.gaierror() | UnicodeError():  # what can not be written as a DNS name
            return "dns"
        case ConnectionRefusedError():
            return "connection_refused"
        case TimeoutError():
            return "timeout"
        case ConnectionError():
            return "connection_reset"
        case OSError() if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
            return "unreachable"
        case _:
            return "_OTHER"


class Upstream:
    """Dials for one run, and keeps idle connections."""

    def __init__(
        self, *, policy: EgressPolicy, guard: AddressGuard, context: ssl.SSLContext, resolver: Resolver
    ) -> None:
        self._policy = policy
        self._guard = guard
        self._context = context
        self._resolver = LimitedResolver(resolver)
        self._idle: dict[Target, list[Channel]] = {}
        self._idle_count = 0
        self._closed = False

    async def acquire(self, target: Target) -> tuple[Channel, bool]:
        """Return a connection and whether it carried an exchange before.

        Raises: DialDeniedError, DialFailedError.
        """
        idle = self._idle.get(target, [])
        while idle:
            channel = idle.pop()
            self._idle_count -= 1
            channel.on_lost(None)
            channel.set_idle_timeout(0)
            if channel.is_idle_and_open:
                return channel, True
            channel.abort()
        return await self.dial(target), False

    def release(self, target: Target, channel: Channel) -> None:
        """Take back a connection whose exchange ended cleanly."""
        if self._closed or self._idle_count >= POOL_SIZE or not channel.is_idle_and_open:
            channel.close()
            return
        idle = self._idle.setdefault(target, [])
        idle.append(channel)
        self._idle_count += 1
        channel.on_lost(lambda: self._forget(target, channel))
        channel.set_idle_timeout(POOL_IDLE_S)

    async def dial(self, target: Target) -> Channel:
        """Open a new connection. Raises: DialDeniedError, DialFailedError."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                addresses = await self._addresses(target)
                return await self._connect(target, addresses)
        except (OSError, UnicodeError) as exc:
            kind = error_type_of(exc)
            raise DialFailedError(kind, f"connect to {target.label}: {kind}: {exc}") from exc

    def close(self) -> None:
        """Drop every idle connection."""
        self._closed = True
        for channel in [channel for idle in self._idle.values() for channel in idle]:
            channel.abort()

    async def _connect(self, target: Target, addresses: list[tuple[IPAddress, int]]) -> Channel:
        loop = asyncio.get_running_loop()
        infos = [_address_info(address, port) for address, port in addresses]
        sock = await start_connection(infos, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, interleave=1)
        try:
            if target.server_name is None:
                _, channel = await loop.create_connection(Channel, sock=sock)
            else:
                _, channel = await loop.create_connection(
                    Channel, sock=sock, ssl=self._context, server_hostname=target.server_name
                )
        except BaseException:
            sock.close()
            raise
        return channel

    async def _addresses(self, target: Target) -> list[tuple[IPAddress, int]]:
        if target.name is not None and (alias := self._policy.alias(target.name)) is not None:
            return [(ip_address(alias[0]), alias[1])]
        found = [target.address] if target.name is None else await self._resolver(target.name, target.port)
        allowed, refusals = [], []
        for address in found:
            refusal = self._guard.refusal(address)
            if refusal is None or self._policy.names_address(address, target.port):
                allowed.append((address, target.port))
            else:
                refusals.append((address, refusal))
        if allowed:
            return allowed
        if not refusals:
            raise DialFailedError("dns", f"{target.label} has no address")
        address, refusal = refusals[0]
        hint = f'- cidrs: ["{address}/{address.max_prefixlen}"]\n  ports: [{target.port}]\n'
        raise DialDeniedError(f"address_{refusal}", f"{target.label} is at {address}, a {refusal} address", hint)

    def _forget(self, target: Target, channel: Channel) -> None:
        idle = self._idle.get(target, [])
        if channel in idle:
            idle.remove(channel)
            self._idle_count -= 1
        if not idle:
            self._idle.pop(target, None)


def _address_info(
    address: IPAddress, port: int
) -> tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]:
    kind, protocol = socket.SOCK_STREAM, socket.IPPROTO_TCP
    if address.version == 4:
        return socket.AF_INET, kind, protocol, "", (str(address), port)
    return socket.AF_INET6, kind, protocol, "", (str(address), port, 0, 0)
