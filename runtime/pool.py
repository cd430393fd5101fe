"""Sandboxes made ahead of demand, for any agent or for one. A sandbox is used by one run and never again."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.ids import NetnsName, SandboxId, new_sandbox_id
from clrk.core.layout import HostLayout
from clrk.core.resources import Agent, RuntimeSpec, TaskAgent
from clrk.netns import namespace
from clrk.netns.namespace import Namespace, NamespaceMaker

from .cgroup import Cgroup, Cgroups
from .sandbox import Sandbox, StampRegistry
from .spawner import ReserveRequest, Spawner
from .state_volume import StateVolumes
from .undo import Undo
from .view import HostView
from .warm_pool import WarmSandboxes

_OOM_SCORE_ADJ: Final = 500  # when the whole host is short of memory, agents go before daemons
_FDS_OF_A_SANDBOX: Final = 20  # 8 held by the runtime, 12 when prepared, more while it starts; the gateway has 10
_OWN_FDS: Final = 128
_REFILL_DELAY_S: Final = 0.05  # with enough left, the run that starts now has the processors first
_MAX_BACKOFF_S: Final = 30.0
_LOG: Final = logging.getLogger(__name__)


class PoolExhaustedError(ClrkError):
    """As many sandboxes exist as the host's limits allow."""


