"""`/metrics`, which anybody on this host may ask for: however often and however slowly, it costs the others little.

With as many series as agents can make, one reading takes a second and gives 16 MB. So there is one at a time, its text
is everybody's for ten times as long as it took, and who does not take it in time is cut off.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesIOPayload

_ANSWER_S: Final = 10.0
_SHARE: Final = 10  # a reading may take one part in so many of the time


class Scrape:
    """An aiohttp handler. render returns Prometheus text and its Content-Type; it is called in a thread."""

    def __init__(self, render: Callable[[], tuple[bytes, str]]) -> None:
        self._render = render
        self._turn = asyncio.Lock()
        self._read = (b"", "")
        self._good_until = 0.0

    async def __call__(self, _request: web.Request) -> web.Response:
        """Answer with metrics that are not much older than the time that reading them takes."""
        now = asyncio.get_running_loop().time
        async with self._turn:
            if (began := now()) >= self._good_until:
                self._read = await asyncio.to_thread(self._render)
                self._good_until = now() + _SHARE * (now() - began)
            text, content_type = self._read
        return web.Response(body=_Piecewise(io.BytesIO(text)), headers={"Content-Type": content_type})


class _Piecewise(BytesIOPayload):
    """Text that is shared by all who read it, and let go of in time."""

    async def write(self, writer: AbstractStreamWriter) -> None:
        """See Payload."""
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """See Payload. Raises: ConnectionResetError when the client is too slow."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                await super().write_with_length(writer, content_length)
        except TimeoutError:
            if writer.transport is not None:
                writer.transport.abort()
            raise ConnectionResetError from None
