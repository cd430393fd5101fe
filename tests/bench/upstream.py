"""The benchmark's upstream: answers every HTTP/1.1 request over TLS with the same 1 KiB, as cheaply as Python can.

So that what is compared is the gateway, not the server. Usage: upstream.py DIR; prints IP:PORT when it listens.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

import uvloop

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/standin"))
from certificates import make_server_context  # noqa: E402 - the stand-in is a folder of programs, not a package

_BODY = b"x" * 1024
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 1024\r\n\r\n" + _BODY


class Answerer(asyncio.Protocol):
    """One connection; requests have no body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class says nothing of asyncio's
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        """Answer every request head that is complete."""
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        if heads:
            self._transport.write(_ANSWER * len(heads))


async def main() -> None:
    """Serve until killed."""
    context, _ = make_server_context(Path(sys.argv[1]), ("files.internal",))
    server = await asyncio.get_running_loop().create_server(Answerer, "127.0.0.1", 0, ssl=context, backlog=1024)
    host, port = server.sockets[0].getsockname()
    print(f"{host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
