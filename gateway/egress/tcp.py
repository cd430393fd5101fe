"""Tunnels: who may have one, who speaks first in it, and the bytes both ways.

Half-close and backpressure are kept, resets passed on. What an agent had sent when it ended still arrives, as it would
without a gateway: the kernel delivers what a dead process has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from clrk.core.errors import ClrkError
from clrk.gateway._aio import spawn
from clrk.gateway.egress.admission import admit_tunnel, allows_tunnel
from clrk.gateway.egress.channel import Channel, RaggedEndError
from clrk.gateway.egress.failure import DialDeniedError, DialFailedError, error_type_of
from clrk.gateway.egress.hidden_http import FirstLine, HiddenHttpError
from clrk.gateway.egress.origin import Exit, Origin
from clrk.gateway.egress.record import CANCELLED, Call

RUN_ENDED: Final = "the run ended"  # the message of a cancellation: the agent is dead, and may have said its last
FLUSH_S: Final = 0.5  # for what is on its way up when the run ends; the sandbox is gone within a second

Admission = Callable[[], Awaitable[None]]
_Broken = list[tuple[Channel, OSError | ClrkError]]  # which side, and how
_Pump = asyncio.Task[bool]


class AgentResetError(ConnectionResetError):
    """The agent broke the connection off: as often as not after its last word, by closing before the peer's goodbye."""


async def dial_tunnel(way_out: Exit, origin: Origin, call: Call, sni: str | None = None) -> Channel | None:
    """Dial, if a rule allows the connection without looking at requests; None when it did not come about.

    Shape: sni is that of a TLS connection that is tunnelled unread.
    Side effects: records the span of a connection that did not come about; the agent is still to be told.
    """
    try:
        upstream = await way_out.upstream.dial(admit_tunnel(way_out, origin, call, sni))
    except DialDeniedError as exc:
        way_out.spans.denied(call, exc.reason, str(exc), exc.rule, exc.hint)
        return None
    except DialFailedError as exc:
        way_out.spans.failed(call, exc.error_type, str(exc))
        return None
    call.peer = upstream.peer
    upstream.keep_alive()  # the agent's own probes end here
    return upstream


async def carry_tunnel(
    way_out: Exit,
    origin: Origin,
    call: Call,
    ends: tuple[Channel, Channel],
    *,
    sni: str | None = None,
    admission: Admission | None = None,
) -> None:
    """Carry bytes to the end, or until other rules end it, and record the span: egress.tcp.

    Shape: ends are the agent's side and the upstream's.
    Raises: what admission raises.
    """
    agent, upstream = ends
    way_out.spans.begin_tcp(call)
    error, message = None, ""
    try:
        carried = tunnel(agent, upstream, admission, FirstLine())
        await way_out.tunnels.carry(lambda now: allows_tunnel(now, origin, sni), carried)
    except OSError as exc:
        error, message = _error_of(exc, call)
        if not isinstance(exc, AgentResetError | HiddenHttpError):
            agent.reset()
            upstream.reset()  # it may not have been used at all
    except ClrkError as exc:
        error, message = _error_of(exc, call)
        raise
    except asyncio.CancelledError as exc:
        if exc.__cause__ is not None or not agent.is_at_end:
            error, message = _error_of(exc.__cause__ or exc, call)
        raise
    finally:
        call.request_bytes, call.response_bytes = upstream.sent_bytes, upstream.received_bytes
        way_out.spans.tcp(call, error, message)


def _error_of(exc: BaseException, call: Call) -> tuple[str | None, str]:
    """Say in the words of a span how a tunnel ended: error.type and message."""
    match exc:
        case AgentResetError():  # its own affair, and nothing that failed: a client that leaves TLS early is one
            return None, ""
        case OSError():
            kind = "http_in_tunnel" if isinstance(exc, HiddenHttpError) else error_type_of(exc)
            return kind, f"{call.destination.host}:{call.destination.port}: {exc}"
        case ClrkError():
            return "not_admitted", str(exc)
        case _:
            return CANCELLED, RUN_ENDED


async def is_client_first(
    client: Coroutine[Any, Any, None], server: Coroutine[Any, Any, None], limit_s: float | None
) -> bool:
    """Wait until one of them speaks or ends; say whether it was the client. Raises: TimeoutError.

    A server that has spoken although no byte of the client has reached it is one that speaks first.
    """
    tasks = spawn(client, name="client-speaks"), spawn(server, name="server-speaks")
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return not tasks[1].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def tunnel(
    agent: Channel, upstream: Channel, admission: Admission | None = None, first: FirstLine | None = None
) -> None:
    """Carry bytes until both directions have ended.

    Shape: admission, if given, is awaited before the agent's first byte goes up; what it raises ends the tunnel. first
        watches what the agent says.
    Raises: OSError of the side that broke, or admission's ClrkError; both sides have then been reset. CancelledError of
        a run that ended: what broke by then, also while the agent's last words were passed on, is its cause.
    Side effects: the upstream is closed; the agent's side stays the caller's.
    """
    broken: _Broken = []
    up = spawn(_pump(agent, upstream, broken, admission, first), name="tunnel-up")
    down = spawn(_pump(upstream, agent, broken, None), name="tunnel-down")
    try:
        await asyncio.wait((up, down))
    except asyncio.CancelledError as exc:
        if exc.args == (RUN_ENDED,):
            await _let_arrive(agent, upstream, up, down)
        else:
            await _cut(agent, upstream, up, down)
        raise exc from _cause(agent, broken)
    finally:
        upstream.close()
    for pump in (up, down):  # not awaited: what it was shall not depend on when the run ends
        pump.result()
    if (cause := _cause(agent, broken)) is not None:
        raise cause


def _cause(agent: Channel, broken: _Broken) -> OSError | ClrkError | None:
    """The first to break is the cause; the other pump has seen its consequences."""
    if not broken:
        return None
    side, error = broken[0]
    return AgentResetError(str(error)) if side is agent and isinstance(error, OSError) else error


async def _let_arrive(agent: Channel, upstream: Channel, up: _Pump, down: _Pump) -> None:
    """The run is over: pass on what its agent has said, to its end; without an end in time, that is a reset."""
    down.cancel()
    await asyncio.wait((up,), timeout=FLUSH_S)
    if up.done() and up.result():
        await upstream.finish(FLUSH_S)
    else:
        await _cut(agent, upstream, up, down)


async def _cut(agent: Channel, upstream: Channel, up: _Pump, down: _Pump) -> None:
    agent.reset()
    upstream.reset()
    up.cancel()
    down.cancel()
    await asyncio.gather(up, down, return_exceptions=True)


async def _pump(
    source: Channel,
    sink: Channel,
    broken: _Broken,
    admission: Admission | None,
    first: FirstLine | None = None,
) -> bool:
    """Carry one direction to its end. An error of either side is noted, and ends both directions."""
    side = source
    try:
        if admission is not None:
            await admission()
        while data := await source.read():
            side = sink
            if first is not None and not first.goes_on(data):
                first = None
            await sink.write(data)
            side = source
    except RaggedEndError:  # of either side: it is over, and whether it broke nobody can tell
        if side is source:
            sink.close_raggedly()
        return True
    except (OSError, ClrkError) as exc:
        broken.append((side, exc))
        source.reset()
        sink.reset()
        return False
    sink.write_eof()
    return True
