"""Questions to a store that is kept, asked seven times each: the median, the slowest, and whether all were quick."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from clrk.gateway.telemetry.store import TraceStore

ROUNDS = 7
LIMIT_S = 1.0
_NAME_COLUMNS = 90


class Asked:
    """Asks and prints one line a question; slow counts those with an answer over LIMIT_S."""

    def __init__(self, what: str, facts: str) -> None:
        self.slow = 0
        print(f"{what:{_NAME_COLUMNS}} {facts:>12} {'median ms':>10} {'slowest ms':>11}")

    async def ask(self, name: str, question: Callable[[], Awaitable[str]]) -> None:
        """Ask; the question returns the facts of its answer."""
        times, facts = [], ""
        for _ in range(ROUNDS):
            start = time.perf_counter()
            facts = await question()
            times.append((time.perf_counter() - start) * 1000)
        self.slow += max(times) > LIMIT_S * 1000
        median, slowest = statistics.median(times), max(times)
        print(f"{name[:_NAME_COLUMNS]:{_NAME_COLUMNS}} {facts:>12} {median:10.1f} {slowest:11.1f}")


async def open_kept(folder: Path) -> TraceStore:
    """Open the store of `store.py --keep FOLDER`, and keep everything in it."""
    store = TraceStore(folder / "traces.db", retention_s=365 * 86_400.0, max_file_bytes=2**40)
    await store.flush(60)
    return store


def run(measure: Callable[[Path], Awaitable[int]], usage: str) -> None:
    """Measure the store in the folder of the command line; exit with what was slow."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "traces.db").exists():
        sys.exit(usage)

    async def measured() -> int:
        return await measure(Path(sys.argv[1]))

    finish(asyncio.run(measured()))


def finish(slow: int) -> None:
    """Exit with an error when something was slow."""
    if slow:
        sys.exit(f"{slow} questions took longer than {LIMIT_S} s")
