"""Tunnels: bytes both ways, half-close and backpressure kept, resets passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from clrk.core.errors import ClrkError
from clrk.gateway._aio import spawn
from clrk.gateway.egress.channel import Channel

Admission = Callable[[], Awaitable[None]]


async def tunnel(agent: Channel, upstream: Channel, admission: Admission | None = None) -> None:
    """Carry bytes until both directions have ended.

    Shape: admission, if given, is awaited before the agent's first byte goes up; what it raises ends the tunnel.
    Raises: OSError of the side that broke, or admission's ClrkError; both sides have then been reset.
    Side effects: the upstream is closed; the agent's side stays the caller's.
    """
    up = spawn(_pump(agent, upstream, admission), name="tunnel-up")
    down = spawn(_pump(upstream, agent, None), name="tunnel-down")
    try:
        errors = await asyncio.gather(up, down)
    except asyncio.CancelledError:
        agent.reset()
        upstream.reset()
        await asyncio.gather(up, down, return_exceptions=True)
        raise
    finally:
        upstream.close()
    for error in errors:
        if error is not None:
            raise error


async def _pump(source: Channel, sink: Channel, admission: Admission | None) -> OSError | ClrkError | None:
    """Carry one direction. An error of either side ends both directions; it is a result here, not a crash."""
    try:
        if admission is not None:
            await admission()
        while data := await source.read():
            await sink.write(data)
    except (OSError, ClrkError) as exc:
        source.reset()
        sink.reset()
        return exc
    sink.write_eof()
    return None
