"""Every call of a sandbox is attributed to the invocation, the process and the destination that it had."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from instances import DEADLINE_S
from sdk_lab import lasted_s
from stack import EVENT, Daemon, StandIn, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

IDENTITY = (
    "invocation.id",
    "agent.kind",
    "agent.namespace",
    "agent.name",
    "agent.uid",
    "agent.revision",
    "clrk.sandbox.id",
)


def egress_spans(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]


def one(spans: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [span for span in spans if span["name"] == name]
    assert len(found) == 1, (name, [span["name"] for span in spans])
    return found[0]


def host_pids(invocation_id: str, comm: str) -> set[int]:
    """Return the processes, as the host numbers them, that run `comm` in the sandbox of an invocation."""
    wanted = f"CLRK_INVOCATION_ID={invocation_id}".encode()
    found = set()
    for process in Path("/proc").iterdir():
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                if (process / "comm").read_text().strip() == comm:
                    found.add(int(process.name))
        except (OSError, ValueError):  # not a process, or gone by now
            continue
    return found


async def open_gate(caller: aiohttp.ClientSession, providers: StandIn, gate: str) -> None:
    async with caller.post(f"http://{providers.plain}/gate/{gate}/open", headers={"host": "tools.internal"}) as answer:
        assert answer.status == 204


async def wait_for(caller: aiohttp.ClientSession, providers: StandIn, gate: str, count: int) -> None:
    url = f"http://{providers.plain}/gate/{gate}/arrived/{count}"
    async with caller.get(url, headers={"host": "tools.internal"}, timeout=aiohttp.ClientTimeout(DEADLINE_S)) as answer:
        assert answer.status == 200


async def test_sdk_agent(daemon: Daemon, providers: StandIn, caller: aiohttp.ClientSession) -> None:
    """Official SDKs, unmodified: two models, one of them streamed, an MCP tool, an internal API, one denied call."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    headers = EVENT | {"traceparent": f"00-{trace_id}-{span_id}-01", "ce-x-tenant-id": "acme"}
    seen_before = len(providers.seen())
    text, invocation_id = await invoke(caller, daemon, "sdk", json.dumps({"question": "Why?"}), headers)
    assert "Here is what I found." in text
    spans = daemon.spans_when_complete(invocation_id)
    assert {span["trace_id"] for span in spans} == {trace_id}
    root, run = one(spans, "ingress.dispatch"), one(spans, "invoke_agent sdk")
    assert (root["parent_span_id"], run["parent_span_id"]) == (span_id, root["span_id"])
    assert root["kind"] == "SPAN_KIND_SERVER"
    for span in spans:
        attributes = span["attributes"]
        assert [attributes[key] for key in IDENTITY] == [root["attributes"][key] for key in IDENTITY], span["name"]
        assert attributes["invocation.id"] == invocation_id
        assert (attributes["agent.kind"], attributes["agent.name"]) == ("TaskAgent", "sdk")
    for name in ("sandbox.acquire", "sandbox.spawn", "sandbox.teardown"):
        assert one(spans, name)["kind"] == "SPAN_KIND_INTERNAL"
    calls = egress_spans(spans)
    assert {span["parent_span_id"] for span in calls} == {run["span_id"]}
    assert all(span["attributes"]["process.executable.name"] == "python" for span in calls), calls
    assert len({span["attributes"]["process.pid"] for span in calls}) == 1
    check_models(spans)
    check_tools(spans)
    check_upstream(providers.seen()[seen_before:], calls)


def check_models(spans: list[dict[str, Any]]) -> None:
    claude = one(spans, "chat claude-sonnet-5")["attributes"]
    assert claude["gen_ai.system"] == claude["gen_ai.provider.name"] == "anthropic"
    assert claude["gen_ai.operation.name"] == "chat"
    assert claude["gen_ai.request.model"] == claude["gen_ai.response.model"] == "claude-sonnet-5"
    assert claude["gen_ai.request.max_tokens"] == 256
    assert claude["gen_ai.response.finish_reasons"] == ["end_turn"]
    assert claude["gen_ai.usage.input_tokens"] > 50
    assert claude["gen_ai.usage.output_tokens"] > 10
    assert claude["clrk.cost.usd"] > 0
    assert claude["server.address"] == "api.anthropic.com"
    assert claude["http.response.status_code"] == 200
    streamed = one(spans, "chat gpt-5.4-mini")
    gpt = streamed["attributes"]
    assert gpt["gen_ai.system"] == gpt["gen_ai.provider.name"] == "openai"
    assert gpt["gen_ai.request.stream"] is True
    assert gpt["gen_ai.response.model"] == "gpt-5.4-mini-2026-03-17"
    # The agent did not ask for usage: the gateway did, and kept the answer to itself.
    assert gpt["clrk.body.request_rewritten"] is True
    assert gpt["gen_ai.usage.output_tokens"] > 10
    assert 0 < gpt["gen_ai.response.time_to_first_chunk"] <= lasted_s(streamed)


def check_tools(spans: list[dict[str, Any]]) -> None:
    tool = one(spans, "tools/call refund_policy")["attributes"]
    assert (tool["mcp.method.name"], tool["gen_ai.tool.name"]) == ("tools/call", "refund_policy")
    assert one(spans, "tools/list")["attributes"]["mcp.method.name"] == "tools/list"
    internal = one(spans, "GET tools.internal")["attributes"]
    assert (internal["server.address"], internal["server.port"]) == ("tools.internal", 80)
    assert internal["http.response.status_code"] == 200
    denied = one(spans, "egress.dial.denied")
    assert denied["status"]["code"] == "STATUS_CODE_ERROR"
    assert denied["attributes"]["clrk.egress.deny_reason"]
    assert "DELETE" in denied["status"]["message"]


