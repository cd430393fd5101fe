"""The answer to a caller (CONTRACT sections 4 and 6): what the agent says, as it says it, and no lie about its end.

Until the first byte is out a failure is a status code; afterwards it is a connection that ends without the terminator
of its chunked body.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from datetime import UTC, datetime
from typing import Final

from aiohttp import HttpVersion11, web

from clrk.core.messages import StartFailure
from clrk.core.resources import MAX_BODY_BYTES
from clrk.gateway.dispatch import Dispatch
from clrk.gateway.envelope import agent_source, response_event, to_structured
from clrk.gateway.invocation import Invocation
from clrk.gateway.media import STRUCTURED_EVENT, prefers_structured
from clrk.gateway.metadata import PostedAnswer
from clrk.gateway.outcome import CALLER_GONE, Outcome, Phase
from clrk.gateway.problem import SERVER, Problem
from clrk.gateway.sandbox_run import StartRefused

_SLOW_CALLER_S: Final = 60.0  # beyond the agent's timeout, for a caller that reads slowly
_PIECE_SIZE: Final = 65_536  # of a whole answer: what is not yet sent stays here once, not in each connection's buffer
_ABORT_AFTER_S: Final = 30.0  # for what is still in the send buffer of a connection that ends badly
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class Answer:
    """Sends one invocation's answer to one request."""

    def __init__(self, request: web.BaseRequest, dispatch: Dispatch, invocation: Invocation) -> None:
        self._request = request
        self._dispatch = dispatch
        self._invocation = invocation
        self._agent = dispatch.target.agent
        self._accept = ",".join(request.headers.getall("Accept", []))
        self._verdict = CALLER_GONE  # of a run that is stopped before its answer is whole
        self._told = False  # the caller has its answer, or as much of one as there will be

    async def send(self) -> web.StreamResponse:
        """Wait for the answer and send it.

        Raises: Problem when there is none; CancelledError or ConnectionError when the caller has gone.
        """
        try:
            await asyncio.shield(self._invocation.started)
        except StartRefused as refused:
            self._dispatch.outcome = await self._invocation.outcome
            raise _start_problem(refused) from refused
        if self._invocation.order.metadata_mode:
            response = await self._paced(await self._posted())
        elif self._collects:
            response = await self._paced(await self._collected())
        else:
            response = await self._streamed()
        self._told = True
        return response

    def close(self) -> None:
        """Stop the run unless the caller has its answer, and let go of stdout."""
        if not self._told:
            self._invocation.cancel(self._verdict)
        self._invocation.release_stdout()

    # --- Stdin mode -------------------------------------------------------------------------------------------------

    async def _streamed(self) -> web.StreamResponse:
        chunk = await self._read_stdout()
        if not chunk:
            return self._whole(200, self._content_type, b"", await self._success())
        response = web.StreamResponse(headers=self._headers(self._content_type))
        self._dispatch.status = 200
        try:
            async with asyncio.timeout(self._deadline_s()):
                await response.prepare(self._request)
                while chunk:
                    await response.write(chunk)
                    self._dispatch.response_bytes += len(chunk)
                    chunk = await self._read_stdout()
                outcome = self._dispatch.outcome = await asyncio.shield(self._invocation.outcome)
        except TimeoutError:
            outcome = self._dispatch.outcome = Outcome(Phase.FAILED, message="the caller did not read the answer")
        if outcome.succeeded:
            await response.write_eof()
        else:
            self._cut_off()
        return response

    @property
    def _collects(self) -> bool:
        """Say whether nothing is told before the agent has ended: a failure then is a status, not a cut."""
        return (
            not self._agent.spec.streaming.enabled
            or self._wraps(self._content_type)  # its JSON needs its end
            or self._request.method == "HEAD"  # it has no body
        )

    async def _collected(self) -> web.Response:
        """Answer as a whole."""
        received, size, wraps = bytearray(), 0, self._wraps(self._content_type)
        keeps = wraps or self._request.method != "HEAD"
        while chunk := await self._read_stdout():
            size += len(chunk)
            if keeps and size > MAX_BODY_BYTES:
                raise self._too_large()
            if keeps:
                self._invocation.charge(len(chunk))
                received += chunk
        response = self._whole(200, self._content_type, bytes(received), await self._success())
        if not keeps:
            response.headers["Content-Length"] = str(size)  # as GET would have it (RFC 9110, section 8.6)
        return response

    def _too_large(self) -> Problem:
        message = f"the agent's answer is over {MAX_BODY_BYTES} bytes, too large to be sent as a whole"
        self._verdict = self._dispatch.outcome = Outcome(Phase.FAILED, message=message)
        return Problem(502, message)

    async def _read_stdout(self) -> bytes:
        stdout = self._invocation.stdout
        return await stdout.read() if stdout is not None else b""

    async def _success(self) -> Outcome:
        outcome = self._dispatch.outcome = await asyncio.shield(self._invocation.outcome)
        if not outcome.succeeded:
            self._told = True  # there is no run left to stop
            raise _failure(outcome)
        return outcome

    # --- Metadata mode ----------------------------------------------------------------------------------------------

    async def _posted(self) -> web.Response:
        posted, outcome = self._invocation.posted, self._invocation.outcome
        await asyncio.wait((posted, outcome), return_when=asyncio.FIRST_COMPLETED)
        if posted.done():
            return self._answer_of(posted.result())
        self._dispatch.outcome = outcome.result()
        self._told = True
        if outcome.result().phase is Phase.TIMEOUT:
            raise _failure(outcome.result())
        raise Problem(502, f"no answer was posted: {outcome.result().message}", _exit_code(outcome.result()))

    def _answer_of(self, posted: PostedAnswer) -> web.Response:
        if posted.status == 205:  # it has no content (RFC 9110, section 15.3.6); aiohttp sees to 204 and 304
            return self._whole(205, posted.content_type or self._content_type, b"", None)
        return self._whole(posted.status, posted.content_type or self._content_type, posted.body, None)

    # --- common -----------------------------------------------------------------------------------------------------

    @property
    def _content_type(self) -> str:
        return self._agent.spec.delivery.content_type

    def _wraps(self, content_type: str) -> bool:
        return prefers_structured(self._accept, content_type)

    def _headers(self, content_type: str) -> dict[str, str]:
        return {"Content-Type": content_type, "X-Clrk-Invocation-ID": self._dispatch.invocation_id, **SERVER}

    def _whole(self, status: int, content_type: str, body: bytes, outcome: Outcome | None) -> web.Response:
        if outcome is not None:
            self._dispatch.outcome = outcome
        if self._wraps(content_type):
            metadata = self._agent.metadata
            source = agent_source(metadata.namespace, metadata.name)
            event = response_event(self._invocation.order.event, source, content_type, body, datetime.now(UTC))
            content_type, body = STRUCTURED_EVENT, to_structured(event)
        self._dispatch.response_bytes = 0 if self._request.method == "HEAD" else len(body)
        return web.Response(status=status, body=body, headers=self._headers(content_type))

    async def _paced(self, whole: web.Response) -> web.StreamResponse:
        """Send a large answer piece by piece, within a deadline: a caller may never read it."""
        body = whole.body
        if not isinstance(body, bytes) or len(body) <= _PIECE_SIZE or self._has_no_body(whole.status):
            return whole
        response = web.StreamResponse(status=whole.status, headers=whole.headers)
        response.content_length = len(body)
        self._dispatch.status, self._dispatch.response_bytes = whole.status, 0
        try:
            async with asyncio.timeout(self._deadline_s()):
                await response.prepare(self._request)
                for start in range(0, len(body), _PIECE_SIZE):
                    piece = body[start : start + _PIECE_SIZE]
                    await response.write(piece)
                    self._dispatch.response_bytes += len(piece)
                await response.write_eof()
        except TimeoutError:
            self._dispatch.outcome = Outcome(Phase.FAILED, message="the caller did not read the answer")
            self._cut_off()
        return response

    def _has_no_body(self, status: int) -> bool:
        return self._request.method == "HEAD" or status in (204, 304)

    def _deadline_s(self) -> float:
        order = self._invocation.order
        return (order.timeout_s or order.agent.spec.timeout) + _SLOW_CALLER_S

    def _cut_off(self) -> None:
        """End the connection so that the caller can not take what it has for the whole.

        HTTP/1.1: the chunked body lacks its terminator. HTTP/1.0 has no terminator to lack: the connection is reset.
        """
        transport = self._request.transport
        if transport is None:
            return
        sock = transport.get_extra_info("socket")
        if self._request.version < HttpVersion11 and sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()
            return
        transport.close()  # what is in the send buffer still goes out
        asyncio.get_running_loop().call_later(_ABORT_AFTER_S, transport.abort)


def _start_problem(refused: StartRefused) -> Problem:
    match refused.reason:
        case StartFailure.POOL_EXHAUSTED:
            return Problem(503, "no sandbox is free on this host", {"Retry-After": "1"})
        case StartFailure.DRAINING:
            return Problem(503, "this host is draining", {"Retry-After": "1", "Connection": "close"})
        case StartFailure.UNKNOWN_AGENT:
            return Problem(404, "no such agent on this host any more")
        case StartFailure.STATE_FULL:
            return Problem(507, refused.message)
        case StartFailure.SANDBOX_FAILED:
            return Problem(502, f"the sandbox did not start: {refused.message}")


def _failure(outcome: Outcome) -> Problem:
    if outcome.phase is Phase.TIMEOUT:
        return Problem(504, outcome.message)
    if not outcome.has_run:
        return Problem(502, f"the sandbox did not start: {outcome.message}")
    return Problem(500, outcome.message, _exit_code(outcome))


def _exit_code(outcome: Outcome) -> dict[str, str]:
    return {} if outcome.exit_code is None else {"X-Clrk-Exit-Code": str(outcome.exit_code)}
