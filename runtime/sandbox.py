"""One sandbox: a network namespace, cgroups and a uid that exactly one run uses, from acquisition to removal."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from clrk.core.errors import HostError
from clrk.core.ids import NetnsName, SandboxId
from clrk.core.resources import Agent
from clrk.netns.namespace import Namespace

from .cgroup import Cgroup
from .isolation import Run, plan_run
from .seccomp import build_filter
from .spawner import ExitStatus, Spawner, SpawnRequest
from .undo import Undo
from .view import HostView

_DEATH_TIMEOUT_S: Final = 5.0
_SIGNAL_BASE: Final = 128  # how a shell shows a death by signal

_LOG: Final = logging.getLogger(__name__)


class StampRegistry(Protocol):
    """The kernel's table of header templates (clrk.ebpf.loader.Stamp)."""

    def register(self, netns_cookie: int, header_v4: bytes, header_v6: bytes) -> None:
        """Stamp connections of this namespace from now on."""

    def unregister(self, netns_cookie: int) -> None:
        """Refuse connections of this namespace from now on. Unknown cookies are ignored."""


@dataclass(frozen=True, slots=True)
class SpawnedRun:
    """A run's first process exists. Units: *_ns are CLOCK_REALTIME nanoseconds; pid in the initial pid namespace."""

    pid: int
    spawn_start_ns: int
    spawn_end_ns: int


@dataclass(frozen=True, slots=True)
class SandboxExit:
    """How the agent's main process ended.

    Shape: exit_code is 0..255 as a shell shows it (128+N for signal N); oom says that it failed after the kernel had
        killed a process of the sandbox for memory.
    Units: cpu_s in seconds of everything in the sandbox; max_rss_bytes is the peak of the sandbox's memory where the
        kernel tells it; exit_ns CLOCK_REALTIME.
    """

    exit_code: int
    oom: bool
    cpu_s: float
    max_rss_bytes: int
    exit_ns: int