def check_upstream(requests: list[dict[str, Any]], calls: list[dict[str, Any]]) -> None:
    """What arrived at the providers carries the span of its call, and the denied call never arrived."""
    by_span = {span["span_id"]: span for span in calls}
    assert requests
    for request in requests:
        (traceparent,) = request["traceparent"]
        span = by_span[traceparent.split("-")[2]]
        assert span["attributes"]["server.address"] == request["host"].partition(":")[0]
        assert request["method"] != "DELETE"


@pytest.mark.parametrize("path", ["", "?q=1"])
async def test_curl_agent(daemon: Daemon, providers: StandIn, caller: aiohttp.ClientSession, path: str) -> None:
    async with caller.get(f"{daemon.url}/agents/curl{path}") as answer:
        assert answer.status == 200
        assert json.loads(await answer.read())["order"] == "1042"
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    (call,) = egress_spans(daemon.spans_when_complete(invocation_id))
    assert call["name"] == "GET tools.internal"
    assert call["attributes"]["process.executable.name"] == "curl"
    assert call["attributes"]["clrk.dst.name"] == "tools.internal"
    assert call["attributes"]["network.peer.address"] == providers.plain.rpartition(":")[0]
    assert call["attributes"]["network.peer.port"] == int(providers.plain.rpartition(":")[2])


async def test_node_agent_over_tls(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    data = json.dumps({"urls": ["https://files.internal/orders/1042"]})
    text, invocation_id = await invoke(caller, daemon, "node", data, EVENT)
    assert json.loads(text)[0]["status"] == 200
    (call,) = egress_spans(daemon.spans_when_complete(invocation_id))
    assert call["name"] == "GET files.internal"
    assert call["attributes"]["process.executable.name"] == "node"
    assert (call["attributes"]["server.address"], call["attributes"]["server.port"]) == ("files.internal", 443)


async def test_raw_dial_to_an_address_is_named_by_the_kernel(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    """No library, no name: the destination on the span is what connect() was called with, and so is getpeername()."""
    source = "exec /agent/raw/raw_dial 203.0.113.9 80 tools.internal /orders/1042"
    text, invocation_id = await invoke(caller, daemon, "shell", source)
    assert "peer 203.0.113.9 80\n" in text
    (call,) = egress_spans(daemon.spans_when_complete(invocation_id))
    assert call["name"] == "egress.dial.denied"
    assert call["attributes"]["process.executable.name"] == "raw_dial"
    assert call["attributes"]["network.peer.address"] == "203.0.113.9"
    assert call["attributes"]["network.peer.port"] == 80


async def test_raw_dial_to_a_resolved_name(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    address = "$(getent ahostsv4 tools.internal | head -1 | cut -d' ' -f1)"
    source = f"exec /agent/raw/raw_dial {address} 80 tools.internal /orders/1042"
    text, invocation_id = await invoke(caller, daemon, "shell", source)
    assert "HTTP/1.1 200 OK" in text
    (call,) = egress_spans(daemon.spans_when_complete(invocation_id))
    assert call["name"] == "GET tools.internal"
    assert call["attributes"]["process.executable.name"] == "raw_dial"
    assert call["attributes"]["clrk.dst.name"] == "tools.internal"


async def test_twenty_invocations_of_two_agents_at_once(
    daemon: Daemon, providers: StandIn, caller: aiohttp.ClientSession
) -> None:
    """All twenty are in the middle of a call when the host's own process table is read; no span is anybody else's."""
    gate = secrets.token_hex(4)
    url = f"http://tools.internal/gate/{gate}"
    shell = f'curl -sS "{url}?i=$CLRK_INVOCATION_ID"'
    fetch = f"import os,urllib.request as r; print(r.urlopen('{url}?i=' + os.environ['CLRK_INVOCATION_ID']).read())"

    async def fetched(name: str, source: str) -> tuple[str, str]:
        text, invocation = await invoke(caller, daemon, name, source)
        assert "open" in text
        return name, invocation

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetched(*pair)) for pair in [("shell", shell), ("python", fetch)] * 10]
        await wait_for(caller, providers, gate, 20)
        waiting = [request for request in providers.seen() if request["target"].startswith(f"/gate/{gate}?i=")]
        ids = [request["target"].partition("?i=")[2] for request in waiting]
        pids = {i: host_pids(i, "curl") | host_pids(i, "python3") for i in ids}
        await open_gate(caller, providers, gate)

    done = dict(reversed(task.result()) for task in tasks)
    assert Counter(done.values()) == {"shell": 10, "python": 10}
    assert set(done) == set(ids)
    sandboxes = set()
    for invocation_id, name in done.items():
        spans = daemon.spans_when_complete(invocation_id)
        (call,) = egress_spans(spans)
        attributes = call["attributes"]
        assert attributes["invocation.id"] == invocation_id
        assert attributes["agent.name"] == name
        assert {attributes["process.pid"]} == pids[invocation_id]
        assert attributes["process.executable.name"] == {"shell": "curl", "python": "python3"}[name]
        assert attributes["clrk.dst.name"] == "tools.internal"
        assert attributes["url.full"].endswith(f"/gate/{gate}?i={invocation_id}")
        (request,) = [request for request in waiting if request["target"].endswith(invocation_id)]
        assert request["traceparent"] == [f"00-{call['trace_id']}-{call['span_id']}-01"]
        sandboxes.add(attributes["clrk.sandbox.id"])
    assert len(sandboxes) == 20
