"""The HTTP relay end to end: real sockets, both event loops."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re

import pytest
import uvloop
from egress_lab import Authority, aliased, answer, laboratory, read_request, upstream

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME, "api.example.com"]}]


def replying(*replies: bytes, seen: list | None = None):
    """An upstream that answers each request with the next reply, and keeps what it saw."""

    async def handle(reader, writer):
        for reply in replies:
            request = await read_request(reader)
            if seen is not None:
                seen.append(request)
            writer.write(reply)
            await writer.drain()

    return handle


async def test_request_and_response_pass_with_order_case_and_duplicates():
    seen = []
    reply = answer(b"hi", headers='X-b: 1\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nX-A: \r\nAlt-Svc: h3=":443"\r\n')
    async with (
        upstream(replying(reply, seen=seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(
            b"GET /a/../b?x=1&&y=%2f? HTTP/1.1\r\nhOST: tools.internal\r\nX-z: 2\r\nx-Z: 1\r\nKeep-Alive: 5\r\n"
            b"X-Hop: no\r\nConnection: close, x-hop\r\nCookie: c=d\r\n\r\n"
        )
        spans = await lab.recorder.wait()
    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"hi"
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK", b"X-b: 1", b"Set-Cookie: a=1", b"set-cookie: b=2", b"X-A: ", b"Content-Length: 2",
        b"Connection: close",
    ]  # fmt: skip
    span = spans[0]
    lines = seen[0][0].decode().split("\r\n")
    assert lines[:5] == [
        "GET /a/../b?x=1&&y=%2f? HTTP/1.1", "hOST: tools.internal", "X-z: 2", "x-Z: 1", "Cookie: c=d",
    ]  # fmt: skip
    assert lines[5:] == [
        f"traceparent: 00-{lab.identity.context.trace_id}-{span.span_id}-01", "tracestate: vendor=1", "", "",
    ]  # fmt: skip
    assert span.name == "GET tools.internal"
    assert span.parent_span_id == lab.identity.context.span_id
    assert span.attributes["clrk.dst.name"] == NAME
    assert span.attributes["network.peer.address"] == "127.0.0.1"
    assert span.attributes["network.peer.port"] == port
    assert span.attributes["process.pid"] == 1234
    assert span.attributes["process.executable.name"] == "agent"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["url.full"] == "http://tools.internal/a/../b?x=1&&y=%2f?"
    assert span.attributes["clrk.resp.bytes"] == 2
    assert "error.type" not in span.attributes
