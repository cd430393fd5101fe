"""What comes back: exit codes, time-outs, answers that are cut, callers that go away, floods, CloudEvents."""

import asyncio
import io
import json
import resource
import socket

import aiohttp
import pytest
from gateway_caller import problem

from clrk.core.ids import new_invocation_id
from clrk.core.messages import StartRun, StopRun


async def test_exit_code_and_nothing_written(gateway):
    status, headers, body = await gateway.call("/agents/fails")
    assert (status, headers["X-Clrk-Exit-Code"]) == (500, "3")
    assert "why" not in problem(500, headers, body)["detail"]  # stderr never goes to the caller
    status, headers, _ = await gateway.call("/agents/crash")
    assert (status, headers["X-Clrk-Exit-Code"]) == (500, "139")


async def test_nothing_written_and_exit_0(gateway):
    status, headers, body = await gateway.call("/agents/silent")
    assert (status, body, headers["Content-Type"]) == (200, b"", "application/octet-stream")


async def test_timeout_and_nothing_written(gateway):
    status, headers, body = await gateway.call("/agents/slow")
    assert status == 504
    problem(504, headers, body)
    assert gateway.phase(headers["X-Clrk-Invocation-ID"]) == "Timeout"


async def test_a_caller_may_shorten_the_timeout(gateway):
    assert (await gateway.call("/agents/mute", headers={"X-Clrk-Timeout": "0.2"}))[0] == 504
    start = next(m for m in gateway.runtime.received if isinstance(m, StartRun))
    assert start.timeout_s == 0.2


@pytest.mark.parametrize("name", ["cut", "slowtalk"])
async def test_truncation_is_visible(gateway, name):
    reader, writer = await gateway.raw(f"POST /agents/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"chunked" in head.lower()
    assert await reader.read() == b"4\r\npart\r\n"  # and no terminator
    writer.close()
    with pytest.raises(aiohttp.ClientPayloadError):
        await gateway.call(f"/agents/{name}")


async def test_truncation_is_visible_to_http_1_0(gateway):
    reader, writer = await gateway.raw(b"POST /agents/cut HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_truncated_answer_says_so_in_its_span(gateway):
    wanted = new_invocation_id()
    with pytest.raises(aiohttp.ClientPayloadError):
        await gateway.call("/agents/cut", headers={"X-Clrk-Invocation-ID": wanted})
    span = await gateway.span(wanted, "ingress.dispatch")
    assert span["status"]["code"] == "STATUS_CODE_ERROR"
    assert span["attributes"]["error.type"] == "truncated"
    assert span["attributes"]["clrk.phase"] == "Failed"


async def test_http_1_0(gateway):
    reader, writer = await gateway.raw(b"GET /agents/text HTTP/1.0\r\n\r\n")
    answer = await reader.read()
    assert b"chunked" not in answer
    assert answer.endswith(b"\r\n\r\nhello")
    writer.close()


async def test_head(gateway):
    status, headers, body = await gateway.call("/agents/text", "HEAD")
    assert (status, headers["Content-Type"], body) == (200, "text/plain", b"")
    assert (await gateway.call("/agents/cut", "HEAD"))[0] == 500


async def test_stdout_is_streamed_as_it_is_written(gateway):
    async with gateway.client.post(gateway.url + "/agents/forever") as response:
        assert await response.content.readany() == b"ready\n"  # while the agent sleeps on
    await gateway.runtime.until(lambda: not gateway.runtime.runs)


@pytest.mark.parametrize("name", ["mute", "forever", "postslow"])
async def test_a_caller_that_goes_away_cancels(gateway, name):
    wanted = new_invocation_id()
    head = f"POST /agents/{name} HTTP/1.1\r\nHost: x\r\nX-Clrk-Invocation-ID: {wanted}\r\nContent-Length: 0\r\n\r\n"
    _, writer = await gateway.raw(head.encode())
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    writer.transport.abort()
    await gateway.runtime.until(lambda: not gateway.runtime.runs)
    assert StopRun(wanted) in gateway.runtime.received
    run = await gateway.span(wanted, f"invoke_agent {name}")
    assert run["attributes"]["clrk.phase"] == "Cancelled"
    dispatch = await gateway.span(wanted, "ingress.dispatch")
    assert dispatch["attributes"]["error.type"] == "client_disconnected"
    assert dispatch["status"]["code"] == "STATUS_CODE_ERROR"
    assert gateway.phase(wanted) == "Cancelled"


async def test_a_caller_that_goes_away_in_its_body_frees_the_slot(gateway):
    _, writer = await gateway.raw(b"POST /agents/one HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    await gateway.runtime.until(lambda: gateway.runtime.app._parts.invocations.running("default", "one"))
    writer.transport.abort()
    await gateway.runtime.until(lambda: not gateway.runtime.app._parts.invocations.running("default", "one"))
    assert len(gateway.runtime.received) == 1


@pytest.mark.parametrize("name", ["deaf", "deafopen"])
async def test_an_agent_that_never_reads_stdin(gateway, name):
    status, _, body = await gateway.call(f"/agents/{name}", data=io.BytesIO(b"\0" * 8_000_000))
    assert (status, body) == (200, b"done\n")


async def test_a_flood_to_a_slow_caller_is_not_buffered(gateway):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", gateway.runtime.ingress_port))
    await loop.sock_sendall(sock, b"GET /agents/flood HTTP/1.1\r\nHost: x\r\n\r\n")
    await loop.sock_recv(sock, 1024)
    for _ in range(50):  # the caller does not read, others are served
        assert (await gateway.call("/agents/nobody"))[0] == 404
    assert gateway.runtime.runs  # still blocked on its stdout
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    sock.close()
    await gateway.runtime.until(lambda: not gateway.runtime.runs)


async def test_a_flood_to_a_fast_caller_arrives(gateway):
    async with gateway.client.get(gateway.url + "/agents/flood") as response:
        assert sum([len(chunk) async for chunk in response.content.iter_any()]) == 200_000_000


async def test_stderr_goes_to_the_logs_in_bounded_lines(gateway):
    status, headers, body = await gateway.call("/agents/stderrflood")
    assert (status, body) == (200, b"out\n")
    invocation_id = headers["X-Clrk-Invocation-ID"]
    await gateway.span(invocation_id, "sandbox.teardown")
    lines = await gateway.runtime.app._parts.telemetry.store.logs(
        "default/stderrflood", invocation_id=invocation_id, tail=100
    )
    assert [line.line for line in lines if line.stream == "stdout"] == ["out"]
    lines = [line for line in lines if line.stream != "stdout"]
    assert {line.stream for line in lines} == {"stderr"}
    assert max(len(line.line) for line in lines) <= 16_384
    assert "".join(line.line for line in lines) == "x" * 300_000 + "ok"


async def test_answer_as_a_cloudevent(gateway):
    headers = {"Accept": "application/cloudevents+json", "ce-id": "42"}
    status, answer, body = await gateway.call("/agents/text", headers=headers)
    assert (status, answer["Content-Type"]) == (200, "application/cloudevents+json")
    event = json.loads(body)
    assert (event["id"], event["relationid"], event["data"]) == ("42.response", "42", "hello")
    assert event["type"] == "dev.apoxy.clrk.taskagent.response"
    assert event["source"] == "clrk://default/text"
    assert (await gateway.call("/agents/cut", headers=headers))[0] == 500  # nothing was out yet


async def test_a_cloudevent_has_a_largest_size(gateway):
    assert (await gateway.call("/agents/flood", headers={"Accept": "application/cloudevents+json"}))[0] == 502
    await gateway.runtime.until(lambda: not gateway.runtime.runs)
