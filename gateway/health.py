"""How the daemon stands, put together from what the runtime last said and what telemetry knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from clrk.core.messages import Counters
from clrk.gateway.admin.page.health import DaemonHealth, ExporterHealth
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.store import StoreError


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
        """Note a configuration that is in force, and what of it is not yet."""
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

    async def _exporters(self) -> list[ExporterHealth]:
        try:
            found = await self._telemetry.export_status()
        except StoreError:  # then they stand still; that the store can not be read is said by who shows it
            return []
        return [
            ExporterHealth(
                name=f"{one.name} {one.signal}",
                endpoint=one.endpoint,
                behind=one.behind,
                failing_since_ns=one.failing_since_ns,
                error=one.last_error,
                dropped=one.dropped,
            )
            for one in found
        ]
