"""Lists of an MCP server show what may be called, and no more; all else passes to the letter."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from egress_lab import Lab, answer
from mcp_lab import BOTH, JSON, LIST, NAME, PAGE, Server, ask, call, lab, post, raw

SHOWN = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "get"}], "nextCursor": "n"}}


async def whole(one: Lab, request: bytes) -> bytes:
    """Send a request that closes; return the body without its chunks."""
    wire = await one.dial(NAME, 80)
    reply = await wire.ask(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"ontent-Encoding" not in head
    if b"ransfer-Encoding: chunked" not in head:
        return body
    out = b""
    while size := int(body.partition(b"\r\n")[0], 16):
        out += (body := body.partition(b"\r\n")[2])[:size]
        body = body[size + 2 :]
    return out


@pytest.mark.parametrize("coding", ["", "gzip", "Gzip"])
async def test_lists_are_filtered(coding: str) -> None:
    packed = gzip.compress(raw(PAGE)) if coding else raw(PAGE)
    server = Server(answer(packed, headers=JSON + (f"Content-Encoding: {coding}\r\n" if coding else "")))
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        found = await whole(one, post(LIST, BOTH + "Accept-Encoding: gzip, br\r\n"))
        (span,) = await one.recorder.wait()
    assert json.loads(found) == SHOWN
    assert b"accept-encoding: identity\r\n" in server.heads[0].lower()
    assert span.attributes["clrk.resp.bytes"] == len(found)
    assert span.name == "tools/list"


async def test_lists_in_streams_are_filtered() -> None:
    events = b"id: 1\ndata: \n\nevent: message\nid: 2\ndata: " + raw(PAGE) + b"\n\n: bye\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    async with lab(Server(head + events), {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(post(LIST))
        async with asyncio.timeout(25):
            await wire.reader.readuntil(b"\r\n\r\n")
            found = await wire.reader.readuntil(b": bye\n\n")
    before, shown, after = found.partition(b"id: 2\ndata: ")[0], *found.partition(b"id: 2\ndata: ")[2].split(b"\n", 1)
    assert (before, after) == (b"id: 1\ndata: \n\nevent: message\n", b"\n: bye\n\n")
    assert json.loads(shown) == SHOWN


@pytest.mark.parametrize("coding", ["zpaq", "gzip"])
async def test_a_list_that_can_not_be_read_is_not_shown(coding: str) -> None:
    server = Server(answer(raw(PAGE), headers=JSON + f"Content-Encoding: {coding}\r\n"))
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(NAME, 80)
        head, _, body = (await wire.ask(post(LIST))).partition(b"\r\n\r\n")
        (span,) = await one.recorder.wait()
    assert b"ransfer-Encoding: chunked" in head
    assert body == b""  # not even the chunk that ends it: it is no empty answer
    assert span.attributes["error.type"] == "mcp_unfilterable"


async def test_all_else_passes_to_the_letter() -> None:
    body = b' {"jsonrpc":"2.0", "id":1, "result":{"content":[{"type":"text","text":"rm"}],"tools":[{"name":"rm"}]}}\n'
    reply = answer(body, headers=JSON + "ETag: x\r\n")
    async with lab(Server(reply), {"deniedTools": ["rm"]}) as one:
        head, found = await ask(one, post(raw(call("get"))))
    assert head + found == reply
