"""Every status of CONTRACT section 4, its cause and its headers, and what is kept of it: one row each."""

import asyncio
import io
import json
from dataclasses import dataclass, field

import aiohttp
import pytest
from gateway_caller import running_gateway
from scripted_agents import AGENTS, agent
from scripted_runtime import ScriptedRuntime

from clrk.core.ids import new_invocation_id
from clrk.core.messages import StartFailure
from clrk.core.resources import DaemonAgent

LIMIT = 32 * 1024 * 1024
JSON = {"Content-Type": "application/json"}
CE_JSON = {"Content-Type": "application/cloudevents+json"}
CE_BATCH = {"Content-Type": "application/cloudevents-batch+json"}
CE_XML = {"Content-Type": "application/cloudevents+xml"}
WRAPPED = {"Accept": "application/cloudevents+json"}
JWT = {"type": "JWT", "claim": "sub", "field": "user", "jwks": "/none", "issuer": "i", "audience": "a"}
EXTRA = [
    agent("full", "true"),
    agent("whole", "printf part; sleep 0.05; exit 4", streaming={"enabled": False}),
    agent("wholeslow", "printf part; sleep 60", streaming={"enabled": False}, timeout=0.3),
    agent("wholeflood", f"head -c {LIMIT + 1} /dev/zero", streaming={"enabled": False}),
    agent("secured", "true", identity={"extractors": [JWT]}),
]
DAEMON = DaemonAgent.model_validate(
    {
        "kind": "DaemonAgent",
        "metadata": {"name": "watcher"},
        "spec": {"template": {"spec": {"command": ["true"]}}},
    }
)


@pytest.fixture
async def strict(tmp_path):
    async with running_gateway([*AGENTS, *EXTRA], tmp_path) as running:
        runtime = running.runtime
        runtime.refuse["full"] = StartFailure.STATE_FULL
        runtime.app._parts.agents.replace(runtime.config.model_copy(update={"daemons": [DAEMON]}))
        yield running


@dataclass(frozen=True)
class Row:
    """What is asked, and what must come of it. phase "": nothing is kept, since no invocable agent was named."""

    status: int
    path: str
    phase: str = ""
    detail: str = ""
    headers: dict = field(default_factory=dict)
    body: object = None
    answer: dict = field(default_factory=dict)
    error: str | None = None


