"""The ingress against a scripted runtime: who is asked, what is refused, what is bounded; CONTRACT sections 4, 5."""

import asyncio
import base64
import io
import json
import re
import zlib

import pytest
from gateway_caller import problem

from clrk.core.ids import new_invocation_id
from clrk.core.messages import Drain, StopRun

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


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
