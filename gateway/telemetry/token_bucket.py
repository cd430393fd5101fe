"""How much telemetry one run may send: a token bucket of bytes. Pure, with an injected clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

BURST_BYTES: Final = 32 * 1024 * 1024
BYTES_PER_S: Final = 512 * 1024
ITEM_BYTES: Final = 512  # what an item costs beside its own bytes: many small ones are as dear as few large ones


class TokenBucket:
    """Fills with time, up to a burst; a daemon that runs for months gets its rate, a short run the burst."""

    def __init__(
        self,
        *,
        burst_bytes: int = BURST_BYTES,
        bytes_per_s: float = BYTES_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = float(burst_bytes)
        self._rate = bytes_per_s
        self._clock = clock
        self._left = self._burst
        self._at = clock()

    @property
    def is_open(self) -> bool:
        """Say whether another item may come."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left > 0

    def take(self, size_bytes: int) -> None:
        """Pay for an item; the last one may overdraw."""
        self._left -= size_bytes + ITEM_BYTES
