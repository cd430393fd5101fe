"""When scheduled agents are fired: the clock's edge with a clock of the test's, restarts, reloads, jumps."""

import asyncio

import pytest
from scheduled_agents import MINUTE, NOON, SECOND, job
from scripted_agents import agent

from clrk.gateway.outcome import Phase
from clrk.gateway.scheduler import Scheduler
from clrk.gateway.telemetry.records import InvocationRecord


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
        async with asyncio.timeout(25):
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
    async with asyncio.timeout(25):
        while lab.fires != [("job", 1)]:
            await asyncio.sleep(0.001)
        offset_ns += 9 * MINUTE
        while lab.fires != [("job", 1), ("job", 10)]:
            await asyncio.sleep(0.001)
    assert lab.scheduler.status(job())[2] == 8
    await lab.scheduler.close()