ROWS = {
    "no agent named": Row(400, "/", detail="no agent named"),
    "no agent named, path of another kind": Row(400, "/healthz", detail="no agent named"),
    "a name that can not be one": Row(400, "/", detail="namespace/name", headers={"X-Clrk-TaskAgent": "a b"}),
    "no such agent": Row(404, "/agents/nobody", detail="no agent default/nobody on this host"),
    "no such agent, two ways to read it": Row(
        404, "/agents/team/nobody", detail="no agent team/nobody on this host, and no default/team"
    ),
    "a DaemonAgent": Row(405, "/agents/watcher", detail="DaemonAgent", answer={"Allow": ""}),
    "a DaemonAgent, by header": Row(
        405, "/", detail="DaemonAgent", headers={"X-Clrk-TaskAgent": "default/watcher"}, answer={"Allow": ""}
    ),
    "body not JSON": Row(400, "/agents/echo", "Rejected", "not JSON", JSON, b"{"),
    "body not JSON, by suffix": Row(
        400, "/agents/echo", "Rejected", "not JSON", {"Content-Type": "application/vnd.x+json"}, b"[1,]"
    ),
    "malformed ce- value": Row(400, "/agents/echo", "Rejected", "ce-note", {"ce-note": "%zz"}),
    "malformed ce- name": Row(400, "/agents/echo", "Rejected", "an attribute is named", {"ce-a_b": "x"}),
    "malformed ce-time": Row(400, "/agents/echo", "Rejected", "RFC 3339", {"ce-time": "noon"}),
    "empty ce-id": Row(400, "/agents/echo", "Rejected", "ce-id", {"ce-id": ""}),
    "malformed trigger": Row(400, "/agents/echo", "Rejected", "X-Clrk-Trigger", {"X-Clrk-Trigger": "Not This"}),
    "malformed timeout": Row(400, "/agents/echo", "Rejected", "X-Clrk-Timeout", {"X-Clrk-Timeout": "soon"}),
    "malformed invocation id": Row(400, "/agents/echo", "Rejected", "canonical", {"X-Clrk-Invocation-ID": "x"}),
    "not a CloudEvent": Row(400, "/agents/echo", "Rejected", "not a CloudEvent", CE_JSON, b"[]"),
    "a batch": Row(400, "/agents/echo", "Rejected", "one by one", CE_BATCH, b"[]"),
    "another event format": Row(415, "/agents/echo", "Rejected", "application/cloudevents+json", CE_XML, b"<x/>"),
    "no token": Row(401, "/agents/secured", "Rejected", "token"),
    "body over the limit": Row(413, "/agents/echo", "Rejected", str(LIMIT), body=lambda: io.BytesIO(bytes(LIMIT + 1))),
    "non-zero exit": Row(500, "/agents/fails", "Failed", "code 3", answer={"X-Clrk-Exit-Code": "3"}, error="500"),
    "killed": Row(500, "/agents/crash", "Failed", "code 139", answer={"X-Clrk-Exit-Code": "139"}, error="500"),
    "non-zero exit, not streamed": Row(
        500, "/agents/whole", "Failed", "code 4", answer={"X-Clrk-Exit-Code": "4"}, error="500"
    ),
    "non-zero exit, wrapped": Row(500, "/agents/cut", "Failed", "code 4", WRAPPED, error="500"),
    "no answer posted": Row(
        502, "/agents/postnone", "Failed", "no answer was posted", answer={"X-Clrk-Exit-Code": "0"}, error="502"
    ),
    "no answer posted, non-zero exit": Row(
        502, "/agents/postfails", "Failed", "no answer was posted", answer={"X-Clrk-Exit-Code": "6"}, error="502"
    ),
    "no sandbox": Row(502, "/agents/broken", "Failed", "the sandbox did not start: scripted", error="502"),
    "no process": Row(502, "/agents/unspawned", "Failed", "the sandbox did not start: scripted", error="502"),
    "an answer too large to be whole": Row(502, "/agents/wholeflood", "Failed", str(LIMIT), error="502"),
    "pool exhausted": Row(
        503, "/agents/poolless", "Rejected", "no sandbox is free", answer={"Retry-After": "1"}, error="503"
    ),
    "timeout": Row(504, "/agents/slow", "Timeout", "within its timeout of 0.3 s", error="504"),
    "timeout, not streamed": Row(504, "/agents/wholeslow", "Timeout", "within its timeout", error="504"),
    "timeout, nothing posted": Row(504, "/agents/postslow", "Timeout", "within its timeout", error="504"),
    "state over its limit": Row(507, "/agents/full", "Rejected", "scripted", error="507"),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
async def test_row(strict, row):
    body = row.body() if callable(row.body) else row.body
    status, headers, raw = await strict.call(row.path, data=body, headers=row.headers)
    invocation_id = check_problem(row.status, headers, raw, row.detail)
    assert status == row.status
    assert row.answer.items() <= dict(headers).items()
    assert ("X-Clrk-Exit-Code" in headers) >= ("X-Clrk-Exit-Code" in row.answer)
    await check_kept(strict, invocation_id, row.phase, row.status, row.error)


def check_problem(status, headers, raw, detail):
    assert headers["Content-Type"] == "application/problem+json"
    found = json.loads(raw)
    assert set(found) == {"type", "title", "status", "detail", "invocation_id"}
    assert (found["status"], found["invocation_id"]) == (status, headers["X-Clrk-Invocation-ID"])
    assert detail in found["detail"]
    return found["invocation_id"]


async def check_kept(gateway, invocation_id, phase, status, error=None):
    """Check the record, in memory and in the store, and the span: there is one of each, or none of either."""
    parts = gateway.runtime.app._parts
    if phase:
        await gateway.runtime.until(lambda: parts.invocations.record(invocation_id).phase.ended)
    await parts.telemetry.flush()
    kept = await parts.telemetry.store.find_invocation(invocation_id)
    if not phase:
        assert (kept, parts.invocations.record(invocation_id)) == (None, None)
        return
    assert kept.record == parts.invocations.record(invocation_id)
    assert (kept.record.phase, kept.record.status) == (phase, status)
    assert kept.record.ended_ns >= kept.record.created_ns > 0
    assert kept.record.caller.startswith("127.0.0.1:")
    (span,) = await gateway.spans(invocation_id, "ingress.dispatch")
    assert (span["span_id"], span["trace_id"]) == (kept.record.dispatch_span_id, kept.record.trace_id)
    assert span["attributes"]["http.response.status_code"] == status
    assert span["attributes"]["clrk.phase"] == phase
    assert span["attributes"].get("error.type") == error
    assert span["status"]["code"] == ("STATUS_CODE_UNSET" if error is None else "STATUS_CODE_ERROR")


async def test_the_id_of_another_invocation(strict):
    wanted = new_invocation_id()
    assert (await strict.call("/agents/text", headers={"X-Clrk-Invocation-ID": wanted}))[0] == 200
    status, headers, raw = await strict.call("/agents/text", headers={"X-Clrk-Invocation-ID": wanted})
    assert status == 409
    invocation_id = check_problem(409, headers, raw, wanted)
    assert invocation_id != wanted
    await check_kept(strict, invocation_id, "Rejected", 409)
    await check_kept(strict, wanted, "Succeeded", 200)


async def test_at_max_concurrent(strict):
    first = asyncio.create_task(strict.call("/agents/one"))
    await strict.runtime.until(lambda: strict.runtime.runs)
    status, headers, raw = await strict.call("/agents/one")
    assert (status, headers["Retry-After"]) == (429, "1")
    await check_kept(strict, check_problem(429, headers, raw, "maxConcurrent"), "Rejected", 429)
    strict.runtime.open_gate()
    assert (await first)[0] == 200


@pytest.mark.parametrize("cause", ["draining", "host limit", "short of memory"])
async def test_unavailable(strict, cause, monkeypatch):
    invocations = strict.runtime.app._parts.invocations
    match cause:
        case "draining":
            invocations.drain()
        case "host limit":
            invocations.max_running = 0
        case "short of memory":
            monkeypatch.setattr("clrk.gateway.invocations._MAX_HELD_BYTES", 10)
    status, headers, raw = await strict.call("/agents/echo", data=b"more than ten bytes")
    assert (status, headers["Retry-After"]) == (503, "1")
    detail = {"draining": "draining", "host limit": "maxSandboxes", "short of memory": "short of memory"}[cause]
    await check_kept(strict, check_problem(503, headers, raw, detail), "Rejected", 503, "503")


async def test_a_connection_too_many_gets_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr("clrk.gateway.app._max_connections", lambda: 0)
    runtime = ScriptedRuntime(AGENTS, tmp_path)
    await runtime.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", runtime.ingress_port)
    async with asyncio.timeout(25):
        head, _, raw = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert lines[0] == "HTTP/1.1 503 Service Unavailable"
    assert (headers["Retry-After"], int(headers["Content-Length"])) == ("1", len(raw))
    check_problem(503, headers, raw, "too many connections")
    await runtime.stop()


async def test_connect_is_no_invocation(strict):
    reader, writer = await strict.raw(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nX-Clrk-TaskAgent: default/echo\r\n\r\n")
    async with asyncio.timeout(25):
        assert (await reader.readline()).startswith(b"HTTP/1.1 501 ")
    writer.close()
    assert len(strict.runtime.received) == 1


async def test_a_caller_without_a_token_need_not_send_its_body(strict):
    request = b"POST /agents/secured HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    reader, writer = await strict.raw(request)
    async with asyncio.timeout(25):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()
    assert len(strict.runtime.received) == 1


async def test_the_operator_needs_no_token(strict):
    connector = aiohttp.UnixConnector(str(strict.runtime.state_dir / "admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as client:
        async with client.post("http://clrk/v1/agents/default/secured/run") as response:
            assert response.status == 200, await response.text()
