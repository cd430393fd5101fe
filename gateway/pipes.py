"""The agent's stdin, stdout and stderr on the event loop: a read or a write happens only when somebody asks for it.

Nothing is buffered on our side, so an agent that floods or never reads meets the kernel's pipe limit, not our memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

CHUNK_SIZE: Final = 65_536


class Pipe:
    """One end of a pipe. Not for two readers or two writers at once.

    Side effects: owns fd and makes it non-blocking.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """Return what is there, at most CHUNK_SIZE bytes, or b"" at the end. Waits its turn even when data is there."""
        while self._fd >= 0:
            await self._ready(self._loop.add_reader, self._loop.remove_reader)
            try:
                return os.read(self._fd, CHUNK_SIZE) if self._fd >= 0 else b""
            except BlockingIOError:
                continue
        return b""

    async def write_all(self, payload: bytes) -> bool:
        """Write everything; False when the reader went away first, which is its right."""
        view = memoryview(payload)
        while view and self._fd >= 0:
            await self._ready(self._loop.add_writer, self._loop.remove_writer)
            try:
                view = view[os.write(self._fd, view[:CHUNK_SIZE]) :] if self._fd >= 0 else view
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return False
        return not view

    def close(self) -> None:
        """Close the fd; a read or write in progress ends as if the other side had closed."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._waiting is not None and not self._waiting.done():
                self._loop.remove_reader(fd)
                self._loop.remove_writer(fd)
                self._waiting.set_result(None)
            os.close(fd)

    async def _ready(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        fd = self._fd
        waiting = self._waiting = self._loop.create_future()
        add(fd, _wake, waiting)
        try:
            await waiting
        finally:
            if self._fd == fd:
                remove(fd)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
