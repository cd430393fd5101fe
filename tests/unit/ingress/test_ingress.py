"""The ingress against a scripted runtime: CONTRACT section 4 row by row, and sections 5 and 6 from outside."""

import asyncio
import base64
import io
import json
import re
import resource
import socket
import zlib

import aiohttp
import pytest

from clrk.core.ids import new_invocation_id
from clrk.core.messages import Drain, StartRun, StopRun

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def problem(status, headers, body):
    """Check a problem document; returns it."""
    assert headers["Content-Type"] == "application/problem+json"
    found = json.loads(body)
    assert found["status"] == status
    assert found["invocation_id"] == headers["X-Clrk-Invocation-ID"]
    return found


async def test_the_event_reaches_stdin_and_stdout_the_caller(gateway):
    status, headers, body = await gateway.call(
        "/agents/echo/some/rest?q=1",
        json={"a": 1},
        headers={"ce-x-tenant-id": "acme", "Authorization": "Bearer s3cret"},
    )
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert UUID7.fullmatch(headers["X-Clrk-Invocation-ID"])
    event = json.loads(body)
    assert event["data"] == {"a": 1}
    assert event["x-tenant-id"] == "acme"
    assert event["invocationid"] == headers["X-Clrk-Invocation-ID"]
    assert (event["httpmethod"], event["httpurl"], event["httpquery"]) == ("POST", "/agents/echo/some/rest", "q=1")
    assert b"s3cret" not in body


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "PURGE"])
async def test_any_method(gateway, method):
    status, _, body = await gateway.call("/agents/echo", method)
    assert (status, json.loads(body)["httpmethod"]) == (200, method)


@pytest.mark.parametrize(
    ("path", "headers", "source"),
    [
        ("/agents/echo", {}, "clrk://default/echo"),
        ("/agents/echo/", {}, "clrk://default/echo"),
        ("/agents/default/echo", {}, "clrk://default/echo"),
        ("/agents/default/echo/a/b", {}, "clrk://default/echo"),
        ("/", {"X-Clrk-TaskAgent": "default/echo"}, "clrk://default/echo"),
        ("/any/thing", {"X-Clrk-TaskAgent": "echo"}, "clrk://default/echo"),
        ("/agents/text", {"X-Clrk-TaskAgent": "default/echo"}, "clrk://default/echo"),
    ],
)
async def test_routing(gateway, path, headers, source):
    status, _, body = await gateway.call(path, headers=headers)
    assert (status, json.loads(body)["source"]) == (200, source)


async def test_routing_to_another_namespace(gateway):
    assert (await gateway.call("/agents/team/echo/x"))[2] == b"in team\n"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 400),
        ("/agents", {}, 400),
        ("/agents/", {}, 400),
        ("/agentsx/echo", {}, 400),
        ("/agents/nobody", {}, 404),
        ("/agents/team/nobody", {}, 404),
        ("/agents/ECHO", {}, 404),
        ("/agents/echo", {"X-Clrk-TaskAgent": "team/nobody"}, 404),
        ("/agents/echo", {"X-Clrk-TaskAgent": "a/b/c"}, 400),
        ("/agents/echo", {"X-Clrk-TaskAgent": ""}, 400),
        ("/agents/echo", {"X-Clrk-Trigger": "No Such"}, 400),
        ("/agents/echo", {"X-Clrk-Timeout": "-1"}, 400),
        ("/agents/echo", {"X-Clrk-Timeout": "nan"}, 400),
        ("/agents/echo", {"ce-note": "%zz"}, 400),
        ("/agents/echo", {"ce-": "x"}, 400),
        ("/agents/echo", {"X-Clrk-Invocation-ID": "1"}, 400),
        ("/agents/echo", {"X-Clrk-Invocation-ID": "01890000-0000-7000-8000-00000000000A"}, 400),
    ],
)
async def test_refused_requests(gateway, path, headers, status):
    got, answer, body = await gateway.call(path, headers=headers)
    assert got == status
    problem(status, answer, body)
    assert not gateway.runtime.received[1:]  # Ready was all


async def test_two_headers_that_name_the_agent(gateway):
    headers = [("X-Clrk-TaskAgent", "default/echo"), ("X-Clrk-TaskAgent", "team/echo")]
    assert (await gateway.call("/", headers=headers))[0] == 400


