"""The spawner's own process: what it is asked, what it answers, and the loop between. See spawner.py."""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os
import resource
import select
import signal
import socket
from typing import Final, NoReturn

import msgspec

from clrk.core import control
from clrk.core.errors import ProtocolError

FIRST_EXTRA_FD: Final = 3
_HIGH_FD: Final = 64  # above every fd number that a run gets
_NO_FD_ABOVE: Final = 2**31 - 1
_STDIO_AND_NETNS: Final = 4

_CLONE_NEWNS: Final = 0x00020000  # include/uapi/linux/sched.h
_CLONE_NEWNET: Final = 0x40000000
_MS_REC_SLAVE: Final = 0x4000 | 1 << 19  # include/uapi/linux/mount.h
_MNT_DETACH: Final = 2
_PR_SET_PDEATHSIG: Final = 1  # include/uapi/linux/prctl.h

# Python ignores SIGPIPE and SIGXFSZ; runs must not inherit that.
_DEFAULT_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
_PASSIVE_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal's ^C is the runtime's to handle

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class SpawnRequest(msgspec.Struct, frozen=True, tag=True):
    """Start one run. Comes with fds: stdin, stdout, stderr, network namespace, then those numbered from 3.

    Shape: argv[0] is a path. environment is that of argv[0], complete. cgroup_procs are files to write "0" to.
    """

    argv: list[bytes]
    environment: dict[bytes, bytes]
    cgroup_procs: list[str]
    max_open_files: int
    oom_score_adj: int
    request_id: int = 0


class Signal(msgspec.Struct, frozen=True, tag=True):
    """Signal a run's first process."""

    pid: int
    signum: int


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """The run's first process has execed."""

    request_id: int
    pid: int


class SpawnStep(enum.IntEnum):
    """What the child does before exec, in order."""

    REQUEST = 0
    FORK = 1
    FDS = 2
    CGROUP = 3
    LIMITS = 4
    NAMESPACE = 5
    EXEC = 6


class SpawnFailed(msgspec.Struct, frozen=True, tag=True):
    """The run did not start; nothing of it is left. error is an errno."""

    request_id: int
    step: int
    error: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A run's first process is gone. status is as of wait(2)."""

    pid: int
    status: int
    cpu_s: float
    max_rss_bytes: int


SpawnReply = Spawned | SpawnFailed | Ended
_REQUESTS: Final = msgspec.msgpack.Decoder(SpawnRequest | Signal)


def serve(sock: socket.socket) -> None:
    """Serve until the runtime closes its end. Single-threaded; never logs (the log's lock may be held by the fork)."""
    for signum in _PASSIVE_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    _hide_namespace_mounts()
    _Loop(sock).run()


def _hide_namespace_mounts() -> None:
    """Have a mount namespace without /run/netns, so that bwrap does not copy one mount for each sandbox.

    Later mounts of the host still arrive (slave), later namespaces do not (their parent mount is not here any more).
    """
    if _LIBC.unshare(_CLONE_NEWNS) == 0 and _LIBC.mount(None, b"/", None, _MS_REC_SLAVE, None) == 0:
        while _LIBC.umount2(b"/run/netns", _MNT_DETACH) == 0:
            pass


class _Loop:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.epoll()
        self._execs: dict[int, tuple[int, int]] = {}  # exec pipe -> request id, pid
        self._children: dict[int, int] = {}  # pidfd -> pid

    def run(self) -> None:
        self._poll.register(self._sock, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._execs:
                    self._on_exec(fd)
                elif fd in self._children:
                    self._on_exit(fd)
                elif not self._on_request():
                    return

    def _on_request(self) -> bool:
        """Returns: False at the end of the socket."""
        try:
            received = control.receive(self._sock, _REQUESTS)
        except ProtocolError:
            return False  # the runtime never sends such a packet: better no spawner than a confused one
        if received is None:
            return False
        message, fds = received
        if isinstance(message, Signal):
            if message.pid in self._children.values():
                os.kill(message.pid, message.signum)
        else:
            self._start(message, fds)
        for fd in fds:
            os.close(fd)
        return True

    def _start(self, request: SpawnRequest, fds: list[int]) -> None:
        if len(fds) < _STDIO_AND_NETNS:
            control.send(self._sock, SpawnFailed(request.request_id, SpawnStep.REQUEST, 22))
            return
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
        except OSError as exc:
            control.send(self._sock, SpawnFailed(request.request_id, SpawnStep.FORK, exc.errno or 0))
            return
        if pid == 0:
            _run_child(request, fds, writer)
        os.close(writer)
        self._execs[reader] = (request.request_id, pid)
        self._poll.register(reader, select.EPOLLIN)

    def _on_exec(self, reader: int) -> None:
        request_id, pid = self._execs.pop(reader)
        failure = os.read(reader, 16)
        self._poll.unregister(reader)
        os.close(reader)
        if failure:
            os.waitpid(pid, 0)
            step, code = int.from_bytes(failure[:4], "little"), int.from_bytes(failure[4:8], "little")
            control.send(self._sock, SpawnFailed(request_id, step, code))
            return
        control.send(self._sock, Spawned(request_id, pid))
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.EPOLLIN)

    def _on_exit(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        control.send(self._sock, Ended(pid, status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024))


def _run_child(request: SpawnRequest, fds: list[int], report: int) -> NoReturn:
    """Between fork and exec: no locks, no logging, no imports. Any failure goes through the report pipe."""
    step = SpawnStep.FDS
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        report, namespace = _arrange_fds(fds, report)
        step = SpawnStep.CGROUP
        for path in request.cgroup_procs:
            _write(path, b"0")
        step = SpawnStep.LIMITS
        _write("/proc/self/oom_score_adj", b"%d" % request.oom_score_adj)
        _set_limits(request.max_open_files)
        step = SpawnStep.NAMESPACE
        if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        step = SpawnStep.EXEC
        for signum in _DEFAULT_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        os.execve(request.argv[0], request.argv, request.environment)  # noqa: S606 - that is its purpose
    except OSError as exc:
        os.write(report, int(step).to_bytes(4, "little") + (exc.errno or 0).to_bytes(4, "little"))
    finally:
        os._exit(127)


def _arrange_fds(fds: list[int], report: int) -> tuple[int, int]:
    """Put stdio on 0 to 2 and the extra fds on 3 and up; close every other fd, wherever it was inherited from.

    Returns: where the report pipe and the namespace are now: behind the others, closed by exec.
    """
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD) for fd in (*fds, report)]
    report = high.pop()
    namespace = high.pop(_STDIO_AND_NETNS - 1)
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=True)
    first = len(high)
    os.dup2(report, first, inheritable=False)
    os.dup2(namespace, first + 1, inheritable=False)
    os.closerange(first + 2, _NO_FD_ABOVE)
    return first, first + 1


def _set_limits(max_open_files: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = max_open_files if hard == resource.RLIM_INFINITY else min(max_open_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, ceiling), ceiling))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
