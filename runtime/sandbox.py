"""One sandbox: a network namespace, cgroups and a uid that exactly one run uses, from acquisition to removal.

Theory of operation. `prepare` builds the agent's view and starts the launcher in it, which gives up its privileges and
waits; `spawn` sends the environment, and the launcher becomes the agent. A cold run does both in `spawn`; a warm one
was prepared by the pool, and only the second part is left. The socket to the launcher tells both moments: one byte
when it waits, its end when the agent was executed (csrc/launch.c).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from clrk.core.errors import HostError
from clrk.core.ids import NetnsName, SandboxId
from clrk.core.resources import Agent, TaskAgent
from clrk.netns.namespace import Namespace

from .cgroup import Cgroup
from .isolation import ORDER_FD, Run, encode_environment, plan_run
from .seccomp import build_filter
from .spawner import ExitStatus, Spawner, SpawnRequest
from .state_volume import StateClaim, StateVolumes
from .undo import Undo
from .view import HostView

_DEATH_TIMEOUT_S: Final = 5.0
_EXEC_TIMEOUT_S: Final = 1.0  # longer only with next to no cpu; then the run's deadline and its stop must work
_PREPARE_TIMEOUT_S: Final = 20.0
_SIGNAL_BASE: Final = 128  # how a shell shows a death by signal
_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h
_MAX_WORDS_BYTES: Final = 500

_ORDER_INDEX: Final = ORDER_FD - 3  # behind the three of stdio
_LOG: Final = logging.getLogger(__name__)


class StampRegistry(Protocol):
    """The kernel's table of header templates (clrk.ebpf.loader.Stamp)."""

    def register(self, netns_cookie: int, header_v4: bytes, header_v6: bytes) -> None:
        """Stamp connections of this namespace from now on."""

    def unregister(self, netns_cookie: int) -> None:
        """Refuse connections of this namespace from now on. Unknown cookies are ignored."""


