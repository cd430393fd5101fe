"""Serve the HTTP/1.1 requests of one agent connection, one after the other (CONTRACT section 10)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.channel import Channel
from clrk.gateway.egress.exchange import Exchange
from clrk.gateway.egress.http1 import HeadReader, Request, parse_request
from clrk.gateway.egress.origin import Exit, Origin
from clrk.gateway.egress.refusal import render_problem, status_of

_LOG: Final = logging.getLogger(__name__)
KEEP_ALIVE_S: Final = 300.0
HEAD_TIMEOUT_S: Final = 60.0  # from a head's first byte to its last
LINGER_S: Final = 30.0  # of an agent that sends on after our last answer
LINGER_IDLE_S: Final = 2.0  # of one that neither sends nor closes


async def relay_http(way_out: Callable[[], Exit], origin: Origin, agent: Channel) -> None:
    """Carry requests until either side ends the connection. Never raises for what a peer does.

    Shape: way_out returns that of now: each request is judged by the rules that hold when it comes.
    """
    start_ns, unread = origin.connect_ns, True
    try:
        while (request := await _next_request(way_out, origin, agent, start_ns)) is not None:
            call = origin.call(start_ns or time.time_ns())
            exchange = Exchange(way_out(), origin, agent, request, call, follows=not start_ns)
            start_ns = 0
            try:
                if not await exchange.run():
                    unread = exchange.leaves_unread
                    break
            except OSError:
                raise
            except Exception:  # a bug of ours, met in somebody's call: that has a span, and the agent an answer
                _LOG.exception("a %s of sandbox %s failed", request.method, way_out().spans.identity.sandbox_id)
                exchange.broke()
                break
        await _linger(agent, unread=unread)
    except OSError:
        return  # the agent is gone between two requests: nothing is owed to anybody


async def _next_request(way_out: Callable[[], Exit], origin: Origin, agent: Channel, start_ns: int) -> Request | None:
    """Return the next request; None when there is none or it was refused. Raises: OSError between two requests."""
    agent.set_idle_timeout(KEEP_ALIVE_S)
    await agent.drain()  # who does not read what was denied is not read on
    if agent.has_unread:
        await asyncio.sleep(0)  # pipelined: without it, denials would follow each other and nobody else had a turn
    data = await agent.read()
    agent.set_idle_timeout(0)
    if not data:
        return None
    try:
        head, rest = HeadReader().feed(data) or await _rest_of_head(agent, data)
        agent.unread(rest)
        return parse_request(head)
    except ProtocolError as exc:
        call = origin.call(start_ns or time.time_ns())
        reason, invocation_id = f"bad_request_{exc.code}", way_out().spans.identity.invocation_id
        way_out().spans.denied(call, reason, str(exc))
        if not agent.is_broken:
            await agent.write(render_problem(status_of(exc.code), reason, str(exc), invocation_id=invocation_id))
        return None


async def _rest_of_head(agent: Channel, data: bytes) -> tuple[bytes, bytes]:
    """Return (head, what follows it) of a head that begins with data. Raises: ProtocolError."""
    reader = HeadReader()
    try:
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            while (found := reader.feed(data)) is None:
                if not (data := await agent.read()):
                    raise ProtocolError("truncated", "the connection ended inside a request head")
            return found
    except TimeoutError:
        raise ProtocolError("timeout", f"the request head took longer than {HEAD_TIMEOUT_S:g} s") from None
    except OSError as exc:
        raise ProtocolError("truncated", f"the connection broke inside a request head: {exc}") from exc


async def _linger(agent: Channel, *, unread: bool) -> None:
    """Let our last answer arrive: closing with unread input would become a reset that destroys it.

    Shape: unread says that more of a request may come. Where none does, TLS just closes: it has no half-close.
    """
    if agent.is_broken or (agent.is_tls and not unread):
        return
    if not agent.is_tls:
        agent.write_eof()
    agent.set_idle_timeout(LINGER_IDLE_S)
    try:
        async with asyncio.timeout(LINGER_S):
            while await agent.read():
                continue
    except TimeoutError:
        return  # it does not end by itself: the close settles it
