"""Starts sandboxes from a small process of its own, and tells how they ended.

Theory of operation. `Spawner.start` forks before the runtime has threads or an event loop, so that the fork of each
run copies a small single-threaded process. Both sides speak over an AF_UNIX SOCK_SEQPACKET pair, one struct a packet
(clrk.core.control framing). ReserveRequest forks a process that joins its cgroups and waits: joining can take 20 ms, so
it is done ahead of demand. SpawnRequest, with fds, has it enter the network namespace and exec bwrap. A socket that
closes on exec tells the spawner that the exec happened, or which step failed with which errno. Ended comes for every
reserved process, whether it execed or not.

Death. The end of the socket tells the spawner that the runtime is gone, however it ended: it kills the cgroups of all
its children, and exits. Each child gets SIGKILL when the spawner dies, and bwrap keeps that for the processes in the
sandbox; but for the few milliseconds in which bwrap sets up, only the cgroup kill is certain. When the spawner alone is
killed, the runtime learns it by `wait_died`, and kills the cgroups.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from clrk.core import control
from clrk.core.errors import HostError, ProtocolError
from clrk.netns.namespace import ensure_netns_dir

from .spawner_process import (
    Ended,
    Reserved,
    ReserveRequest,
    Signal,
    Spawned,
    SpawnFailed,
    SpawnReply,
    SpawnRequest,
    SpawnStep,
    serve,
)

__all__ = ["ExitStatus", "ReserveRequest", "SpawnRequest", "Spawner"]

T = TypeVar("T")

_REPLIES: Final = msgspec.msgpack.Decoder(SpawnReply)
_SOCKET_BUFFER_BYTES: Final = 1 << 20
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a child ended.

    Shape: exit_code is None if a signal killed it; signal is 0 if none did.
    Units: cpu_s of the child and all descendants that were waited for; max_rss_bytes of the largest of them.
    """

    exit_code: int | None
    signal: int
    cpu_s: float
    max_rss_bytes: int


