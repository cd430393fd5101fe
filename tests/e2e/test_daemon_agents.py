"""DaemonAgents on a real host: calls attributed to the agent alone, restarts, the stop sequence, and nothing left."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import yaml
from instances import DEADLINE_S, instance
from leftovers import Footprint, difference, footprint
from stack import Daemon, StandIn, agent, document, egress

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

T = TypeVar("T")
# Calls without end, and once more while it is asked to end: it has its network and its time for that.
WATCH = """
import os, signal, sys, time, urllib.request as r
def call(order):
    r.urlopen('http://tools.internal/echo?%s-%s' % (sys.argv[1], order)).read()
def bye(*_):
    call('bye')
    print('bye', flush=True)
    os._exit(0)  # SystemExit is lost where the signal came in the middle of a finalizer
signal.signal(signal.SIGTERM, bye)
print('up', 'CLRK_INVOCATION_ID' in os.environ, 'TRACEPARENT' in os.environ, flush=True)
print('and no', len(sys.stdin.read()), file=sys.stderr, flush=True)
while True:
    call('again')
    time.sleep(0.05)
"""


def daemon_agent(name: str, command: list[str], **spec: Any) -> dict[str, Any]:
    return document("DaemonAgent", name, template={"spec": {"command": command}}, **spec)


def watcher(label: str) -> dict[str, Any]:
    return daemon_agent("watcher", ["/usr/bin/python3", "-I", "-c", WATCH, label])


STUBBORN = daemon_agent("stubborn", ["/bin/bash", "-c", "trap '' TERM; echo up; sleep 900; sleep 900"])
CRASHER = daemon_agent("crasher", ["/bin/bash", "-c", "echo crash; exit 3"], maxRestarts=2)


@pytest.fixture
def own(tmp_path: Path, providers: StandIn) -> Iterator[Daemon]:
    """A daemon that may be killed and reloaded."""
    running = Daemon(tmp_path, instance("da"), [*egress(providers), agent("hello", ["/bin/echo", "hi"])])
    yield running
    if running.process is not None and running.process.poll() is None:
        assert running.stop() == 0, running.log()
    after = footprint(running)
    assert (after.namespaces, after.processes, after.mounts, after.cgroups) == (0, (), 0, 0)


def declare(own: Daemon, *documents: dict[str, Any]) -> None:
    """Add these to what the daemon's file declares at first."""
    first = own.folder / "first.yaml"
    if not first.exists():
        first.write_text(own.config.read_text())
    own.config.write_text(first.read_text() + "---\n" + yaml.safe_dump_all(list(documents)))
    if own.process is not None:
        own.process.send_signal(signal.SIGHUP)


