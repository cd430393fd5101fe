"""Sandboxes made ahead of demand. A sandbox is used by one run and never returns to the pool."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import deque
from collections.abc import Awaitable
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.ids import NetnsName, SandboxId, new_sandbox_id
from clrk.core.layout import HostLayout
from clrk.core.resources import RuntimeSpec
from clrk.netns import namespace
from clrk.netns.namespace import Namespace, NamespaceMaker

from .cgroup import Cgroup, Cgroups
from .sandbox import Sandbox, StampRegistry
from .spawner import ReserveRequest, Spawner
from .undo import Undo
from .view import HostView

_MAX_OPEN_FILES: Final = 4096
_OOM_SCORE_ADJ: Final = 500  # when the whole host is short of memory, agents go before daemons
_FDS_OF_A_SANDBOX: Final = 20  # 8 held by the runtime, 12 more while it starts or ends; the gateway has 10
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
        stamp: StampRegistry, ready: int = 4,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._cgroups = cgroups
        self._spawner = spawner
        self._view = view
        self._stamp = stamp
        self._wanted = ready
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
        self._refill: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Fill the pool, then keep it filled in the background.

        Raises: HostError when the first sandbox can not be made: the host lacks something.
        """
        namespace.ensure_netns_dir()
        if self._wanted > 0:
            self._ready.append(await self._begin_making())
        self._refill = asyncio.create_task(self._keep_filled(), name="sandbox pool")
        while len(self._ready) < min(self._wanted, self._limit):
            await self._changed.wait()

    async def acquire(self) -> Sandbox:
        """Return a sandbox that nobody used before: one made ahead (`warm`), or one made now.

        Raises: PoolExhaustedError at the limit; HostError when it can not be made.
        """
        while not self._ready:
            if self._closed or len(self._live) + len(self._making) >= self._limit:
                if self._closed or not self._making:
                    raise PoolExhaustedError(f"{len(self._live)} sandboxes are in use; the limit is {self._limit}")
                await self._changed.wait()
                continue
            return await self._make_for_caller()
        sandbox = self._ready.popleft()
        sandbox.warm = True
        self._wake()
        return sandbox

    async def close(self) -> None:
        """Remove every sandbox, running ones too. Idempotent.

        Raises: ExceptionGroup of what could not be removed.
        """
        self._closed = True
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        await asyncio.gather(*self._making, return_exceptions=True)
        self._ready.clear()
        results = await asyncio.gather(*(box.remove() for box in tuple(self._live.values())), return_exceptions=True)
        await asyncio.to_thread(self._maker.close)
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
        return len(self._ready) < self._wanted and len(self._live) + len(self._making) < self._limit

    def _begin_making(self) -> asyncio.Task[Sandbox]:
        making = asyncio.create_task(self._make(), name="make sandbox")
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        return making

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
        undo.push("namespace fds", space.close)
        sandbox = Sandbox(
            sandbox_id=sandbox_id, uid=uid, pid=pid, space=space, cgroup=cgroup, spawner=self._spawner,
            view=self._view, stamp=self._stamp, undo=undo, on_removed=self._on_removed,
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
        request = ReserveRequest(cgroup_procs=files, max_open_files=_MAX_OPEN_FILES, oom_score_adj=_OOM_SCORE_ADJ)
        return await self._spawner.reserve(request)

    def _new_id(self) -> SandboxId:
        while (sandbox_id := new_sandbox_id()) in self._live:
            continue
        return sandbox_id

    def _on_removed(self, sandbox: Sandbox, clean: bool) -> None:
        del self._live[sandbox.sandbox_id]
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


async def _both(reserving: Awaitable[int], making: Awaitable[Namespace]) -> tuple[int, Namespace]:
    """Wait for both, also when one fails: then the other's result must be taken back too."""
    pid, space = await asyncio.gather(reserving, making, return_exceptions=True)
    if isinstance(space, BaseException):
        raise space
    if isinstance(pid, BaseException):
        space.close()
        raise pid
    return pid, space
