"""The metadata service inside a sandbox (CONTRACT section 7): the event out, and in Metadata mode the answer back.

Its client is the agent, which may be hostile: connections are few, one answer is read at a time, and nothing it sends
reaches anyone but its own invocation's caller.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from clrk.core.resources import MAX_BODY_BYTES
from clrk.gateway.envelope import Event, to_binary_headers, to_structured
from clrk.gateway.http_server import BoundedServer
from clrk.gateway.media import STRUCTURED_EVENT, prefers_structured
from clrk.gateway.problem import SERVER, Problem, read_body

_LOG: Final = logging.getLogger(__name__)
HOSTS: Final = frozenset({"169.254.169.254", "169.254.169.254:80", "[fd00:ec2::254]", "[fd00:ec2::254]:80"})
_MAX_CONNECTIONS: Final = 64  # per sandbox: an agent must not use up the gateway's file descriptors
_BODY_TIMEOUT_S: Final = 3600.0  # the agent's own timeout ends it sooner
_BACKLOG: Final = 64
_PIECE_SIZE: Final = 65_536


@dataclass(frozen=True, slots=True)
class PostedAnswer:
    """What an agent in Metadata mode answers its caller."""

    status: int
    content_type: str | None
    body: bytes


class MetadataService:
    """Serves one run on the listeners of its sandbox. A daemon has no event: there is nothing to get or to answer."""

    def __init__(
        self,
        event: Event | None,
        *,
        metadata_mode: bool,
        on_answer: Callable[[PostedAnswer], None],
        charge: Callable[[int], None],
    ) -> None:
        self._event = event
        self._invocation_id = event.attributes["invocationid"] if event is not None else ""
        self._charge = charge
        self._metadata_mode = metadata_mode
        self._on_answer = on_answer
        self._structured: bytes | None = None
        self._answered = False  # an answer is posted, or being read
        self._http = BoundedServer(
            self._handle,
            max_connections=_MAX_CONNECTIONS,
            invocation_id=lambda: self._invocation_id,
            keepalive_timeout=60,
        )
        self._servers: list[asyncio.Server] = []

    async def serve(self, *listeners: socket.socket) -> None:
        """Accept on these listening sockets, which stay the caller's to close."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(self._http, sock=listener.dup(), backlog=_BACKLOG)
            self._servers.append(server)

    async def close(self) -> None:
        """Stop accepting and end every connection."""
        for server in self._servers:
            server.close()
        await self._http.shutdown(0)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._route(request)
        except Problem as problem:
            return problem.response(self._invocation_id)

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        if "X-Forwarded-For" in request.headers:
            raise Problem(403, "this service does not answer through a proxy")
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or hosts[0] not in HOSTS:
            raise Problem(403, "use CLRK_METADATA_URL as it is: the Host header names another service")
        match request.raw_path.partition("?")[0], request.method:
            case "/v1/event", "GET":
                return await self._get_event(request)
            case "/v1/response", "POST":
                return await self._post_response(request)
            case "/v1/event", _:
                raise Problem(405, "only GET", {"Allow": "GET"})
            case "/v1/response", _:
                raise Problem(405, "only POST", {"Allow": "POST"})
            case _:
                raise Problem(404, "there are GET /v1/event and POST /v1/response")

    async def _get_event(self, request: web.BaseRequest) -> web.StreamResponse:
        event = self._event
        if event is None:
            raise Problem(404, "a DaemonAgent is not invoked: there is no event")
        accept = ",".join(request.headers.getall("Accept", []))
        if prefers_structured(accept, event.content_type):
            return await _send(request, self._structured_event(event), [("Content-Type", STRUCTURED_EVENT)])
        return await _send(request, event.body, to_binary_headers(event))

    def _structured_event(self, event: Event) -> bytes:
        """Return the event's JSON: made once, since an agent may ask on many connections and read none of them."""
        if self._structured is None:
            made = to_structured(event)
            self._charge(len(made))
            self._structured = made
        return self._structured

    async def _post_response(self, request: web.BaseRequest) -> web.Response:
        if self._event is None:
            raise Problem(409, "a DaemonAgent is not invoked: nobody waits for an answer")
        if not self._metadata_mode:
            raise Problem(409, "this agent's delivery mode is Stdin: the answer is what it writes to stdout")
        if self._answered:
            raise Problem(409, "the answer has been posted")
        status, content_type = _posted_head(request)
        self._answered = True  # before the first await: one body at a time is in memory
        try:
            body = await read_body(
                request, limit=MAX_BODY_BYTES, idle_s=_BODY_TIMEOUT_S, total_s=_BODY_TIMEOUT_S, charge=self._charge
            )
        except BaseException:  # whatever ended it, the answer did not arrive
            self._answered = False
            raise
        self._on_answer(PostedAnswer(status, content_type, body))
        return web.Response(status=204, headers=SERVER)


async def _send(request: web.BaseRequest, body: bytes, headers: list[tuple[str, str]]) -> web.StreamResponse:
    """Send a body piece by piece, as the agent reads it: no connection ever holds a copy of its own."""
    response = web.StreamResponse(headers=[*headers, *SERVER.items()])
    response.content_length = len(body)
    await response.prepare(request)
    for start in range(0, len(body), _PIECE_SIZE):
        await response.write(body[start : start + _PIECE_SIZE])
    await response.write_eof()
    return response


def _posted_head(request: web.BaseRequest) -> tuple[int, str | None]:
    status = request.headers.get("X-Clrk-Status", "200")
    if not re.fullmatch(r"[2-5][0-9]{2}", status):
        raise Problem(400, "X-Clrk-Status: a number from 200 to 599")
    content_type = request.headers.get("Content-Type")
    if content_type is not None and not re.fullmatch(r"[\x20-\x7e]+", content_type):
        raise Problem(400, "Content-Type: not printable ASCII")
    return int(status), content_type