def until(ask: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """Ask again until the answer is as wanted."""
    deadline = time.monotonic() + DEADLINE_S
    while not wanted(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)  # a poll of another process, which announces nothing
    return answer


def status(own: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(own.clrk("agents", "get", name, "-o", "json"))
    return found


def spans(own: Daemon, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in own.clrk("traces", "--agent", name, "--json").splitlines()]


def runs(own: Daemon, name: str) -> list[dict[str, Any]]:
    return [span for span in spans(own, name) if span["name"] == f"invoke_agent {name}"]


def heard(providers: StandIn, order: str) -> int:
    return sum(entry["target"] == f"/echo?{order}" for entry in providers.seen())


async def test_what_a_daemon_calls_is_attributed_to_it_alone(
    own: Daemon, providers: StandIn, caller: aiohttp.ClientSession
) -> None:
    declare(own, watcher("calls"))
    own.start()
    calls = until(
        lambda: [span for span in spans(own, "watcher") if span["name"] == "GET tools.internal"],
        lambda found: len(found) >= 3,
    )
    assert {span["parent_span_id"] for span in calls} == {""}
    assert len({span["trace_id"] for span in calls}) == len(calls)
    for span in calls:
        attributes = span["attributes"]
        assert "invocation.id" not in attributes
        assert (attributes["agent.kind"], attributes["agent.name"]) == ("DaemonAgent", "watcher")
        assert attributes["clrk.sandbox.id"] == status(own, "watcher")["sandbox"]
        assert attributes["process.executable.name"] == "python3"
    seen = {parent for entry in providers.seen() for parent in entry["traceparent"]}
    assert {f"00-{span['trace_id']}-{span['span_id']}-01" for span in calls} <= seen  # the upstream can continue it

    assert status(own, "watcher")["state"] == "Running"
    until(lambda: own.clrk("agents", "logs", "watcher"), lambda text: "up False False" in text and "and no 0" in text)
    async with caller.post(f"{own.url}/agents/watcher", data="x") as answer:
        assert answer.status == 405
        assert (await answer.json(content_type=None))["status"] == 405

    before = host_footprint(own)
    assert own.kill_gateway()
    last_seen = len(providers.seen())
    until(lambda: len(providers.seen()), lambda count: count > last_seen + 3)  # the next gateway has started it again
    ended = until(lambda: runs(own, "watcher"), lambda found: len(found) >= 1)
    assert ended[0]["status"]["code"] == "STATUS_CODE_ERROR"  # the run that died with its gateway
    assert ended[0]["parent_span_id"] == ""
    until(lambda: difference(before, host_footprint(own)), lambda found: found == {})


def host_footprint(own: Daemon) -> Footprint:
    """The footprint with the fds of the runtime alone: the pool's children become sandboxes."""
    found = footprint(own)
    runtime = own.process.pid if own.process is not None else 0
    return replace(found, fds=tuple(one for one in found.fds if one[0] == runtime))


def test_a_daemon_that_crashes_comes_back_later_and_later(own: Daemon) -> None:
    declare(own, CRASHER)
    own.start()
    stopped = until(lambda: status(own, "crasher"), lambda found: found["state"] == "Stopped")
    assert (stopped["restarts"], stopped["lastExit"]) == (2, "the agent exited with code 3")
    ended = sorted(runs(own, "crasher"), key=lambda span: span["start_time_unix_nano"])
    assert [span["attributes"]["clrk.exit_code"] for span in ended] == [3, 3, 3]
    waits = [
        (later["start_time_unix_nano"] - earlier["end_time_unix_nano"]) / 1e9
        for earlier, later in itertools.pairwise(ended)
    ]
    assert waits[0] >= 1, waits
    assert waits[1] >= 2, waits
    assert len({span["trace_id"] for span in ended}) == 3
    names = until(
        lambda: [span["name"] for span in spans(own, "crasher")], lambda found: found.count("sandbox.teardown") >= 3
    )
    assert [names.count(name) for name in ("sandbox.acquire", "sandbox.spawn", "sandbox.teardown")] == [3, 3, 3]


def test_a_reload_replaces_what_changed_and_stops_what_is_gone(own: Daemon, providers: StandIn) -> None:
    declare(own, watcher("one"), STUBBORN)
    own.start()
    until(lambda: heard(providers, "one-again"), lambda count: count > 0)
    until(lambda: own.clrk("agents", "logs", "stubborn"), lambda text: "up" in text)
    assert os.path.isdir(f"/run/{own.instance}")

    declare(own, watcher("two"), STUBBORN)
    until(lambda: heard(providers, "two-again"), lambda count: count > 0)
    assert heard(providers, "one-bye") == 1  # SIGTERM, and time for a last call
    (first,) = runs(own, "watcher")
    assert (first["status"]["code"], first["attributes"]["clrk.exit_code"]) == ("STATUS_CODE_UNSET", 0)
    assert first["attributes"]["clrk.exit_reason"] == "stopped"
    assert runs(own, "stubborn") == []  # it was left alone

    asked_ns = time.time_ns()
    declare(own, watcher("two"))
    (killed,) = until(lambda: runs(own, "stubborn"), lambda found: len(found) == 1)
    assert killed["attributes"]["clrk.exit_code"] == 137
    assert (killed["end_time_unix_nano"] - asked_ns) / 1e9 >= 5
    assert status(own, "watcher")["restarts"] == 0


def test_the_hosts_own_stop_is_gentle_too(own: Daemon, providers: StandIn) -> None:
    declare(own, watcher("host"))
    own.start()
    until(lambda: heard(providers, "host-again"), lambda count: count > 0)
    assert own.stop() == 0, own.log()
    assert heard(providers, "host-bye") == 1
    own.start()
    assert runs(own, "watcher")[0]["attributes"]["clrk.exit_code"] == 0
    until(lambda: status(own, "watcher"), lambda found: found["state"] == "Running")
