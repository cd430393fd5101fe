"""The spawner's own process: what it is asked, what it answers, and the loop between. See spawner.py."""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import resource
import select
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from clrk.core import control
from clrk.core.errors import ProtocolError

from .state_mount import attach_state

_HIGH_FD: Final = 64  # above every fd number that a run gets
_NO_FD_ABOVE: Final = 2**31 - 1
_NETNS_AND_STDIO: Final = 4

_CLONE_NEWNS: Final = 0x00020000  # include/uapi/linux/sched.h
_CLONE_NEWNET: Final = 0x40000000
_MS_REC_SLAVE: Final = 0x4000 | 1 << 19  # include/uapi/linux/mount.h
_MNT_DETACH: Final = 2
_PR_SET_PDEATHSIG: Final = 1  # include/uapi/linux/prctl.h

# Python ignores SIGPIPE and SIGXFSZ; runs must not inherit that.
_DEFAULT_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
_PASSIVE_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class ReserveRequest(msgspec.Struct, frozen=True, tag=True):
    """Fork a process ahead of a run and have it join its cgroups, which can take 20 ms: the kernel waits for RCU.

    Shape: cgroup_procs are files to write "0" to. oom_score_adj as in proc(5).
    """

    cgroup_procs: list[str]
    max_open_files: int
    oom_score_adj: int
    request_id: int = 0


class SpawnRequest(msgspec.Struct, frozen=True, tag=True):
    """Have a reserved process exec. Comes with fds: network namespace, stdin, stdout, stderr, those from 3 on.

    Shape: argv[0] is a path. environment is that of argv[0], complete. With a state_target, the last fd is a detached
        mount: it goes there, in a mount namespace of the process's own, with its files owned by state_uid.
    """

    pid: int
    argv: list[bytes]
    environment: dict[bytes, bytes]
    state_target: bytes = b""
    state_uid: int = 0
    request_id: int = 0


class Signal(msgspec.Struct, frozen=True, tag=True):
    """Signal a run's first process."""

    pid: int
    signum: int


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """A process is in its cgroups and waits for a SpawnRequest."""

    request_id: int
    pid: int


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """The reserved process has execed."""

    request_id: int
    pid: int


class SpawnStep(enum.IntEnum):
    """What happens before exec, in order."""

    FORK = 0
    CGROUP = 1
    LIMITS = 2
    REQUEST = 3
    NAMESPACE = 4
    STATE = 5
    FDS = 6
    EXEC = 7


