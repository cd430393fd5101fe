"""TLS on both sides: what agents see is in ca.py; here are the peek at a ClientHello and the context for upstreams."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.channel import RaggedlyEnding
from clrk.gateway.egress.client_hello import MAX_HELLO_SIZE, ClientHello, parse_client_hello
from clrk.gateway.egress.server_flight import MAX_FLIGHT_SIZE, CertificateDemandedError, asks_for_certificate

T = TypeVar("T")

_PEEK_SIZE: Final = MAX_HELLO_SIZE + 1024


_SESSION: Final[ContextVar[tuple[str, ssl.SSLSession] | None]] = ContextVar("session to resume", default=None)


class _WatchedObject(RaggedlyEnding):
    """Keeps what the server says in the handshake: in TLS 1.2 its alert alone does not say what it lacked."""

    incoming: ssl.MemoryBIO
    _flight = b""
    _unread = 0

    def do_handshake(self) -> None:
        """Go on with the handshake. Raises: CertificateDemandedError, ssl.SSLError."""
        arrived = self.incoming.read()
        self.incoming.write(arrived)
        self._flight = (self._flight + arrived[self._unread :])[:MAX_FLIGHT_SIZE]
        try:
            super().do_handshake()
        except ssl.SSLError as exc:
            self._unread = self.incoming.pending
            if exc.reason == "SSLV3_ALERT_HANDSHAKE_FAILURE" and asks_for_certificate(self._flight):
                raise CertificateDemandedError(*exc.args) from exc
            raise
        self._flight = b""


class _UpstreamContext(ssl.SSLContext):
    """Takes up the session of resume_with: neither asyncio nor uvloop has a parameter for it.

    Both call wrap_bio() in the context (contextvars) in which the TCP connection was made, and uvloop takes no other
    name than an exact str, so a context variable is the one way in.
    """

    sslobject_class = _WatchedObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, *args: Any, **options: Any) -> ssl.SSLObject:
        """Make the TLS object of a connection."""
        name, session = _SESSION.get() or (None, None)
        if name == options.get("server_hostname"):  # not the handshake with a proxy on the way there
            options["session"] = session
        made = cast(_WatchedObject, super().wrap_bio(incoming, *args, **options))
        made.incoming = incoming
        return made


@contextmanager
def resume_with(server_name: str | None, session: ssl.SSLSession | None) -> Iterator[None]:
    """Offer a session, of the same context, in the handshake with server_name on a connection that is made inside."""
    if server_name is None or session is None:
        yield
        return
    token = _SESSION.set((server_name, session))
    try:
        yield
    finally:
        _SESSION.reset(token)


def session_of(tls: ssl.SSLObject | None) -> ssl.SSLSession | None:
    """Return what a later handshake can resume; None while the upstream has sent no ticket, and where it never does."""
    session = tls.session if tls is not None else None
    if session is None or tls is None or (tls.version() == "TLSv1.3" and not session.has_ticket):
        return None
    return session


def upstream_context(extra_ca_pem: str | None) -> ssl.SSLContext:
    """Return a verifying client context: the system's roots, and the operator's. Cost: tens of milliseconds.

    Raises: ssl.SSLError when the PEM text holds no certificate.
    """
    context = _UpstreamContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if extra_ca_pem:
        context.load_verify_locations(cadata=extra_ca_pem)
    return context


async def wait_readable(sock: socket.socket) -> None:
    """Return when SO_RCVLOWAT bytes, or the end, can be read from a non-blocking socket."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def peek_until(sock: socket.socket, judge: Callable[[bytes], T | None]) -> T | None:
    """Peek, without consuming, until judge makes something of the bytes.

    Returns: what judge returned; None when the stream ended, or the window is full, and it was still undecided.
    Raises: what judge raises; OSError of the socket.
    """
    try:
        seen = -1
        while True:
            try:
                peeked = sock.recv(_PEEK_SIZE, socket.MSG_PEEK)
            except BlockingIOError:
                await wait_readable(sock)
                continue
            if (found := judge(peeked)) is not None:
                return found
            if len(peeked) <= seen or not peeked or len(peeked) >= _PEEK_SIZE:
                return None  # awake without news: the end of the stream, or a buffer that can hold no more
            seen = len(peeked)
            # Sleep until there is more than we have seen: readiness alone would wake us at once, again and again.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)
            await wait_readable(sock)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def peek_client_hello(sock: socket.socket) -> ClientHello:
    """Return the ClientHello that waits on a socket. Raises: ProtocolError(client_hello), OSError."""
    hello = await peek_until(sock, parse_client_hello)
    if hello is None:
        raise ProtocolError("client_hello", "the connection ended inside the ClientHello")
    return hello
