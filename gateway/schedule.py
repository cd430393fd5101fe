"""When a scheduled agent is due, and which of its slots are lost: the arithmetic of `schedule`. Pure.

Theory of operation. A slot is a whole minute, UTC, that the schedule names. `advance(now)` is asked again and again
with what the clock says; it answers with the slot to fire, if one is due, and what was missed since it was last asked.
A slot that is found more than LATE_NS after its time is missed (the gateway was down, the host asleep, the clock jumped
forward), never fired late. Fired slots are remembered, so a clock that goes back comes to slots that it has not had yet
and to none that it has had; what is too long ago to be remembered one by one counts as fired.

Cost: each step of the schedule is some microseconds; a gap is counted up to MAX_COUNTED slots, then it is "at least".
Source: crontab(5) of Debian, as cronsim reads it; CONTRACT section 3.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cronsim import CronSim

from clrk.core.values import CRON_MNEMONICS

LATE_NS: Final = 30 * 10**9  # more than the scheduler sleeps at a time, less than the shortest distance of two slots
MAX_COUNTED: Final = 10_000
_MAX_FIRED: Final = 4096
_SECOND_NS: Final = 10**9
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Missed:
    """Slots that were not fired. Units: CLOCK_REALTIME nanoseconds of the first and the last of them."""

    count: int
    first_ns: int
    last_ns: int

    @property
    def counted(self) -> bool:
        """Say whether count is exact; otherwise there are more."""
        return self.count < MAX_COUNTED


@dataclass(frozen=True, slots=True)
class Advance:
    """What came due. slot_ns: the slot to fire, None: none."""

    slot_ns: int | None = None
    missed: Missed | None = None


class Timetable:
    """The slots of one schedule. Units: CLOCK_REALTIME nanoseconds throughout."""

    def __init__(self, schedule: str, now_ns: int) -> None:
        """Begin at now: slots up to now are past."""
        self.schedule = schedule
        self._expression = CRON_MNEMONICS.get(schedule, schedule)
        self._floor_ns = -1  # slots up to here count as fired
        self._fired: list[int] = []  # above the floor, ascending
        self._now_ns = now_ns
        self._next_ns = self._following(now_ns)

    @property
    def next_ns(self) -> int | None:
        """Return the slot that is due next; None when the schedule names no further one."""
        return self._next_ns

    def remember(self, fired_ns: Iterable[int]) -> None:
        """Take it that the agent was fired at these moments, each for the slot before it."""
        for moment in fired_ns:
            if (slot := self._slot_at(moment)) is not None:
                self._remember(slot)
        if self._next_ns is not None and self._has_fired(self._next_ns):  # the clock has gone back since
            self._next_ns = self._following(self._next_ns)

    def replan(self, schedule: str, now_ns: int) -> Timetable:
        """Return the timetable of another schedule from now on, for which the same slots count as fired."""
        other = Timetable(schedule, now_ns)
        other._floor_ns, other._fired = self._floor_ns, list(self._fired)
        other._next_ns = other._following(now_ns)
        return other

    def advance(self, now_ns: int) -> Advance:
        """Go on to now; returns what came due on the way."""
        went_back = now_ns < self._now_ns
        self._now_ns = now_ns
        if went_back:
            # Below a slot that is due now nothing was fired yet, so this never loses it: it is found again.
            self._next_ns = self._following(now_ns)
        if self._next_ns is None or now_ns < self._next_ns:
            return Advance()
        latest = self._slot_at(now_ns)
        due = latest if latest is not None and now_ns - latest <= LATE_NS and not self._has_fired(latest) else None
        missed = self._missed(self._next_ns, now_ns, due)
        if due is not None:
            self._remember(due)
        self._next_ns = self._following(now_ns)
        return Advance(due, missed)

    def missed_since(self, moment_ns: int, now_ns: int) -> Missed | None:
        """Return the slots after the one that was fired at moment, up to now."""
        slot = self._slot_at(moment_ns)
        after = self._first_after(slot if slot is not None else moment_ns)
        return self._missed(after, now_ns, None) if after is not None else None

    def _missed(self, first_ns: int, until_ns: int, due_ns: int | None) -> Missed | None:
        count, last = 0, 0
        for slot in self._slots_after(first_ns - _SECOND_NS):
            if slot > until_ns or count == MAX_COUNTED:
                break
            if slot != due_ns and not self._has_fired(slot):
                first_ns = slot if not count else first_ns
                count, last = count + 1, slot
        return Missed(count, first_ns, last) if count else None

    def _following(self, now_ns: int) -> int | None:
        """Return the first slot after now that has not been fired."""
        for slot in self._slots_after(max(now_ns, self._floor_ns)):
            if not self._has_fired(slot):
                return slot
        return None

    def _remember(self, slot_ns: int) -> None:
        if self._has_fired(slot_ns):
            return
        bisect.insort(self._fired, slot_ns)
        if len(self._fired) > _MAX_FIRED:
            self._floor_ns = self._fired.pop(0)

    def _has_fired(self, slot_ns: int) -> bool:
        if slot_ns <= self._floor_ns:
            return True
        index = bisect.bisect_left(self._fired, slot_ns)
        return index < len(self._fired) and self._fired[index] == slot_ns

    def _first_after(self, moment_ns: int) -> int | None:
        return next(self._slots_after(moment_ns), None)

    def _slots_after(self, moment_ns: int) -> Iterator[int]:
        for slot in CronSim(self._expression, _whole_second(moment_ns)):
            yield _nanoseconds(slot)

    def _slot_at(self, moment_ns: int) -> int | None:
        """Return the latest slot that is not after the moment."""
        after = _whole_second(moment_ns) + timedelta(seconds=1)
        found = next(CronSim(self._expression, after, reverse=True), None)
        return _nanoseconds(found) if found is not None else None


def _whole_second(moment_ns: int) -> datetime:
    return _EPOCH + timedelta(seconds=moment_ns // _SECOND_NS)


def _nanoseconds(moment: datetime) -> int:
    return int((moment - _EPOCH) / timedelta(seconds=1)) * _SECOND_NS
