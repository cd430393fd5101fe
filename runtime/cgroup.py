"""Control groups of sandboxes, on a cgroup v2 host or on a hybrid one (v1 controllers beside a bare v2 tree).

Theory of operation. Every sandbox has a group in the v2 tree (BPF attaches to the parent there, cgroup.kill and the
CPU account work there) and, on a hybrid host, one in each v1 hierarchy that limits something. A process joins by
writing "0" into each of `Cgroup.procs_files`. Only groups whose name is eight hex digits below our own parent are
ever removed.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError
from clrk.core.ids import SandboxId
from clrk.core.layout import HostLayout
from clrk.core.resources import Resources

_CPU_PERIOD_US: Final = 100_000
_MIN_QUOTA_US: Final = 1_000  # the kernel's lowest
_BWRAP_PROCESSES: Final = 2  # its monitor and its pid 1 share the group with the agent
_EMPTY_TIMEOUT_S: Final = 5.0
_MAIN_PID: Final = 2  # of the agent in its pid namespace; bwrap is 1, and the namespace ends with the agent
_NAMESPACES: Final = 2  # that a process of the sandbox is in: the host's and its own
_CONTROLLERS: Final = ("cpu", "memory", "pids")
_GROUP_NAME: Final = re.compile(r"[0-9a-f]{8}")

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the host mounted its cgroup trees. v1 maps a controller to its mount; empty on a pure v2 host."""

    v2: Path
    v1: dict[str, Path]


