"""What work costs, as a ratio against other work of the same moment, so that no verdict depends on the machine's speed.

A second of CPU is no promise: a test host may be three times slower than the one at which a limit was chosen. A ratio
is, when it is far from both answers: work that grows with the square of its input costs 64 times as much for eight
times the input, where proportional work costs eight times as much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 5
FLOOR_S = 0.0005  # below this a measurement is the clock's and the collector's, not the work's
TIMES_LARGER = 8
AT_MOST = 3.0 * TIMES_LARGER  # between 8 (proportional) and 64 (quadratic)


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds that one call of `work` takes in this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def times_as_much(work: Callable[[], object], baseline: Callable[[], object], at_most: float) -> float:
    """How many times the CPU of `baseline` does `work` take, each at its best? Measured again while over `at_most`."""
    baseline_s, work_s = cpu_s(baseline), cpu_s(work)
    for _ in range(ATTEMPTS - 1):
        if work_s <= at_most * max(baseline_s, FLOOR_S):
            break
        baseline_s, work_s = min(baseline_s, cpu_s(baseline)), min(work_s, cpu_s(work))
    return work_s / max(baseline_s, FLOOR_S)


def assert_cheap(work: Callable[[], object], baseline: Callable[[], object], at_most: float) -> None:
    """`work` takes at most `at_most` times the CPU of `baseline`."""
    ratio = times_as_much(work, baseline, at_most)
    assert ratio <= at_most, f"{ratio:.1f} times the CPU of the baseline, at most {at_most} expected"


def assert_proportional(work: Callable[[T], object], small: T, large: T, at_most: float = AT_MOST) -> None:
    """Eight times the input takes some eight times the CPU, not 64 times: `large` is TIMES_LARGER times `small`."""
    assert_cheap(lambda: work(large), lambda: work(small), at_most)


MANY_OBJECTS = b"[" + b"{}," * ((4 << 20) // 3) + b"0]"


def as_objects() -> None:
    """The baseline for what must not be built: 4 MiB of JSON as Python objects, 0.16 s on a machine of 2026."""
    json.loads(MANY_OBJECTS)
