"""DaemonAgents: what is started when, stopped how, and what is left to read. Real processes, no real waiting."""

import asyncio
import json

import pytest
from credential_policies import BEARER, policy
from scripted_agents import CURL, daemon

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.messages import AgentKind, Drain, StartFailure, StartRun, StopRun
from clrk.gateway.daemon_run import STOP_GRACE_S
from clrk.gateway.telemetry.query import SpanFilter

FOREVER = "echo up; while :; do read -t 0.05 _ <> <(:); done"
GENTLE = "trap 'echo ending >&2; exit 0' TERM; " + FOREVER
STUBBORN = "trap '' TERM; echo up; sleep 600; sleep 600"
GATED = 'read -r < "$GATE"; exit 4'


class Waits:
    """Takes the place of waiting: a back-off is over at once, and what is in `held` when `over` is called."""

    def __init__(self):
        self.asked = []
        self.held = set()
        self._over = asyncio.Event()

    async def pause(self, event, seconds):
        self.asked.append(seconds)
        if seconds not in self.held:
            return
        waits = [asyncio.create_task(one.wait()) for one in (event, self._over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._over.clear()

    def over(self):
        """Let what is held go on."""
        self._over.set()


@pytest.fixture
def desk(gateway):
    return Desk(gateway)


class Desk:
    """Daemons of a gateway whose clock and pauses belong to the test."""

    def __init__(self, gateway):
        self.gateway, self.runtime, self.parts = gateway, gateway.runtime, gateway.runtime.app._parts
        self.daemons, self.waits, self.now_s, self.generation = self.parts.daemons, Waits(), 0.0, 1
        self.daemons._pause, self.daemons._clock = self.waits.pause, lambda: self.now_s

    async def configure(self, *daemons, **more):
        """Reload with these daemons, and wait until the gateway has them."""
        self.generation += 1
        self.runtime.config = self.runtime.config.model_copy(update={"daemons": list(daemons), **more})
        self.runtime.ready.clear()
        self.runtime.configure(self.generation)
        await self.runtime.ready.wait()

    def reconfigured(self):
        """The gateways that runs were given while they ran."""
        return self.runtime.egress.reconfigured

    def status(self, name="d"):
        found = [agent for agent in self.parts.agents.daemons() if agent.metadata.name == name]
        return self.daemons.status(found[0])

    async def state(self, state, name="d"):
        """Wait for a state."""
        await self.runtime.until(lambda: self.status(name).state == state)
        return self.status(name)

    def heard(self, kind):
        return [message for message in self.runtime.received if isinstance(message, kind)]

    def starts(self):
        return [message for message in self.heard(StartRun) if message.kind is AgentKind.DAEMON]

    async def logged(self, *lines):
        """Wait until these lines are kept; return all."""
        found = []
        async with asyncio.timeout(25):
            while not set(lines) <= {entry.line for entry in found}:
                await self.parts.telemetry.flush()
                found = await self.parts.telemetry.store.logs("default/d")
        return found

    async def up(self, count):
        """Wait until the daemon has said `up` so often: its handlers are in place."""
        async with asyncio.timeout(25):
            while [entry.line for entry in await self.logged("up")].count("up") < count:
                continue

    async def spans(self, name):
        """Return the daemon's spans of this name, once there is one."""
        found = []
        async with asyncio.timeout(25):
            while not found:
                await self.parts.telemetry.flush()
                async for page in self.parts.telemetry.store.spans(SpanFilter(agent="default/d", name=name)):
                    found += [json.loads(entry.json) for entry in page]
        return found


# --- when it is started again -----------------------------------------------------------------------------------


async def test_a_daemon_that_crashes_is_started_again_ever_later(desk):
    await desk.configure(daemon("d", "exit 3", maxRestarts=8))
    status = await desk.state("Stopped")
    assert desk.waits.asked == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(desk.starts()) == 9
    assert status.restarts == 8
    assert status.last_exit == "the agent exited with code 3"
    assert len({start.run_id for start in desk.starts()}) == 9


async def test_a_back_off_is_told(desk):
    desk.waits.held.add(2)
    await desk.configure(daemon("d", "exit 3"))
    status = await desk.state("BackOff")
    await desk.runtime.until(lambda: desk.waits.asked == [1, 2])
    status = desk.status()
    assert (status.state, status.restarts, status.sandbox_id) == ("BackOff", 1, "")
    assert 0 < status.next_start_ns - status.since_ns <= 2_100_000_000


async def test_a_steady_run_ends_the_row_of_failures(desk):
    desk.waits.held.add(60)
    await desk.configure(daemon("d", GATED))
    for lived_s, expected in ((1, 1), (9.5, 2), (0, 4), (10, 1), (0, 2)):
        await desk.state("Running")
        before = len(desk.waits.asked)
        desk.now_s += lived_s
        desk.runtime.open_gate()
        await desk.runtime.until(lambda before=before: len(desk.waits.asked) > before)
        assert desk.waits.asked[-1] == expected


@pytest.mark.parametrize(
    ("policy", "script", "starts", "last_exit"),
    [
        ("Never", "exit 3", 1, "the agent exited with code 3"),
        ("Never", "exit 0", 1, "it exited with code 0"),
        ("OnFailure", "exit 0", 1, "it exited with code 0"),
        ("OnFailure", "exit 3", 3, "the agent exited with code 3"),
        ("OnFailure", "kill -SEGV $$", 3, "the agent exited with code 139"),
        ("Always", "exit 0", 3, "it exited with code 0"),
    ],
)
async def test_restart_policies(desk, policy, script, starts, last_exit):
    await desk.configure(daemon("d", script, restartPolicy=policy, maxRestarts=2))
    status = await desk.state("Stopped")
    assert (len(desk.starts()), status.last_exit, status.restarts) == (starts, last_exit, starts - 1)


async def test_a_host_without_room_is_a_failed_run(desk):
    desk.waits.held.add(4)
    desk.runtime.refuse["d"] = StartFailure.POOL_EXHAUSTED
    await desk.configure(daemon("d", FOREVER))
    await desk.runtime.until(lambda: desk.waits.asked == [1, 2, 4])
    status = desk.status()
    assert (status.state, status.last_exit) == ("BackOff", "it did not start: scripted")
    assert len(desk.starts()) == 3


async def test_a_daemon_that_got_room_at_last_runs(desk):
    desk.waits.held.add(1)
    desk.runtime.refuse["d"] = StartFailure.POOL_EXHAUSTED
    await desk.configure(daemon("d", FOREVER))
    await desk.state("BackOff")
    del desk.runtime.refuse["d"]
    desk.waits.held.clear()
    await desk.configure(daemon("d", FOREVER, maxRestarts=3))  # another revision does not wait for the back-off
    assert (await desk.state("Running")).sandbox_id == "0badcafe"


async def test_a_start_that_is_never_answered_is_a_failed_run(desk, monkeypatch):
    monkeypatch.setattr("clrk.gateway.sandbox_run.START_DEADLINE_S", 0.05)
    await desk.configure(daemon("unstarted", FOREVER, restartPolicy="Never"))
    status = await desk.state("Stopped", "unstarted")
    assert status.last_exit.startswith("it did not start: no sandbox within")
    assert [stop.run_id for stop in desk.heard(StopRun)] == [start.run_id for start in desk.starts()]


async def test_a_lifetime_that_is_over_is_no_failure(desk):
    desk.waits.held.add(7)
    await desk.configure(daemon("d", GENTLE, maxLifetimeSeconds=7, maxRestarts=1))
    for count in range(1, 4):  # more often than maxRestarts: these do not count
        await desk.state("Running")
        await desk.up(count)
        desk.waits.over()
        await desk.runtime.until(lambda count=count: len(desk.starts()) == count + 1)
    assert set(desk.waits.asked) == {7}  # no back-off
    assert [stop.grace_s for stop in desk.heard(StopRun)] == [STOP_GRACE_S] * 3
    assert desk.status().last_exit == "it ended as asked, with code 0"


async def test_on_failure_a_lifetime_that_is_over_ends_it(desk):
    desk.waits.held.add(7)
    await desk.configure(daemon("d", GENTLE, maxLifetimeSeconds=7, restartPolicy="OnFailure"))
    await desk.up(1)
    desk.waits.over()
    status = await desk.state("Stopped")
    assert len(desk.starts()) == 1
    assert status.last_exit == "it ended as asked, with code 0"


# --- reload and drain -----------------------------------------------------------------------------------------------


async def test_a_removed_daemon_gets_sigterm_and_is_gone(desk):
    await desk.configure(daemon("d", GENTLE))
    await desk.state("Running")
    await desk.logged("up")
    await desk.configure()
    await asyncio.wait_for(desk.daemons.idle(), 10)
    assert [(stop.run_id, stop.grace_s) for stop in desk.heard(StopRun)] == [(desk.starts()[0].run_id, 5.0)]
    await desk.logged("ending")
    assert desk.daemons.status(daemon("d", GENTLE)).state == "Stopped"
    assert desk.waits.asked == []


async def test_one_that_ignores_sigterm_is_said_to_have_failed(desk):
    desk.runtime.grace_share = 0.01
    await desk.configure(daemon("d", STUBBORN))
    await desk.logged("up")
    await desk.configure()
    await asyncio.wait_for(desk.daemons.idle(), 10)
    (span,) = await desk.spans("invoke_agent d")
    assert span["status"]["code"] == "STATUS_CODE_ERROR"
    assert span["status"]["message"] == "it did not end within 5 s of SIGTERM, and was killed"
    assert span["attributes"]["clrk.exit_reason"] == "stopped"
    assert span["attributes"]["clrk.exit_code"] == 137


async def test_an_unchanged_daemon_is_left_alone(desk):
    await desk.configure(daemon("d", FOREVER), daemon("other", FOREVER))
    await desk.state("Running")
    await desk.state("Running", "other")
    labelled = daemon("d", FOREVER).model_copy(
        update={"metadata": daemon("d", FOREVER).metadata.model_copy(update={"labels": {"a": "b"}})}
    )
    await desk.configure(labelled, daemon("other", "echo new; " + FOREVER))
    await desk.runtime.until(lambda: len(desk.starts()) == 3)
    assert [start.agent.name for start in desk.starts()] == ["d", "other", "other"]
    assert len(desk.heard(StopRun)) == 1
    assert desk.status().state == "Running"


async def test_a_changed_daemon_is_replaced_and_never_runs_twice(desk):
    await desk.configure(daemon("d", GENTLE))
    await desk.state("Running")
    await desk.logged("up")
    first = desk.starts()[0]
    await desk.configure(daemon("d", "echo new; " + FOREVER))
    await desk.logged("new")
    kinds = [type(message).__name__ for message in desk.runtime.received if isinstance(message, StartRun | StopRun)]
    assert kinds == ["StartRun", "StopRun", "StartRun"]
    assert first.run_id not in desk.runtime.runs
    assert desk.status().restarts == 0  # of this revision


GATEWAY = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": {}})
ROUTE = EgressL4Route.model_validate(
    {"kind": "EgressL4Route", "metadata": {"name": "r"}, "spec": {"rules": [{"hostnames": ["a.example"]}]}}
)


async def test_other_rules_are_given_to_the_run_of_now(desk):
    await desk.configure(daemon("d", FOREVER), gateways=[GATEWAY], routes=[ROUTE])
    await desk.state("Running")
    exporting = GATEWAY.model_validate(
        GATEWAY.model_dump() | {"spec": {"otlp": {"endpoint": "http://127.0.0.1:9", "timeout": "1s"}}}
    )
    await desk.configure(daemon("d", FOREVER), gateways=[exporting], routes=[ROUTE])  # of no matter to a run
    assert desk.heard(StopRun) == []
    assert desk.reconfigured() == []
    await desk.configure(daemon("d", FOREVER), gateways=[exporting], routes=[])
    assert desk.reconfigured() == [exporting]
    closed = GATEWAY.model_validate(GATEWAY.model_dump() | {"spec": {"tls": {"mode": "Passthrough"}}})
    await desk.configure(daemon("d", FOREVER), gateways=[closed], routes=[ROUTE])
    assert desk.reconfigured() == [exporting, closed]
    assert desk.heard(StopRun) == []
    assert len(desk.starts()) == 1
    await desk.configure(daemon("d", FOREVER), gateways=[], routes=[])  # who it belongs to changes
    await desk.runtime.until(lambda: len(desk.starts()) == 2)
    assert len(desk.heard(StopRun)) == 1


async def test_a_credential_that_was_taken_away_is_taken_from_the_run(desk):
    key = policy(BEARER, hostnames=["api.example.com"])
    given = {"gateways": [GATEWAY], "credential_policies": [key], "secrets": {"default/keys": {"token": "one"}}}
    await desk.configure(daemon("d", FOREVER), **given)
    await desk.state("Running")
    await desk.configure(daemon("d", FOREVER), **(given | {"secrets": {"default/keys": {"token": "two"}}}))
    assert desk.heard(StopRun) == []
    assert desk.reconfigured() == []  # values are read for each request
    await desk.configure(daemon("d", FOREVER), **(given | {"credential_policies": []}))
    assert desk.reconfigured() == [GATEWAY]
    assert desk.heard(StopRun) == []


async def test_a_daemon_that_comes_back_while_it_is_stopped_runs_again(desk):
    desk.runtime.grace_share = 0.02
    await desk.configure(daemon("d", STUBBORN))
    await desk.logged("up")
    await desk.configure()
    await desk.configure(daemon("d", STUBBORN))
    await desk.runtime.until(lambda: len(desk.starts()) == 2)
    await desk.state("Running")
    stopped, runs = desk.starts()
    assert {message.run_id for message in desk.heard(StopRun)} == {stopped.run_id}
    assert set(desk.runtime.runs) == {runs.run_id}


async def test_drain_stops_every_daemon_before_drained(desk):
    await desk.configure(daemon("d", GENTLE), daemon("e", "exit 3"))
    await desk.logged("up")
    desk.runtime.send(Drain())
    await asyncio.wait_for(desk.runtime.drained.wait(), 10)
    assert desk.runtime.runs == {}
    await desk.configure(daemon("d", GENTLE), daemon("f", GENTLE))  # too late for any
    assert "f" not in {start.agent.name for start in desk.starts()}
    assert desk.daemons.restarts() == {}


async def test_a_daemon_that_waits_is_stopped_at_once(desk):
    desk.waits.held.add(1)
    await desk.configure(daemon("d", "exit 3"))
    await desk.state("BackOff")
    await desk.configure()
    await asyncio.wait_for(desk.daemons.idle(), 10)
    assert len(desk.starts()) == 1


# --- what is left to read -------------------------------------------------------------------------------------------


async def test_the_spans_of_a_run_are_a_trace_of_its_own(desk):
    await desk.configure(daemon("d", "exit 3", restartPolicy="Never"))
    await desk.state("Stopped")
    (run,) = await desk.spans("invoke_agent d")
    assert (run["parent_span_id"], run["kind"]) == ("", "SPAN_KIND_INTERNAL")
    for name in ("sandbox.acquire", "sandbox.spawn", "sandbox.teardown"):
        (span,) = await desk.spans(name)
        assert (span["trace_id"], span["parent_span_id"]) == (run["trace_id"], run["span_id"])
        assert "invocation.id" not in span["attributes"]
        assert span["attributes"]["clrk.sandbox.warm"] is True
    attributes = run["attributes"]
    assert "invocation.id" not in attributes
    assert (attributes["agent.kind"], attributes["agent.name"]) == ("DaemonAgent", "d")
    assert (attributes["clrk.exit_code"], attributes["clrk.exit_reason"]) == (3, "exited")
    assert (attributes["clrk.cpu_time"], attributes["clrk.memory.peak"]) == (0.01, 4096)
    assert attributes["clrk.sandbox.id"] == "0badcafe"


async def test_both_streams_are_log_lines_of_no_invocation(desk):
    await desk.configure(daemon("d", "echo one; echo two >&2; cat; echo three", restartPolicy="Never"))
    found = await desk.logged("one", "two", "three")  # its stdin is at its end, or cat would wait
    assert {(entry.stream, entry.invocation_id) for entry in found} == {("stdout", ""), ("stderr", "")}


async def test_there_is_no_event_and_nobody_to_answer(desk):
    script = (
        f"{CURL} -w '%{{http_code}}\\n' $URL/v1/event; {CURL} -w '%{{http_code}}\\n' -d x $URL/v1/response;"
        f" {CURL} -o /dev/null -w '%{{http_code}}\\n' $URL/else"
    )
    await desk.configure(daemon("d", script, restartPolicy="Never"))
    found = await desk.logged("404", "409")
    await desk.state("Stopped")
    problems = [json.loads(entry.line) for entry in found if entry.line.startswith("{")]
    assert [problem["status"] for problem in problems] == [404, 409]
    assert all("invocation_id" not in problem for problem in problems)


async def test_a_daemon_takes_no_requests(desk):
    await desk.configure(daemon("d", FOREVER))
    status, headers, body = await desk.gateway.call("/agents/d")
    assert (status, json.loads(body)["status"]) == (405, 405)
    assert headers["Content-Type"] == "application/problem+json"


async def test_when_the_runtime_dies_the_span_is_recorded(desk):
    await desk.configure(daemon("d", FOREVER))
    await desk.state("Running")
    desk.daemons.abandon_all()
    (run,) = await desk.spans("invoke_agent d")
    assert run["attributes"]["clrk.exit_reason"] == "stopped"
    assert "clrk.cpu_time" not in run["attributes"]  # nobody measured it