class SandboxPool:
    """Makes, counts and removes the sandboxes of this host. Belongs to one event loop."""

    def __init__(
        self, *, layout: HostLayout, spec: RuntimeSpec, cgroups: Cgroups, spawner: Spawner, view: HostView,
        stamp: StampRegistry, ready: int = 4, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._cgroups = cgroups
        self._spawner = spawner
        self._view = view
        self._stamp = stamp
        self._wanted = ready
        self._max_open_files = spec.limits.max_open_files
        self._states = StateVolumes(Path(spec.state_dir) / "agents")
        first = spec.uid_range.start + 1  # the range's first uid is the gateway's
        self._free_uids = deque(range(first, spec.uid_range.start + spec.uid_range.count))
        self._limit = min(spec.limits.max_sandboxes, len(self._free_uids), _sandboxes_by_fds())
        if self._limit < spec.limits.max_sandboxes:
            _LOG.warning(
                "at most %d sandboxes, not limits.maxSandboxes %d: uidRange is for %d, RLIMIT_NOFILE for %d",
                self._limit, spec.limits.max_sandboxes, len(self._free_uids), _sandboxes_by_fds(),
            )  # fmt: skip
        self._maker = NamespaceMaker()
        self._ready: deque[Sandbox] = deque()
        self._live: dict[SandboxId, Sandbox] = {}  # ready ones included
        self._making: set[asyncio.Task[Sandbox]] = set()
        self._changed = asyncio.Event()
        self._in_use: dict[SandboxId, tuple[str, str] | None] = {}  # the agents' keys
        self._waiting = 0  # runs that have no sandbox yet
        self._warm = WarmSandboxes(
            clock=clock, make=self._make_for_warming, has_room=self._has_room_for_warm,
            changed=lambda: self._changed, wake=self._wake,
        )  # fmt: skip
        self._helpers: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Fill the pool, then keep it filled in the background.

        Raises: HostError when the first sandbox can not be made: the host lacks something.
        """
        namespace.ensure_netns_dir()
        if self._wanted > 0:
            self._ready.append(await self._begin_making())
        self._helpers = [
            asyncio.create_task(self._keep_filled(), name="sandbox pool"),
            asyncio.create_task(self._warm.keep_filled(), name="warm sandboxes"),
        ]
        while len(self._ready) < min(self._wanted, self._limit):
            await self._changed.wait()

    def set_agents(self, agents: Iterable[Agent]) -> None:
        """Say which agents there are, at the start and after each reload: they have their warm sandboxes from now on.

        State that none of them has is unmounted.
        """
        agents = list(agents)
        self._warm.set_agents(agents)
        leaving = asyncio.create_task(asyncio.to_thread(self._states.keep_only, agents), name="unmount states")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def trust(self, ca_cert_pem: str) -> None:
        """Put this CA into the bundles of sandboxes that no agent's view was built in; prepared ones are replaced."""
        if ca_cert_pem == self._view.ca_cert_pem:
            return
        self._view = self._view.with_ca(ca_cert_pem)
        for sandbox in self._ready:
            sandbox.use_view(self._view)
        self._warm.empty()

    def trusted(self) -> set[str]:
        """Return the ids of the CAs that sandboxes have."""
        return {sandbox.ca_id for sandbox in self._live.values()}

    def counts(self) -> dict[str, int]:
        """Return the number of sandboxes by state: made ahead, prepared for one agent, and in use."""
        return {"ready": len(self._ready), "warm": sum(self.warm_agents().values()), "running": len(self._in_use)}

    def warm_agents(self) -> dict[str, int]:
        """Return the number of prepared sandboxes by namespace/name of the agent, where there are any."""
        return self._warm.counts()

    async def changed(self) -> None:
        """Return at the next change of what `counts` and `warm_agents` say."""
        await self._changed.wait()

    async def acquire(self, agent: Agent | None = None) -> Sandbox:
        """Return a sandbox that nobody used before: one prepared for the agent (`warm`), made ahead, or made now.

        An agent's state comes with it, until the sandbox is removed.
        Raises: PoolExhaustedError at the limit; StateFullError; HostError when it can not be made.
        """
        has_state = isinstance(agent, TaskAgent) and agent.spec.state is not None
        claim = await self._states.claim(agent) if has_state and isinstance(agent, TaskAgent) else None
        self._waiting += 1
        try:
            sandbox = await self._take(agent)
        except BaseException:
            if claim is not None:
                claim.release()
            if agent is not None:
                self._warm.ended(agent.key)
            raise
        finally:
            self._waiting -= 1
        if claim is not None:
            sandbox.hold_state(claim)
        self._in_use[sandbox.sandbox_id] = None if agent is None else agent.key
        self._wake()
        return sandbox

    async def _take(self, agent: Agent | None) -> Sandbox:
        prepared = None if agent is None else await self._warm.take(agent)
        if prepared is not None:
            return prepared
        while not self._ready:
            if self._closed:
                raise PoolExhaustedError("the runtime is shutting down")
            if self._has_room():
                return await self._make_for_caller()
            changed = self._changed
            if (victim := self._warm.evict()) is not None:
                await victim.remove()
            elif self._making or self._warm.preparing:
                await changed.wait()
            else:
                raise PoolExhaustedError(f"{len(self._live)} sandboxes are in use; the limit is {self._limit}")
        return self._ready.popleft()

    def _has_room(self) -> bool:
        return len(self._live) + len(self._making) < self._limit

    async def close(self) -> None:
        """Remove every sandbox, running ones too. Idempotent.

        Raises: ExceptionGroup of what could not be removed.
        """
        self._closed = True
        for helper in self._helpers:
            helper.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        self._warm.set_agents(())
        await self._warm.drained()
        await asyncio.gather(*self._making, return_exceptions=True)
        self._ready.clear()
        results = await asyncio.gather(*(box.remove() for box in tuple(self._live.values())), return_exceptions=True)
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.to_thread(self._maker.close)
        await asyncio.to_thread(self._states.close)
        self._wake()
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise ExceptionGroup("sandboxes that could not be removed", failures)

    async def _make_for_caller(self) -> Sandbox:
        making = self._begin_making()
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._keep_unclaimed)
            raise

    def _keep_unclaimed(self, making: asyncio.Task[Sandbox]) -> None:
        if not making.cancelled() and making.exception() is None and not self._closed:
            self._ready.append(making.result())
            self._wake()

    async def _keep_filled(self) -> None:
        backoff_s = 1.0
        while True:
            while not self._wants_more():
                await self._changed.wait()
            if len(self._ready) * 2 > self._wanted:
                await asyncio.sleep(_REFILL_DELAY_S)
                if not self._wants_more():  # the last one may have gone to a run meanwhile
                    continue
            try:
                self._ready.append(await asyncio.shield(self._begin_making()))
                backoff_s = 1.0
                self._wake()
            except (ClrkError, OSError) as exc:
                _LOG.error("sandbox not made ahead: %s; next try in %.0f s", exc, backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)

    def _wants_more(self) -> bool:
        return len(self._ready) < self._wanted and self._has_room()

    # --- making -----------------------------------------------------------------------------------------------------

    def _has_room_for_warm(self) -> bool:
        return not self._closed and self._waiting == 0 and (self._has_room() or bool(self._ready))

    async def _make_for_warming(self) -> Sandbox:
        """At the limit, one that was made ahead for anybody becomes one agent's."""
        if self._has_room() or not self._ready:
            return await asyncio.shield(self._begin_making())
        return self._ready.popleft()

    def _begin_making(self) -> asyncio.Task[Sandbox]:
        making = asyncio.create_task(self._make(), name="make sandbox")
        self._making.add(making)
        making.add_done_callback(self._on_made)
        return making

    def _on_made(self, making: asyncio.Task[Sandbox]) -> None:
        self._making.discard(making)
        if making.cancelled() or making.exception() is not None:
            self._wake()  # else whoever gets the sandbox does: runs that wait at the limit look again

    async def _make(self) -> Sandbox:
        sandbox_id = self._new_id()
        uid = self._free_uids.popleft()
        undo = Undo(f"sandbox {sandbox_id}")
        try:
            cgroup = await asyncio.to_thread(self._cgroups.create, sandbox_id)
            undo.push("cgroup", cgroup.remove)
            name = NetnsName(self._layout.netns_prefix + sandbox_id)
            making = asyncio.wrap_future(self._maker.submit(name))
            undo.push("namespace", lambda: namespace.remove(name))
            pid, space = await _both(self._reserve(cgroup), making)
        except BaseException:
            await self._take_back(undo, uid)
            raise
        undo.push("namespace fds", lambda: _close_space(space))
        sandbox = Sandbox(
            sandbox_id=sandbox_id, uid=uid, pid=pid, space=space, cgroup=cgroup, spawner=self._spawner,
            view=self._view, stamp=self._stamp, states=self._states, undo=undo, on_removed=self._on_removed,
        )  # fmt: skip
        self._live[sandbox_id] = sandbox
        return sandbox

    async def _take_back(self, undo: Undo, uid: int) -> None:
        """Undo a sandbox that was not made; the caller's exception is the one to report."""
        try:
            await asyncio.to_thread(undo.run)
        except ExceptionGroup as exc:  # each part is logged; the next start removes what stayed
            _LOG.error("%s: its uid is not used again", exc.message)
        else:
            self._free_uids.append(uid)

    async def _reserve(self, cgroup: Cgroup) -> int:
        files = list(cgroup.procs_files)
        request = ReserveRequest(cgroup_procs=files, max_open_files=self._max_open_files, oom_score_adj=_OOM_SCORE_ADJ)
        return await self._spawner.reserve(request)

    def _new_id(self) -> SandboxId:
        while (sandbox_id := new_sandbox_id()) in self._live:
            continue
        return sandbox_id

    def _on_removed(self, sandbox: Sandbox, clean: bool) -> None:
        del self._live[sandbox.sandbox_id]
        key = self._in_use.pop(sandbox.sandbox_id, None)
        if key is not None:
            self._warm.ended(key)
        if clean:
            self._free_uids.append(sandbox.uid)
        self._wake()

    def _wake(self) -> None:
        """Have everyone who waits for a change look again: those waiting now run, later ones wait anew."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _sandboxes_by_fds() -> int:
    """Say for how many there are fds. It must not come to none: not even cgroup.kill could be written then."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (soft - _OWN_FDS) // _FDS_OF_A_SANDBOX)


def _close_space(space: Namespace) -> None:
    """Close at once: a gateway may have connected a listener to the backlog of another one, and asked it to linger."""
    for sock in space.listeners:
        if sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    space.close()


async def _both(reserving: Awaitable[int], making: Awaitable[Namespace]) -> tuple[int, Namespace]:
    """Wait for both, also when one fails: then the other's result must be taken back too."""
    pid, space = await asyncio.gather(reserving, making, return_exceptions=True)
    if isinstance(space, BaseException):
        raise space
    if isinstance(pid, BaseException):
        space.close()
        raise pid
    return pid, space