class SpawnFailed(msgspec.Struct, frozen=True, tag=True):
    """A request was not done, and its process is gone or going. error is an errno."""

    request_id: int
    step: int
    error: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A reserved process, or what it execed, is gone. status is as of wait(2)."""

    pid: int
    status: int
    cpu_s: float
    max_rss_bytes: int


SpawnReply = Reserved | Spawned | SpawnFailed | Ended
_REQUESTS: Final = msgspec.msgpack.Decoder(ReserveRequest | SpawnRequest | Signal)
_ORDERS: Final = msgspec.msgpack.Decoder(SpawnRequest)
_READY: Final = b"\1"


def serve(sock: socket.socket) -> None:
    """Serve until the runtime closes its end, by dying too; then kill every run.

    Single-threaded. Never logs: the fork may have copied a held lock.
    """
    os.setsid()  # a ^C at the runtime's terminal is for the runtime: it drains, the runs go on meanwhile
    for signum in _PASSIVE_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    _hide_namespace_mounts()
    loop = _Loop(sock)
    try:
        loop.run()
    finally:
        loop.kill_all()


def _hide_namespace_mounts() -> None:
    """Have a mount namespace without /run/netns, so that bwrap does not copy one mount for each sandbox.

    Later mounts of the host still arrive (slave), later namespaces do not (their parent mount is not here any more).
    """
    if _LIBC.unshare(_CLONE_NEWNS) == 0 and _LIBC.mount(None, b"/", None, _MS_REC_SLAVE, None) == 0:
        while _LIBC.umount2(b"/run/netns", _MNT_DETACH) == 0:
            pass


@dataclass(slots=True)
class _Child:
    """A forked process. link carries the order to exec one way, and how the steps went the other; exec closes it.

    Shape: request_id is of the request that is not answered yet, 0 when there is none. groups are its cgroups.
    """

    pid: int
    pidfd: int
    link: socket.socket
    groups: list[str]
    request_id: int
    is_reserved: bool = False


class _Loop:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.epoll()
        self._children: dict[int, _Child] = {}  # by pid
        self._links: dict[int, _Child] = {}  # by fd
        self._pidfds: dict[int, _Child] = {}

    def run(self) -> None:
        self._poll.register(self._sock, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._links:
                    self._on_link(self._links[fd])
                elif fd in self._pidfds:
                    self._on_exit(self._pidfds[fd])
                elif fd == self._sock.fileno() and not self._on_request():
                    return

    def kill_all(self) -> None:
        """Kill everything in the cgroups of the children: the runtime is gone.

        That they get SIGKILL when this process ends is not enough: bwrap's pid 1 asks for the same late, and one whose
        monitor dies before that would live on with its agent.
        """
        for group in {group for child in self._children.values() for group in child.groups}:
            with suppress(OSError):  # v1 has no such file, and a group may be gone
                _write(f"{group}/cgroup.kill", b"1")

    def _on_request(self) -> bool:
        """Returns: False at the end of the socket."""
        try:
            received = control.receive(self._sock, _REQUESTS)
        except ProtocolError:
            return False  # the runtime never sends such a packet: better no spawner than a confused one
        if received is None:
            return False
        message: ReserveRequest | SpawnRequest | Signal
        message, fds = received
        match message:
            case Signal():
                if message.pid in self._children:
                    os.kill(message.pid, message.signum)  # not reaped yet, so the pid is still its own
            case ReserveRequest():
                self._fork(message)
            case SpawnRequest():
                self._order(message, fds)
        for fd in fds:
            os.close(fd)
        return True

    def _fork(self, request: ReserveRequest) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            spawner = os.getpid()
            pid = os.fork()
        except OSError as exc:
            control.send(self._sock, SpawnFailed(request.request_id, SpawnStep.FORK, exc.errno or 0))
            return
        if pid == 0:
            _run_child(request, theirs, spawner)
        theirs.close()
        ours.setblocking(False)
        groups = [os.path.dirname(path) for path in request.cgroup_procs]
        child = _Child(pid, os.pidfd_open(pid), ours, groups, request.request_id)
        self._children[pid] = self._links[ours.fileno()] = self._pidfds[child.pidfd] = child
        self._poll.register(ours, select.EPOLLIN)
        self._poll.register(child.pidfd, select.EPOLLIN)

    def _order(self, request: SpawnRequest, fds: list[int]) -> None:
        child = self._children.get(request.pid)
        if child is None or not child.is_reserved or child.request_id or len(fds) < _NETNS_AND_STDIO:
            control.send(self._sock, SpawnFailed(request.request_id, SpawnStep.REQUEST, errno.ESRCH))
            return
        child.request_id = request.request_id
        try:
            control.send(child.link, request, fds)
        except OSError as exc:
            self._fail(child, SpawnStep.REQUEST, exc.errno or 0)

    def _on_link(self, child: _Child) -> None:
        """A report of the child, or the end of the link: then it has execed, or died, which _on_exit tells."""
        try:
            report = child.link.recv(16)
        except BlockingIOError:
            return
        except OSError:
            report = b""
        if report == _READY:
            child.is_reserved = True
            self._answer(child, Reserved(child.request_id, child.pid))
        elif report:
            step, code = int.from_bytes(report[:4], "little"), int.from_bytes(report[4:8], "little")
            self._fail(child, step, code)
        else:
            if child.is_reserved and child.request_id:
                self._answer(child, Spawned(child.request_id, child.pid))
            self._drop_link(child)

    def _fail(self, child: _Child, step: int, code: int) -> None:
        if child.request_id:
            self._answer(child, SpawnFailed(child.request_id, step, code))

    def _answer(self, child: _Child, reply: SpawnReply) -> None:
        child.request_id = 0
        control.send(self._sock, reply)

    def _drop_link(self, child: _Child) -> None:
        if self._links.pop(child.link.fileno(), None) is not None:
            self._poll.unregister(child.link)
            child.link.close()

    def _on_exit(self, child: _Child) -> None:
        if child.link.fileno() >= 0:
            self._on_link(child)  # what it said last comes first
        self._fail(child, SpawnStep.REQUEST, errno.ESRCH)
        self._drop_link(child)
        del self._children[child.pid], self._pidfds[child.pidfd]
        self._poll.unregister(child.pidfd)
        os.close(child.pidfd)
        _, status, usage = os.wait4(child.pid, 0)
        cpu_s = usage.ru_utime + usage.ru_stime
        control.send(self._sock, Ended(child.pid, status, cpu_s, usage.ru_maxrss * 1024))


def _run_child(request: ReserveRequest, link: socket.socket, spawner: int) -> None:
    """Between fork and exec: no locks, no logging, no imports. Any failure is reported over the link."""
    step = SpawnStep.CGROUP
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != spawner:  # it died before that: this copy of its socket must not make it look alive
            return
        for signum in _DEFAULT_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        for path in request.cgroup_procs:
            _write(path, b"0")
        step = SpawnStep.LIMITS
        _write("/proc/self/oom_score_adj", b"%d" % request.oom_score_adj)
        _set_limits(request.max_open_files)
        link.send(_READY)
        step = SpawnStep.REQUEST
        received = control.receive(link, _ORDERS)
        if received is None:
            return  # the spawner is gone
        order, fds = received
        step = SpawnStep.NAMESPACE
        if _LIBC.setns(fds[0], _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        if order.state_target:
            step = SpawnStep.STATE
            attach_state(fds.pop(), order.state_target, order.state_uid)
        step = SpawnStep.FDS
        link = _arrange_fds(fds[1:], link)
        step = SpawnStep.EXEC
        os.execve(order.argv[0], order.argv, order.environment)  # noqa: S606 - that is its purpose
    except OSError as exc:
        link.send(int(step).to_bytes(4, "little") + (exc.errno or 0).to_bytes(4, "little"))
    finally:
        os._exit(127)


def _arrange_fds(fds: list[int], link: socket.socket) -> socket.socket:
    """Put the fds on 0 and up; close every other one, wherever it was inherited from.

    Returns: the link, behind the others and closed by exec.
    """
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD) for fd in (*fds, link.fileno())]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=number < len(fds))
    os.closerange(len(high), _NO_FD_ABOVE)
    link.detach()
    return socket.socket(fileno=len(fds))


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
