"""TLS on both sides: what agents see is in ca.py; here are the peek at a ClientHello and the context for upstreams."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final, TypeVar

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.client_hello import MAX_HELLO_SIZE, ClientHello, parse_client_hello

T = TypeVar("T")

_PEEK_SIZE: Final = MAX_HELLO_SIZE + 1024


def upstream_context(extra_ca_pem: str | None) -> ssl.SSLContext:
    """Return a verifying client context: the system's roots, and the operator's. Cost: tens of milliseconds.

    Raises: ssl.SSLError when the PEM text holds no certificate.
    """
    context = ssl.create_default_context()
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
