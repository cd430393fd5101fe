"""The privileged daemon: takes the host's parts in order, runs until told to stop, and gives them back in reverse.

Every start first removes what a predecessor left, so that a crash at any instruction is mended by the next start; an
orderly stop merely does it sooner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from clrk.core.errors import ConfigError, HostError
from clrk.core.layout import HostLayout
from clrk.core.messages import Counters
from clrk.ebpf.loader import Stamp
from clrk.runtime import ca
from clrk.runtime.cgroup import Cgroups
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.load import load
from clrk.runtime.config.notes import notes_of
from clrk.runtime.gateway_config import build_gateway_config
from clrk.runtime.gateway_process import GatewayProcess
from clrk.runtime.gateway_supervisor import GatewaySupervisor
from clrk.runtime.listeners import HostListeners, format_address
from clrk.runtime.notify import notify
from clrk.runtime.pool import SandboxPool
from clrk.runtime.reconcile import InstanceLock, remove_leftovers
from clrk.runtime.runs import Runs
from clrk.runtime.spawner import Spawner
from clrk.runtime.state_dir import StateDir
from clrk.runtime.view import HostView

_LOG: Final = logging.getLogger(__name__)
DRAIN_DEADLINE_S: Final = 30.0
_RUNTIME_CHANGED: Final = "the Runtime resource changed; that takes effect at the next start"
_READY_SANDBOXES: Final = 4
_MAX_WARM_AGENTS: Final = 256  # that the gateway is told of


def serve(layout: HostLayout, paths: Sequence[Path]) -> int:
    """Run the daemon until SIGTERM or SIGINT.

    Returns: the exit code.
    Raises: ConfigError, HostError when it can not start; everything taken is given back.
    Privileges: root.
    """
    resources = load(paths)
    os.umask(0o022)  # sandboxes read what is made for them; a hardened host's 027 or 077 would shut them out
    _raise_open_files()
    lock = InstanceLock.take(layout)
    try:
        spawner = Spawner.start()  # before any thread, event loop or BPF fd exists: it forks
        try:
            asyncio.run(_Daemon(layout, paths, resources, spawner).run())
        finally:
            spawner.close()
    finally:
        lock.release()
    return 0


class _Daemon:
    def __init__(self, layout: HostLayout, paths: Sequence[Path], resources: Resources, spawner: Spawner) -> None:
        self._layout = layout
        self._paths = paths
        self._resources = resources
        self._spawner = spawner
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload = asyncio.Event()
        self._reload_ca: Callable[[], bool] = lambda: False

    async def run(self) -> None:
        """Start, serve, stop."""
        self._handle_signals()
        async with AsyncExitStack() as stack:
            supervisor = await self._start(stack)
            async with asyncio.TaskGroup() as tasks:
                helpers = [
                    tasks.create_task(supervisor.run(), name="gateway supervisor"),
                    tasks.create_task(self._fail_without_spawner(), name="spawner watch"),
                    tasks.create_task(self._announce(supervisor), name="ready"),
                    tasks.create_task(self._reload_on_request(supervisor), name="reload"),
                ]
                await self._stop.wait()
                notify("STOPPING=1")
                await self._drain(supervisor)
                for helper in helpers:
                    helper.cancel()
        _LOG.info("stopped: nothing of instance %s is left", self._layout.instance)

    async def _start(self, stack: AsyncExitStack) -> GatewaySupervisor:
        """Take the host's parts; each pushes its undo on the stack."""
        layout, spec = self._layout, self._resources.runtime
        state = StateDir.take(Path(spec.state_dir))
        stack.callback(state.release)
        state_dir = state.path
        cgroups = Cgroups.open(layout)
        stack.callback(_logged(cgroups.close))
        remove_leftovers(layout, cgroups)
        authorities = ca.Authorities(ca.load_or_create(state_dir))
        view = HostView.prepare(layout, ca_cert_pem=authorities.current.cert_pem, hidden=(str(state_dir),))
        stack.callback(view.remove)
        listeners = HostListeners.open(layout, spec)
        stack.callback(listeners.close)
        stamp = Stamp.attach(layout, cgroups.v2_dir)
        stack.callback(stamp.close)
        pool = SandboxPool(
            layout=layout, spec=spec, cgroups=cgroups, spawner=self._spawner, view=view, stamp=stamp,
            ready=min(_READY_SANDBOXES, spec.limits.max_sandboxes),
        )  # fmt: skip
        stack.push_async_callback(pool.close)
        await pool.start()
        supervisor = GatewaySupervisor(
            start_process=lambda: GatewayProcess.start(state_dir / "gateway", spec.uid_range.start),
            build_config=lambda resources: build_gateway_config(resources, authorities),
            listeners=listeners,
            flows_fd=stamp.flows_fd,
            counters=lambda: _counters(stamp, pool),
            resources=self._resources,
            trust=pool.trust,
        )
        self._reload_ca = lambda: authorities.replace(ca.load_or_create(state_dir), pool.trusted())
        supervisor.runs = Runs(pool, self._resources, max_runs=spec.limits.max_sandboxes)
        stack.push_async_callback(supervisor.runs.stop_all)
        _LOG.info("ingress on http://%s, health on http://%s", *map(format_address, listeners.tcp()))
        _LOG.info("for `clrk`: %s", self._layout.admin_socket)
        for note in notes_of(self._resources):
            _LOG.warning("%s", note)
        return supervisor

    # --- signals ----------------------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_stop_signal, signum)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)

    def _on_stop_signal(self, signum: signal.Signals) -> None:
        if self._stop.is_set():
            _LOG.warning("%s again: stopping at once", signum.name)
            self._stop_now.set()
        else:
            _LOG.info("%s: draining for at most %.0f s; a second signal stops at once", signum.name, DRAIN_DEADLINE_S)
            self._stop.set()

    async def _drain(self, supervisor: GatewaySupervisor) -> None:
        """Let what is in flight finish, within the deadline or until the second signal."""
        if supervisor.runs is not None:
            supervisor.runs.draining = True
            supervisor.runs.stop_daemons()
        await supervisor.drain()
        loop = asyncio.get_running_loop()
        waits = [loop.create_task(event.wait()) for event in (supervisor.drained, self._stop_now)]
        await asyncio.wait(waits, timeout=DRAIN_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if not (supervisor.drained.is_set() or self._stop_now.is_set()):
            _LOG.warning("invocations are still in flight after %.0f s: they are ended", DRAIN_DEADLINE_S)
        for wait in waits:
            wait.cancel()

    async def _announce(self, supervisor: GatewaySupervisor) -> None:
        await supervisor.ready.wait()
        _LOG.info("ready: agents: %d", _count_agents(self._resources))
        notify("READY=1")

    async def _fail_without_spawner(self) -> None:
        await self._spawner.wait_died()
        raise HostError("the spawner died, and every sandbox with it; start the runtime again")

    async def _reload_on_request(self, supervisor: GatewaySupervisor) -> None:
        """All valid, or nothing changes."""
        while True:
            await self._reload.wait()
            self._reload.clear()
            try:
                loaded = await asyncio.to_thread(load, self._paths)
            except ConfigError as exc:
                for problem in exc.problems:
                    _LOG.error("reload: %s", problem)
                _LOG.error("reload: nothing was changed")
                await supervisor.refuse_reload(exc.problems)
                continue
            except Exception:  # a bug of ours, met in somebody's file: what runs is worth more than the reload
                _LOG.exception("reload: nothing was changed")
                await supervisor.refuse_reload(["a bug of ours in reading the resources; the daemon's log has it"])
                continue
            try:
                if self._reload_ca():
                    _LOG.warning("reload: a new CA: sandboxes trust it from now on; those that run keep the former one")
            except HostError as exc:
                _LOG.error("reload: %s; nothing was changed", exc)
                await supervisor.refuse_reload([str(exc)])
                continue
            notes = [_RUNTIME_CHANGED] if loaded.runtime != self._resources.runtime else []
            self._resources = loaded.with_runtime(self._resources.runtime)
            for note in (*notes, *notes_of(self._resources)):
                _LOG.warning("reload: %s", note)
            try:
                await supervisor.reload(self._resources, notes)
            except HostError as exc:  # the gateway of now does not know; the next one begins with these resources
                _LOG.error("reload: %s", exc)
            else:
                _LOG.info("reload: agents: %d", _count_agents(self._resources))


def _count_agents(resources: Resources) -> int:
    return len(resources.agents) + len(resources.daemons)


def _counters(stamp: Stamp, pool: SandboxPool) -> Counters:
    """Return what the gateway shows of the host. One packet holds it, however many agents have warm sandboxes."""
    warm = sorted(pool.warm_agents().items())[:_MAX_WARM_AGENTS]
    return Counters(stamp.counters(), pool.counts(), dict(warm))


def _raise_open_files() -> None:
    """Take all the fds that the host grants: each sandbox costs eight of them, and shells grant 1024 at first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _logged(undo: Callable[[], None]) -> Callable[[], None]:
    """Wrap an undo so that its failure is reported and the others still run; the next start removes what stayed."""

    def run() -> None:
        try:
            undo()
        except HostError as exc:
            _LOG.error("%s", exc)

    return run
