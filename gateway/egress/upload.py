"""The request on its way up: what is here already goes with the head, the rest follows as it comes.

A body goes up in the framing that it came in. One that somebody has to judge or rewrite as a whole is collected first
and goes up in one piece; its `Expect: 100-continue` is then answered here, since the upstream can not be asked yet.
Every other Expect is the upstream's to answer (RFC 9110, section 10.1.1).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway._aio import spawn
from clrk.gateway.credentials import CredentialError, Filled, OutgoingHead, apply_all, drop_headers, fill
from clrk.gateway.egress import forward
from clrk.gateway.egress.admission import Admitted
from clrk.gateway.egress.capture import Capture
from clrk.gateway.egress.channel import Channel
from clrk.gateway.egress.echo import withhold, withhold_fields
from clrk.gateway.egress.failure import DialFailedError
from clrk.gateway.egress.http1 import Body, Headers, Response, render_chunk, render_head, render_last_chunk
from clrk.gateway.egress.record import Call
from clrk.gateway.egress.refusal import RefusedError
from clrk.gateway.govern import MAX_GOVERNED_BYTES, Answer
from clrk.gateway.interpret import Allowance
from clrk.gateway.secret_values import SecretValues

MAX_REWRITE_SIZE: Final = 8 * 1024 * 1024


class AgentGoneError(ConnectionError):
    """The agent's side failed while the exchange was under way."""


