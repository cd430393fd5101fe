"""A CONNECT proxy on loopback that knows its own names, as a company's does: hosts map to ports here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from egress_lab import upstream


@dataclass
class ConnectProxy:
    """What it does, and what it saw.

    Shape: hosts maps `host:port` of CONNECT to a loopback port. reply answers instead of a tunnel, b"" with the end of
        the connection, None with silence.
    """

    hosts: Mapping[str, int] = field(default_factory=dict)
    credentials: str = ""
    reply: bytes | None = b"tunnel"
    glued: bytes = b""  # right behind its 200
    port: int = 0
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one CONNECT, and carry what follows."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self.reply is None:
            await reader.read()
        elif self.reply != b"tunnel":
            writer.write(self.reply)
        else:
            await self._tunnel(head, reader, writer)

    async def _tunnel(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, *fields = head.decode().split("\r\n")
        method, target, version = line.split(" ")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        expected = "Proxy-Authorization: Basic " + base64.b64encode(self.credentials.encode()).decode()
        if self.credentials and expected not in fields:
            writer.write(b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n')
        elif target not in self.hosts:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        else:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.hosts[target])
            writer.write(b"HTTP/1.0 200 Connection established\r\nContent-Length: 17\r\n\r\n" + self.glued)
            try:
                await asyncio.gather(_copy(reader, up_writer), _copy(up_reader, writer))
            finally:
                up_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()


@contextlib.asynccontextmanager
async def connect_proxy(context: ssl.SSLContext | None = None, **options) -> AsyncIterator[ConnectProxy]:
    """Run one; with a context it is an https:// proxy."""
    proxy = ConnectProxy(**options)
    async with upstream(proxy.serve, context) as proxy.port:
        yield proxy
