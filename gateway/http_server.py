"""aiohttp's server for listeners that strangers reach: a bounded number of connections, and errors in our own words."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from clrk.core.ids import new_invocation_id
from clrk.gateway.problem import Problem

_BUSY: Final = Problem(503, "too many connections", {"Retry-After": "1", "Connection": "close"})


class BoundedServer(web.Server):
    """A web.Server that serves max_connections at a time; others get 503 at once, so that descriptors are left.

    Shape: invocation_id names the answers to what is no HTTP; by default each gets a new id. handler_cancellation ends
        a handler whose client has gone; auto_decompress undoes Content-Encoding before the handler reads. For
        lingering_s the rest of a refused body is read, so that its sender gets to see the answer.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        max_connections: int,
        invocation_id: Callable[[], str] = new_invocation_id,
        keepalive_timeout: float,
        handler_cancellation: bool = True,
        auto_decompress: bool = True,
        lingering_s: float = 10.0,
    ) -> None:
        super().__init__(
            handler, handler_cancellation=handler_cancellation, access_log=None, keepalive_timeout=keepalive_timeout,
            auto_decompress=auto_decompress, lingering_time=lingering_s,
        )  # fmt: skip
        self._max_connections = max_connections
        self.invocation_id = invocation_id

    def __call__(self) -> Any:
        """Return the protocol of one connection."""
        if len(self.connections) >= self._max_connections:
            return _Refusal(self.invocation_id())
        return _Connection(self, loop=self._loop, **self._kwargs)


class BoundedSite(web.SockSite):
    """A web.SockSite of an application that serves max_connections at a time, as BoundedServer does."""

    def __init__(self, runner: web.BaseRunner, sock: socket.socket, *, backlog: int, max_connections: int) -> None:
        super().__init__(runner, sock, backlog=backlog)
        self._max_connections = max_connections

    async def start(self) -> None:
        """See SockSite."""
        await web.BaseSite.start(self)
        server = cast(web.Server, self._runner.server)  # set up before any site

        def protocol() -> asyncio.BaseProtocol:
            if len(server.connections) >= self._max_connections:
                return _Refusal("")
            return cast(asyncio.BaseProtocol, server())

        self._server = await asyncio.get_running_loop().create_server(
            protocol, sock=self._sock, backlog=self._backlog
        )  # fmt: skip


class _Connection(RequestHandler):
    """Answers what is no HTTP with a problem document: aiohttp's answer names versions, and its log the bytes."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """See RequestHandler."""
        if not isinstance(exc, HttpProcessingError) or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        if isinstance(exc, LineTooLong):
            problem = Problem(431, "the request line or a header is too long")
        else:
            problem = Problem(400, "this is not HTTP/1.1 as RFC 9112 has it")
        server = cast("BoundedServer | None", self._manager)
        response = problem.response(server.invocation_id() if server is not None else new_invocation_id())
        response.force_close()
        return response


class _Refusal(asyncio.Protocol):
    """Ends a connection that is one too many."""

    def __init__(self, invocation_id: str) -> None:
        self._invocation_id = invocation_id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.WriteTransport, transport)
        answer = _BUSY.response(self._invocation_id)
        body = cast(bytes, answer.body)
        head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        stream.write(f"HTTP/1.1 503 {answer.reason}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        stream.close()
