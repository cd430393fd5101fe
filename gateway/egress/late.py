"""Spans of exchanges whose answer comes on another exchange: recorded when it has come, or nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clrk.gateway.interpret import Facts, Later


def record_late(later: Later, record: Callable[[Facts], None], limit_s: float) -> None:
    """Have record called once: when the answer has come, when its conversation ends, or after limit_s."""
    timer: asyncio.TimerHandle | None = None

    def come(facts: Facts) -> None:
        if timer is not None:
            timer.cancel()
        record(facts)

    timer = asyncio.get_running_loop().call_later(limit_s, later(come))