async def test_broken_json_is_400_and_starts_nothing(gateway):
    status, headers, body = await gateway.call("/agents/echo", data=b"{", headers={"Content-Type": "application/json"})
    assert "JSON" in problem(status, headers, body)["detail"]
    assert status == 400
    assert len(gateway.runtime.received) == 1
    assert gateway.phase(headers["X-Clrk-Invocation-ID"]) == "Rejected"


async def test_a_body_at_the_limit_and_one_over_it(gateway):
    limit = 32 * 1024 * 1024
    status, _, body = await gateway.call("/agents/echo", data=io.BytesIO(b"\0" * limit))
    assert status == 200
    assert len(base64.b64decode(json.loads(body)["data_base64"])) == limit
    assert (await gateway.call("/agents/echo", data=io.BytesIO(b"\0" * (limit + 1))))[0] == 413


async def test_a_chunked_body_over_the_limit(gateway):
    async def chunks():
        for _ in range(33):
            yield b"\0" * 1024 * 1024

    status, headers, body = await gateway.call("/agents/echo", data=chunks())
    assert status == 413
    problem(413, headers, body)


async def test_a_compressed_body_counts_as_what_it_holds(gateway):
    bomb = zlib.compress(b"\0" * 40_000_000)
    assert (await gateway.call("/agents/echo", data=bomb, headers={"Content-Encoding": "deflate"}))[0] == 413


