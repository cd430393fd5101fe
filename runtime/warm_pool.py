"""Sandboxes that wait right before the first instruction of one agent (`warmPoolSize`), on top of the pool's others.

Theory of operation. For each agent that asks for it, the background loop keeps that many sandboxes prepared, one at a
time, and only out of what the host's limit leaves: the pool takes them away again (`evict`) when a run has no other.
An agent that nobody invoked for its `warmPoolIdleTTL` has none until somebody does. A reload replaces the sandboxes of
each agent whose revision changed; values of secrets and of an invocation come only when a sandbox is used.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.resources import Agent, TaskAgent

from .sandbox import Sandbox

_REFILL_DELAY_S: Final = 0.05  # with enough left, the run that starts now has the processors first
_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
_LOG: Final = logging.getLogger(__name__)

_Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class _AgentSet:
    """What is prepared for one revision of an agent. Times are of the pool's clock."""

    agent: TaskAgent
    revision: str
    used_s: float
    running: int = 0
    sandboxes: deque[Sandbox] = field(default_factory=deque)
    retry_s: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S

    def idle_at_s(self) -> float:
        return self.used_s + self.agent.spec.warm_pool_idle_ttl

    def is_idle(self, now_s: float) -> bool:
        return self.running == 0 and now_s >= self.idle_at_s()

    def lacks(self, now_s: float) -> int:
        if now_s < self.retry_s or self.is_idle(now_s):
            return 0
        return self.agent.spec.warm_pool_size - len(self.sandboxes)

    def back_off(self, now_s: float) -> None:
        self.retry_s, self.backoff_s = now_s + self.backoff_s, min(self.backoff_s * 2, _MAX_BACKOFF_S)