class Sandbox:
    """Made by SandboxPool; used by one run; ends with `remove`. Belongs to one event loop."""

    def __init__(
        self, *, sandbox_id: SandboxId, uid: int, pid: int, space: Namespace, cgroup: Cgroup, spawner: Spawner,
        view: HostView, stamp: StampRegistry, undo: Undo, on_removed: Callable[[Sandbox, bool], None],
    ) -> None:  # fmt: skip
        self.sandbox_id: Final = sandbox_id
        self.netns_name: Final[NetnsName] = space.name
        self.netns_cookie: Final = space.cookie
        self.uid: Final = uid
        self.warm = False
        self.listener_fds: Final = tuple(sock.fileno() for sock in space.listeners)
        self._space = space
        self._cgroup = cgroup
        self._spawner = spawner
        self._view = view
        self._stamp = stamp
        self._undo = undo
        self._on_removed = on_removed
        self._stdio: tuple[int, ...] = ()
        self._pid = pid  # reserved by the pool, and in the cgroup already
        self._is_spawned = False
        self._removal: asyncio.Task[None] | None = None

    def register_stamp(self, header_v4: bytes, header_v6: bytes) -> None:
        """Tell the kernel what to stamp; taken back by `remove`. Call before `spawn`."""
        self._undo.push("stamp", lambda: self._stamp.unregister(self.netns_cookie))
        self._stamp.register(self.netns_cookie, header_v4, header_v6)

    def open_stdio(self) -> tuple[int, int, int]:
        """Make the three pipes. Call once, before `spawn`.

        Returns: stdin write end, stdout and stderr read ends: non-blocking, close-on-exec, the caller's to close.
        Raises: HostError when no fd is free.
        """
        if self._stdio:
            raise HostError(f"sandbox {self.sandbox_id}: stdio is open already")
        opened: list[int] = []
        try:
            for _ in range(3):
                opened.extend(os.pipe2(os.O_CLOEXEC))
            stdin_read, stdin_write, stdout_read, stdout_write, stderr_read, stderr_write = opened
            for fd in (stdin_read, stdout_read, stderr_read):
                os.fchown(fd, self.uid, self.uid)  # the inode of both ends: agents open /dev/stdout by path
        except OSError as exc:
            for fd in opened:
                os.close(fd)
            raise HostError(f"sandbox {self.sandbox_id}: make pipes: {exc.strerror}") from exc
        for fd in (stdin_write, stdout_read, stderr_read):
            os.set_blocking(fd, False)  # the other ends are open files of their own and stay blocking
        self._stdio = (stdin_read, stdout_write, stderr_write)
        self._undo.push("stdio", self._close_stdio)
        return stdin_write, stdout_read, stderr_read

    async def spawn(self, *, agent: Agent, environment: Mapping[str, str]) -> SpawnedRun:
        """Start the agent.

        Shape: environment is what the agent gets beside PATH, HOME, PWD and the CA variables.
        Raises: HostError when it can not start; call `remove` all the same.
        """
        if self._is_spawned or not self._stdio:
            raise HostError(f"sandbox {self.sandbox_id}: one spawn, after open_stdio")
        self._is_spawned = True
        start_ns = time.time_ns()
        fds: list[int] = []
        try:
            run = await asyncio.to_thread(self._prepare, agent, environment, fds)
            argv = [os.fsencode(word) for word in run.argv]
            request = SpawnRequest(pid=self._pid, argv=argv, environment={})
            await self._spawner.spawn(request, (self._space.handle, *self._stdio, *fds))
        finally:
            for fd in fds:
                os.close(fd)
        self._close_stdio()
        return SpawnedRun(self._pid, start_ns, time.time_ns())

    def _prepare(self, agent: Agent, environment: Mapping[str, str], fds: list[int]) -> Run:
        """In a thread: plan the run, set the limits, and put the memfds into fds in the order of isolation.*_FD."""
        resources = agent.spec.resources
        memory = int(resources.memory)
        run = plan_run(agent.spec.template.spec, self._view, uid=self.uid, memory=memory, environment=environment)
        self._cgroup.limit(resources)
        try:
            for content in (run.options, build_filter(), run.passwd, run.group):
                fds.append(_memfd(content))
        except OSError as exc:
            raise HostError(f"sandbox {self.sandbox_id}: pass options to bwrap: {exc.strerror}") from exc
        return run

    async def wait(self) -> SandboxExit:
        """Wait for the agent's main process; bwrap ends with it.

        Raises: HostError when nothing was spawned, or the spawner is gone.
        """
        if not self._is_spawned:
            raise HostError(f"sandbox {self.sandbox_id}: nothing was spawned")
        status = await self._spawner.wait(self._pid)
        exit_ns = time.time_ns()
        exit_code = _shell_exit_code(status)
        return SandboxExit(
            exit_code=exit_code,
            oom=exit_code != 0 and self._cgroup.oom_kills() > 0,
            cpu_s=self._cgroup.cpu_s() or status.cpu_s,
            max_rss_bytes=self._cgroup.peak_memory_bytes() or status.max_rss_bytes,
            exit_ns=exit_ns,
        )

    def kill(self) -> None:
        """Kill everything in the sandbox; a run that has not started yet will not. Idempotent.

        Raises: HostError when the kernel refuses.
        """
        self._cgroup.kill()

    async def remove(self) -> None:
        """Kill what is left and remove everything: stamp, namespace, cgroups, fds; frees the uid. Idempotent.

        Goes on to its end when the caller is cancelled.
        Raises: ExceptionGroup of what could not be removed; the uid is then not used again.
        """
        if self._removal is None:
            self._removal = asyncio.create_task(self._remove(), name=f"remove {self.sandbox_id}")
        await asyncio.shield(self._removal)

    async def _remove(self) -> None:
        clean = False
        try:
            try:
                self.kill()
            except HostError as exc:  # no fd left: the steps below free some and kill again
                _LOG.error("sandbox %s: %s", self.sandbox_id, exc)
            await self._reap()
            await asyncio.to_thread(self._undo.run)
            clean = True
        finally:
            self._on_removed(self, clean)

    async def _reap(self) -> None:
        try:
            with suppress(HostError):  # a dead spawner: its children died with it, and init reaps them
                async with asyncio.timeout(_DEATH_TIMEOUT_S):
                    await self._spawner.wait(self._pid)
        except TimeoutError:
            _LOG.error("sandbox %s: its process %d does not die", self.sandbox_id, self._pid)
        finally:
            self._spawner.forget(self._pid)

    def _close_stdio(self) -> None:
        stdio, self._stdio = self._stdio, ()
        for fd in stdio:
            os.close(fd)


def _shell_exit_code(status: ExitStatus) -> int:
    return _SIGNAL_BASE + status.signal if status.exit_code is None else status.exit_code


def _memfd(content: bytes) -> int:
    fd = os.memfd_create("clrk-run", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd
