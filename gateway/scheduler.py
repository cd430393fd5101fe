"""Fires scheduled agents when their slots come: the clock's side of schedule.py.

The wall clock decides, and it may jump: it is asked at least every WAKE_S, whatever a timer thinks how long it slept.
What an agent was fired for before this process is asked of its records: a restart tells honestly what it missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from clrk.core.resources import TaskAgent
from clrk.gateway._aio import spawn
from clrk.gateway.schedule import Missed, Timetable
from clrk.gateway.telemetry.records import InvocationRecord

_LOG: Final = logging.getLogger(__name__)
WAKE_S: Final = 20.0
_RECALL_S: Final = 10.0  # for the store to say what was fired before
_EARLY_S: Final = 0.001  # a timer may be that much before the wall clock

Fire = Callable[[TaskAgent, int], None]  # the agent and the slot, CLOCK_REALTIME ns
Recall = Callable[[TaskAgent], Awaitable[Sequence[InvocationRecord]]]  # its fires, the newest first; may raise


@dataclass(slots=True)
class _Entry:
    agent: TaskAgent
    timetable: Timetable
    last_fire_ns: int | None = None
    skipped: int = 0
    ready: bool = False  # it is known what was fired before


class Scheduler:
    """Follows the schedules of the present configuration. clock returns CLOCK_REALTIME nanoseconds."""

    def __init__(self, fire: Fire, recall: Recall, clock: Callable[[], int] = time.time_ns) -> None:
        self._fire = fire
        self._recall = recall
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, agents: Iterable[TaskAgent]) -> None:
        """Begin to follow the schedules of these agents; slots missed while no gateway ran are said to be skipped."""
        self._replace(agents, counts_missed=True)
        self._spawn(self._follow(), "scheduler")

    def reload(self, agents: Iterable[TaskAgent]) -> None:
        """Follow these agents from now on; a schedule that stays goes on as if nothing had happened."""
        self._replace(agents, counts_missed=False)

    async def close(self) -> None:
        """Fire nothing any more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def status(self, agent: TaskAgent) -> tuple[int | None, int | None, int | None]:
        """Return when the agent is due next, when it was fired last, and how many slots were skipped since our start.

        Units: CLOCK_REALTIME nanoseconds. None: never, not known, or no schedule.
        """
        entry = self._entries.get(agent.key)
        if entry is None:
            return None, None, None
        return entry.timetable.next_ns, entry.last_fire_ns, entry.skipped

    def tick(self) -> None:
        """Fire what is due now."""
        for entry in self._entries.values():
            if entry.ready:
                self._advance(entry)

    # --- configuration ----------------------------------------------------------------------------------------------

    def _replace(self, agents: Iterable[TaskAgent], *, counts_missed: bool) -> None:
        before, now_ns = self._entries, self._clock()
        self._entries = {}
        for agent in agents:
            if (schedule := agent.spec.schedule) is None:
                continue
            entry = before.get(agent.key)
            if entry is None:
                entry = _Entry(agent, Timetable(schedule, now_ns))
                self._spawn(self._look_back(entry, now_ns, counts_missed), f"last fire of {_name(agent)}")
            entry.agent = agent
            if entry.timetable.schedule != schedule:
                if entry.ready:
                    self._advance(entry)  # a slot of the old schedule that is due at this very moment
                entry.timetable = entry.timetable.replan(schedule, now_ns)
            self._entries[agent.key] = entry
        self._changed.set()

    async def _look_back(self, entry: _Entry, now_ns: int, counts_missed: bool) -> None:
        """Learn what was fired before; without an answer go on as if that were nothing."""
        agent, fires = entry.agent, list[InvocationRecord]()
        try:
            async with asyncio.timeout(_RECALL_S):
                fires = list(await self._recall(agent))
        except Exception as exc:  # telemetry fails open: the store is no reason not to fire
            _LOG.warning("last fire of %s is not known: %s", _name(agent), str(exc) or type(exc).__name__)
        timetable = entry.timetable
        timetable.remember(fire.created_ns for fire in fires)
        if fires:
            entry.last_fire_ns = max(fire.created_ns for fire in fires)
            # Of another revision it is not known what the schedule was.
            if counts_missed and fires[0].revision == agent.revision:
                self._skip(entry, timetable.missed_since(entry.last_fire_ns, now_ns), "while no gateway ran")
        entry.ready = True
        self._changed.set()

    # --- time -------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            self.tick()
            try:
                async with asyncio.timeout(self._sleep_s()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _sleep_s(self) -> float | None:
        """Return how long nothing can come due, as far as clocks can be trusted; None: until something changes."""
        if not self._entries:
            return None
        due = [
            slot for entry in self._entries.values() if entry.ready and (slot := entry.timetable.next_ns) is not None
        ]
        if not due:
            return WAKE_S
        return min(WAKE_S, max(0.0, (min(due) - self._clock()) / 1e9) + _EARLY_S)

    def _advance(self, entry: _Entry) -> None:
        now_ns = self._clock()
        advance = entry.timetable.advance(now_ns)
        self._skip(entry, advance.missed, "the host slept, or its clock jumped")
        if advance.slot_ns is None:
            return
        entry.last_fire_ns = now_ns
        try:
            self._fire(entry.agent, advance.slot_ns)
        except Exception:  # a bug with one agent must not end the schedules of all others
            _LOG.exception("firing %s failed", _name(entry.agent))

    def _skip(self, entry: _Entry, missed: Missed | None, why: str) -> None:
        if missed is None:
            return
        entry.skipped += missed.count
        _LOG.warning(
            "skipped %s%d fires of %s, from %s to %s: %s",
            "" if missed.counted else "at least ", missed.count, _name(entry.agent),
            _moment(missed.first_ns), _moment(missed.last_ns), why,
        )  # fmt: skip

    def _spawn(self, work: Awaitable[None], name: str) -> None:
        async def run() -> None:
            await work

        task = spawn(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _name(agent: TaskAgent) -> str:
    return f"{agent.metadata.namespace}/{agent.metadata.name}"


def _moment(moment_ns: int) -> str:
    return datetime.fromtimestamp(moment_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%MZ")
