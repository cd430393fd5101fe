"""Slots of a schedule: fired once, skipped when missed, whatever the clock does. No clock but the test's."""

from datetime import UTC, datetime

import pytest

from clrk.gateway.schedule import LATE_NS, MAX_COUNTED, Advance, Missed, Timetable

SECOND = 10**9
MINUTE = 60 * SECOND


def at(text):
    """Return the time of a day in 2026 as nanoseconds."""
    return int(datetime.fromisoformat(f"2026-{text}+00:00").timestamp()) * SECOND


def shown(moment_ns):
    return datetime.fromtimestamp(moment_ns / SECOND, UTC).strftime("%m-%dT%H:%M")


NOON = at("03-14T12:00")


@pytest.mark.parametrize(
    ("schedule", "now", "expected"),
    [
        ("* * * * *", "03-14T12:00:00", "03-14T12:01"),  # the slot of the very moment is past
        ("*/15 9-17 * * 1-5", "03-14T12:00:00", "03-16T09:00"),  # a Saturday
        ("0 0 29 2 *", "03-14T12:00:00", "02-29T00:00"),
        ("@yearly", "03-14T12:00:00", "01-01T00:00"),
        ("@annually", "03-14T12:00:00", "01-01T00:00"),
        ("@monthly", "03-14T12:00:00", "04-01T00:00"),
        ("@weekly", "03-14T12:00:00", "03-15T00:00"),
        ("@daily", "03-14T12:00:00", "03-15T00:00"),
        ("@midnight", "03-14T12:00:00", "03-15T00:00"),
        ("@hourly", "03-14T12:00:00", "03-14T13:00"),
        ("30 4 1,15 * 5", "03-14T12:00:00", "03-15T04:30"),  # either day, as in crontab(5)
        ("0 2 29 3 *", "03-14T12:00:00", "03-29T02:00"),  # summer time begins elsewhere; here it is UTC
    ],
)
def test_next_slot(schedule, now, expected):
    assert shown(Timetable(schedule, at(now)).next_ns) == expected


def test_a_slot_is_due_at_its_time_and_once():
    timetable = Timetable("* * * * *", NOON)
    assert timetable.advance(NOON + MINUTE - 1) == Advance()
    assert timetable.advance(NOON + MINUTE) == Advance(NOON + MINUTE)
    assert timetable.advance(NOON + MINUTE) == Advance()
    assert timetable.advance(NOON + MINUTE + 5 * SECOND) == Advance()
    assert timetable.next_ns == NOON + 2 * MINUTE


def test_every_slot_of_a_day_with_a_clock_that_ticks_unevenly():
    timetable, fired = Timetable("* * * * *", NOON), []
    for step in range(0, 24 * 3600, 7):
        advance = timetable.advance(NOON + step * SECOND)
        assert advance.missed is None
        fired += [advance.slot_ns] if advance.slot_ns is not None else []
    assert fired == [NOON + minute * MINUTE for minute in range(1, 24 * 60)]


@pytest.mark.parametrize(("late", "fires"), [(0, True), (LATE_NS, True), (LATE_NS + 1, False)])
def test_a_slot_found_late_is_missed(late, fires):
    advance = Timetable("0 13 * * *", NOON).advance(at("03-14T13:00") + late)
    if fires:
        assert advance == Advance(at("03-14T13:00"))
    else:
        assert advance == Advance(None, Missed(1, at("03-14T13:00"), at("03-14T13:00")))


def test_a_clock_that_jumps_forward_skips_and_fires_the_latest_only():
    timetable = Timetable("* * * * *", NOON)
    advance = timetable.advance(NOON + 10 * MINUTE + 3 * SECOND)
    assert advance == Advance(NOON + 10 * MINUTE, Missed(9, NOON + MINUTE, NOON + 9 * MINUTE))
    assert timetable.next_ns == NOON + 11 * MINUTE


def test_a_host_that_slept_past_the_slot_skips_it():
    advance = Timetable("0 * * * *", NOON).advance(NOON + 150 * MINUTE)
    assert advance == Advance(None, Missed(2, NOON + 60 * MINUTE, NOON + 120 * MINUTE))


