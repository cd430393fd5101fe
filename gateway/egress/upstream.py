"""Connections to upstreams: resolve here, refuse dangerous addresses, dial only what was resolved, verify TLS, pool.

A pool belongs to one run: no two sandboxes ever share an upstream connection or a TLS session, so none can see or
upset another's. With an upstreamProxy a name is the proxy's to resolve, since this host often can not; where it can,
the addresses that it finds are judged all the same.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from aiohappyeyeballs import start_connection

from clrk.core.errors import ProtocolError
from clrk.core.wire import IPAddress
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.egress.channel import Channel
from clrk.gateway.egress.failure import DialDeniedError, DialFailedError, error_type_of, explain
from clrk.gateway.egress.http1 import HeadReader
from clrk.gateway.egress.proxy import Proxy, authority, check_answer, render_connect
from clrk.gateway.egress.resolve import LimitedResolver, Resolver
from clrk.gateway.egress.tls import resume_with, session_of
from clrk.gateway.policy import EgressPolicy

CONNECT_TIMEOUT_S: Final = 10.0
HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # RFC 8305, section 5
POOL_SIZE: Final = 32  # idle connections of one run
PROXY_ANSWER_S: Final = 30.0  # the proxy connects meanwhile, with a timeout of its own
LOCAL_LOOKUP_S: Final = 2.0  # of a name that the proxy resolves
UNRESOLVED_S: Final = 60.0  # a name that this host can not resolve is not asked for again
MAX_REMEMBERED: Final = 256  # sessions, and unresolved names, of one run

Secrets = Callable[[], Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect. name is resolved here; without one, address is dialled. server_name asks for TLS."""

    name: str | None
    address: IPAddress
    port: int
    server_name: str | None = None

    def __hash__(self) -> int:
        """Leave out the address of a name: hashing one takes longer than all the rest."""
        return hash((self.name or self.address, self.port, self.server_name))

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


class Upstream:
    """Dials for one run, and keeps idle connections."""

    def __init__(
        self,
        *,
        policy: EgressPolicy,
        guard: AddressGuard,
        context: ssl.SSLContext,
        resolver: Resolver,
        proxy: Proxy | None = None,
        secrets: Secrets = dict,
    ) -> None:
        self._policy = policy
        self._guard = guard
        self._context = context
        self._resolver = LimitedResolver(resolver)
        self._proxy = proxy
        self._secrets = secrets
        self._idle: dict[Target, list[Channel]] = {}
        self._idle_count = 0
        self._sessions: dict[Target, ssl.SSLSession] = {}
        self._unresolved: dict[str, float] = {}
        self._closed = False

    async def acquire(self, target: Target) -> tuple[Channel, bool]:
        """Return a connection and whether it carried an exchange before.

        Raises: DialDeniedError, DialFailedError.
        """
        while (idle := self._idle.get(target)) is not None:
            channel = idle[-1]
            self._forget(target, channel)
            channel.on_lost(None)
            channel.set_idle_timeout(0)
            if channel.is_idle_and_open:
                return channel, True
            channel.abort()
        return await self.dial(target), False

    def release(self, target: Target, channel: Channel, kept_s: float) -> None:
        """Take back a connection whose exchange ended cleanly; it may be idle for kept_s."""
        if target.server_name is not None and target not in self._sessions:
            self._remember(target, channel)
        if self._closed or self._idle_count >= POOL_SIZE or not channel.is_idle_and_open:
            channel.close()
            return
        idle = self._idle.setdefault(target, [])
        idle.append(channel)
        self._idle_count += 1
        channel.on_lost(lambda: self._forget(target, channel))
        channel.set_idle_timeout(kept_s)

    async def dial(self, target: Target) -> Channel:
        """Open a new connection. Raises: DialDeniedError, DialFailedError."""
        with resume_with(target.server_name, self._sessions.pop(target, None)):
            if (proxy := self._proxy_of(target)) is not None:
                return await self._dial_through(proxy, target)
            return await self._dial_directly(target)

    async def _dial_directly(self, target: Target) -> Channel:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                addresses = await self._addresses(target)
                return await self._connect(target, addresses)
        except (OSError, UnicodeError) as exc:
            kind = error_type_of(exc)
            raise DialFailedError(kind, f"connect to {target.label}: {kind}: {explain(exc)}") from exc

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

    def _remember(self, target: Target, channel: Channel) -> None:
        """Keep the session for the next handshake; each is used once (RFC 8446, appendix C.4)."""
        session = session_of(channel.ssl_object)
        if session is not None:
            _bound(self._sessions)
            self._sessions[target] = session

    # --- through the proxy ------------------------------------------------------------------------------------------

    def _proxy_of(self, target: Target) -> Proxy | None:
        """Return the proxy if the target goes through it; hostAliases never do."""
        proxy = self._proxy
        if proxy is None or not proxy.carries(target.name, target.address):
            return None
        return None if target.name is not None and self._policy.alias(target.name) is not None else proxy

    async def _dial_through(self, proxy: Proxy, target: Target) -> Channel:
        authorization = proxy.authorization(self._secrets())
        await self._judge_for_proxy(target)
        host = target.name or str(target.address)
        where = authority(host, target.port)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                channel = await self._reach(proxy)
            async with asyncio.timeout(PROXY_ANSWER_S):
                await _ask_for_tunnel(channel, proxy, where, authorization, speaks_first=target.server_name is None)
        except (OSError, UnicodeError) as exc:
            kind = f"proxy_{error_type_of(exc)}"
            raise DialFailedError(kind, f"proxy {proxy.label} for {where}: {kind}: {explain(exc)}") from exc
        if target.server_name is None:
            return channel
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await channel.start_tls(self._context, target.server_name)
        except OSError as exc:
            kind = error_type_of(exc)
            raise DialFailedError(kind, f"{where} through proxy {proxy.label}: {kind}: {explain(exc)}") from exc

    async def _reach(self, proxy: Proxy) -> Channel:
        """Connect to the proxy itself, wherever it is: its address is the operator's word."""
        addresses = await self._resolver(proxy.host, proxy.port)
        target = Target(proxy.host, addresses[0], proxy.port, proxy.host if proxy.is_tls else None)
        return await self._connect(target, [(address, proxy.port) for address in addresses])

    async def _judge_for_proxy(self, target: Target) -> None:
        """Refuse what the guard refuses, as far as this host can see it. Raises: DialDeniedError."""
        loop = asyncio.get_running_loop()
        if target.name is None:
            found = [target.address]
        elif self._unresolved.get(target.name, 0.0) > loop.time():
            return
        else:
            try:
                async with asyncio.timeout(LOCAL_LOOKUP_S):
                    found = await self._resolver(target.name, target.port)
            except (OSError, UnicodeError):  # the usual case behind a proxy: only the proxy can resolve it
                found = []
            if not found:
                _bound(self._unresolved)
                self._unresolved[target.name] = loop.time() + UNRESOLVED_S
        _, refusals = self._judge(found, target.port)
        if refusals:  # one is enough: which of them the proxy would take, nobody knows
            raise _refused(target, *refusals[0])

    # --- addresses --------------------------------------------------------------------------------------------------

    async def _addresses(self, target: Target) -> list[tuple[IPAddress, int]]:
        if target.name is not None and (alias := self._policy.alias(target.name)) is not None:
            return [(ip_address(alias[0]), alias[1])]
        found = [target.address] if target.name is None else await self._resolver(target.name, target.port)
        allowed, refusals = self._judge(found, target.port)
        if allowed:
            return [(address, target.port) for address in allowed]
        if not refusals:
            raise DialFailedError("dns", f"{target.label} has no address")
        raise _refused(target, *refusals[0])

    def _judge(self, found: Sequence[IPAddress], port: int) -> tuple[list[IPAddress], list[tuple[IPAddress, str]]]:
        """Split addresses into those that may be dialled, and the others with the reason."""
        allowed, refusals = [], []
        for address in found:
            refusal = self._guard.refusal(address)
            if refusal is None or self._policy.names_address(address, port, refusal[1]):
                allowed.append(address)
            else:
                refusals.append((address, refusal[0]))
        return allowed, refusals

    def _forget(self, target: Target, channel: Channel) -> None:
        idle = self._idle[target]
        idle.remove(channel)
        self._idle_count -= 1
        if not idle:
            del self._idle[target]


