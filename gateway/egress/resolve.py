"""Resolve upstream names with the host's resolver, in threads of our own, so that slow names starve nobody.

getaddrinfo() can not be cancelled: a name server that never answers holds its thread for tens of seconds, also after
the connection that asked has given up. So a run holds few threads at a time, a slot is free only when its thread is,
and the threads are daemons: no lookup delays the end of the process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from ipaddress import ip_address
from typing import Final

from clrk.core.wire import IPAddress

MAX_LOOKUPS: Final = 4  # of one run

Resolver = Callable[[str, int], Awaitable[list[IPAddress]]]


async def system_resolver(name: str, port: int) -> list[IPAddress]:
    """Return the addresses of a name in the host's order. Raises: socket.gaierror."""
    found: Future[list[IPAddress]] = Future()
    threading.Thread(target=_lookup, args=(name, port, found), name="clrk-resolve", daemon=True).start()
    return await asyncio.wrap_future(found)


def _lookup(name: str, port: int, found: Future[list[IPAddress]]) -> None:
    found.set_running_or_notify_cancel()
    try:
        entries = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries)
    except Exception as exc:  # the root of a thread: whatever it is belongs to who asked
        found.set_exception(exc)
    else:
        found.set_result(list(addresses))


class LimitedResolver:
    """A resolver for one run: at most MAX_LOOKUPS at a time, those that nobody waits for any more included."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._slots = asyncio.Semaphore(MAX_LOOKUPS)

    async def __call__(self, name: str, port: int) -> list[IPAddress]:
        """Resolve. Raises: socket.gaierror, and CancelledError at once; the lookup then ends by itself."""
        await self._slots.acquire()
        lookup = asyncio.ensure_future(self._resolver(name, port))
        lookup.add_done_callback(self._finished)
        return await asyncio.shield(lookup)

    def _finished(self, lookup: asyncio.Future[list[IPAddress]]) -> None:
        self._slots.release()
        if not lookup.cancelled():
            lookup.exception()  # seen: when the waiter has gone, nobody else will look
