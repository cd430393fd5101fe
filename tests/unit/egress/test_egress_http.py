"""The HTTP relay end to end: real sockets, both event loops; whatever is said arrives, unchanged and at once."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, GET, NAME, replying, through

from clrk.core.wire import FAMILY_V4, FAMILY_V6

MIB = 2**20


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
        span = (await lab.recorder.wait())[0]
    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"hi"
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK", b"X-b: 1", b"Set-Cookie: a=1", b"set-cookie: b=2", b"X-A: ", b"Content-Length: 2",
        b"Connection: close",
    ]  # fmt: skip
    lines = seen[0][0].decode().split("\r\n")
    assert lines[:5] == [
        "GET /a/../b?x=1&&y=%2f? HTTP/1.1", "hOST: tools.internal", "X-z: 2", "x-Z: 1", "Cookie: c=d",
    ]  # fmt: skip
    assert lines[5:] == [
        f"traceparent: 00-{lab.identity.context.trace_id}-{span.span_id}-01", "tracestate: vendor=1",
        "baggage: user=alice", "", "",
    ]  # fmt: skip
    assert span.name == "GET tools.internal"
    assert span.parent_span_id == lab.identity.context.span_id
    expected = {
        "clrk.dst.name": NAME, "network.peer.address": "127.0.0.1", "network.peer.port": port, "process.pid": 1234,
        "process.executable.name": "agent", "http.response.status_code": 200, "http.request.method": "GET",
        "url.full": "http://tools.internal/a/../b?x=1&&y=%2f?", "clrk.req.bytes": 0, "clrk.resp.bytes": 2,
        "server.address": NAME, "server.port": 80,
    }  # fmt: skip
    assert {key: span.attributes[key] for key in expected} == expected
    assert "error.type" not in span.attributes


async def test_the_span_begins_when_the_agent_called_connect_and_only_for_the_first_request():
    reply = answer(b"hi")
    async with (
        upstream(replying(reply, reply)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        for _ in range(2):
            wire.writer.write(b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n")
            assert (await wire.response())[1] == b"hi"
        first, second = await lab.recorder.wait(2)
    assert first.start_ns < first.end_ns < second.start_ns


async def test_the_agents_own_span_of_the_same_trace_is_the_parent():
    seen = []
    async with (
        upstream(replying(answer(b""), seen=seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        own = f"00-{lab.identity.context.trace_id}-00000000000000ab-00"
        await wire.ask(GET.replace(b"\r\n\r\n", f"\r\nTraceParent: {own}\r\ntracestate: mine=2\r\n\r\n".encode()))
        span = (await lab.recorder.wait())[0]
    assert span.parent_span_id == "00000000000000ab"
    head = seen[0][0].decode()
    assert f"TraceParent: 00-{lab.identity.context.trace_id}-{span.span_id}-00\r\ntracestate: mine=2\r\n" in head


@pytest.mark.parametrize("foreign", ["00-" + "ab" * 16 + "-00000000000000ab-01", "junk"])
async def test_a_foreign_or_broken_traceparent_is_replaced(foreign):
    seen = []
    async with (
        upstream(replying(answer(b""), seen=seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        header = f"\r\ntraceparent: {foreign}\r\ntraceparent: {foreign}\r\n\r\n".encode()
        await wire.ask(GET.replace(b"\r\n\r\n", header))
        span = (await lab.recorder.wait())[0]
    assert span.parent_span_id == lab.identity.context.span_id
    head = seen[0][0].decode()
    assert foreign not in head
    assert head.count("traceparent") == 1


@pytest.mark.parametrize(
    "own", ["baggage: mine=1", "Baggage: mine=1\r\nbaggage: more=2", "baggage: not baggage at all", "baggage:"]
)
async def test_the_agents_own_baggage_goes_out_alone_and_as_it_is(own):
    seen = []
    async with (
        upstream(replying(answer(b""), seen=seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        await wire.ask(GET.replace(b"\r\n\r\n", f"\r\n{own}\r\n\r\n".encode()))
    head = seen[0][0].decode()
    sent = [line for line in head.split("\r\n") if line.lower().startswith("baggage")]
    assert [line.rstrip() for line in sent] == own.split("\r\n")
    assert "user=alice" not in head


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
async def test_64_mib_up_arrive_unchanged(chunked):
    digest = hashlib.sha256()

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if chunked:
            while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
                digest.update((await reader.readexactly(size + 2))[:-2])
        else:
            left = 64 * MIB
            while left:
                data = await reader.read(min(left, MIB))
                digest.update(data)
                left -= len(data)
        writer.write(answer(b"done"))

    block = bytes(range(256)) * 1024
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (64 * MIB)
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: tools.internal\r\n" + framing + b"\r\n\r\n")
        mine = hashlib.sha256()
        for _ in range(256):
            mine.update(block)
            wire.writer.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
            await wire.writer.drain()
        wire.writer.write(b"0\r\n\r\n" if chunked else b"")
        assert (await wire.response())[1] == b"done"
        span = (await lab.recorder.wait())[0]
    assert digest.hexdigest() == mine.hexdigest()
    assert span.attributes["clrk.req.bytes"] == 64 * MIB


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_64_mib_down_arrive_unchanged(framing):
    block = bytes(range(256)) * 1024
    theirs = hashlib.sha256(block * 256).hexdigest()
    header = {"chunked": "Transfer-Encoding: chunked\r\n", "length": f"Content-Length: {64 * MIB}\r\n", "close": ""}

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\n{header[framing]}\r\n".encode())
        for _ in range(256):
            writer.write(b"%x\r\n%b\r\n" % (len(block), block) if framing == "chunked" else block)
            await writer.drain()
        writer.write(b"0\r\n\r\n" if framing == "chunked" else b"")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        await wire.reader.readuntil(b"\r\n\r\n")
        digest = hashlib.sha256()
        if framing == "chunked":
            while size := int((await wire.reader.readuntil(b"\r\n")).strip(), 16):
                digest.update((await wire.reader.readexactly(size + 2))[:-2])
        else:
            while data := await wire.reader.read(MIB):
                digest.update(data)
        span = (await lab.recorder.wait())[0]
    assert digest.hexdigest() == theirs
    assert span.attributes["clrk.resp.bytes"] == 64 * MIB


async def test_server_sent_events_arrive_one_by_one():
    """The upstream sends an event only after the agent has acknowledged the one before: buffering would dead-lock."""
    acknowledged = asyncio.Semaphore(1)

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(200):
            await acknowledged.acquire()
            event = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        writer.write(b"0\r\n\r\n")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        async with asyncio.timeout(20):
            await wire.reader.readuntil(b"\r\n\r\n")
            for number in range(200):
                await wire.reader.readuntil(b"\r\n")
                assert await wire.reader.readuntil(b"\n\n\r\n") == b"data: %d\n\n\r\n" % number
                acknowledged.release()
            assert await wire.reader.read() == b"0\r\n\r\n"


async def test_trailers_pass_both_ways():
    seen = []
    reply = b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 9\r\n\r\n"

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(reply)

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(
            b"POST / HTTP/1.1\r\nHost: tools.internal\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\nX-Up: 1\r\nx-up: 2\r\n\r\n"
        )
    assert seen == [b"3\r\nabc\r\n0\r\nX-Up: 1\r\nx-up: 2\r\n\r\n"]
    assert raw.endswith(b"\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 9\r\n\r\n")


async def test_the_answer_may_come_before_the_request_is_complete():
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"too large", "413 Content Too Large"))
        await writer.drain()
        await reader.read()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 100\r\n\r\nabc")
        head, body = await wire.response()
        assert head.startswith(b"HTTP/1.1 413 ")
        assert body == b"too large"
        wire.writer.write(b"d" * 97)  # the agent may still finish, and go on
        span = (await lab.recorder.wait())[0]
    assert span.attributes["error.type"] == "413"
    assert span.status.code == "STATUS_CODE_ERROR"


@pytest.mark.parametrize(
    ("request_line", "reply", "expected"),
    [
        (b"HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"200 OK\r\nContent-Length: 9\r\n"),
        (b"GET / HTTP/1.1", b"HTTP/1.1 204 No Content\r\n\r\n", b"204 No Content\r\n"),
        (b"GET / HTTP/1.1", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
         b"304 Not Modified\r\nContent-Length: 5\r\n"),
        (b"GET / HTTP/1.1", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", b"200 \r\nContent-Length: 0\r\n"),
    ],
)  # fmt: skip
async def test_answers_without_a_body(request_line, reply, expected):
    raw, _ = await through(reply, GET.replace(b"GET / HTTP/1.1", request_line))
    assert raw == b"HTTP/1.1 " + expected + b"Connection: close\r\n\r\n"


async def test_an_http_1_0_agent_gets_no_chunks():
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    raw, _ = await through(chunks, b"GET / HTTP/1.0\r\n\r\n")
    assert raw == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi"


@pytest.mark.parametrize(
    ("destination", "family", "host"),
    [(NAME, FAMILY_V4, NAME), ("127.0.0.1", FAMILY_V4, "127.0.0.1"), ("::1", FAMILY_V6, "[::1]")],
)
async def test_who_names_no_host_in_http_1_0_gets_one_with_its_port(destination, family, host):
    """HTTP/1.1, which goes up, demands a Host (RFC 9110, section 7.2), and a port that is not the default one in it."""
    seen: list = []
    listen = "::1" if destination == "::1" else "127.0.0.1"
    rules = [*ALLOW, {"cidrs": ["127.0.0.1/32", "::1/128"]}]
    async with (
        upstream(replying(answer(b"hi"), seen=seen), host=listen) as port,
        laboratory(gateway=aliased(port, NAME), rules=rules) as lab,
    ):
        agent = await lab.dial(destination, port, family=family)
        assert (await agent.ask(b"GET / HTTP/1.0\r\n\r\n")).endswith(b"hi")
        (span,) = await lab.recorder.wait()
    assert f"\r\nHost: {host}:{port}\r\n".encode() in seen[0][0]
    assert span.attributes["url.full"] == f"http://{host}:{port}/"


async def test_early_hints_pass():
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    raw, _ = await through(hints + answer(b"hi"))
    assert raw.startswith(hints + b"HTTP/1.1 200 OK\r\n")


async def test_pipelined_requests_are_answered_in_order():
    async with (
        upstream(replying(answer(b"one"), answer(b"two"))) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        first = b"POST /1 HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 2\r\n\r\nab"
        raw = await wire.ask(first + GET)
    assert raw.index(b"one") < raw.index(b"two")


async def test_a_websocket_is_tunnelled():
    async def handle(reader, writer):
        head, _ = await read_request(reader)
        assert b"Connection: Upgrade\r\nUpgrade: websocket\r\n" in head
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello")
        while data := await reader.read(1000):
            writer.write(data.upper())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(
            b"GET /ws HTTP/1.1\r\nHost: tools.internal\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        async with asyncio.timeout(25):
            head = await wire.reader.readuntil(b"hello")
            assert b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" in head
            wire.writer.write(b"abc")
            assert await wire.reader.readexactly(3) == b"ABC"
            wire.writer.write_eof()
            assert await wire.reader.read() == b""
        span = (await lab.recorder.wait())[0]
    assert span.attributes["http.response.status_code"] == 101
    assert (span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == (3, 8)