@pytest.mark.parametrize("back", [1, SECOND, MINUTE, 90 * MINUTE, 400 * 86_400 * SECOND])
def test_a_clock_that_jumps_backward_never_fires_a_slot_twice(back):
    timetable, fired = Timetable("* * * * *", NOON), []
    for moment in range(NOON, NOON + 5 * MINUTE + 1, 10 * SECOND):
        fired += [slot] if (slot := timetable.advance(moment).slot_ns) is not None else []
    assert len(fired) == 5
    start = NOON + 5 * MINUTE - back
    for moment in range(start, start + min(back, 100 * MINUTE) + 2 * MINUTE, 10 * SECOND):
        fired += [slot] if (slot := timetable.advance(moment).slot_ns) is not None else []
    assert len(fired) == len(set(fired))
    assert set(fired) >= {NOON + minute * MINUTE for minute in range(1, 6)}


def test_slots_before_the_first_one_are_had_when_the_clock_was_wrong():
    """A clock a year ahead that is set right must not silence the agent for a year."""
    wrong = NOON + 365 * 86_400 * SECOND
    timetable = Timetable("* * * * *", wrong)
    assert timetable.advance(wrong + MINUTE).slot_ns == wrong + MINUTE
    assert timetable.advance(NOON) == Advance()
    assert timetable.advance(NOON + MINUTE).slot_ns == NOON + MINUTE
    assert timetable.advance(wrong).slot_ns == wrong  # as of now it is a slot like any other…
    assert timetable.advance(wrong + MINUTE).slot_ns is None  # …but this one was fired


def test_a_slot_that_is_due_while_the_clock_trembles_is_not_lost():
    timetable = Timetable("* * * * *", NOON)
    assert timetable.advance(NOON + MINUTE - 1).slot_ns is None
    assert timetable.advance(NOON + MINUTE - 2 * SECOND).slot_ns is None
    assert timetable.advance(NOON + MINUTE).slot_ns == NOON + MINUTE


def test_what_was_fired_before_this_process_is_not_fired_again():
    timetable = Timetable("* * * * *", NOON)
    timetable.remember([NOON + MINUTE + 400, NOON + 2 * MINUTE + LATE_NS, NOON - MINUTE])  # the clock was ahead
    assert timetable.next_ns == NOON + 3 * MINUTE
    assert timetable.advance(NOON + 2 * MINUTE) == Advance()
    assert timetable.advance(NOON + 3 * MINUTE) == Advance(NOON + 3 * MINUTE)


def test_memory_of_fired_slots_is_bounded_and_what_falls_out_counts_as_fired():
    timetable = Timetable("* * * * *", NOON)
    for minute in range(1, 5001):
        timetable.advance(NOON + minute * MINUTE)
    assert len(timetable._fired) <= 4096
    for minute in range(1, 5001):
        assert timetable.advance(NOON + minute * MINUTE).slot_ns is None


def test_missed_since_the_last_fire():
    timetable = Timetable("0 * * * *", NOON)
    assert timetable.missed_since(at("03-14T09:00:03"), NOON) == Missed(3, at("03-14T10:00"), NOON)
    assert timetable.missed_since(NOON, NOON) is None
    assert timetable.missed_since(NOON + MINUTE, NOON) is None  # the clock has gone back


def test_counting_ends():
    """A year of minutes must not hold up the loop."""
    missed = Timetable("* * * * *", NOON).advance(NOON + 365 * 86_400 * SECOND + MINUTE // 2 + LATE_NS // 2).missed
    assert missed.count == MAX_COUNTED
    assert not missed.counted


def test_another_schedule_knows_what_the_first_one_fired():
    timetable = Timetable("0 13 * * *", NOON)
    assert timetable.advance(at("03-14T13:00")).slot_ns == at("03-14T13:00")
    other = timetable.replan("*/5 * * * *", at("03-14T12:58"))  # and the clock went back
    assert other.schedule == "*/5 * * * *"
    assert shown(other.next_ns) == "03-14T13:05"


def test_the_rarest_slot_is_found():
    """February has a fifth Monday every 28 years."""
    assert datetime.fromtimestamp(Timetable("0 0 * 2 1#5", NOON).next_ns / SECOND, UTC) == datetime(
        2044, 2, 29, tzinfo=UTC
    )