class Upload:
    """Reads the body from the agent and writes the request to the upstream."""

    def __init__(
        self, admitted: Admitted, agent: Channel, call: Call, allowance: Allowance, capture: Capture | None = None
    ) -> None:
        self._admitted, self._agent, self._call, self._capture = admitted, agent, call, capture
        self._body = admitted.body
        self._allowance = allowance
        self._kept = 0  # bytes of the allowance
        self._first = b""
        self._length: int | None = None  # of a rewritten body
        self._whole = False  # collected: what goes up is framed by us
        self._collecting = False  # the interpreter gets the bytes only after it was asked to rewrite them
        self._plain = False  # the answer is to come without content coding
        self._filled: tuple[Filled, ...] = ()
        self._signs = any(credential.signs for credential in admitted.credentials)
        self._signed = b""  # the body that a signature covers
        self.rewritten = False
        self.answered_expect = False
        self.waits_for_agent = False  # the agent has begun its body, and owes us the next bytes of it
        self.answer: Answer | None = None  # what the governor says in place of the upstream
        self.error: ProtocolError | None = None  # the agent's body was broken

    @property
    def done(self) -> bool:
        """Say whether the whole body was read from the agent."""
        return self._body.done

    @property
    def has_body(self) -> bool:
        """Say whether any body byte was or will be sent."""
        return bool(self._first) or not self._body.done

    async def prepare(self, timeout_s: float) -> None:
        """Take what is here of the body, or all of it when somebody judges or may rewrite it.

        Raises: OSError, ProtocolError of the agent's side; RefusedError for a body that can not be judged as a whole.
        """
        governor, interpreter = self._admitted.governor, self._admitted.interpreter
        as_a_whole = governor is not None or self._signs
        if not as_a_whole and (interpreter is None or not interpreter.wants_whole_request):
            self._first = b"" if self._body.done else self._take(self._agent.read_nowait())
            return
        self._whole = True
        if not self._body.done and self._expects_continue():
            self.answered_expect = True
            await self._agent.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        sent = whole = await self._collect(MAX_GOVERNED_BYTES if as_a_whole else MAX_REWRITE_SIZE, timeout_s)
        if as_a_whole and not self._body.done:
            why = "governed" if governor is not None else "signed by the gateway"
            text = f"the call is {why}, and its body over {MAX_GOVERNED_BYTES >> 20} MiB, or what one run may hold"
            if self._signs or self._admitted.enforces:
                raise RefusedError(413, "body_too_large", text)
            self.answer = Answer(413, "text/plain", b"", "body_too_large", text)
        elif governor is not None:
            self.answer = governor.judge(whole)
            sent = governor.rewrite_request(whole)
            self._plain = governor.wants_plain_response
            if sent is not whole and self._is_signed_by_agent():
                text = (
                    "the agent signed this body, so nothing can be written into it: say in the request how many tokens "
                    "of output it may have, or let a CredentialInjectionPolicy sign it"
                )
                raise RefusedError(400, "signed_body", text)
        if interpreter is not None:
            if self._body.done and interpreter.wants_whole_request:
                sent = interpreter.rewrite_request(sent)
            interpreter.request_data(whole)
        self.rewritten = sent is not whole
        self._length = len(sent) if self.rewritten and not self._body.chunked else None
        self._first = self._frame(sent)
        self._signed = sent if self._signs else b""

    def _is_signed_by_agent(self) -> bool:
        """Say whether the upstream will look for a signature (AWS SigV4) that is none of the gateway's."""
        signature = self._admitted.head.header("authorization") or ""
        return not self._signs and signature.startswith("AWS4-")

    def _expects_continue(self) -> bool:
        request = self._admitted.request
        return request.minor == 1 and "100-continue" in request.tokens("expect")

    async def _collect(self, limit: int, timeout_s: float) -> bytes:
        """Return the whole body, or what has come when it turned out to be too much to keep."""
        collected, self._collecting = bytearray(), True
        self._agent.set_idle_timeout(timeout_s)
        while not self._body.done and len(collected) <= limit:
            if not (data := await self._agent.read()):
                self._body.eof()
            collected += (piece := self._feed(data))
            if not self._allowance.take(len(piece)):
                break
            self._kept += len(piece)
        self._agent.set_idle_timeout(0)
        self._collecting = False
        return bytes(collected)

    def close(self) -> None:
        """Let go of what was kept; the exchange is over. Idempotent."""
        self._allowance.give_back(self._kept)
        self._kept, self._first, self._signed = 0, b"", b""

    def take_credentials(self, values: SecretValues) -> None:
        """Take the values that go out with this request. Raises: DialFailedError: without them, it goes nowhere."""
        if self._admitted.credentials:
            try:
                self._filled = fill(self._admitted.credentials, values, self._admitted.head.host)
            except CredentialError as exc:
                raise DialFailedError(exc.code, str(exc)) from exc

    def withhold(self, response: Response) -> Response:
        """Return a head of the answer without what take_credentials took."""
        return withhold(response, self._filled)

    def withhold_trailers(self, body: Body) -> Headers:
        """Return the trailers of the answer's body, which has ended, without it either."""
        return withhold_fields(body.trailers, self._filled)

    def send_head(self, upstream: Channel) -> None:
        """Send the head and what is there of the body, in one write. Bounded, so it needs no backpressure."""
        head, request = self._admitted.head, self._admitted.request
        headers = forward.request_headers(
            request,
            host=head.authority,
            context=self._admitted.context,
            upgrade=self._admitted.upgrade,
            length=self._length,
            plain=self.rewritten or self._plain,
            expect=request.minor == 1 and not self.answered_expect,
        )
        query = head.query
        if self._filled:
            host = next(value for name, value in headers if name.lower() == "host")
            out = apply_all(self._filled, OutgoingHead(request.method, host, head.path, query, headers), self._signed)
            query, headers = out.query, out.headers
        mark = "?" if query or "?" in request.target else ""
        line = f"{request.method} {head.path}{mark}{query} HTTP/1.1"
        upstream.write_nowait(render_head(line, headers) + self._first + self._end())

    async def run(self, upstream: Channel) -> None:
        """Send the rest. The agent's failure breaks the upstream; the upstream's is seen by whoever reads from it."""
        self.waits_for_agent = bool(self._first) or not self._expects_continue()
        while not self._body.done:
            try:
                data = await self._next()
            except ProtocolError as exc:
                self.error = exc
                upstream.fail(AgentGoneError(str(exc)))
                return
            except OSError as exc:
                upstream.fail(AgentGoneError(str(exc)))
                return
            self.waits_for_agent = False
            try:
                await upstream.write(data)
            except OSError:
                return  # perhaps it has answered already, and wants no more
            self.waits_for_agent = True

    async def _next(self) -> bytes:
        """Return the next bytes of the request as they go up."""
        while True:
            data = await self._agent.read()
            if not data:
                self._body.eof()
            if out := self._take(data) + self._end():
                return out

    def _take(self, data: bytes) -> bytes:
        """Return the body bytes in data as they go up."""
        piece = self._feed(data)
        if self._whole:
            return self._frame(piece)
        self._call.request_bytes += len(piece)
        return self._body.framed(piece)

    def _feed(self, data: bytes) -> bytes:
        piece = self._body.feed(data)
        if piece and self._capture is not None:
            self._capture.request_data(piece)
        if self._body.done:
            self._agent.unread(self._body.rest)
        if piece and self._admitted.interpreter is not None and not self._collecting:
            self._admitted.interpreter.request_data(piece)
        return piece

    def _frame(self, piece: bytes) -> bytes:
        if not piece:
            return b""
        self._call.request_bytes += len(piece)
        return render_chunk(piece) if self._body.chunked else piece

    def _end(self) -> bytes:
        """Return what ends the request, if it is complete."""
        if not self._body.done:
            return b""
        if self._admitted.interpreter is not None:
            self._admitted.interpreter.request_end()
        if not self._body.chunked:
            return b""
        trailers = self._body.trailers
        for one in self._filled:  # a server may take a trailer for a header
            trailers = tuple(drop_headers(trailers, one.credential.header_names))
        return render_last_chunk(trailers)


async def end_of(sending: asyncio.Task[None], upstream: Channel) -> None:
    """Wait until the upload is over, or its reader has ended; whatever that one says now, it says out of turn."""
    reading = spawn(_watch(upstream), name="egress-early-answer")
    try:
        await asyncio.wait((sending, reading), return_when=asyncio.FIRST_COMPLETED)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _watch(upstream: Channel) -> None:
    """Return when the upstream ends, breaks or speaks."""
    with contextlib.suppress(OSError):
        upstream.unread(await upstream.read())
