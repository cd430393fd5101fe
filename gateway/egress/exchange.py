"""One HTTP exchange: admit, connect, send, relay the answer, record one span.

Theory of operation: the request body goes up in a task of its own (unless it is already here) while this task waits for
the response and relays it, so that an early answer is an early answer. Whoever fails first breaks the other side:
a vanished agent aborts the upstream; a broken upstream answers 502 before the response head, and cuts the response
visibly after it. Nothing is sent twice, but a request without a body and without effect, on a pooled connection that
turns out to be dead before any answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway._aio import spawn
from clrk.gateway.egress import forward
from clrk.gateway.egress.admission import Admitted, admit, allows
from clrk.gateway.egress.channel import Channel, RaggedEndError
from clrk.gateway.egress.download import Download
from clrk.gateway.egress.failure import DialDeniedError, DialFailedError, error_type_of, explain
from clrk.gateway.egress.forward import Framing, choose_framing
from clrk.gateway.egress.guarded import find_client_errors_guarded
from clrk.gateway.egress.http1 import Body, Request, Response, render_chunk, render_last_chunk, response_body
from clrk.gateway.egress.origin import Exit, Origin
from clrk.gateway.egress.record import AGENT_DISCONNECTED, CANCELLED, Call
from clrk.gateway.egress.refusal import RefusedError, render_answer, render_problem
from clrk.gateway.egress.reply import read_final_head
from clrk.gateway.egress.tcp import RUN_ENDED, tunnel
from clrk.gateway.egress.tunnels import TunnelRevokedError
from clrk.gateway.egress.upload import AgentGoneError, Upload, end_of
from clrk.gateway.govern import Answer, Cut, Governor
from clrk.gateway.interpret import Facts, RequestHead
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import SpanEvent

_BUG: Final = "internal_error", "the gateway failed in this call; its log says why"
_CANCELLED: Final = CANCELLED, RUN_ENDED
_REPEATABLE: Final = frozenset(("GET", "HEAD", "OPTIONS"))


class _DeadPooledError(Exception):
    """A pooled connection ended before it gave any answer."""


class Exchange:
    """One request of one agent connection. follows says that another came before it."""

    def __init__(
        self, way_out: Exit, origin: Origin, agent: Channel, request: Request, call: Call, *, follows: bool
    ) -> None:
        self._exit, self._origin, self._agent, self._request, self._call = way_out, origin, agent, request, call
        self._follows = follows
        self._loop = asyncio.get_running_loop()
        self._status: int | None = None
        self._answered = False  # the response head went to the agent
        self._continues = True  # the agent connection can carry another exchange
        self._open_ended = False  # the response ends with the agent's connection
        self._until_close = False  # and with the upstream's
        self._sent_at = 0.0
        self._governor: Governor | None = None  # until it has settled
        self._cut_short: Cut | None = None
        self._switched = False  # what is said now is no HTTP
        self._relayed = False  # the agent has all of the answer that it gets
        self._capture = way_out.new_capture() if way_out.new_capture is not None else None
        self._upload: Upload | None = None

    async def run(self) -> bool:
        """Carry the exchange; return whether the agent connection can carry another. Records exactly one span."""
        spans, call = self._exit.spans, self._call
        try:
            admitted = admit(self._exit, self._origin, self._request, call)
        except RefusedError as exc:
            spans.denied(call, exc.reason, str(exc), exc.rule, exc.hint)
            self._answer(exc.status, exc.reason, str(exc), exc.hint)
            return False
        self._governor = admitted.governor
        self._upload = upload = Upload(admitted, self._agent, call, self._exit.allowance, self._capture)
        if self._capture is not None:
            self._capture.request(self._request, admitted.body)
        try:
            await upload.prepare(self._exit.request_timeout_s)
            if upload.answer is not None and self._denies(upload.answer):
                self._answer_instead(admitted, upload.answer)
                return self._continues
            await self._carry(admitted, upload)
        except (RefusedError, DialDeniedError) as exc:
            self._settle(None)
            spans.denied(call, exc.reason, str(exc), exc.rule, exc.hint)
            self._answer(exc.status, exc.reason, str(exc), exc.hint)
        except DialFailedError as exc:
            self._settle(None)
            spans.failed(call, exc.error_type, str(exc), self._events())
            self._answer(502, exc.error_type, str(exc))
        except asyncio.CancelledError:
            over = self._relayed or (self._switched and self._agent.is_at_end)
            self._record(admitted, *(() if over else _CANCELLED))
            raise
        except (OSError, ProtocolError) as exc:
            self._fail(admitted, upload, exc)
        else:
            self._record(admitted)
            return self._continues and upload.done
        finally:
            self._settle(None)
            upload.close()
            if self._capture is not None:
                self._capture.close()
        return False

    @property
    def leaves_unread(self) -> bool:
        """Say whether the agent may be sending its request still, although it has a whole answer."""
        return not self._open_ended and (self._upload is None or not self._upload.done)

    async def _carry(self, admitted: Admitted, upload: Upload) -> None:
        upload.take_credentials(self._exit.credentials.values)
        pool, target = self._exit.upstream, admitted.target
        repeatable = self._request.method in _REPEATABLE and not upload.has_body
        if repeatable or self._follows:
            upstream, reused = await pool.acquire(target)
        else:  # who has just connected does not expect a connection that has been idle, and may be dead
            upstream, reused = await pool.dial(target), False
        try:
            await self._talk(admitted, upload, upstream, repeatable=reused and repeatable)
        except _DeadPooledError:
            self._call.attributes[attr.HTTP_REQUEST_RESEND_COUNT] = 1
            await self._talk(admitted, upload, await pool.dial(target), repeatable=False)

    async def _talk(self, admitted: Admitted, upload: Upload, upstream: Channel, *, repeatable: bool) -> None:
        self._call.peer = upstream.peer
        self._agent.on_lost(lambda: upstream.fail(AgentGoneError("the agent closed the connection")))
        upstream.set_idle_timeout(self._exit.request_timeout_s)
        sending: asyncio.Task[None] | None = None
        kept_s = 0.0
        try:
            if self._agent.is_broken:  # it left while the upstream was dialled: on_lost comes once
                raise AgentGoneError("the agent closed the connection")
            try:
                self._sent_at = self._loop.time()
                self._exit.spans.begin_http(self._call, admitted.head)
                upload.send_head(upstream)
                if not upload.done:
                    sending = spawn(upload.run(upstream), name="egress-upload")
                response = await read_final_head(upstream, admitted.upgrade, lambda it: self._interim(it, upload))
                self._call.attributes[attr.NETWORK_PROTOCOL_VERSION] = f"1.{response.minor}"
            except ConnectionError as exc:
                if repeatable and not isinstance(exc, AgentGoneError):
                    raise _DeadPooledError from exc
                raise
            goes_on = await self._relay(admitted, upload, upstream, response)
            self._relayed = True
            if sending is not None and not sending.done() and self._can_complete:
                await end_of(sending, upstream)  # the upstream has answered, and may go on reading
            kept_s = forward.kept_for_s(response) if goes_on and upload.done else 0.0
        finally:
            self._agent.on_lost(None)
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            upstream.set_idle_timeout(0)
            if kept_s > 0:
                self._exit.upstream.release(admitted.target, upstream, kept_s)
            else:
                upstream.abort()

    async def _interim(self, response: Response, upload: Upload) -> None:
        """Pass on a response that comes before the final one, unless it answers what was answered already."""
        if self._request.minor == 0 or (response.status == 100 and upload.answered_expect):
            return
        await self._agent.write(forward.render_response(upload.withhold(response), framing=Framing.AS_SENT))

    # --- the response coming down -----------------------------------------------------------------------------------

    async def _relay(self, admitted: Admitted, upload: Upload, upstream: Channel, response: Response) -> bool:
        """Send the response to the agent as it comes; return whether the upstream connection can be used again."""
        self._status = response.status
        download = Download(admitted, self._capture, self._elapsed, upload.withhold_trailers)
        if response.status == 101:
            if not upload.done:
                raise ProtocolError("upgrade", "the upstream switched protocols before the request was complete")
            download.head(response, None)
            await self._switch(admitted.head, upstream, upload.withhold(response))
            return False
        body = response_body(response, self._request.method)
        download.head(response, body)
        rewrites, governed = upload.rewritten or download.rewrites, admitted.governor is not None
        framing = choose_framing(self._request, response, body, rewrites=rewrites, governed=governed)
        self._until_close = body.until_close
        self._open_ended = body.until_close or framing is Framing.DECODED
        ends = response.minor == 0 or "close" in response.tokens("connection")
        self._continues = not (self._open_ended or self._asks_close() or ends)
        told, close = upload.withhold(response), not self._continues
        pending = [forward.render_response(told, framing=framing, drop_coding=download.decodes, close=close)]
        download.opened(partial(self._inject, framing=framing))
        try:
            await self._stream(download, body, upstream, pending, framing)
        except (OSError, ProtocolError):
            self._inject(b"" if pending else download.broken(), framing=framing)
            raise
        if download.cut is not None:
            self._cut_short, self._continues = download.cut, False
            return False
        upstream.unread(body.rest)
        return not (ends or body.until_close)

    async def _stream(
        self, download: Download, body: Body, upstream: Channel, pending: list[bytes], framing: Framing
    ) -> None:
        """Carry the body to its end, or to where its governor cuts it: cleanly, if the framing can say so."""
        chunked = not body.done and framing in (Framing.CHUNKED, Framing.REWRITTEN)
        while not body.done:
            data = upstream.read_nowait()
            if not data:
                await self._flush(pending, upstream)
                if not (data := await upstream.read()):
                    body.eof()
                    break
            piece = body.feed(data)
            out = download.data(piece)
            if framing is Framing.CHUNKED:
                self._call.response_bytes += len(piece)
                if framed := body.framed(piece):
                    pending.append(framed)
            else:
                self._push(pending, out, framing)
            if download.cut is not None:
                break
            if len(pending) > 1 or not self._answered:
                await self._flush(pending, upstream)
        if download.cut is None:
            self._push(pending, download.end(), framing)
        if clean := chunked and (download.cut is None or bool(download.cut.last)):
            pending.append(render_last_chunk(download.trailers(body)))
        await self._flush(pending, upstream)
        if download.cut is not None and not clean:
            self._cut()

    def _push(self, pending: list[bytes], piece: bytes, framing: Framing) -> None:
        if piece:
            self._call.response_bytes += len(piece)
            pending.append(render_chunk(piece) if framing is Framing.REWRITTEN else piece)

    def _inject(self, piece: bytes, *, framing: Framing) -> bool:
        """Send what else there is to say. Between two awaits of _stream all that was pending is written."""
        if not piece or not self._answered or self._agent.is_paused:
            return False
        try:
            self._agent.write_nowait(render_chunk(piece) if framing is Framing.REWRITTEN else piece)
        except OSError:
            return False
        self._call.response_bytes += len(piece)
        return True

    async def _flush(self, pending: list[bytes], upstream: Channel) -> None:
        if pending:
            self._answered = True
            data = pending[0] if len(pending) == 1 else b"".join(pending)
            pending.clear()
            self._agent.write_nowait(data)
            if self._agent.is_paused:  # the upstream can say nothing meanwhile, so its clock stands
                upstream.set_idle_timeout(0)
                self._agent.set_idle_timeout(self._exit.request_timeout_s)
                await self._agent.drain()
                self._agent.set_idle_timeout(0)
                upstream.set_idle_timeout(self._exit.request_timeout_s)

    async def _switch(self, head: RequestHead, upstream: Channel, response: Response) -> None:
        """Become a tunnel (RFC 9110, section 15.2.2)."""
        self._answered, self._continues, self._switched = True, False, True
        self._agent.on_lost(None)
        upstream.set_idle_timeout(0)
        upstream.keep_alive()  # the agent's own probes end here
        await self._agent.write(forward.render_response(response, framing=Framing.AS_SENT))
        up, down = upstream.sent_bytes, self._agent.sent_bytes
        try:
            carried = tunnel(self._agent, upstream)
            await self._exit.tunnels.carry(lambda way_out: allows(way_out, self._origin, head), carried)
        finally:
            self._call.request_bytes += upstream.sent_bytes - up
            self._call.response_bytes += self._agent.sent_bytes - down

    @property
    def _can_complete(self) -> bool:
        """Say whether a request may be sent to its end after the answer: not where that means to end the connection."""
        return not (self._open_ended or self._switched or self._cut_short is not None)

    # --- how it ends ------------------------------------------------------------------------------------------------

    def broke(self) -> None:
        """A bug of ours ended it: record it if nobody has, and tell the agent what can still be told."""
        if not self._call.recorded:
            self._exit.spans.failed(self._call, *_BUG)
        self._answer(500, *_BUG)

    def _asks_close(self) -> bool:
        return self._request.minor == 0 or "close" in self._request.tokens("connection")

    def _denies(self, answer: Answer) -> bool:
        """Say whether a governor's word holds: where the gateway only watches, it is noted on the span."""
        if self._exit.policy.enforces:
            return True
        self._exit.spans.would_deny(self._call, answer.reason, answer.rule)
        return False

    def _answer_instead(self, admitted: Admitted, answer: Answer) -> None:
        """Give the governor's answer; the request was read to its end, so the connection can carry another."""
        if admitted.interpreter is not None:
            admitted.interpreter.request_end()
        self._call.attributes.update(answer.attributes)
        self._call.attributes[attr.CLRK_EGRESS_DENY_REASON] = answer.reason
        if answer.rule:
            self._call.attributes[attr.CLRK_EGRESS_ROUTE] = answer.rule
        self._status, self._answered, self._continues = answer.status, True, not self._asks_close()
        if not self._agent.is_broken:  # else nobody waits for it; it was denied all the same
            raw = render_answer(answer, head_only=self._request.method == "HEAD", close=not self._continues)
            self._call.response_bytes = len(answer.body)
            self._agent.write_nowait(raw)
        self._record(admitted, answer.reason, answer.message)

    def _settle(self, facts: Facts | None) -> None:
        """Tell the governor, once, how it ended."""
        governor, self._governor = self._governor, None
        if governor is not None:
            self._call.attributes.update(governor.settle(facts, sent=bool(self._sent_at)))

    def _fail(self, admitted: Admitted, upload: Upload, exc: OSError | ProtocolError) -> None:
        """One side broke: say so to the other, and in the span."""
        if self._answered and admitted.governor is not None:
            admitted.governor.response_end(complete=False)
        broken = upload.error or (exc if isinstance(exc, ProtocolError) and not self._sent_at else None)
        if broken is not None:
            self._settle(None)
            self._exit.spans.denied(self._call, f"bad_request_{broken.code}", str(broken))
            self._answer(400, f"bad_request_{broken.code}", str(broken))
            return
        if isinstance(exc, AgentGoneError | TunnelRevokedError) or self._agent.is_broken:
            why = error_type_of(exc) if isinstance(exc, TunnelRevokedError) else AGENT_DISCONNECTED
            self._record(admitted, why, str(exc))
            self._agent.abort()
            return
        if isinstance(exc, TimeoutError) and upload.waits_for_agent and not upload.done and not self._answered:
            text = f"the request's body did not go on for {self._exit.request_timeout_s:g} s"
            self._record(admitted, "request_timeout", text)
            self._answer(408, "request_timeout", text)
            return
        kind = exc.code if isinstance(exc, ProtocolError) else error_type_of(exc)
        message = f"{admitted.target.label}: {explain(exc)}"
        if self._answered:
            self._record(admitted, kind, message)
            self._cut(exc)
        elif kind == "timeout":
            self._record(admitted, kind, message)
            self._answer(504, kind, f"no answer within {self._exit.request_timeout_s:g} s from {admitted.target.label}")
        else:
            kind = f"bad_response_{exc.code}" if isinstance(exc, ProtocolError) else kind
            self._settle(None)
            self._exit.spans.failed(self._call, kind, message, self._events())
            self._answer(502, kind, message)

    def _cut(self, cause: OSError | ProtocolError | None = None) -> None:
        """End a response that is not complete so that the agent can see it: never a clean end."""
        if self._until_close and isinstance(cause, RaggedEndError):
            self._agent.close_raggedly()  # what that means is its own decision, as without us
        elif self._open_ended:
            self._agent.reset()
        else:
            self._agent.close()  # what came is delivered; the length, or the last chunk, is missing

    def _answer(self, status: int, reason: str, detail: str, hint: str = "") -> None:
        if self._answered or self._agent.is_broken:
            self._agent.abort()
            return
        self._answered = True
        is_head, run_id = self._request.method == "HEAD", self._exit.spans.identity.invocation_id
        errors = find_client_errors_guarded(self._exit, self._origin, self._request)
        raw = render_problem(status, reason, detail, hint=hint, head_only=is_head, invocation_id=run_id, errors=errors)
        self._agent.write_nowait(raw)

    def _record(self, admitted: Admitted, error: str | None = None, message: str = "") -> None:
        """Record the span. Without an error, the answer went to its end, or to where it was cut."""
        if error is None and (cut := self._cut_short) is not None:
            error, message = cut.reason, cut.message
        facts = None
        if (interpreter := admitted.interpreter) is not None and not self._switched:
            if error is not None:
                interpreter.response_end(complete=False)
            facts = interpreter.facts()
        self._settle(facts)
        self._exit.spans.http(
            self._call, admitted.head, self._status, facts, error=error, message=message, events=self._events()
        )

    def _events(self) -> Sequence[SpanEvent]:
        return self._capture.events() if self._capture is not None else ()

    def _elapsed(self) -> float:
        return self._loop.time() - self._sent_at
