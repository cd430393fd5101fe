"""What the page shows of the daemon's health, and who has to know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from clrk.core.messages import Counters


@dataclass(frozen=True, slots=True)
class ExporterHealth:
    """One signal of one exporter; behind counts rows of the store. Units: CLOCK_REALTIME ns, 0: it is not failing."""

    name: str
    endpoint: str
    behind: int
    failing_since_ns: int = 0
    error: str = ""
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class DaemonHealth:
    """How the daemon stands. reload_problems are those of the last reload, empty when it was taken;
    reload_notes say what of it waits for the next start.

    Shape: generation counts the configurations that were taken, refusals the reloads that were not.
    """

    ready: bool
    started_ns: int
    counters: Counters
    generation: int = 0
    refusals: int = 0
    reload_problems: list[str] = field(default_factory=list)
    reload_notes: list[str] = field(default_factory=list)
    exporters: list[ExporterHealth] = field(default_factory=list)


class HealthSource(Protocol):
    """Knows how the daemon stands."""

    async def health(self) -> DaemonHealth:
        """Return it as it is now; without exporters when the store can not be read."""
