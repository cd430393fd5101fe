"""MCP over HTTP+SSE: answers that come on the stream of another exchange; governed and not."""

from __future__ import annotations

import asyncio
import json

import pytest
from egress_lab import read_request
from mcp_lab import JSON, NAME, lab, raw
from mcp_streams_lab import (
    ENDPOINT,
    STREAM_HEAD,
    SseServer,
    chunk,
    listen,
    message,
    named,
    post,
    read_event,
    request,
    result,
)


async def test_an_answer_on_the_stream_ends_the_span_of_its_post() -> None:
    server = SseServer()
    async with lab(server) as one:
        wire = await listen(one)
        assert await read_event(wire) == ENDPOINT
        head, _ = await post(one, request("tools/call", 5, name="get"))
        assert b" 202 " in head
        assert one.spans == []
        server.send(message(raw({"jsonrpc": "2.0", "method": "notifications/progress"})))
        server.send(message(result("5", isError=True)) + message(result(9)))
        (span,) = await one.recorder.wait()
        server.end()
        await one.recorder.wait(2)
    assert span.name == "tools/call get"
    assert span.attributes["error.type"] == "tool_error"
    assert span.attributes["http.response.status_code"] == 202
    assert "clrk.body.usage_visible" not in span.attributes
    assert span.end_ns - span.start_ns > 0
    assert [other.name for other in one.spans] == ["tools/call get", f"GET {NAME}"]


async def test_an_answer_that_overtakes_the_end_of_its_post() -> None:
    release, streams = asyncio.Event(), []

    async def server(reader, writer) -> None:
        head, _ = await read_request(reader)
        if head.startswith(b"GET"):
            writer.write(STREAM_HEAD + chunk(ENDPOINT))
            streams.append(writer)
        else:
            streams[0].write(chunk(message(result(5))))
            await release.wait()
            writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with lab(server) as one:
        wire = await listen(one)
        await read_event(wire)
        posting = asyncio.create_task(post(one, request("tools/call", 5, name="get")))
        assert await read_event(wire) == message(result(5))
        release.set()
        await posting
        (span,) = await one.recorder.wait()
    assert span.name == "tools/call get"
    assert "clrk.body.usage_visible" not in span.attributes


@pytest.mark.parametrize("answered", ["before", "after"])
async def test_a_client_that_does_not_read_that_its_post_was_accepted(answered: str) -> None:
    gone, streams = asyncio.Event(), []

    async def server(reader, writer) -> None:
        head, _ = await read_request(reader)
        if head.startswith(b"GET"):
            writer.write(STREAM_HEAD + chunk(ENDPOINT))
            streams.append(writer)
            await reader.read()
        if answered == "before":
            streams[0].write(chunk(message(result(5))))
        writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 8\r\n\r\n")
        await reader.read()
        gone.set()

    async with lab(server) as one:
        listening = await listen(one)
        await read_event(listening)
        wire = await one.dial(NAME, 80)
        body = request("tools/call", 5, name="get")
        head = f"POST /messages/?session_id=7 HTTP/1.1\r\nHost: {NAME}\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
        wire.writer.write(head.encode() + body)
        await wire.reader.readuntil(b"\r\n\r\n")
        if answered == "before":
            await read_event(listening)
        wire.reset()
        async with asyncio.timeout(25):
            await gone.wait()
        if answered == "after":
            streams[0].write(chunk(message(result(5))))
        (span,) = await one.recorder.wait()
    assert span.name == "tools/call get"
    assert "error.type" not in span.attributes
    assert "clrk.body.usage_visible" not in span.attributes


async def test_calls_without_an_answer_are_recorded_when_their_stream_ends() -> None:
    server = SseServer()
    async with lab(server) as one:
        await read_event(await listen(one))
        await post(one, request("tools/call", 1, name="get"))
        await post(one, request("tools/call", 2, name="set"))
        await post(one, raw({"jsonrpc": "2.0", "method": "notifications/initialized"}))
        server.end()
        await one.recorder.wait(4)
    assert {span.name for span in one.spans} == {
        "tools/call get", "tools/call set", "notifications/initialized", f"GET {NAME}",
    }  # fmt: skip
    assert all(found["clrk.body.usage_visible"] is False for found in named(one, "tools/call get"))


async def test_calls_without_an_answer_are_recorded_when_the_run_ends() -> None:
    async with lab(SseServer()) as one:
        await read_event(await listen(one))
        await post(one, request("tools/call", 1, name="get"))
    assert len(named(one, "tools/call get")) == 1


async def test_nobody_waits_longer_than_for_a_response() -> None:
    server = SseServer()
    async with lab(server, requestTimeout="300ms") as one:
        wire = await listen(one)
        await read_event(wire)
        await post(one, request("tools/call", 1, name="get"))
        server.send(b": still here\n\n")
        await one.recorder.wait()
    assert len(named(one, "tools/call get")) == 1


