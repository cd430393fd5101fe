"""How an agent stands now, for `clrk agents` and the page. Pure values."""

from __future__ import annotations

from typing import Protocol

import msgspec

from clrk.core.resources import Agent


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
