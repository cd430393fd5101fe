"""Count everything that a daemon may leave on the host: what is more than before is a leak."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from instances import DEADLINE_S
from stack import Daemon

# linux/bpf.h, enum bpf_cmd and enum bpf_map_type; x86-64 system call numbers.
_BPF_MAP_GET_NEXT_KEY = 4
_SYS_BPF = 321
_SYS_PIDFD_OPEN = 434
_SYS_PIDFD_GETFD = 438
_HASHES = {1, 9, 18}  # HASH, LRU_HASH, SOCKHASH: arrays have as many entries as they were made with

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Footprint:
    """What there is of one instance."""

    namespaces: int
    cgroups: int
    processes: tuple[str, ...]
    mounts: int
    map_entries: int
    fds: tuple[tuple[int, str, int], ...]  # pid, name, count
    files: tuple[str, ...]


def footprint(daemon: Daemon) -> Footprint:
    """Count what belongs to a daemon, running or not."""
    family = _family(daemon)
    return Footprint(
        namespaces=sum(1 for name in _names(Path("/run/netns")) if name.startswith(f"{daemon.instance}-")),
        cgroups=sum(1 for _ in _cgroups(daemon.instance)),
        processes=tuple(sorted(_comm(pid) for pid in family)),
        mounts=_mounts(daemon, family),
        map_entries=sum(_map_entries(pid) for pid in family if pid == (daemon.process and daemon.process.pid)),
        fds=tuple((pid, _comm(pid), len(_names(Path(f"/proc/{pid}/fd")))) for pid in family),
        files=tuple(sorted(
            os.path.join(folder, "segment" if name.isdecimal() else name)  # a journal's are numbered on and on
            for top in (Path("/run") / daemon.instance, daemon.state_dir) for folder, folders, names in os.walk(top)
            for name in folders + names if not name.endswith(("-wal", "-shm"))  # SQLite's own, which come and go
        )),
    )  # fmt: skip


def settled(daemon: Daemon, wanted: Footprint | None = None, *, but: str = "") -> Footprint:
    """Return the footprint once it differs from `wanted` in nothing, or (without one) has not changed for a second.

    Shape: but is a field that may differ. After DEADLINE_S the last one is returned: the caller's assertion then shows
        the difference.
    """
    deadline, last, since = time.monotonic() + DEADLINE_S, footprint(daemon), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.1)  # a poll of the kernel's tables: nothing announces that a cgroup is gone
        now = footprint(daemon)
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > 1 if wanted is None else not difference(wanted, now, but=but):
            break
    return last


def difference(before: Footprint, after: Footprint, *, but: str = "") -> dict[str, str]:
    """Return what changed but for one field, by name; of lists only what one has and the other has not."""
    # Only processes that lived through it can have leaked an fd; the waiting children of the pool are others by now.
    lived = {pid for pid, *_ in before.fds} & {pid for pid, *_ in after.fds}
    old, new = (asdict(one) | {"fds": tuple(fact for fact in one.fds if fact[0] in lived)} for one in (before, after))
    changes = {}
    for name in old:
        if name != but and old[name] != new[name]:
            changes[name] = f"{old[name]} -> {new[name]}"
            if isinstance(old[name], tuple):
                was, now = Counter(old[name]), Counter(new[name])
                changes[name] = f"only before: {dict(was - now)}, only after: {dict(now - was)}"
    return changes


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cgroups(instance: str) -> Iterator[Path]:
    """Every folder of the instance in the v2 tree and in each v1 controller; the parent itself counts too."""
    root = Path("/sys/fs/cgroup")
    for tree in [root, *(path for path in root.iterdir() if path.is_dir())]:
        parent = tree / instance
        if parent.is_dir():
            # os.walk, not rglob: a sandbox's group may vanish while we look
            yield from (Path(folder) for folder, _, _ in os.walk(parent))


def _family(daemon: Daemon) -> list[int]:
    """The runtime and all its descendants, and whatever else sits in the instance's cgroups."""
    pids: set[int] = set()
    if daemon.process is not None and daemon.process.poll() is None:
        pids.add(daemon.process.pid)
    parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in pids} - pids
        pids |= more
        grown = bool(more)
    for cgroup in _cgroups(daemon.instance):
        try:
            pids |= {int(line) for line in (cgroup / "cgroup.procs").read_text().split()}
        except OSError:
            continue
    return sorted(pids)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return -1


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def _mounts(daemon: Daemon, family: list[int]) -> int:
    """Mounts of the host that name the instance, and those in the runtime's own mount namespace."""
    count = 0
    for pid in {os.getpid(), *(pid for pid in family if daemon.process and pid == daemon.process.pid)}:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        count += sum(1 for line in lines if daemon.instance in line or str(daemon.folder) in line)
    return count


# --- BPF maps -----------------------------------------------------------------------------------------------------


def _map_entries(pid: int) -> int:
    """Count the entries of every hash map that a process holds."""
    count, seen = 0, set()
    pidfd = _LIBC.syscall(_SYS_PIDFD_OPEN, pid, 0)
    if pidfd < 0:
        return 0
    try:
        for name in _names(Path(f"/proc/{pid}/fdinfo")):
            facts = _fdinfo(pid, name)
            if int(facts.get("map_type", "0")) not in _HASHES or facts.get("map_id") in seen:
                continue
            seen.add(facts.get("map_id"))
            fd = _LIBC.syscall(_SYS_PIDFD_GETFD, pidfd, int(name), 0)
            if fd >= 0:
                count += _count_keys(fd, int(facts["key_size"]))
                os.close(fd)
    finally:
        os.close(pidfd)
    return count


def _fdinfo(pid: int, name: str) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _count_keys(fd: int, key_size: int) -> int:
    key, following = ctypes.create_string_buffer(key_size), ctypes.create_string_buffer(key_size)
    count, pointer = 0, 0
    while count < 1_000_000:
        attr = struct.pack("=IxxxxQQ", fd, pointer, ctypes.addressof(following))
        if _LIBC.syscall(_SYS_BPF, _BPF_MAP_GET_NEXT_KEY, attr, len(attr)) != 0:
            break
        ctypes.memmove(key, following, key_size)
        pointer = ctypes.addressof(key)
        count += 1
    return count
