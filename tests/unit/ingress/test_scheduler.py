"""Scheduled agents: the clock's edge with a clock of the test's, and what a fire leaves behind with real processes."""

import asyncio
import json
import logging
from datetime import UTC, datetime

import aiohttp
import pytest
from scripted_runtime import CURL, JSON, Gateway, ScriptedRuntime, agent

from clrk.core.messages import PROTOCOL_VERSION, Ready, StartRun
from clrk.gateway.outcome import Phase
from clrk.gateway.scheduler import Scheduler
from clrk.gateway.telemetry.records import InvocationFilter, InvocationRecord

SECOND = 10**9
MINUTE = 60 * SECOND
NOON = int(datetime(2026, 3, 14, 12, tzinfo=UTC).timestamp()) * SECOND


def job(name="job", schedule="* * * * *", command="true", **spec):
    return agent(name, command, schedule=schedule, **spec)


def fired(minutes, of, **changes):
    """Return the record of a fire so many minutes after noon, as an earlier gateway left it."""
    return InvocationRecord(
        invocation_id="i", namespace="default", agent=of.metadata.name, revision=changes.get("revision", of.revision),
        trigger="cron", phase=Phase.SUCCEEDED, trace_id="t", dispatch_span_id="d", run_span_id="r",
        created_ns=NOON + minutes * MINUTE + 5,
    )  # fmt: skip