@dataclass(frozen=True, slots=True)
class SpawnedRun:
    """The agent was executed. pid is bwrap's, in the initial pid namespace.

    Units: CLOCK_REALTIME nanoseconds, from when the agent was asked for to when the kernel had executed it, or had not
        after a second.
    """

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
        view: HostView, stamp: StampRegistry, states: StateVolumes, undo: Undo,
        on_removed: Callable[[Sandbox, bool], None],
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
        self._states = states
        self._stdio: tuple[int, ...] = ()  # the agent's ends
        self._own_stdio: tuple[int, ...] = ()  # ours, until open_stdio gives them away
        self._pid = pid  # reserved by the pool, and in the cgroup already
        self._order: socket.socket | None = None  # to the launcher
        self._prepared_for: tuple[tuple[str, str], str] | None = None
        self._sources: dict[str, tuple[int, int]] = {}  # what is mounted: device and inode
        self._is_spawned = False
        self._claim: StateClaim | None = None
        self._removal: asyncio.Task[None] | None = None

    @property
    def ca_id(self) -> str:
        """Return the name of the CA that it trusts."""
        return self._view.ca_id

    def use_view(self, view: HostView) -> None:
        """Take another view before the agent's is built; afterwards it stays what it is."""
        if self._prepared_for is None:
            self._view = view

    def register_stamp(self, header_v4: bytes, header_v6: bytes) -> None:
        """Tell the kernel what to stamp; taken back by `remove`. Call before `spawn`."""
        self._undo.push("stamp", lambda: self._stamp.unregister(self.netns_cookie))
        self._stamp.register(self.netns_cookie, header_v4, header_v6)

    def hold_state(self, claim: StateClaim) -> None:
        """Keep the agent's state for this run until `remove` has ended every process of it."""
        self._claim = claim

    def open_stdio(self) -> tuple[int, int, int]:
        """Give out our ends of the three pipes. Call once, before `spawn`.

        Returns: stdin write end, stdout and stderr read ends: non-blocking, close-on-exec, the caller's to close.
        Raises: HostError when no fd is free.
        """
        if not self._own_stdio:
            self._make_stdio()
        (stdin, stdout, stderr), self._own_stdio = self._own_stdio, ()
        return stdin, stdout, stderr

    def _make_stdio(self) -> None:
        if self._stdio or self._prepared_for:
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
        self._own_stdio = (stdin_write, stdout_read, stderr_read)
        self._undo.push("stdio", self._close_stdio)

    # --- the agent --------------------------------------------------------------------------------------------------

    async def prepare(self, agent: Agent) -> None:
        """Build the agent's view and have the launcher wait in it.

        Raises: HostError when that fails, with what bwrap said; call `remove` all the same.
        """
        self._make_stdio()
        await self._launch(agent)
        assert self._order is not None  # noqa: S101 - launched
        said = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_PREPARE_TIMEOUT_S):
                said = await asyncio.get_running_loop().sock_recv(self._order, 1)
        if not said:
            with suppress(BlockingIOError):
                said = os.read(self._own_stdio[2], _MAX_WORDS_BYTES)
            words = said.decode(errors="replace").strip() or "no message"
            raise HostError(f"sandbox {self.sandbox_id}: bwrap could not build the view: {words!r}")
        self.warm = True

    def watch(self, on_death: Callable[[Sandbox], None]) -> None:
        """Have on_death called when a prepared sandbox ends before it is used."""
        assert self._order is not None  # noqa: S101 - prepared
        asyncio.get_running_loop().add_reader(self._order, on_death, self)

    def unwatch(self) -> None:
        """Take `watch` back. Idempotent."""
        if self._order is not None and self._order.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._order)

    def is_prepared_for(self, agent: Agent) -> bool:
        """Say whether it waits for this agent's revision, with the files that its mounts lead to now. Blocks."""
        if self._prepared_for != (agent.key, agent.revision):
            return False
        return self._sources == _identify_sources(agent)

    async def spawn(self, *, agent: Agent, environment: Mapping[str, str]) -> SpawnedRun:
        """Start the agent: build its view if it is not prepared, and hand over the environment.

        Shape: environment is what the agent gets beside PATH, HOME, PWD and the CA variables.
        Raises: HostError when it can not start; call `remove` all the same.
        """
        if self._is_spawned or not (self._stdio or self._prepared_for):
            raise HostError(f"sandbox {self.sandbox_id}: one spawn, after open_stdio")
        self._is_spawned = True
        start_ns = time.time_ns()
        order = encode_environment(agent.spec.template.spec, environment)
        if self._prepared_for is None:
            await self._launch(agent)
        elif self._prepared_for != (agent.key, agent.revision):
            raise HostError(f"sandbox {self.sandbox_id} is prepared for another agent")
        self._send_order(order)
        await self._wait_executed()
        return SpawnedRun(self._pid, start_ns, time.time_ns())

    async def _launch(self, agent: Agent) -> None:
        """Have bwrap build the view and start the launcher in it; returns when bwrap was executed."""
        self._prepared_for = (agent.key, agent.revision)
        ours, theirs = socket.socketpair()
        self._order = ours
        self._undo.push("launcher", ours.close)
        ours.setblocking(False)
        fds: list[int] = []  # in the order of isolation.*_FD; the state's mount is the last
        try:
            run, target = await asyncio.to_thread(self._build, agent, fds)
            request = SpawnRequest(
                pid=self._pid, argv=[os.fsencode(word) for word in run.argv], environment={},
                state_target=target, state_uid=self.uid,
            )  # fmt: skip
            fds.insert(_ORDER_INDEX, theirs.fileno())
            await self._spawner.spawn(request, (self._space.handle, *self._stdio, *fds))
        finally:
            if theirs.fileno() in fds:
                fds.remove(theirs.fileno())
            for fd in fds:
                os.close(fd)
            theirs.close()
        self._close_agents_stdio()

    def _build(self, agent: Agent, fds: list[int]) -> tuple[Run, bytes]:
        """In a thread: plan the run, set the limits, open the fds. Returns the run and where its state is mounted."""
        state = agent.spec.state if isinstance(agent, TaskAgent) else None
        memory = int(agent.spec.resources.memory)
        path = None if state is None else state.mount_path
        self._sources = _identify_sources(agent)
        run = plan_run(agent.spec.template.spec, self._view, uid=self.uid, memory=memory, state_path=path)
        self._cgroup.limit(agent.spec.resources)
        try:
            for content in (run.options, build_filter(), run.passwd, run.group):
                fds.append(_memfd(content))
        except OSError as exc:
            raise HostError(f"sandbox {self.sandbox_id}: pass options to bwrap: {exc.strerror}") from exc
        if state is None:
            return run, b""
        assert isinstance(agent, TaskAgent)  # noqa: S101 - only these have state
        fds.append(self._states.open_mount(agent))
        return run, os.fsencode(self._view.state_point)

    def _send_order(self, order: bytes) -> None:
        """Send all of it at once, into a buffer that is made to hold it: an agent with little cpu reads late."""
        assert self._order is not None  # noqa: S101 - launched
        self.unwatch()
        try:
            self._order.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(order) + (1 << 16))
            if self._order.send(order) != len(order):
                raise HostError(f"sandbox {self.sandbox_id}: the environment was not taken")
        except OSError:  # the launcher is gone; _wait_executed finds out why
            return

    async def _wait_executed(self) -> None:
        """Return when the agent was executed, or after a second, or when it was killed before: `wait` tells that.

        Raises: HostError when bwrap or the launcher failed by itself.
        """
        assert self._order is not None  # noqa: S101 - launched
        is_ready = self.warm
        try:
            async with asyncio.timeout(_EXEC_TIMEOUT_S):
                while await asyncio.get_running_loop().sock_recv(self._order, 1):
                    is_ready = True
        except TimeoutError:
            return
        except OSError:  # it died with the order unread
            is_ready = False
        if is_ready:
            return
        code = _shell_exit_code(await self._spawner.wait(self._pid))
        if code != _SIGNAL_BASE + signal.SIGKILL:
            raise HostError(f"sandbox {self.sandbox_id}: not built: bwrap ended with {code}; the agent's log says more")

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

    async def terminate(self) -> None:
        """Send SIGTERM to the agent's main process, if it is there."""
        await asyncio.to_thread(self._cgroup.signal_main, signal.SIGTERM)

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
        self.unwatch()
        try:
            try:
                self.kill()
            except HostError as exc:  # no fd left: the steps below free some and kill again
                _LOG.error("sandbox %s: %s", self.sandbox_id, exc)
            await self._reap()
            await asyncio.to_thread(self._undo.run)
            clean = True
        finally:
            if self._claim is not None:
                self._claim.release()
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
        self._close_agents_stdio()
        own, self._own_stdio = self._own_stdio, ()
        for fd in own:
            os.close(fd)

    def _close_agents_stdio(self) -> None:
        stdio, self._stdio = self._stdio, ()
        for fd in stdio:
            os.close(fd)


def _identify_sources(agent: Agent) -> dict[str, tuple[int, int]]:
    """Say which files and folders the mounts lead to: a deployment may replace them, by name or by link."""
    template = agent.spec.template.spec
    found: dict[str, tuple[int, int]] = {}
    for path in (template.rootfs, *(mount.host_path for mount in template.mounts)):
        with suppress(OSError):  # plan_run says what is missing
            status = os.stat(path)
            found[path] = (status.st_dev, status.st_ino)
    return found


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