@pytest.mark.parametrize(
    "line",
    [b"/agents/echo/\xff", b"/agents/echo/\xc3\xa4", b"/agents/echo?\xff", b"/agents/echo#x", b"/agents/echo/\x01"],
)
async def test_a_target_with_raw_bytes_hangs_nothing(gateway, line):
    reader, writer = await gateway.raw(b"GET " + line + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.split()[1] in (b"200", b"400", b"404")
    writer.close()


async def test_absolute_form_and_authority(gateway):
    reader, writer = await gateway.raw(b"GET http://x/agents/echo?a=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    assert b'"httpurl":"/agents/echo"' in answer
    writer.close()


async def test_expect_100_continue(gateway):
    reader, writer = await gateway.raw(
        b"POST /agents/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hi")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_no_100_continue_for_a_request_that_is_refused(gateway):
    reader, writer = await gateway.raw(
        b"POST /agents/nobody HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 404")
    writer.close()


async def test_a_callers_invocation_id_is_used_once(gateway):
    wanted = new_invocation_id()
    status, headers, body = await gateway.call("/agents/echo", headers={"X-Clrk-Invocation-ID": wanted})
    assert (status, headers["X-Clrk-Invocation-ID"], json.loads(body)["invocationid"]) == (200, wanted, wanted)
    status, headers, body = await gateway.call("/agents/echo", headers={"X-Clrk-Invocation-ID": wanted})
    assert status == 409
    assert problem(409, headers, body)["invocation_id"] != wanted  # the other chain gets nothing added
    assert len(await gateway.spans(wanted, "ingress.dispatch")) == 1


async def test_max_concurrent(gateway):
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    status, headers, body = await gateway.call("/agents/one")
    assert status == 429
    assert headers["Retry-After"] == "1"
    problem(429, headers, body)
    assert gateway.phase(headers["X-Clrk-Invocation-ID"]) == "Rejected"
    span = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert span["attributes"]["http.response.status_code"] == 429
    gateway.runtime.open_gate()
    assert (await first)[0] == 200
    gateway.runtime.open_gate()
    assert (await gateway.call("/agents/one"))[0] == 200  # the slot is free once the answer has ended


async def test_a_refused_body_gives_the_slot_back(gateway):
    for _ in range(3):
        assert (await gateway.call("/agents/one", data=b"{", headers={"Content-Type": "application/json"}))[0] == 400


@pytest.mark.parametrize(
    ("name", "status", "retry"),
    [("poolless", 503, "1"), ("broken", 502, None), ("unspawned", 502, None), ("gone", 404, None)],
)
async def test_runs_that_do_not_start(gateway, name, status, retry):
    got, headers, body = await gateway.call(f"/agents/{name}")
    assert (got, headers.get("Retry-After")) == (status, retry)
    problem(status, headers, body)


async def test_a_run_that_never_starts(gateway, monkeypatch):
    monkeypatch.setattr("clrk.gateway.sandbox_run.START_DEADLINE_S", 0.1)
    assert (await gateway.call("/agents/unstarted"))[0] == 502
    assert isinstance(gateway.runtime.received[-1], StopRun)


async def test_the_hosts_limit(gateway):
    gateway.runtime.app._parts.invocations.max_running = 0
    status, headers, _ = await gateway.call("/agents/echo")
    assert (status, headers["Retry-After"]) == (503, "1")


async def test_memory_is_bounded_over_all_invocations(gateway, monkeypatch):
    monkeypatch.setattr("clrk.gateway.invocations._MAX_HELD_BYTES", 3_000_000)
    first = asyncio.create_task(gateway.call("/agents/one", data=io.BytesIO(b"\0" * 2_000_000)))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    status, headers, body = await gateway.call("/agents/echo", data=io.BytesIO(b"\0" * 2_000_000))
    assert (status, headers["Retry-After"]) == (503, "1")
    problem(503, headers, body)
    gateway.runtime.open_gate()
    assert (await first)[0] == 200
    assert (await gateway.call("/agents/echo", data=io.BytesIO(b"\0" * 2_000_000)))[0] == 200  # given back
    assert gateway.runtime.app._parts.invocations._held_bytes == 0


async def test_no_answer_names_versions(gateway):
    for path in ("/agents/echo", "/agents/nobody", "/agents/text"):
        assert (await gateway.call(path))[1]["Server"] == "clrk"


async def test_a_bug_of_ours_is_an_answer_with_an_id(gateway, monkeypatch):
    monkeypatch.setattr("clrk.gateway.ingress.read_binary", lambda *_: 1 / 0)
    status, headers, body = await gateway.call("/agents/one")
    assert status == 500
    problem(500, headers, body)
    monkeypatch.undo()
    gateway.runtime.open_gate()
    assert (await gateway.call("/agents/one"))[0] == 200


async def test_draining(gateway):
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    gateway.runtime.send(Drain())
    await gateway.runtime.until(lambda: gateway.runtime.app._draining)
    status, headers, body = await gateway.call("/agents/echo")
    assert (status, headers["Connection"]) == (503, "close")
    problem(503, headers, body)
    assert not gateway.runtime.drained.is_set()
    gateway.runtime.open_gate()
    assert (await first)[0] == 200
    await asyncio.wait_for(gateway.runtime.drained.wait(), 10)


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


# --- spans ------------------------------------------------------------------------------------------------------------


async def test_the_span_tree(gateway):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x", "ce-x-tenant-id": "acme"}
    status, answer, body = await gateway.call("/agents/echo?secret=1", headers=headers)
    assert status == 200
    invocation_id = answer["X-Clrk-Invocation-ID"]
    await gateway.span(invocation_id, "sandbox.teardown")
    spans = {span["name"]: span for span in await gateway.spans(invocation_id)}
    assert set(spans) == {
        "ingress.dispatch",
        "invoke_agent echo",
        "sandbox.acquire",
        "sandbox.spawn",
        "sandbox.teardown",
    }
    dispatch, run = spans["ingress.dispatch"], spans["invoke_agent echo"]
    assert {span["trace_id"] for span in spans.values()} == {TRACE}
    assert dispatch["parent_span_id"] == PARENT
    assert run["parent_span_id"] == dispatch["span_id"]
    for name in ("sandbox.acquire", "sandbox.spawn", "sandbox.teardown"):
        assert spans[name]["parent_span_id"] == run["span_id"]
        assert spans[name]["attributes"]["clrk.sandbox.warm"] is True
        assert spans[name]["attributes"]["clrk.sandbox.id"] == "0badcafe"
    event = json.loads(body)
    assert event["traceparent"] == f"00-{TRACE}-{run['span_id']}-01"
    assert event["tracestate"] == "vendor=x"
    assert (dispatch["kind"], run["kind"]) == ("SPAN_KIND_SERVER", "SPAN_KIND_INTERNAL")
    assert (
        dispatch["attributes"].items()
        >= {
            "invocation.id": invocation_id,
            "agent.kind": "TaskAgent",
            "agent.namespace": "default",
            "agent.name": "echo",
            "clrk.trigger": "http",
            "clrk.phase": "Succeeded",
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "http.route": "/agents/{name}",
            "url.path": "/agents/echo",
            "url.scheme": "http",
            "client.address": "127.0.0.1",
            "server.address": "127.0.0.1",
            "server.port": gateway.runtime.ingress_port,
        }.items()
    )
    assert (
        run["attributes"].items()
        >= {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": "echo",
            "clrk.exit_code": 0,
            "clrk.exit_reason": "exited",
            "clrk.phase": "Succeeded",
        }.items()
    )
    for span in spans.values():
        assert "acme" not in json.dumps(span)
        assert "secret" not in json.dumps(span)
        assert span["start_time_unix_nano"] <= span["end_time_unix_nano"]


async def test_a_trace_without_a_caller(gateway):
    _, answer, body = await gateway.call("/agents/env", headers={"X-Clrk-Trigger": "cron", "traceparent": "nonsense"})
    invocation_id = answer["X-Clrk-Invocation-ID"]
    dispatch = await gateway.span(invocation_id, "ingress.dispatch")
    assert dispatch["parent_span_id"] == ""
    assert dispatch["attributes"]["clrk.trigger"] == "cron"
    run = await gateway.span(invocation_id, "invoke_agent env")
    assert body.decode().split() == [f"00-{run['trace_id']}-{run['span_id']}-01", invocation_id]


async def test_an_unsampled_parent_stays_unsampled(gateway):
    _, _, body = await gateway.call("/agents/echo", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert json.loads(body)["traceparent"].endswith("-00")


async def test_a_failed_run_is_an_error_in_both_spans(gateway):
    _, headers, _ = await gateway.call("/agents/fails")
    run = await gateway.span(headers["X-Clrk-Invocation-ID"], "invoke_agent fails")
    assert (run["status"]["code"], run["attributes"]["error.type"]) == ("STATUS_CODE_ERROR", "exit_code_3")
    dispatch = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert (dispatch["status"]["code"], dispatch["attributes"]["error.type"]) == ("STATUS_CODE_ERROR", "500")


async def test_a_refused_request_has_a_span_without_error(gateway):
    _, headers, _ = await gateway.call("/agents/echo", headers={"ce-note": "%"})
    dispatch = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert dispatch["attributes"]["http.response.status_code"] == 400
    assert dispatch["status"]["code"] == "STATUS_CODE_UNSET"  # semconv: 4xx is the client's fault


async def test_an_unknown_method_is_other(gateway):
    _, headers, _ = await gateway.call("/agents/echo", "PURGE")
    attributes = (await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch"))["attributes"]
    assert attributes["http.request.method"] == "_OTHER"
    assert attributes["http.request.method_original"] == "PURGE"


# --- run-task ---------------------------------------------------------------------------------------------------------


async def test_run_task_over_the_admin_socket(gateway):
    connector = aiohttp.UnixConnector(str(gateway.runtime.state_dir / "admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as client:
        url = "http://clrk/v1/agents/default/echo/run"
        async with client.post(url, data=b"hi", headers={"ce-k": "v", "Content-Type": "text/plain"}) as response:
            event = await response.json()
            invocation_id = response.headers["X-Clrk-Invocation-ID"]
        async with client.get(f"http://clrk/v1/invocations/{invocation_id}") as response:
            assert (await response.json())["phase"] == "Succeeded"
        async with client.post("http://clrk/v1/agents/default/mute/run", headers={"X-Clrk-Timeout": "0.2"}) as response:
            assert response.status == 504
        async with client.post("http://clrk/v1/agents/default/nobody/run") as response:
            assert response.status == 404
    assert (event["subject"], event["k"], event["data"], event["httpurl"]) == ("cli", "v", "hi", "/agents/default/echo")
    attributes = (await gateway.span(invocation_id, "ingress.dispatch"))["attributes"]
    assert attributes["clrk.trigger"] == "cli"
    assert attributes["clrk.caller.uid"] == 0 or attributes["clrk.caller.uid"] > 0
    assert "client.address" not in attributes


async def test_run_task_is_cancelled_with_its_caller(gateway):
    _, writer = await asyncio.open_unix_connection(str(gateway.runtime.state_dir / "admin.sock"))
    writer.write(b"POST /v1/agents/default/mute/run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    writer.transport.abort()
    await gateway.runtime.until(lambda: not gateway.runtime.runs)
    assert isinstance(gateway.runtime.received[-1], StopRun)
