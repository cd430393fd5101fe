"""Each span of CONTRACT section 13, provoked for real; and nothing that a caller says becomes an attribute."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from instances import instance
from span_contract import violations
from stack import Daemon, StandIn, agent, document, egress, free_port

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

# egress.proxy.malformed is provoked by the race of test_attacks.py.
EVERY = {
    "ingress.dispatch", "invoke_agent", "sandbox.acquire", "sandbox.spawn", "sandbox.teardown", "chat", "tools/call",
    "GET", "POST", "egress.tcp", "egress.dial.denied", "egress.dial.failed", "egress.dns.denied",
}  # fmt: skip
CALLS = """
import os, socket, urllib.error, urllib.request as r
def get(url, body=None, **headers):
    try:
        r.urlopen(r.Request(url, body, headers), timeout=60).read()
    except OSError:
        pass  # most of these are meant to fail
get("http://tools.internal/orders/1042?token=QUERY-SECRET")
get("http://tools.internal/orders/1042", b"DELETE me", Authorization="Bearer AGENT-SECRET")
r.urlopen(r.Request("http://tools.internal/orders/1042", headers={"Cookie": "c=AGENT-SECRET"})).read()
get("http://dead.internal/")
get("http://nowhere.example/")
try:
    r.urlopen(r.Request("http://tools.internal/orders/1042", method="DELETE"))
except urllib.error.HTTPError as error:
    assert error.code == 403, error
body = b'{"model": "gpt-5.4-mini", "messages": [{"role": "user", "content": "hi"}]}'
kind = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
get("https://api.openai.com/v1/chat/completions", body, Authorization="Bearer sk-AGENT-SECRET", **kind)
call = b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "refund_policy", "arguments": {}}}'
get("https://mcp.internal/mcp", call, **kind)
line = socket.create_connection(("tcp.internal", 2525), 60)
assert line.recv(64) == b"220 hello\\r\\n"
line.sendall(b"QUIT\\r\\n")
assert line.recv(64) == b""
print("done")
"""


class Greeter(socketserver.BaseRequestHandler):
    """Speaks first, as SMTP does."""

    def handle(self) -> None:
        self.request.sendall(b"220 hello\r\n")
        self.request.recv(64)


@pytest.fixture
def greeter() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def own(tmp_path: Path, providers: StandIn, greeter: int) -> Iterator[Daemon]:
    gateway, route = egress(providers)
    gateway["spec"]["hostAliases"] += [
        {"hostnames": ["tcp.internal"], "address": f"127.0.0.1:{greeter}"},
        {"hostnames": ["dead.internal"], "address": f"127.0.0.1:{free_port()}"},
    ]
    route["spec"]["rules"] += [
        {"hostnames": ["tcp.internal"], "ports": [2525]}, {"hostnames": ["dead.internal"], "ports": [80]},
    ]  # fmt: skip
    caller = {"extractors": [{"type": "Header", "name": "X-Tenant", "field": "tenant"}]}
    caller_agent = agent("calls", ["/usr/bin/python3", "-I", "-c", CALLS], identity=caller)
    daemon_agent = document(
        "DaemonAgent", "watcher",
        template={"spec": {"command": ["/bin/bash", "-c", "curl -sS http://tools.internal/orders/1042; sleep 3600"]}},
    )  # fmt: skip
    running = Daemon(tmp_path, instance("sp"), [gateway, route, caller_agent, daemon_agent])
    running.start()
    yield running
    assert running.stop() == 0, running.log()


async def test_every_span_of_the_contract(own: Daemon, caller: aiohttp.ClientSession) -> None:
    headers = {
        "X-Tenant": "acme", "Authorization": "Bearer CALLER-SECRET", "Cookie": "CALLER-SECRET",
        "ce-subject": "CE-SECRET", "ce-x-note": "CE-SECRET", "X-Request-Id": "CALLER-SECRET",
        "content-type": "text/plain",
    }  # fmt: skip
    url = f"{own.url}/agents/calls/some/path?key=CALLER-SECRET"
    async with caller.post(url, data="BODY-SECRET", headers=headers) as answer:
        assert (answer.status, await answer.text()) == (200, "done\n"), own.log()
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    spans = own.spans_when_complete(invocation_id)
    assert {span["name"].partition(" ")[0] for span in spans} == EVERY
    everything = [json.loads(line) for line in own.clrk("traces", "--json").splitlines()]
    assert sorted(set(violations(everything))) == []
    assert all(span["attributes"]["agent.identity.tenant"] == "acme" for span in spans), spans
    daemons = [span for span in everything if span["attributes"]["agent.kind"] == "DaemonAgent"]
    assert "GET tools.internal" in {span["name"] for span in daemons}
    printed = json.dumps(everything)
    for secret in ("CALLER-SECRET", "CE-SECRET", "BODY-SECRET", "AGENT-SECRET", "QUERY-SECRET"):
        assert secret not in printed, secret


async def test_the_tree_is_one_trace(own: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{own.url}/agents/calls", headers={"X-Tenant": "acme"}) as answer:
        assert answer.status == 200, await answer.text()
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    spans = own.spans_when_complete(invocation_id)
    by_id: dict[str, dict[str, Any]] = {span["span_id"]: span for span in spans}
    assert len(by_id) == len(spans)
    assert len({span["trace_id"] for span in spans}) == 1
    (root,) = (span for span in spans if not span["parent_span_id"])
    assert root["name"] == "ingress.dispatch"
    run = next(span for span in spans if span["name"] == "invoke_agent calls")
    for span in spans:
        parent = {root["span_id"]: "", run["span_id"]: root["span_id"]}.get(span["span_id"], run["span_id"])
        assert span["parent_span_id"] == parent, span["name"]
        assert span["start_time_unix_nano"] <= span["end_time_unix_nano"]