def find_hierarchy(mounts: str) -> Hierarchy:
    """Read the text of /proc/self/mounts.

    Raises: HostError when there is no cgroup v2 tree, or a controller is on neither side.
    """
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        target, kind, options = Path(fields[1]), fields[2], fields[3].split(",")
        if kind == "cgroup2":
            v2 = v2 or target
        elif kind == "cgroup":
            for controller in _CONTROLLERS:
                if controller in options:
                    v1.setdefault(controller, target)
    if v2 is None:
        raise HostError("no cgroup v2 tree is mounted; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
    return Hierarchy(v2, v1)


class Cgroup:
    """The groups of one sandbox. Made by `Cgroups.create`."""

    def __init__(self, v2_dir: Path, v1_dirs: dict[str, Path]) -> None:
        self._v2_dir = v2_dir
        self._v1_dirs = v1_dirs

    @property
    def procs_files(self) -> tuple[str, ...]:
        """Files that a process writes "0" to in order to join, limits first."""
        return tuple(str(directory / "cgroup.procs") for directory in (*self._v1_dirs.values(), self._v2_dir))

    def limit(self, resources: Resources) -> None:
        """Set the limits. Call before the first process joins.

        Raises: HostError naming the file.
        """
        quota = max(_MIN_QUOTA_US, round(resources.cpu * _CPU_PERIOD_US))
        memory, pids = int(resources.memory), resources.pids + _BWRAP_PROCESSES
        if "cpu" in self._v1_dirs:
            _write(self._v1_dirs["cpu"] / "cpu.cfs_period_us", _CPU_PERIOD_US)
            _write(self._v1_dirs["cpu"] / "cpu.cfs_quota_us", quota)
        else:
            _write(self._v2_dir / "cpu.max", f"{quota} {_CPU_PERIOD_US}")
        if "memory" in self._v1_dirs:
            _write(self._v1_dirs["memory"] / "memory.limit_in_bytes", memory)
            _write_if_there(self._v1_dirs["memory"] / "memory.memsw.limit_in_bytes", memory)
            # v1 counts socket buffers only where they have a limit; else one agent uses up the tcp_mem of the host.
            _write_if_there(self._v1_dirs["memory"] / "memory.kmem.tcp.limit_in_bytes", memory)
            _write_if_there(self._v1_dirs["memory"] / "memory.swappiness", 0)  # where swap is not accounted
        else:
            _write(self._v2_dir / "memory.max", memory)
            _write_if_there(self._v2_dir / "memory.swap.max", 0)
            _write(self._v2_dir / "memory.oom.group", 1)
        _write(self._v1_dirs.get("pids", self._v2_dir) / "pids.max", pids)

    def kill(self) -> None:
        """Send SIGKILL to every process of the group, forks in flight included. Idempotent."""
        try:
            (self._v2_dir / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            if self._v2_dir.exists():  # Linux before 5.14 has no cgroup.kill
                self._kill_each()
        except OSError as exc:
            raise HostError(f"kill {self._v2_dir}: {exc.strerror}") from exc

    def _kill_each(self) -> None:
        """Kill until a pass finds nobody. The pids limit and the kills of each pass outrun any fork bomb."""
        deadline_mono_s = time.monotonic() + _EMPTY_TIMEOUT_S
        while (pids := self._pids()) and time.monotonic() < deadline_mono_s:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def signal_main(self, signum: signal.Signals) -> None:
        """Signal the agent's main process, if it is there: the second of the sandbox's pid namespace, after bwrap's."""
        for pid in self._pids():
            try:
                fd = os.pidfd_open(pid)  # so that what is read below is of the process that gets the signal
            except OSError:  # it has ended
                continue
            try:
                if _namespace_pid(pid) == _MAIN_PID:
                    signal.pidfd_send_signal(fd, signum)
                    return
            except ProcessLookupError:
                return
            finally:
                os.close(fd)

    def _pids(self) -> list[int]:
        try:
            return [int(line) for line in (self._v2_dir / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def oom_kills(self) -> int:
        """How many processes of this group the kernel killed for memory."""
        if "memory" in self._v1_dirs:
            return _read_counter(self._v1_dirs["memory"] / "memory.oom_control", "oom_kill")
        return _read_counter(self._v2_dir / "memory.events", "oom_kill")

    def peak_memory_bytes(self) -> int:
        """The most memory that the group had at one time, page cache and tmpfs included; 0 if the kernel can not tell.

        Source: memory.peak since Linux 5.19; memory.max_usage_in_bytes in v1.
        """
        if "memory" in self._v1_dirs:
            return _read_number(self._v1_dirs["memory"] / "memory.max_usage_in_bytes")
        return _read_number(self._v2_dir / "memory.peak")

    def cpu_s(self) -> float:
        """Seconds of user and system time of everything that ever ran in the group."""
        return _read_counter(self._v2_dir / "cpu.stat", "usage_usec") / 1e6

    def remove(self) -> None:
        """Kill what is left and remove the groups. Idempotent. Blocks until the last process is gone.

        Raises: HostError when a process does not die within 5 s (it then hangs in the kernel).
        """
        self.kill()
        self._wait_empty()
        for directory in (*self._v1_dirs.values(), self._v2_dir):
            _remove_dir(directory)

    def _wait_empty(self) -> None:
        """Wait for `populated 0`: the kernel notifies pollers of cgroup.events with POLLPRI."""
        try:
            fd = os.open(self._v2_dir / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            deadline_mono_s = time.monotonic() + _EMPTY_TIMEOUT_S
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            while b"populated 1" in os.pread(fd, 256, 0):
                left_s = deadline_mono_s - time.monotonic()
                if left_s <= 0:
                    raise HostError(f"{self._v2_dir}: processes {self._pids()} do not die")
                poller.poll(left_s * 1000)
        finally:
            os.close(fd)


class Cgroups:
    """Parent groups of this instance. `v2_dir` is where BPF attaches."""

    def __init__(self, v2_dir: Path, v1_dirs: dict[str, Path]) -> None:
        self.v2_dir: Final = v2_dir
        self._v1_dirs = v1_dirs

    @classmethod
    def open(cls, layout: HostLayout) -> Cgroups:
        """Make the parent groups, or find those of a predecessor.

        Raises: HostError when the host has no usable cgroups.
        Privileges: root, write access to the cgroup trees.
        """
        hierarchy = find_hierarchy(Path("/proc/self/mounts").read_text())
        parent = hierarchy.v2 / layout.cgroup_name
        v1_dirs = {controller: root / layout.cgroup_name for controller, root in hierarchy.v1.items()}
        try:
            for directory in (parent, *v1_dirs.values()):
                directory.mkdir(mode=0o755, exist_ok=True)
        except OSError as exc:
            raise HostError(f"make cgroup {exc.filename}: {exc.strerror}") from exc
        wanted = [controller for controller in _CONTROLLERS if controller not in v1_dirs]
        _enable(hierarchy.v2, wanted)
        _enable(parent, wanted)
        return cls(parent, v1_dirs)

    def create(self, sandbox_id: SandboxId) -> Cgroup:
        """Make the groups of one sandbox.

        Raises: HostError; nothing is left then.
        """
        v2_dir = self.v2_dir / sandbox_id
        v1_dirs = {controller: parent / sandbox_id for controller, parent in self._v1_dirs.items()}
        with ExitStack() as undo:
            try:
                for directory in (*v1_dirs.values(), v2_dir):
                    directory.mkdir(mode=0o755)
                    undo.callback(_remove_dir, directory)
            except OSError as exc:
                raise HostError(f"make cgroup {exc.filename}: {exc.strerror}") from exc
            undo.pop_all()
        return Cgroup(v2_dir, v1_dirs)

    def remove_leftovers(self) -> tuple[SandboxId, ...]:
        """Kill and remove every sandbox group of a dead predecessor.

        Returns: what was removed.
        Raises: ExceptionGroup of HostError, after trying each.
        """
        names = sorted({name for parent in (self.v2_dir, *self._v1_dirs.values()) for name in _group_names(parent)})
        failures: list[Exception] = []
        for name in names:
            try:
                Cgroup(self.v2_dir / name, {key: parent / name for key, parent in self._v1_dirs.items()}).remove()
                _LOG.info("leftover cgroup removed", extra={"sandbox_id": name})
            except HostError as exc:
                failures.append(exc)
        if failures:
            raise ExceptionGroup("cgroups that could not be removed", failures)
        return tuple(SandboxId(name) for name in names)

    def close(self) -> None:
        """Remove the parent groups. Programs attached to `v2_dir` are detached by it. Idempotent.

        Raises: HostError while a sandbox is left.
        """
        for directory in (*self._v1_dirs.values(), self.v2_dir):
            _remove_dir(directory)


def _namespace_pid(pid: int) -> int:
    """Return the process's pid in the sandbox's own pid namespace; 0 in another or when it is gone.

    Source: proc_pid_status(5), NSpid: one number for each namespace from the reader's to the process's own.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    numbers = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
    return int(numbers[1]) if len(numbers) == _NAMESPACES else 0


def _group_names(parent: Path) -> Iterator[str]:
    if parent.is_dir():
        for entry in parent.iterdir():
            if entry.is_dir() and _GROUP_NAME.fullmatch(entry.name):
                yield entry.name


def _enable(directory: Path, controllers: list[str]) -> None:
    """Pass controllers on to the children of a v2 group.

    Raises: HostError naming those that the host does not offer there.
    """
    if not controllers:
        return
    missing = set(controllers) - set((directory / "cgroup.controllers").read_text().split())
    if missing:
        raise HostError(f"{directory}: no {', '.join(sorted(missing))} controller, in cgroup v2 or v1")
    _write(directory / "cgroup.subtree_control", " ".join(f"+{controller}" for controller in controllers))


def _write(path: Path, value: int | str) -> None:
    try:
        path.write_text(str(value))
    except OSError as exc:
        raise HostError(f"write {value} to {path}: {exc.strerror}") from exc


def _write_if_there(path: Path, value: int) -> None:
    """For limits that not every kernel has: swap is not always accounted, and TCP is part of memory in v2."""
    if path.exists():
        _write(path, value)


def _read_counter(path: Path, key: str) -> int:
    """Read `key value` of a flat-keyed file; 0 once the group is gone, or on a kernel that does not count it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == key), 0)


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _remove_dir(directory: Path) -> None:
    """Remove one group. EBUSY right after the last exit is retried: v1 has no event to wait for."""
    deadline_mono_s = time.monotonic() + _EMPTY_TIMEOUT_S
    while True:
        try:
            directory.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as exc:
            if time.monotonic() > deadline_mono_s:
                raise HostError(f"remove cgroup {directory}: {exc.strerror}") from exc
            time.sleep(0.001)
