"""Official MCP clients in real sandboxes against official MCP servers, both transports: what passes, what is denied.

The clients are the `mcp` package and `@modelcontextprotocol/sdk`; the servers are the stand-in (built with `mcp`) and
`@modelcontextprotocol/server-everything`. Nothing in them knows of clrk.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from instances import instance
from mcp_servers import behind_tls, everything
from span_contract import violations
from stack import EVENT, ROOT, Daemon, StandIn, agent, document, egress, invoke
from tls_material import Authority

pytestmark = pytest.mark.e2e
EVERYTHING, LEGACY, COUNTED, PYTHON = "everything.internal", "legacy.internal", "counted.internal", "mcp.internal"
DENIED = {"deniedTools": ["get-env", "open_ticket"]}


def mcp_route(name: str, hosts: list[str], **policy: Any) -> dict[str, Any]:
    rules = [{"filters": [{"type": "ToolPolicy", "toolPolicy": policy}]}]
    return document("MCPRoute", name, hostnames=hosts, rules=rules)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, providers: StandIn) -> Iterator[Daemon]:
    """A daemon of its own: its MCPRoutes, and the servers behind TLS."""
    folder: Path = tmp_path_factory.mktemp("mcp")
    authority = Authority("MCP servers")
    trusted = folder / "ca.pem"
    trusted.write_bytes(authority.pem + Path(providers.ca_file).read_bytes())
    with contextlib.ExitStack() as stack:
        targets = {mode: stack.enter_context(everything(folder, mode)) for mode in ("streamableHttp", "sse")}
        fronts = [(EVERYTHING, "streamableHttp"), (COUNTED, "streamableHttp"), (LEGACY, "sse")]
        aliases = [
            {
                "hostnames": [name],
                "address": stack.enter_context(behind_tls(authority, name, targets[mode], folder)),
            }
            for name, mode in fronts
        ]
        gateway, _ = egress(providers)
        gateway["spec"] |= {"hostAliases": [*gateway["spec"]["hostAliases"], *aliases]}
        gateway["spec"]["upstreamTLS"] = {"caFile": str(trusted)}
        node = {"/agent/node": ROOT / "tests/node"}
        code = {"/agent/venv": ROOT / ".venv", "/agent/code": ROOT / "tests/e2e"}
        documents = [
            gateway,
            document(
                "EgressL4Route", "mcp", rules=[{"hostnames": [EVERYTHING, LEGACY, COUNTED, PYTHON], "ports": [443]}]
            ),
            mcp_route("names", [EVERYTHING, LEGACY, PYTHON], **DENIED),
            mcp_route("counts", [COUNTED], maxCallsPerExecution=2),
            agent("py", ["/agent/venv/bin/python", "-I", "/agent/code/mcp_agent.py"], mounts=code),
            agent("node", ["/usr/bin/node", "/agent/node/mcp_agent.mjs"], mounts=node),
        ]
        daemon = Daemon(tmp_path_factory.mktemp("mcpd"), instance("mc"), documents)
        daemon.start()
        yield daemon
        spans = [json.loads(line) for line in daemon.clrk("traces", "--json").splitlines()]
        assert daemon.stop() == 0, daemon.log()
        assert sorted(set(violations(spans))) == []


async def use(running: Daemon, caller: aiohttp.ClientSession, name: str, asked: dict[str, Any]) -> tuple[Any, list]:
    """Run an agent; return what it printed, and its spans."""
    printed, invocation = await invoke(caller, running, name, json.dumps(asked), EVENT)
    return json.loads(printed), running.spans_when_complete(invocation)


def calls(spans: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {span["name"]: span for span in spans if "mcp.method.name" in span["attributes"]}


EVERY_CALL = [
    ["echo", {"message": "hi"}],
    ["trigger-long-running-operation", {"duration": 0.2, "steps": 2}],
    ["trigger-sampling-request", {"prompt": "p", "maxTokens": 9}],
    ["trigger-elicitation-request", {}],
    ["get-roots-list", {}],
    ["get-env", {}],
]


@pytest.mark.parametrize("client", ["py", "node"])
@pytest.mark.parametrize("sse", [False, True], ids=["streamable", "sse"])
async def test_the_typescript_server(running: Daemon, caller: aiohttp.ClientSession, client: str, sse: bool) -> None:
    asked = {
        "url": f"https://{LEGACY}/sse" if sse else f"https://{EVERYTHING}/mcp", "sse": sse, "calls": EVERY_CALL,
        "resource": "demo://resource/static/document/features.md", "prompt": ["simple-prompt", {}],
    }  # fmt: skip
    found, spans = await use(running, caller, client, asked)
    made = found["calls"]
    assert "echo" in found["tools"]
    assert "get-env" not in found["tools"]
    assert made["echo"] == {"error": False, "text": "Echo: hi"}
    assert found["progress"] >= 1
    assert "m-1" in made["trigger-sampling-request"]["text"]
    assert "Ada" in made["trigger-elicitation-request"]["text"]
    assert "file:///work" in made["get-roots-list"]["text"]
    assert found["resource"].startswith("# Everything Server")
    assert found["prompt"] == "This is a simple prompt without arguments."
    denial = made["get-env"]
    assert denial["code"] == -32010
    assert "tool 'get-env' is denied by deniedTools of MCPRoute default/names rules[0]" in denial["message"]
    assert denial["data"] == {"reason": "tool_denied", "rule": "MCPRoute default/names rules[0]"}
    by_name = calls(spans)
    assert by_name.keys() >= {
        "initialize", "notifications/initialized", "tools/list", "resources/read", "prompts/get simple-prompt",
        "sampling/createMessage", "elicitation/create", "roots/list", *(f"tools/call {tool}" for tool, _ in EVERY_CALL),
    }  # fmt: skip
    denied = by_name.pop("tools/call get-env")
    assert denied["status"]["code"] == "STATUS_CODE_ERROR"
    assert denied["attributes"]["clrk.egress.deny_reason"] == "tool_denied"
    unanswered = [name for name, span in by_name.items() if span["attributes"].get("clrk.body.usage_visible") is False]
    assert unanswered == []
    assert [name for name, span in by_name.items() if span["status"]["code"] == "STATUS_CODE_ERROR"] == []
    slow = by_name["tools/call trigger-long-running-operation"]
    assert slow["end_time_unix_nano"] - slow["start_time_unix_nano"] > 150e6
    sessions = {span["attributes"].get("mcp.session.id") for span in by_name.values()}
    assert len(sessions) == 1
    assert (sessions == {None}) == sse


PYTHON_CALLS = [
    ["refund_policy", {"country": "DE"}],
    ["count", {"steps": 3}],
    ["summarise", {"text": "t"}],
    ["approve", {}],
    ["roots", {}],
    ["refund_policy", {"country": "XX"}],
    ["open_ticket", {"order": "1", "reason": "r"}],
]


@pytest.mark.parametrize("client", ["py", "node"])
@pytest.mark.parametrize("sse", [False, True], ids=["streamable", "sse"])
async def test_the_python_server(
    running: Daemon, caller: aiohttp.ClientSession, providers: StandIn, client: str, sse: bool
) -> None:
    before = len(providers.seen())
    asked = {
        "url": f"https://{PYTHON}/{'sse' if sse else 'mcp'}", "sse": sse, "calls": PYTHON_CALLS,
        "resource": "orders://1042", "prompt": ["reply", {"tone": "kind"}],
    }  # fmt: skip
    found, spans = await use(running, caller, client, asked)
    made = found["calls"]
    assert found["tools"] == ["approve", "count", "refund_policy", "roots", "summarise"]
    assert (made["count"]["text"], made["summarise"]["text"]) == ("3", "m-1")
    assert (made["approve"]["text"], made["roots"]["text"]) == ("accept", "file:///work")
    assert made["refund_policy"]["error"] is True
    assert made["open_ticket"]["code"] == -32010
    assert (found["resource"], found["prompt"]) == ("one lamp", "Write a kind reply.")
    assert found["progress"] >= 2
    refunds = [span["attributes"].get("error.type") for span in spans if span["name"] == "tools/call refund_policy"]
    assert sorted(map(str, refunds)) == ["None", "tool_error"]
    assert calls(spans)["resources/read"]["attributes"]["mcp.resource.uri"] == "orders://1042"
    assert b"open_ticket" not in json.dumps(providers.seen()[before:]).encode()


async def test_the_protocol_without_sessions(running: Daemon, caller: aiohttp.ClientSession) -> None:
    """MCP 2026-07-28: no initialize, and headers that repeat what the body says."""
    asked = {
        "url": f"https://{PYTHON}/mcp", "sse": False, "mode": "auto",
        "calls": [["refund_policy", {"country": "DE"}], ["open_ticket", {"order": "1", "reason": "r"}]],
    }  # fmt: skip
    found, spans = await use(running, caller, "py", asked)
    assert found["version"] == "2026-07-28"
    assert "refund_policy" in found["tools"]
    assert "open_ticket" not in found["tools"]
    assert found["calls"]["refund_policy"]["text"] == "30 days, free return"
    assert found["calls"]["open_ticket"]["code"] == -32010
    by_name = calls(spans)
    assert by_name.keys() == {"server/discover", "tools/list", "tools/call refund_policy", "tools/call open_ticket"}
    assert by_name["tools/list"]["attributes"]["mcp.protocol.version"] == "2026-07-28"


@pytest.mark.parametrize("client", ["py", "node"])
async def test_calls_are_counted_for_each_execution(
    running: Daemon, caller: aiohttp.ClientSession, client: str
) -> None:
    three = [["echo", {"message": "1"}], ["get-sum", {"a": 1, "b": 2}], ["get-env", {}]]
    asked = {"url": f"https://{COUNTED}/mcp", "sse": False, "calls": three}
    for _ in range(2):
        found, spans = await use(running, caller, client, asked)
        assert "get-env" in found["tools"]
        assert "3" in found["calls"]["get-sum"]["text"]
        assert found["calls"]["get-env"]["data"]["reason"] == "tool_calls_exceeded"
        assert calls(spans)["tools/call get-env"]["attributes"]["clrk.egress.deny_reason"] == "tool_calls_exceeded"


async def test_denials_are_found_counted_and_measured(running: Daemon, caller: aiohttp.ClientSession) -> None:
    asked = {"url": f"https://{EVERYTHING}/mcp", "sse": False, "calls": [["get-env", {}]]}
    _, spans = await use(running, caller, "py", asked)
    invocation = spans[0]["attributes"]["invocation.id"]
    found = [json.loads(line) for line in running.clrk("traces", "--denied", "--json").splitlines()]
    mine = [span for span in found if span["attributes"]["invocation.id"] == invocation]
    assert [span["name"] for span in mine] == ["tools/call get-env"]
    rows = map(json.loads, running.clrk("agents", "invocations", "py", "-o", "json").splitlines())
    (listed,) = [row for row in rows if invocation in json.dumps(row)]
    assert listed["denials"] == 1
    async with caller.get(f"http://127.0.0.1:{running.admin_port}/metrics") as answer:
        metrics = await answer.text()
    assert any(
        line.startswith("clrk_egress_denied_total") and 'clrk_egress_deny_reason="tool_denied"' in line
        for line in metrics.splitlines()
    )