class Spawner:
    """The runtime's end. Made by `start`; belongs to one event loop from the first `spawn` on."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid: Final = pid
        self._sock = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_id = 1
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._running: dict[int, asyncio.Future[ExitStatus]] = {}
        self._died: asyncio.Event = asyncio.Event()

    @classmethod
    def start(cls) -> Spawner:
        """Fork the spawner. Call before any thread or event loop exists.

        Raises: HostError.
        Side effects: makes /run/netns a mount point; the child has a mount namespace without it, so that bwrap does
            not copy one mount for each sandbox.
        """
        ensure_netns_dir()  # a mount of its own, which the child can leave out
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        try:
            pid = os.fork()
        except OSError as exc:
            raise HostError(f"fork the spawner: {exc.strerror}") from exc
        if pid == 0:
            _become_spawner(ours, theirs)
        theirs.close()
        ours.setblocking(False)
        return cls(ours, pid)

    async def reserve(self, request: ReserveRequest) -> int:
        """Fork a process that joins its cgroups and waits for `spawn`.

        Returns: its pid.
        Raises: HostError naming the step that failed, or when the spawner is gone.
        """
        return await self._ask(request, ())

    async def spawn(self, request: SpawnRequest, fds: Sequence[int]) -> None:
        """Have a reserved process exec; fds are the network namespace, then those numbered from 0. They stay open here.

        Raises: HostError naming the step that failed, or when the spawner is gone; `wait` tells the end all the same.
        """
        await self._ask(request, fds)

    async def _ask(self, request: ReserveRequest | SpawnRequest, fds: Sequence[int]) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        answer: asyncio.Future[int] = self._attach().create_future()
        self._asked[request_id] = answer
        await self._send(msgspec.structs.replace(request, request_id=request_id), fds)
        return await answer

    async def wait(self, pid: int) -> ExitStatus:
        """Wait for the end of a reserved process or its run. May be awaited more than once, until `forget`.

        Raises: HostError for an unknown pid, or when the spawner is gone.
        """
        if pid not in self._running:
            raise HostError(f"pid {pid} was not started by this spawner")
        return await asyncio.shield(self._running[pid])

    def forget(self, pid: int) -> None:
        """Drop the result of a run that has ended, or that nobody waits for any more."""
        ended = self._running.pop(pid, None)
        if ended is not None and ended.done() and not ended.cancelled():
            ended.exception()  # read, so that asyncio does not report it as never retrieved

    def kill(self, pid: int, signum: int = signal.SIGKILL) -> None:
        """Signal a reserved or running process; nothing happens when it has ended: its pid is not reused before."""
        try:
            control.send(self._sock, Signal(pid=pid, signum=signum))
        except OSError as exc:
            _LOG.warning("signal not sent", extra={"pid": pid, "error": str(exc)})

    async def wait_died(self) -> None:
        """Return when the spawner is gone; the runtime can not go on then."""
        self._attach()
        await self._died.wait()

    def close(self) -> None:
        """End the spawner, and with it every child that is left; reap it. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._fail_all()
        self._sock.close()
        os.waitpid(self.pid, 0)

    def _attach(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._sock, self._on_readable)
        return self._loop

    async def _send(self, message: ReserveRequest | SpawnRequest, fds: Sequence[int]) -> None:
        while True:
            try:
                control.send(self._sock, message, fds)
                return
            except BlockingIOError:
                await self._writable()
            except ValueError as exc:
                self._asked.pop(message.request_id, None)
                raise HostError(f"spawn: command line too long: {exc}") from exc
            except OSError as exc:
                self._asked.pop(message.request_id, None)
                raise HostError(f"spawn: the spawner is gone: {exc.strerror}") from exc

    async def _writable(self) -> None:
        loop = self._attach()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._sock, _settle, ready, None)
        try:
            await ready
        finally:
            loop.remove_writer(self._sock)

    def _on_readable(self) -> None:
        while True:
            try:
                received = control.receive(self._sock, _REPLIES)
            except BlockingIOError:
                return
            except (OSError, ProtocolError) as exc:
                _LOG.error("spawner connection lost", extra={"error": str(exc)})
                received = None
            if received is None:
                self._fail_all()
                return
            self._on_reply(received[0])

    def _on_reply(self, reply: SpawnReply) -> None:
        match reply:
            case Reserved(request_id=request_id, pid=pid):
                self._running[pid] = self._attach().create_future()
                if not _settle(self._asked.pop(request_id, None), pid):
                    self.kill(pid)  # nobody waits for it any more
                    self.forget(pid)
            case Spawned(request_id=request_id, pid=pid):
                _settle(self._asked.pop(request_id, None), pid)
            case SpawnFailed(request_id=request_id, step=step, error=code):
                asked = self._asked.pop(request_id, None)
                if asked is not None and not asked.done():
                    asked.set_exception(HostError(f"spawn: {SpawnStep(step).name.lower()}: {os.strerror(code)}"))
            case Ended():
                _settle(self._running.get(reply.pid), _exit_status(reply))

    def _fail_all(self) -> None:
        """Every waiter learns that the spawner is gone: its children died with it."""
        if self._loop is not None:
            self._loop.remove_reader(self._sock)
        gone = HostError("the spawner is gone")
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(gone)
        for ended in self._running.values():
            if not ended.done():
                ended.set_exception(gone)
                ended.exception()  # a run that nobody waits for is no error of its own
        self._asked.clear()
        self._died.set()


def _settle(waiting: asyncio.Future[T] | None, result: T) -> bool:
    """Returns: whether somebody was waiting."""
    if waiting is None or waiting.done():
        return False
    waiting.set_result(result)
    return True


def _exit_status(reply: Ended) -> ExitStatus:
    signalled = os.WIFSIGNALED(reply.status)
    return ExitStatus(
        exit_code=None if signalled else os.WEXITSTATUS(reply.status),
        signal=os.WTERMSIG(reply.status) if signalled else 0,
        cpu_s=reply.cpu_s,
        max_rss_bytes=reply.max_rss_bytes,
    )


def _become_spawner(ours: socket.socket, theirs: socket.socket) -> None:
    """Never returns: this is the forked child. No parent-death signal: it must live to kill the runs."""
    status = 1
    try:
        ours.close()
        serve(theirs)
        status = 0
    finally:
        os._exit(status)  # without the atexit handlers and buffers of the runtime
