"""From Record to Enforce on a real host: what was recorded becomes the rules, and a daemon gets them while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import aiohttp
import pytest
import yaml
from instances import DEADLINE_S, instance
from span_contract import violations
from stack import RUN_PYTHON, Daemon, StandIn, agent, document, egress, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

WORK = """
import urllib.request
for url in ('http://tools.internal/orders/1042?x=1', 'https://files.internal/x'):
    try:
        print(urllib.request.urlopen(url).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
ELSEWHERE = """
import urllib.request
try:
    print(urllib.request.urlopen('http://mcp.internal:443/').status)
except OSError as error:
    print(getattr(error, 'code', 'no such name'))
"""
# One connection for as long as it lasts, and a line for each answer.
WATCH = """
import http.client, time
connection, made = None, 0
while True:
    try:
        if connection is None:
            connection, made = http.client.HTTPConnection('tools.internal', timeout=60), made + 1
        connection.request('GET', '/orders/1042')
        answer = connection.getresponse()
        answer.read()
        print(made, answer.status, flush=True)
        if answer.will_close:
            connection = None
    except OSError as error:
        print(made, type(error).__name__, flush=True)
        connection = None
    time.sleep(0.1)
"""


@pytest.fixture
def recording(tmp_path_factory: pytest.TempPathFactory, providers: StandIn) -> Iterator[tuple[Daemon, list[dict]]]:
    gateway, _ = egress(providers)
    gateway["spec"]["mode"] = "Record"
    watcher = {"command": ["/usr/bin/python3", "-I", "-c", WATCH]}
    documents = [
        gateway, agent("python", ["/usr/bin/python3", "-I", "-c", RUN_PYTHON]),
        document("DaemonAgent", "watcher", template={"spec": watcher}),
    ]  # fmt: skip
    running = Daemon(tmp_path_factory.mktemp("recording"), instance("po"), documents)
    running.start()
    yield running, documents
    assert running.stop() == 0, running.log()


def reload(daemon: Daemon, documents: list[dict]) -> None:
    runtime = next(one for one in yaml.safe_load_all(daemon.config.read_text()) if one["kind"] == "Runtime")
    daemon.config.write_text(yaml.safe_dump_all([runtime, *documents]))
    daemon.clrk("apply")


def lines_of(daemon: Daemon) -> list[str]:
    logs = daemon.clrk("agents", "logs", "watcher", "-o", "json", "--tail", "10000").splitlines()
    return [json.loads(line)["line"] for line in logs]


def wait_for(daemon: Daemon, line: str, after: int) -> list[str]:
    """Return the watcher's lines from `after` on, when one of them ends in `line`."""
    deadline = time.monotonic() + DEADLINE_S
    found: list[str] = []
    while not any(one.endswith(line) for one in found):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found = lines_of(daemon)[after:]
    return found


async def test_from_record_to_enforce(recording: tuple[Daemon, list[dict]], caller: aiohttp.ClientSession) -> None:
    daemon, documents = recording
    first, invocation = await invoke(caller, daemon, "python", WORK)
    assert len(first.splitlines()) == 2
    spans = daemon.spans_when_complete(invocation)
    assert list(violations(spans)) == []
    marked = [span for span in spans if span["attributes"].get("clrk.egress.would_deny") == "no_rule"]
    assert {span["attributes"]["clrk.dst.name"] for span in marked} == {"tools.internal", "files.internal"}
    daemon.clrk("policy", "explain", "python", "GET", "http://mcp.internal/")  # goes out, since it is only recorded
    wait_for(daemon, "200", 0)

    suggested = [
        yaml.safe_load(daemon.clrk("policy", "suggest", name, "--paths", "--since", "1h"))
        for name in ("python", "watcher")
    ]
    assert [rule["hostnames"] for rule in suggested[0]["spec"]["rules"]] == [["files.internal"], ["tools.internal"]]
    assert suggested[0]["spec"]["rules"][1]["http"] == {"methods": ["GET"], "paths": ["/orders/*"]}
    before = daemon.clrk("agents", "get", "watcher", "-o", "json")
    gateway = documents[0] | {"spec": documents[0]["spec"] | {"mode": "Enforce"}}
    seen = len(lines_of(daemon))
    reload(daemon, [gateway, *documents[1:], *suggested])

    again, _ = await invoke(caller, daemon, "python", WORK)
    assert again == first
    denied, _ = await invoke(caller, daemon, "python", ELSEWHERE)
    assert denied == "no such name\n"
    daemon.clrk("policy", "explain", "python", "GET", "http://tools.internal/orders/9")
    told = json.loads(
        daemon.clrk("policy", "explain", "python", "POST", "http://tools.internal/x", "-o", "json", code=1)
    )
    assert (told["reason"], told["mode"]) == ("http_not_allowed", "Enforce")

    kept = wait_for(daemon, "200", seen)
    assert {line.split()[-1] for line in kept} == {"200"}
    assert {line.split()[0] for line in lines_of(daemon)} == {"1"}  # one connection, through the reload
    seen = len(lines_of(daemon))
    reload(daemon, [gateway, *documents[1:]])
    lost = wait_for(daemon, "403", seen)
    assert lost
    after = daemon.clrk("agents", "get", "watcher", "-o", "json")
    sandbox = [json.loads(text)["sandbox"] for text in (before, after)]
    assert sandbox[0] == sandbox[1] != ""
    assert json.loads(after)["restarts"] == 0
