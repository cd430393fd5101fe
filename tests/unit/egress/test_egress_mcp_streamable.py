"""MCP over Streamable HTTP: streams that a client leaves or resumes, questions of servers, ends of sessions."""

from __future__ import annotations

import asyncio

import mcp_lab
import pytest
from egress_lab import answer, read_request
from mcp_lab import JSON, NAME, lab
from mcp_streams_lab import SESSION, STREAM_HEAD, chunk, listen, message, named, post, read_event, request, result


class StreamableServer:
    """Closes the stream of a call early; its answer comes on the GET that resumes it."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            self.head = head
            if head.startswith(b"POST") and b"result" in body:
                writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
            elif head.startswith(b"POST"):
                question = message(request("elicitation/create", "q", message="sure?"))
                writer.write(STREAM_HEAD + chunk(b"id: 1\r\ndata: \r\n\r\n" + question) + b"0\r\n\r\n")
            elif head.startswith(b"GET"):
                writer.write(STREAM_HEAD + chunk(b"id: 2\r\n" + message(result(4, content=[]))) + b"0\r\n\r\n")
            else:
                writer.write(answer(b"", "200 OK"))


@pytest.mark.parametrize("is_error", [False, True])
async def test_a_client_that_leaves_its_stream_when_it_has_its_answer(is_error: bool) -> None:
    gone = asyncio.Event()

    async def server(reader, writer) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(message(result(5, content=[], isError=is_error))))
        await reader.read()
        gone.set()

    async with lab(server) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(mcp_lab.post(request("tools/call", 5, name="get"), JSON + SESSION))
        await wire.reader.readuntil(b"\r\n\r\n")
        await read_event(wire)
        wire.reset()
        async with asyncio.timeout(25):
            await gone.wait()
        (span,) = await one.recorder.wait()
    assert span.name == "tools/call get"
    assert span.attributes.get("error.type") == ("tool_error" if is_error else None)


async def test_a_client_that_leaves_without_its_answer_is_said_to_have_left() -> None:
    async def server(reader, writer) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(b": wait\n\n"))
        await reader.read()

    async with lab(server) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(mcp_lab.post(request("tools/call", 5, name="get"), JSON))
        await wire.reader.readuntil(b"\r\n\r\n")
        wire.reset()
        (span,) = await one.recorder.wait()
    assert span.attributes["error.type"] == "agent_disconnected"


async def test_a_resumed_stream_brings_the_answer_of_its_call() -> None:
    server = StreamableServer()
    async with lab(server) as one:
        await post(one, request("tools/call", 4, name="slow"), "/mcp", SESSION)
        await post(one, result("q", action="accept"), "/mcp", SESSION)
        (reply,) = await one.recorder.wait(1)
        wire = await listen(one, "/mcp", SESSION + "Last-Event-ID: 1\r\n")
        assert b'"content"' in await read_event(wire)
        assert b"last-event-id: 1" in server.head.lower()
        await one.recorder.wait(3)
    assert (reply.name, reply.attributes["mcp.session.id"]) == ("elicitation/create", "s-1")
    (call,) = named(one, "tools/call slow")
    assert "clrk.body.usage_visible" not in call
    assert "error.type" not in call
    (stream,) = named(one, f"GET {NAME}")
    assert (stream["mcp.session.id"], stream["mcp.protocol.version"]) == ("s-1", "2025-06-18")


async def test_another_sessions_stream_answers_nobody() -> None:
    async with lab(StreamableServer()) as one:
        await post(one, request("tools/call", 4, name="slow"), "/mcp", SESSION)
        await read_event(await listen(one, "/mcp", "Mcp-Session-Id: another\r\nLast-Event-ID: 1\r\n"))
        await one.recorder.wait(1)
        assert named(one, "tools/call slow") == []
    (call,) = named(one, "tools/call slow")
    assert call["clrk.body.usage_visible"] is False


async def test_the_end_of_a_session_is_a_plain_call_that_names_it() -> None:
    async with lab(StreamableServer(), {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(f"DELETE /mcp HTTP/1.1\r\nHost: {NAME}\r\n{SESSION}\r\n".encode())
        assert b" 200 " in (await wire.response())[0]
        (span,) = await one.recorder.wait()
    assert (span.name, span.attributes["mcp.session.id"]) == (f"DELETE {NAME}", "s-1")
    assert "clrk.egress.deny_reason" not in span.attributes