class WarmSandboxes:
    """The prepared sandboxes of all agents. Part of SandboxPool, which owns the sandboxes and their number.

    Shape: make returns an unused sandbox; has_room says whether it may be called; changed gives the event that the
        pool sets at its next change.
    """

    def __init__(
        self, *, clock: Callable[[], float], make: Callable[[], Awaitable[Sandbox]], has_room: Callable[[], bool],
        changed: Callable[[], asyncio.Event], wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.preparing = 0
        self._clock = clock
        self._make = make
        self._has_room = has_room
        self._changed = changed
        self._wake = wake
        self._sets: dict[_Key, _AgentSet] = {}
        self._removals: set[asyncio.Task[None]] = set()

    def set_agents(self, agents: Iterable[Agent]) -> None:
        """Prepare for these from now on; what is prepared for others, or other revisions, is removed."""
        old, self._sets = self._sets, {}
        for agent in agents:
            if not isinstance(agent, TaskAgent) or agent.spec.warm_pool_size == 0:
                continue
            revision, known = agent.revision, old.get(agent.key)
            if known is not None and known.revision == revision:
                self._sets[agent.key] = old.pop(agent.key)
            else:
                running = known.running if known else 0
                self._sets[agent.key] = _AgentSet(agent, revision, self._clock(), running)
        for gone in old.values():
            self._empty(gone)
        self._wake()

    def empty(self) -> None:
        """Give up all that is prepared; the background loop prepares them anew."""
        for key, prepared in list(self._sets.items()):
            self._sets[key] = replace(prepared, sandboxes=deque())  # another object: what is under way goes too
            self._empty(prepared)
        self._wake()

    async def take(self, agent: Agent) -> Sandbox | None:
        """Count an invocation of the agent, and return a sandbox that is prepared for it, if there is one."""
        found = self._sets.get(agent.key)
        if found is None:
            return None
        found.used_s = self._clock()
        found.running += 1
        self._wake()
        if found.revision != agent.revision:  # a run that began before a reload
            return None
        while found.sandboxes:
            sandbox = found.sandboxes.popleft()
            sandbox.unwatch()
            if await asyncio.to_thread(sandbox.is_prepared_for, agent):
                found.backoff_s = _FIRST_BACKOFF_S
                return sandbox
            self._discard(sandbox)  # its mounts lead elsewhere now
        return None

    def ended(self, key: _Key) -> None:
        """Count the end of a run that `take` has counted."""
        found = self._sets.get(key)
        if found is not None:
            found.running = max(0, found.running - 1)
            found.used_s = self._clock()

    def evict(self) -> Sandbox | None:
        """Give one up, of the agent that was not invoked for longest; the caller removes it."""
        candidates = [prepared for prepared in self._sets.values() if prepared.sandboxes]
        if not candidates:
            return None
        sandbox = min(candidates, key=lambda prepared: prepared.used_s).sandboxes.pop()
        sandbox.unwatch()
        return sandbox

    def counts(self) -> dict[str, int]:
        """Return how many are prepared, by namespace/name of the agent."""
        return {"/".join(key): len(prepared.sandboxes) for key, prepared in self._sets.items() if prepared.sandboxes}

    def shrink_idle(self) -> None:
        """Remove what is prepared for agents that nobody invoked for their warmPoolIdleTTL."""
        now_s = self._clock()
        for prepared in self._sets.values():
            if prepared.sandboxes and prepared.is_idle(now_s):
                _LOG.info("%s/%s: no invocation for its warmPoolIdleTTL: nothing is kept ready", *prepared.agent.key)
                self._empty(prepared)

    async def keep_filled(self) -> None:
        """Prepare, shrink, and wait for changes; for ever."""
        while True:
            changed = self._changed()
            self.shrink_idle()
            neediest = self._neediest()
            if neediest is None:
                await _wait(changed, self._next_s())
                continue
            if len(neediest.sandboxes) * 2 >= neediest.agent.spec.warm_pool_size:
                await asyncio.sleep(_REFILL_DELAY_S)
                if self._neediest() is not neediest:  # its turn may be over
                    continue
            self.preparing += 1
            try:
                await self._prepare(neediest)
            finally:
                self.preparing -= 1
                self._wake()

    async def drained(self) -> None:
        """Wait for removals that are on their way."""
        await asyncio.gather(*self._removals, return_exceptions=True)

    def _neediest(self) -> _AgentSet | None:
        if not self._has_room():
            return None
        now_s = self._clock()
        lacking = [prepared for prepared in self._sets.values() if prepared.lacks(now_s) > 0]
        # Most recently used first among those that have none, then the others.
        return min(lacking, key=lambda prepared: (len(prepared.sandboxes), -prepared.used_s), default=None)

    def _next_s(self) -> float | None:
        """How long until something happens by itself."""
        now_s = self._clock()
        times = [prepared.idle_at_s() for prepared in self._sets.values() if prepared.sandboxes]
        times += [prepared.retry_s for prepared in self._sets.values()]
        return min((time_s - now_s for time_s in times if time_s > now_s), default=None)

    async def _prepare(self, prepared: _AgentSet) -> None:
        sandbox: Sandbox | None = None
        try:
            sandbox = await self._make()
            await sandbox.prepare(prepared.agent)
        except (ClrkError, OSError) as exc:
            prepared.back_off(self._clock())
            _LOG.error("%s/%s: not prepared ahead: %s", *prepared.agent.key, exc)
            if sandbox is not None:
                self._discard(sandbox)
            return
        if self._sets.get(prepared.agent.key) is not prepared:  # a reload has replaced it meanwhile
            self._discard(sandbox)
            return
        prepared.sandboxes.append(sandbox)
        sandbox.watch(self._on_death)

    def _on_death(self, sandbox: Sandbox) -> None:
        sandbox.unwatch()
        for prepared in self._sets.values():
            if sandbox in prepared.sandboxes:
                _LOG.warning("sandbox %s ended before it was used", sandbox.sandbox_id)
                prepared.sandboxes.remove(sandbox)
                prepared.back_off(self._clock())
        self._discard(sandbox)

    def _empty(self, prepared: _AgentSet) -> None:
        while prepared.sandboxes:
            self._discard(prepared.sandboxes.popleft())

    def _discard(self, sandbox: Sandbox) -> None:
        sandbox.unwatch()
        removal = asyncio.get_running_loop().create_task(_remove(sandbox), name="remove warm sandbox")
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)


async def _remove(sandbox: Sandbox) -> None:
    try:
        await sandbox.remove()
    except ExceptionGroup as exc:  # each part is logged; the next start removes what stayed
        _LOG.error("sandbox %s not fully removed: %s", sandbox.sandbox_id, exc)


async def _wait(changed: asyncio.Event, timeout_s: float | None) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await changed.wait()
    except TimeoutError:
        return