def _bound(remembered: dict[Any, Any]) -> None:
    """Forget the oldest, so that there is room for one more."""
    while len(remembered) >= MAX_REMEMBERED:
        del remembered[next(iter(remembered))]


async def _ask_for_tunnel(
    channel: Channel, proxy: Proxy, target: str, authorization: str, *, speaks_first: bool
) -> None:
    """Turn a connection to the proxy into one to the target; broken unless that worked.

    Shape: speaks_first says that bytes of the target may come right behind the proxy's answer.
    Raises: DialFailedError, OSError.
    """
    try:
        await channel.write(render_connect(target, authorization))
        reader = HeadReader()
        while (found := _feed(reader, await channel.read(), proxy)) is None:
            continue
        head, rest = found
        check_answer(head, proxy, target)
        if rest and not speaks_first:
            raise DialFailedError("proxy_bad_response", f"proxy {proxy.label}: bytes of its own inside the tunnel")
    except BaseException:
        channel.abort()
        raise
    channel.begin_again(rest)


def _feed(reader: HeadReader, data: bytes, proxy: Proxy) -> tuple[bytes, bytes] | None:
    if not data:
        raise DialFailedError("proxy_connection_reset", f"proxy {proxy.label} closed the connection without an answer")
    try:
        return reader.feed(data)
    except ProtocolError as exc:
        raise DialFailedError("proxy_bad_response", f"proxy {proxy.label}: no HTTP answer: {exc}") from exc


def _refused(target: Target, address: IPAddress, refusal: str) -> DialDeniedError:
    hint = f'- cidrs: ["{address}/{address.max_prefixlen}"]\n  ports: [{target.port}]\n'
    message = f"{target.label} is at {address}, a {refusal.replace('_', '-')} address"
    return DialDeniedError(f"address_{refusal}", message, hint)


def _address_info(
    address: IPAddress, port: int
) -> tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]:
    kind, protocol = socket.SOCK_STREAM, socket.IPPROTO_TCP
    if address.version == 4:
        return socket.AF_INET, kind, protocol, "", (str(address), port)
    return socket.AF_INET6, kind, protocol, "", (str(address), port, 0, 0)