async def test_a_servers_question_names_the_post_that_answers_it() -> None:
    server = SseServer()
    async with lab(server) as one:
        wire = await listen(one)
        await read_event(wire)
        server.send(message(request("sampling/createMessage", 3)) + message(request("roots/list", "r")))
        for _ in range(2):
            if b"roots/list" in await read_event(wire):
                break
        await post(one, result(3, model="m"))
        await post(one, raw({"jsonrpc": "2.0", "id": "r", "error": {"code": -32601, "message": "no roots"}}))
        await post(one, result(99))
        await one.recorder.wait(3)
    asked, refused, unknown = one.spans[:3]
    assert (asked.name, asked.attributes["jsonrpc.request.id"]) == ("sampling/createMessage", "3")
    assert (refused.name, refused.attributes["error.type"]) == ("roots/list", "-32601")
    assert refused.status.code == "STATUS_CODE_ERROR"
    assert unknown.name == f"POST {NAME}"


async def test_a_denial_comes_where_the_client_reads_answers() -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await listen(one)
        assert await read_event(wire) == ENDPOINT
        head, body = await post(one, request("tools/call", 5, name="rm"))
        assert b" 202 " in head
        assert body == b"Accepted"
        event = await read_event(wire)
        assert event.startswith(b"event: message\ndata: {")
        found = json.loads(event.split(b"data: ")[1])
        assert (found["id"], found["error"]["code"]) == (5, -32010)
        await post(one, request("tools/call", 6, name="get"))
        server.send(message(result(6)))
        assert await read_event(wire) == message(result(6))
        spans = await one.recorder.wait(2)
    assert [json.loads(body)["id"] for body in server.bodies] == [6]
    assert (spans[0].name, spans[0].attributes["clrk.egress.deny_reason"]) == ("tools/call rm", "tool_denied")


async def test_a_denial_by_a_route_for_every_host_comes_there_too() -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}, hostnames=[]) as one:
        wire = await listen(one)
        await read_event(wire)
        head, _ = await post(one, request("tools/call", 5, name="rm"))
        assert b" 202 " in head
        assert b'"id": 5' in await read_event(wire)
    assert server.bodies == []


async def test_an_endpoint_that_is_no_url_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    odd = b"event: endpoint\ndata: http://[\n\n"
    server = SseServer(odd)
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await listen(one)
        assert await read_event(wire) == odd
        server.send(message(result(1)))
        assert await read_event(wire) == message(result(1))
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_denial_never_comes_into_the_middle_of_an_event() -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await listen(one)
        await read_event(wire)
        half = message(result(1, text="x" * 100))
        server.send(half[:40])
        await post(one, request("ping"))  # what came before it on the stream is with the gateway by now, most likely
        await post(one, request("tools/call", 5, name="rm"))
        assert b'"id": 5' in await read_event(wire)
        server.send(half[40:])
        assert await read_event(wire) == half


async def test_a_denial_after_the_stream_is_gone_answers_the_post() -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await listen(one)
        await read_event(wire)
        server.end()
        async with asyncio.timeout(25):
            assert await wire.reader.readexactly(5) == b"0\r\n\r\n"
        head, body = await post(one, request("tools/call", 5, name="rm"))
    assert b" 200 OK" in head
    assert json.loads(body)["error"]["data"]["reason"] == "tool_denied"


async def test_lists_on_the_stream_are_filtered() -> None:
    server = SseServer()
    async with lab(server, {"allowedToolsRegex": "get.*"}) as one:
        wire = await listen(one)
        await read_event(wire)
        await post(one, request("tools/list", 2))
        page = message(result(2, tools=[{"name": "rm"}, {"name": "get_x"}], nextCursor="c"))
        server.send(page[:30])
        server.send(page[30:])
        event = await read_event(wire)
    assert json.loads(event.split(b"data: ")[1])["result"] == {"tools": [{"name": "get_x"}], "nextCursor": "c"}


@pytest.mark.parametrize("mode", ["Shadow", "Record"])
async def test_a_stream_under_watch_is_left_alone(mode: str) -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}, mode=mode) as one:
        wire = await listen(one)
        await read_event(wire)
        await post(one, request("tools/call", 5, name="rm"))
        page = message(result(5, tools=[{"name": "rm"}]))
        server.send(page)
        assert await read_event(wire) == page
    assert [json.loads(body)["id"] for body in server.bodies] == [5]


async def test_a_client_that_reads_nothing_takes_no_memory() -> None:
    server = SseServer()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        await read_event(await listen(one))
        big = "x" * 100_000
        kinds = set()
        for at in range(200):
            head, _ = await post(one, request("tools/call", f"{at}{big}", name="rm"))
            kinds.add(head.split()[1])
            if b"200" in kinds:
                break
    assert kinds == {b"202", b"200"}  # at last the POST itself is answered
    assert server.bodies == []
