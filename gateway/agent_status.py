"""How an agent stands now, for `clrk agents` and the page, put together from those who know parts of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from clrk.core.resources import Agent, DaemonAgent, TaskAgent


class DaemonStatus(msgspec.Struct, frozen=True):
    """A DaemonAgent's state.

    Shape: state is Starting, Running, BackOff, Stopping or Stopped. last_exit is for people, "" before the first.
    Units: CLOCK_REALTIME nanoseconds, 0: not now.
    """

    state: str
    restarts: int = 0
    since_ns: int = 0
    next_start_ns: int = 0
    last_exit: str = ""
    sandbox_id: str = ""


class AgentStatus(msgspec.Struct, frozen=True):
    """Shape: fields that do not apply to the agent's kind are None. Units: CLOCK_REALTIME nanoseconds."""

    running: int = 0
    warm: int = 0
    next_fire_ns: int | None = None
    last_fire_ns: int | None = None
    skipped_fires: int | None = None  # since the gateway's start
    daemon: DaemonStatus | None = None


class AgentStatusSource(Protocol):
    """Knows how agents stand."""

    def agent_status(self, agent: Agent) -> AgentStatus:
        """Return the state of one agent of the present configuration."""


class RunningSource(Protocol):
    """Knows the invocations in flight."""

    def running(self, namespace: str, agent: str) -> int:
        """Return how many invocations of an agent are in flight."""


class FireSource(Protocol):
    """Knows the schedules."""

    def status(self, agent: TaskAgent) -> tuple[int | None, int | None, int | None]:
        """Return next fire, last fire (CLOCK_REALTIME ns) and how many were skipped."""


class DaemonSource(Protocol):
    """Knows the DaemonAgents."""

    def status(self, agent: DaemonAgent) -> DaemonStatus:
        """Return how a daemon stands."""


class AgentStates:
    """Implements AgentStatusSource. warm gives the number of prepared sandboxes by namespace/name of the agent."""

    def __init__(
        self,
        running: RunningSource,
        warm: Callable[[], Mapping[str, int]],
        fires: FireSource | None = None,
        daemons: DaemonSource | None = None,
    ) -> None:
        self._running = running
        self._fires = fires
        self._daemons = daemons
        self._warm = warm

    def agent_status(self, agent: Agent) -> AgentStatus:
        """Return the state of one agent of the present configuration."""
        if isinstance(agent, DaemonAgent):
            daemon = self._daemons.status(agent) if self._daemons is not None else None
            return AgentStatus(running=int(daemon is not None and daemon.state == "Running"), daemon=daemon)
        namespace, name = agent.key
        next_ns, last_ns, skipped = self._fires.status(agent) if self._fires is not None else (None, None, None)
        return AgentStatus(
            running=self._running.running(namespace, name),
            warm=self._warm().get(f"{namespace}/{name}", 0),
            next_fire_ns=next_ns,
            last_fire_ns=last_ns,
            skipped_fires=skipped,
        )
