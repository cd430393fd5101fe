"""MCP streams: servers that answer on another exchange, clients that listen."""

from __future__ import annotations

import asyncio
from typing import Any

import mcp_lab
from egress_lab import Lab, Wire, read_request
from mcp_lab import JSON, NAME, raw

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDPOINT = b"event: endpoint\ndata: /messages/?session_id=7\n\n"
SESSION = "Mcp-Session-Id: s-1\r\nMCP-Protocol-Version: 2025-06-18\r\n"


def request(method: str, id_: Any = 1, **params: Any) -> bytes:
    return raw({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})


def message(value: bytes) -> bytes:
    return b"event: message\r\ndata: " + value + b"\r\n\r\n"


def result(id_: Any, **found: Any) -> bytes:
    return raw({"jsonrpc": "2.0", "id": id_, "result": found})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class SseServer:
    """HTTP+SSE: GET is the stream, POSTs are accepted. `send` puts bytes on the stream."""

    def __init__(self, first: bytes = ENDPOINT) -> None:
        self.first = first
        self.bodies: list[bytes] = []
        self.streams: list[asyncio.StreamWriter] = []
        self.more = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            if head.startswith(b"GET"):
                writer.write(STREAM_HEAD + chunk(self.first))
                self.streams.append(writer)
            else:
                self.bodies.append(body)
                writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 8\r\n\r\nAccepted")
            self.more.set()

    def send(self, data: bytes) -> None:
        self.streams[-1].write(chunk(data))

    def end(self) -> None:
        self.streams[-1].write(b"0\r\n\r\n")


async def listen(one: Lab, path: str = "/sse", headers: str = "") -> Wire:
    wire = await one.dial(NAME, 80)
    head = f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\nAccept: text/event-stream\r\n{headers}\r\n"
    wire.writer.write(head.encode())
    async with asyncio.timeout(25):
        assert b" 200 OK" in await wire.reader.readuntil(b"\r\n\r\n")
    return wire


async def read_event(wire: Wire) -> bytes:
    """Return the next chunk's data: the gateway's own chunks hold whole events."""
    async with asyncio.timeout(25):
        size = int(await wire.reader.readuntil(b"\r\n"), 16)
        return (await wire.reader.readexactly(size + 2))[:-2]


async def post(
    one: Lab, body: bytes, target: str = "/messages/?session_id=7", headers: str = ""
) -> tuple[bytes, bytes]:
    wire = await one.dial(NAME, 80)
    wire.writer.write(mcp_lab.post(body, JSON + headers, target))
    return await wire.response()


def named(one: Lab, name: str) -> list[dict[str, Any]]:
    return [dict(span.attributes) for span in one.spans if span.name == name]
