"""What hostile callers and agents were found to achieve on the ingress and the metadata service, and must not again."""

import asyncio
import io
import json
import resource
import socket

import aiohttp
import pytest
from gateway_caller import Gateway, running_gateway
from scripted_agents import AGENTS, CURL, agent
from scripted_runtime import ScriptedRuntime

from clrk.core.messages import Drain


async def ready(gateway):
    async with gateway.client.get(f"http://127.0.0.1:{gateway.runtime.health_port}/readyz") as response:
        return response.status


async def test_a_draining_host_is_not_ready(gateway):
    assert await ready(gateway) == 200
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    gateway.runtime.send(Drain())
    await gateway.runtime.until(lambda: gateway.runtime.app._draining)
    assert await ready(gateway) == 503
    gateway.runtime.open_gate()
    assert (await first)[0] == 200


SIZE = 8_000_000  # no send buffer of the kernel takes so much
BIG = agent("big", f"head -c {SIZE} /dev/zero | {CURL} --data-binary @- $URL/v1/response", mode="Metadata")


@pytest.fixture
async def posting(tmp_path):
    """A gateway with an agent that posts a large answer."""
    async with running_gateway([*AGENTS, BIG], tmp_path) as running:
        yield running


async def unread(gateway, request):
    """Send a request from a socket that never reads more than the kernel takes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", gateway.runtime.ingress_port))
    await asyncio.get_running_loop().sock_sendall(sock, request)
    return sock


async def test_a_large_posted_answer_arrives_whole(posting):
    status, headers, body = await posting.call("/agents/big")
    assert (status, headers["Content-Length"], len(body)) == (200, str(SIZE), SIZE)


async def test_an_answer_that_nobody_reads_is_charged_until_it_is_dropped(posting, monkeypatch):
    """It was held twice, uncounted and for as long as the caller liked."""
    monkeypatch.setattr("clrk.gateway.answer._SLOW_CALLER_S", 0.5)
    invocations = posting.runtime.app._parts.invocations
    with await unread(posting, b"GET /agents/big HTTP/1.1\r\nHost: x\r\nX-Clrk-Timeout: 2\r\n\r\n") as caller:
        await posting.runtime.until(lambda: (invocations._open or invocations._ended) and not posting.runtime.runs)
        invocation_id = next(iter([*invocations._open, *invocations._ended]))
        await posting.runtime.until(lambda: invocations._held_bytes == 0)
        received = b""
        while data := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(caller, 1 << 20), 10):
            received += data
    assert b"Content-Length: 8000000\r\n" in received
    assert len(received) < SIZE
    span = await posting.span(invocation_id, "ingress.dispatch")
    assert span["status"] == {"code": "STATUS_CODE_ERROR", "message": "the caller did not read the answer"}
    assert span["attributes"]["clrk.resp.bytes"] < SIZE


async def test_events_that_an_agent_never_reads_are_held_once(gateway):
    """64 connections, each with its own copy of a caller's 8 MB, were half a gigabyte."""
    call = asyncio.create_task(gateway.call("/agents/probemeta", data=io.BytesIO(b"\0" * SIZE)))
    url = gateway.runtime.gate.with_suffix(".url")
    await gateway.runtime.until(lambda: url.exists() and url.read_text().endswith("\n"))
    host, _, port = url.read_text().strip().removeprefix("http://").partition(":")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loop, socks = asyncio.get_running_loop(), []
    for accept in ("*/*", "application/cloudevents+json") * 20:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, int(port)))
        await loop.sock_sendall(
            sock, f"GET /v1/event HTTP/1.1\r\nHost: 169.254.169.254\r\nAccept: {accept}\r\n\r\n".encode()
        )
        assert (await asyncio.wait_for(loop.sock_recv(sock, 100), 10)).startswith(b"HTTP/1.1 200 ")
        socks.append(sock)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for sock in socks:
        sock.close()
    gateway.runtime.open_gate()
    assert (await call)[0] == 502  # it posts no answer
    assert grown_kib < 100_000


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /agents/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /agents/\x1b[31m\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    ],
)
async def test_what_is_no_http_gets_a_problem_and_no_place_in_the_log(gateway, caplog, request_bytes, status):
    reader, writer = await gateway.raw(request_bytes)
    async with asyncio.timeout(25):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    assert (headers["Content-Type"], headers["Server"]) == ("application/problem+json", "clrk")
    found = json.loads(body)
    assert (found["status"], found["invocation_id"]) == (status, headers["X-Clrk-Invocation-ID"])
    assert caplog.text == ""


async def test_callers_leave_descriptors_to_the_sandboxes(tmp_path, monkeypatch):
    """Connections that say nothing took every descriptor of the gateway, and no sandbox could start."""
    monkeypatch.setattr("clrk.gateway.app._max_connections", lambda: 3)
    runtime = ScriptedRuntime(AGENTS, tmp_path)
    await runtime.start()
    async with aiohttp.ClientSession() as client:
        gateway = Gateway(runtime, client)
        silent = [await gateway.raw(b"GET / HTTP/1.1\r\nX: ") for _ in range(3)]
        reader, writer = await gateway.raw(b"GET /agents/echo HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(25):
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        for _, silent_writer in [*silent, (reader, writer)]:
            silent_writer.close()
        await runtime.until(lambda: not _connections(runtime))
        assert (await gateway.call("/agents/echo"))[0] == 200
    await runtime.stop()


def _connections(runtime):
    return [runner for runner in runtime.app._parts._runners if runner.server and runner.server.connections]
