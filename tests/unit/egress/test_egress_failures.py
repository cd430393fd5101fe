"""Exchanges that end badly: the agent can tell, the span says why, and nothing is sent twice."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, GET, NAME, replying, through


@pytest.mark.parametrize(
    ("reply", "ending"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"\r\n\r\nabc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"\r\n\r\n3\r\nabc\r\n"),
    ],
    ids=["length", "chunked"],
)  # fmt: skip
async def test_a_truncated_answer_is_visibly_truncated(reply, ending):
    raw, span = await through(reply)
    assert raw.endswith(ending)
    assert b"0\r\n\r\n" not in raw
    assert span.attributes["error.type"] == "truncated"
    assert span.status.code == "STATUS_CODE_ERROR"
    assert span.attributes["http.response.status_code"] == 200


async def test_an_answer_that_ends_with_the_connection_and_breaks_is_reset():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await writer.drain()
        await told.wait()
        writer.transport.abort()

    told = asyncio.Event()
    async with upstream(resetting(handle)) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        assert (await wire.reader.readuntil(b"abc")).endswith(b"abc")
        told.set()
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        span = (await lab.recorder.wait())[0]
    assert span.attributes["error.type"] == "connection_reset"


def resetting(handle):
    """Make the upstream's abort a reset."""
    import socket
    import struct

    async def wrapped(reader, writer):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await handle(reader, writer)

    return wrapped


def problem(raw: bytes) -> tuple[int, dict]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Content-Type: application/problem+json\r\n" in head
    return int(head.split()[1]), json.loads(body)


async def test_reset_before_an_answer_is_502_and_not_tried_again():
    calls = []

    async def handle(reader, writer):
        calls.append(await read_request(reader))
        writer.transport.abort()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        status, body = problem(await wire.ask(b"POST / HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 1\r\n\r\nx"))
        span = (await lab.recorder.wait())[0]
    assert (status, body["reason"]) == (502, "connection_reset")
    assert body["invocation_id"] == lab.identity.invocation_id
    assert span.name == "egress.dial.failed"
    assert span.attributes["error.type"] == "connection_reset"
    assert len(calls) == 1


async def test_refused_upstream_is_502():
    async with upstream(replying()) as port:
        pass
    async with laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        status, body = problem(await wire.ask(GET))
        span = (await lab.recorder.wait())[0]
    assert (status, body["reason"]) == (502, "connection_refused")
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "connection_refused")


async def test_an_upstream_that_does_not_answer_in_time_is_504():
    async def handle(reader, writer):
        await reader.read()

    spec = {"requestTimeout": "100ms"}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        status, body = problem(await wire.ask(GET))
        span = (await lab.recorder.wait())[0]
    assert (status, body["reason"]) == (504, "timeout")
    assert (span.name, span.attributes["error.type"]) == ("GET tools.internal", "timeout")


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX : 1\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 90_000 + b"\r\n\r\n"],
)  # fmt: skip
async def test_a_broken_answer_is_502(reply):
    raw, span = await through(reply)
    status, _ = problem(raw)
    assert status == 502
    assert span.name == "egress.dial.failed"
    assert span.attributes["error.type"].startswith("bad_response_")


async def test_a_vanished_agent_ends_the_upstream_exchange():
    gone = asyncio.Event()

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.read()
        gone.set()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        await wire.reader.readuntil(b"1\r\na\r\n")
        wire.reset()
        async with asyncio.timeout(25):
            await gone.wait()
        span = (await lab.recorder.wait())[0]
    assert span.attributes["error.type"] == "agent_disconnected"


async def test_closing_the_run_records_what_was_in_flight():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.read()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        await wire.reader.readuntil(b"1\r\na\r\n")
        await lab.egress.close()
        assert [span.attributes["error.type"] for span in lab.spans] == ["cancelled"]
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()


async def die_at_the_second(connections, reader, writer):
    """Answer the first request of a connection, and break at the next."""
    connections.append(writer)
    head, _ = await read_request(reader)
    writer.write(answer(head.split()[0]))
    await read_request(reader)
    writer.transport.abort()


async def test_connections_are_reused_and_a_dead_one_costs_only_requests_with_an_effect():
    connections = []

    async with (
        upstream(partial(die_at_the_second, connections)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        for _ in range(2):
            wire.writer.write(b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n")
            assert (await wire.response())[1] == b"GET"
        assert len(connections) == 2
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 1\r\n\r\nx")
        head, _ = await wire.response()
        assert head.startswith(b"HTTP/1.1 502 ")
        assert len(connections) == 2


async def test_who_has_just_connected_gets_no_dead_connection_for_a_request_with_an_effect():
    """A client that connects anew does not expect the end of a connection that was idle, as one that keeps its own."""
    connections = []

    async with (
        upstream(partial(die_at_the_second, connections)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        for count, method in enumerate([b"GET", b"POST", b"PUT", b"DELETE"], 1):
            wire = await lab.dial(NAME, 80)
            wire.writer.write(method + b" / HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 1\r\n\r\nx")
            head, body = await wire.response()
            assert (head[:13], body) == (b"HTTP/1.1 200 ", method)
            assert len(connections) == count


@pytest.mark.parametrize(
    ("said", "kept_s"),
    [("", 30.0), ("Keep-Alive: timeout=5\r\n", 4.0), ("Keep-Alive: max=3, timeout=600\r\n", 30.0),
     ("keep-alive: Timeout=9, max=1\r\nKeep-Alive: timeout=7\r\n", 6.0), ("Keep-Alive: timeout=x\r\n", 30.0),
     ("Keep-Alive: timeout=1\r\n", None), ("Keep-Alive: timeout=0\r\n", None)],
)  # fmt: skip
async def test_a_connection_is_let_go_before_the_upstream_ends_it(said, kept_s):
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(b"hi", headers=said))
        await reader.read()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n")
        assert (await wire.response())[1] == b"hi"
        await lab.recorder.wait()
        idle = [channel for kept in lab.egress._acceptor.way_out.upstream._idle.values() for channel in kept]
    assert [channel._idle_s for channel in idle] == ([] if kept_s is None else [kept_s])
