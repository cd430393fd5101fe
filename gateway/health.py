"""How the daemon stands, put together from what the runtime last said and what telemetry knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from clrk.core.messages import Counters
from clrk.gateway.telemetry.exporters import ExportStatus
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.store import StoreError


@dataclass(frozen=True, slots=True)
class DaemonHealth:
    """How the daemon stands. reload_problems are those of the last reload, empty when it was taken;
    reload_notes say what of it waits for the next start, and what is valid but can not be meant.

    Shape: generation counts the configurations that were taken, refusals the reloads that were not.
    """

    ready: bool
    started_ns: int
    counters: Counters
    generation: int = 0
    refusals: int = 0
    reload_problems: list[str] = field(default_factory=list)
    reload_notes: list[str] = field(default_factory=list)
    exporters: list[ExportStatus] = field(default_factory=list)


class HealthSource(Protocol):
    """Knows how the daemon stands."""

    async def health(self) -> DaemonHealth:
        """Return it as it is now; without exporters when the store can not be read."""


@dataclass(slots=True)
class RuntimeNews:
    """What the runtime said last: the kernel's counters, and what became of reloads."""

    counters: Counters = field(default_factory=lambda: Counters({}))
    generation: int = 0
    refusals: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, problems: list[str]) -> None:
        """Note a reload that changed nothing."""
        self.refusals += 1
        self.problems = problems

    def take(self, generation: int, notes: list[str] | None = None) -> None:
        """Note a configuration that is in force, and what there is to say of it."""
        self.generation = generation
        self.problems, self.notes = [], notes or []


class Health:
    """Implements HealthSource."""

    def __init__(self, news: RuntimeNews, telemetry: Telemetry, ready: Callable[[], bool]) -> None:
        self._news = news
        self._telemetry = telemetry
        self._ready = ready
        self._started_ns = time.time_ns()

    async def health(self) -> DaemonHealth:
        """Return it as it is now."""
        return DaemonHealth(
            ready=self._ready(),
            started_ns=self._started_ns,
            counters=self._news.counters,
            generation=self._news.generation,
            refusals=self._news.refusals,
            reload_problems=self._news.problems,
            reload_notes=self._news.notes,
            exporters=await self._exporters(),
        )

    async def _exporters(self) -> list[ExportStatus]:
        try:
            return await self._telemetry.export_status()
        except StoreError:  # then they stand still; that the store can not be read is said by who shows it
            return []