class Lab:
    """A scheduler, its clock, what it fired, and what it is told about the past."""

    def __init__(self, *records):
        self.now_ns = NOON
        self.fires = []
        self.records = records
        self.asked = asyncio.Event()
        self.scheduler = Scheduler(self._fire, self._recall, lambda: self.now_ns)

    def _fire(self, fired_agent, slot_ns):
        self.fires.append((fired_agent.metadata.name, (slot_ns - NOON) // MINUTE))

    async def _recall(self, asked):
        self.asked.set()
        return [record for record in self.records if record.agent == asked.metadata.name]

    async def begin(self, *agents):
        self.scheduler.start(agents)
        await self.known()

    async def known(self):
        """Wait until every agent's past is known."""
        async with asyncio.timeout(10):
            while not all(entry.ready for entry in self.scheduler._entries.values()):
                await asyncio.sleep(0)

    def at(self, minutes):
        self.now_ns = NOON + int(minutes * MINUTE)
        self.scheduler.tick()
        return self


@pytest.fixture
async def lab():
    made = []

    def make(*records):
        made.append(Lab(*records))
        return made[-1]

    yield make
    for each in made:
        await each.scheduler.close()


async def test_each_agent_at_its_own_slots(lab):
    lab = lab()
    await lab.begin(job("a"), job("b", "*/2 * * * *"), agent("never", "true"))
    for half_minutes in range(9):
        lab.at(half_minutes / 2)
    assert lab.fires == [("a", 1), ("a", 2), ("b", 2), ("a", 3), ("a", 4), ("b", 4)]


async def test_status(lab):
    lab, each, never = lab(), job(schedule="*/5 * * * *"), agent("never", "true")
    await lab.begin(each, never)
    assert lab.scheduler.status(each) == (NOON + 5 * MINUTE, None, 0)
    assert lab.scheduler.status(never) == (None, None, None)
    lab.at(5.05)
    assert lab.scheduler.status(each) == (NOON + 10 * MINUTE, NOON + 5 * MINUTE + 3 * SECOND, 0)
    lab.at(20.9)
    assert lab.scheduler.status(each) == (NOON + 25 * MINUTE, NOON + 5 * MINUTE + 3 * SECOND, 3)


async def test_skipped_slots_are_said(lab, caplog):
    lab = lab()
    await lab.begin(job())
    lab.at(10)
    assert lab.fires == [("job", 10)]
    assert "skipped 9 fires of default/job, from 2026-03-14T12:01Z to 2026-03-14T12:09Z: the host slept" in caplog.text


async def test_what_no_gateway_fired_is_skipped_and_said_once(lab, caplog):
    each = job()
    lab = lab(fired(-30, each))
    await lab.begin(each)
    assert lab.fires == []  # the slot of this very moment too: who says that it was not fired a moment ago
    assert lab.scheduler.status(each) == (NOON + MINUTE, NOON - 30 * MINUTE + 5, 30)
    assert "skipped 30 fires of default/job" in caplog.text
    assert "while no gateway ran" in caplog.text
    lab.at(1)
    assert lab.fires == [("job", 1)]
    assert lab.scheduler.status(each)[2] == 30


async def test_slots_of_another_revision_are_not_counted(lab, caplog):
    each = job()
    lab = lab(fired(-30, each, revision="another"))
    await lab.begin(each)
    assert lab.scheduler.status(each) == (NOON + MINUTE, NOON - 30 * MINUTE + 5, 0)
    assert caplog.text == ""


async def test_fires_of_before_a_restart_are_not_repeated_when_the_clock_went_back(lab):
    each = job()
    lab = lab(fired(2, each), fired(1, each))
    await lab.begin(each)
    for half_minutes in range(8):
        lab.at(half_minutes / 2)
    assert lab.fires == [("job", 3)]


async def test_a_store_that_says_nothing_stops_nothing(lab, caplog):
    lab = lab()

    async def broken(_):
        raise OSError("disk full")

    lab.scheduler._recall = broken
    await lab.begin(job())
    lab.at(1)
    assert lab.fires == [("job", 1)]
    assert "disk full" in caplog.text


async def test_nothing_is_fired_before_the_past_is_known(lab):
    lab, go = lab(), asyncio.Event()

    async def slow(_):
        lab.asked.set()
        await go.wait()
        return [fired(1, job())]

    lab.scheduler._recall = slow
    lab.scheduler.start([job()])
    await lab.asked.wait()
    assert lab.at(1).fires == []
    go.set()
    await lab.known()
    assert lab.at(1).fires == []  # it had been
    assert lab.at(2).fires == [("job", 2)]


async def test_a_bug_with_one_agent_does_not_stop_the_others(lab, caplog):
    lab = lab()
    right = lab.scheduler._fire

    def wrong(fired_agent, slot_ns):
        right(fired_agent, slot_ns)
        if fired_agent.metadata.name == "a":
            raise RuntimeError("a bug")

    lab.scheduler._fire = wrong
    await lab.begin(job("a"), job("b"))
    lab.at(1).at(2)
    assert lab.fires == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert "a bug" in caplog.text


# --- reload -----------------------------------------------------------------------------------------------------------


async def test_reload_adds_changes_and_removes(lab):
    lab = lab()
    await lab.begin(job("stays"), job("changes"), job("goes"))
    lab.at(1)
    lab.now_ns = NOON + MINUTE + 30 * SECOND
    lab.scheduler.reload([job("stays", timeout=5), job("changes", "*/10 * * * *"), job("comes")])
    await lab.known()
    lab.fires.clear()
    lab.at(2)
    assert sorted(lab.fires) == [("comes", 2), ("stays", 2)]
    assert lab.scheduler.status(job("changes"))[0] == NOON + 10 * MINUTE
    assert lab.scheduler.status(job("goes")) == (None, None, None)


@pytest.mark.parametrize("schedule", ["* * * * *", "*/2 * * * *"])
async def test_a_reload_in_the_moment_of_a_slot_loses_and_doubles_nothing(lab, schedule):
    lab = lab()
    await lab.begin(job())
    lab.now_ns = NOON + 2 * MINUTE  # due, and nobody has looked yet
    lab.scheduler.reload([job(schedule=schedule)])
    lab.at(2)
    lab.scheduler.reload([job(schedule="* * * * *")])
    lab.at(2)
    assert lab.fires == [("job", 2)]


async def test_a_reload_does_not_count_what_was_not_scheduled(lab):
    each = job()
    lab = lab(fired(-30, each))
    await lab.begin()
    lab.scheduler.reload([each])
    await lab.known()
    assert lab.scheduler.status(each) == (NOON + MINUTE, NOON - 30 * MINUTE + 5, 0)


# --- the edge ---------------------------------------------------------------------------------------------------------


async def test_the_edge_wakes_for_a_slot_and_for_a_jump(monkeypatch):
    """The clock runs from shortly before a slot; then it jumps, and only the waking by itself can notice."""
    monkeypatch.setattr("clrk.gateway.scheduler.WAKE_S", 0.05)
    lab, loop = Lab(), asyncio.get_running_loop()
    zero, offset_ns = loop.time(), NOON + MINUTE - SECOND // 20
    lab.scheduler = Scheduler(lab._fire, lab._recall, lambda: offset_ns + int((loop.time() - zero) * 1e9))
    lab.scheduler.start([job()])
    async with asyncio.timeout(10):
        while lab.fires != [("job", 1)]:
            await asyncio.sleep(0.001)
        offset_ns += 9 * MINUTE
        while lab.fires != [("job", 1), ("job", 10)]:
            await asyncio.sleep(0.001)
    assert lab.scheduler.status(job())[2] == 8
    await lab.scheduler.close()


# --- what a fire leaves -----------------------------------------------------------------------------------------------

SCHEDULED = [
    job("echo", "0 0 1 1 *", "cat", scheduleInput={"report": "daily", "n": 1.50}),
    job("bare", "0 0 1 1 *", "cat"),
    job("failing", "0 0 1 1 *", "echo said; exit 3"),
    job("gated", "0 0 1 1 *", 'read -r < "$GATE"', maxConcurrent=1),
    job("poolless", "0 0 1 1 *"),
    job("posting", "0 0 1 1 *", f"{CURL} -w '%{{http_code}}' -d '{{}}' {JSON} $URL/v1/response", mode="Metadata"),
    job("unposted", "0 0 1 1 *", mode="Metadata"),
    job("chatty", "0 0 1 1 *", "head -c 3000000 /dev/zero | tr '\\0' '\\n'", timeout=10),
]


@pytest.fixture
async def scheduled(tmp_path):
    runtime = ScriptedRuntime(SCHEDULED, tmp_path)
    await runtime.start()
    async with aiohttp.ClientSession() as client:
        yield Gateway(runtime, client)
    await runtime.stop()
    assert runtime.crashes == []
    assert runtime.left_open == []


async def fire(gateway, name):
    """Fire an agent's slot; return its record once it has ended and everything of it is recorded."""
    parts = gateway.runtime.app._parts
    known = set(parts.invocations._ended)
    parts.scheduler._fire(parts.agents.find("default", name), NOON)
    await gateway.runtime.until(lambda: set(parts.invocations._ended) - known)
    (invocation_id,) = set(parts.invocations._ended) - known
    await parts.scheduled.idle()
    await gateway.runtime.until(lambda: not parts.invocations._live)
    await parts.telemetry.flush()
    return parts.invocations.record(invocation_id)


async def logged(gateway, record):
    store = gateway.runtime.app._parts.telemetry.store
    lines = await store.logs(f"default/{record.agent}", invocation_id=record.invocation_id, tail=50)
    return {stream: [line.line for line in lines if line.stream == stream] for stream in ("stdout", "stderr")}


async def test_the_event_of_a_slot(scheduled):
    record = await fire(scheduled, "echo")
    (line,) = (await logged(scheduled, record))["stdout"]
    event = json.loads(line)
    run = await scheduled.span(record.invocation_id, "invoke_agent echo")
    assert event == {
        "specversion": "1.0",
        "id": record.invocation_id,
        "source": "clrk://default/echo",
        "type": "dev.apoxy.clrk.taskagent.invoke",
        "time": "2026-03-14T12:00:00.000Z",
        "subject": "cron",
        "datacontenttype": "application/json",
        "traceparent": f"00-{run['trace_id']}-{run['span_id']}-01",
        "invocationid": record.invocation_id,
        "clrkrevision": record.revision,
        "data": {"report": "daily", "n": 1.5},
    }


async def test_without_schedule_input_there_is_no_data(scheduled):
    record = await fire(scheduled, "bare")
    event = json.loads((await logged(scheduled, record))["stdout"][0])
    assert not {"data", "data_base64", "datacontenttype"} & set(event)


async def test_span_and_record_of_a_fire(scheduled):
    record = await fire(scheduled, "echo")
    assert (record.trigger, record.phase, record.caller, record.status) == ("cron", "Succeeded", "", 0)
    assert (record.exit_code, record.exit_reason, record.message) == (0, "exited", "")
    assert record.created_ns <= record.started_ns <= record.ended_ns
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert (dispatch["kind"], dispatch["parent_span_id"]) == ("SPAN_KIND_SERVER", "")
    assert (dispatch["trace_id"], dispatch["span_id"]) == (record.trace_id, record.dispatch_span_id)
    assert dispatch["status"]["code"] == "STATUS_CODE_UNSET"
    own = {"clrk.trigger": "cron", "clrk.phase": "Succeeded"}
    assert {
        key: value for key, value in dispatch["attributes"].items() if not key.startswith(("agent.", "invocation."))
    } == own | {"clrk.sandbox.id": "0badcafe"}
    run = await scheduled.span(record.invocation_id, "invoke_agent echo")
    assert (run["span_id"], run["parent_span_id"]) == (record.run_span_id, record.dispatch_span_id)
    store = scheduled.runtime.app._parts.telemetry.store
    (kept,) = await store.list_invocations(InvocationFilter(agent="default/echo", trigger="cron"), limit=10)
    assert kept.record == record


@pytest.mark.parametrize(
    ("name", "phase", "message", "error"),
    [
        ("failing", "Failed", "the agent exited with code 3", "failed"),
        ("unposted", "Failed", "the agent exited without posting an answer", "failed"),
        ("poolless", "Rejected", "scripted", "rejected"),
    ],
)
async def test_a_fire_that_fails(scheduled, name, phase, message, error):
    record = await fire(scheduled, name)
    assert (record.phase, record.message) == (phase, message)
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert dispatch["status"] == {"code": "STATUS_CODE_ERROR", "message": message}
    assert (dispatch["attributes"]["error.type"], dispatch["attributes"]["clrk.phase"]) == (error, phase)


async def test_a_posted_answer_is_taken_and_dropped(scheduled):
    record = await fire(scheduled, "posting")
    assert record.phase == "Succeeded"
    assert (await logged(scheduled, record))["stdout"] == ["204"]
    assert scheduled.runtime.app._parts.invocations._held_bytes == 0


async def test_output_that_nobody_waits_for_is_read_to_its_end(scheduled):
    record = await fire(scheduled, "chatty")
    assert (record.phase, record.exit_code) == ("Succeeded", 0)  # with a pipe full and nobody reading it would hang


async def test_at_max_concurrent_the_fire_is_rejected_and_says_so(scheduled):
    parts = scheduled.runtime.app._parts
    gated = parts.agents.find("default", "gated")
    parts.scheduler._fire(gated, NOON)
    await scheduled.runtime.until(lambda: scheduled.runtime.runs)
    record = await fire_refused(scheduled, gated)
    assert (record.phase, record.trigger, record.started_ns, record.status) == ("Rejected", "cron", 0, 0)
    assert record.message == "the agent runs 1 invocations, its maxConcurrent"
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert dispatch["attributes"]["error.type"] == "rejected"
    assert len([m for m in scheduled.runtime.received if isinstance(m, StartRun)]) == 1
    scheduled.runtime.open_gate()
    await parts.scheduled.idle()


async def fire_refused(gateway, refused):
    parts = gateway.runtime.app._parts
    known = set(parts.invocations._ended)
    parts.scheduler._fire(refused, NOON)
    (invocation_id,) = set(parts.invocations._ended) - known
    return parts.invocations.record(invocation_id)


async def test_a_restart_remembers_and_a_forged_trigger_is_no_fire(scheduled):
    record = await fire(scheduled, "echo")
    await scheduled.call("/agents/echo", headers={"X-Clrk-Trigger": "cron"})
    parts = scheduled.runtime.app._parts
    await parts.telemetry.flush()
    assert [entry.invocation_id for entry in await parts._recall_fires(parts.agents.find("default", "echo"))] == [
        record.invocation_id
    ]


async def test_reload_reaches_the_scheduler(scheduled):
    runtime, parts = scheduled.runtime, scheduled.runtime.app._parts
    before = parts.scheduler.status(parts.agents.find("default", "bare"))[0]
    runtime.config = runtime.config.model_copy(update={"agents": [job("bare", "0 0 2 2 *")]})
    runtime.configure(2)
    await runtime.until(lambda: runtime.received[-1] == Ready(PROTOCOL_VERSION, 2))
    after = parts.scheduler.status(parts.agents.find("default", "bare"))[0]
    assert before != after
    assert datetime.fromtimestamp(after / SECOND, UTC).strftime("%m-%d") == "02-02"
    assert parts.scheduler.status(SCHEDULED[0]) == (None, None, None)


async def test_the_end_of_the_gateway_leaves_no_fire_unaccounted(scheduled, caplog):
    """The runtime dies while a scheduled run is in flight: its record says so before the gateway ends."""
    parts = scheduled.runtime.app._parts
    parts.scheduler._fire(parts.agents.find("default", "gated"), NOON)
    await scheduled.runtime.until(lambda: scheduled.runtime.runs)
    (invocation_id,) = parts.invocations._open
    await parts.close()
    record = parts.invocations.record(invocation_id)
    assert (record.phase, record.message) == ("Failed", "the run was stopped by the host")
    assert [entry for entry in caplog.records if entry.levelno >= logging.ERROR] == []
