"""The state of agents (`spec.state`): a folder that outlives a run, with a size that holds.

Theory of operation. Each agent has an ext4 image under the state folder, attached to one loop device and mounted, but
nowhere: the mount is an fd of the runtime, and each run gets another one of the same file system, in the mount
namespace of its own sandbox. So there is no path by which the host, another agent, or root by mistake could walk into
an agent's files, and nothing to unmount after a crash: the kernel does it with the last holder. Content comes into the
image through the kernel's file system alone. The one tool that ever reads it is resize2fs, with the check that it asks
for, when the limit was raised: without any capability, and while nothing is mounted.

Runs that share a state do not overlap: a claim is held from before a run begins until all its processes are gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError
from clrk.core.resources import Agent, TaskAgent

from .loop_device import LoopDevice
from .state_mount import STATE_UID, mount_ext4

_MIB: Final = 1 << 20
_SMALL_MB: Final = 64  # below it, blocks of 1 KiB and the smallest journal
_CLAIM_TIMEOUT_S: Final = 15.0  # the last run's removal takes less, or never ends
_ROOM_BYTES: Final = 64 << 10  # with less, a run can not keep anything
_HOST_ROOM_BYTES: Final = 64 * _MIB  # free on the host: with less, what a run writes may be lost
_SECTOR_BYTES: Final = 512  # the unit of st_blocks
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})  # an error of its own, but none in the file system
_FREE_TIMEOUT_S: Final = 5.0  # sandboxes that were prepared before a reload are removed in less
_TOOLS: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_NO_CAPABILITIES: Final = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--")
_SUPERBLOCK_AT: Final = 1024  # fs/ext4/ext4.h, struct ext4_super_block: s_blocks_count_lo and s_log_block_size
_SUPERBLOCK: Final = struct.Struct("<4xI16xI")

_LOG: Final = logging.getLogger(__name__)

_Key = tuple[str, str]


class StateFullError(HostError):
    """An agent's state is at its limit."""


class StateClaim:
    """Says that one run has an agent's state."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock: asyncio.Lock | None = lock

    def release(self) -> None:
        """Let the next run have it. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


@dataclass(slots=True)
class _Volume:
    """A mounted image. mount and root, its top folder, are -1 while it is not mounted."""

    path: Path
    image: int
    device: LoopDevice
    mount: int = -1
    root: int = -1
    size_mb: int = 0  # what the agent asked for, as far as it is done

    def take(self) -> None:
        """Mount. Raises: OSError."""
        self.mount = mount_ext4(self.device.path)
        self.root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.mount)

    def leave(self) -> None:
        """Unmount; other holders keep theirs. Idempotent."""
        fds, self.mount, self.root = (self.root, self.mount), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        self.leave()
        os.close(self.image)
        self.device.close()


class StateVolumes:
    """The volumes of this host's agents; opened when first needed. Belongs to one event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._volumes: dict[_Key, _Volume] = {}
        self._claims: dict[_Key, asyncio.Lock] = {}
        self._opening = threading.Lock()

    async def claim(self, agent: TaskAgent) -> StateClaim:
        """Wait until no other run has this agent's state, and see that there is room in it.

        Raises: StateFullError; HostError when it can not be mounted, or another run does not end.
        """
        lock = self._claims.setdefault(agent.key, asyncio.Lock())
        try:
            async with asyncio.timeout(_CLAIM_TIMEOUT_S):
                await lock.acquire()
        except TimeoutError:
            raise HostError(f"state of {_name(agent)}: the last run still has it") from None
        try:
            await asyncio.to_thread(self._check_room, agent)
        except BaseException:
            lock.release()
            raise
        return StateClaim(lock)

    def open_mount(self, agent: TaskAgent) -> int:
        """Return one more mount of the agent's state, detached. Blocks; the caller closes the fd.

        Raises: HostError.
        """
        with self._opening:
            device = self._open(agent, patience_s=0).device.path  # no claim: an older run may still have it
            try:
                return mount_ext4(device)
            except OSError as exc:
                raise HostError(f"state of {_name(agent)}: {exc.strerror}") from exc

    def keep_only(self, agents: Iterable[Agent]) -> None:
        """Unmount what no agent of these has, runs that still go aside; the images stay. Blocks."""
        wanted = {agent.key for agent in agents if isinstance(agent, TaskAgent) and agent.spec.state is not None}
        with self._opening:
            for key in self._volumes.keys() - wanted:
                volume = self._volumes.pop(key)
                _LOG.info("state of %s/%s: no agent has it any more; its files stay in %s", *key, volume.path)
                volume.close()

    def close(self) -> None:
        """Unmount everything. Idempotent. Blocks."""
        with self._opening:
            for volume in self._volumes.values():
                volume.close()
            self._volumes.clear()

    def _check_room(self, agent: TaskAgent) -> None:
        state = agent.spec.state
        assert state is not None  # noqa: S101 - callers ask for agents with state only
        with self._opening:
            volume = self._open(agent, patience_s=_FREE_TIMEOUT_S)
            status = os.fstatvfs(volume.root)
            is_writable = _is_writable(volume)
        if not is_writable:
            raise HostError(f"state of {_name(agent)}: errors in it; stop the runtime and run e2fsck -f {volume.path}")
        if status.f_bavail * status.f_frsize < _ROOM_BYTES or status.f_favail == 0:
            raise StateFullError(
                f"state of {_name(agent)} is full: {state.size_limit_mb} MB, spec.state.sizeLimitMB; raise it and "
                f"reload, or stop the runtime and remove {volume.path} to begin with none"
            )
        _check_host(volume)

    def _open(self, agent: TaskAgent, patience_s: float) -> _Volume:
        """Return the agent's volume, made at the first call, and of the size that the agent has now. Call locked.

        Units: patience_s is how long a growth waits for sandboxes that still have it; nobody else's state opens then.
        """
        state = agent.spec.state
        assert state is not None  # noqa: S101 - callers ask for agents with state only
        try:
            volume = self._volumes.get(agent.key)
            if volume is None:
                namespace, name = agent.key
                volume = _open_image(self._folder / f"{namespace}.{name}.ext4", state.size_limit_mb)
                self._volumes[agent.key] = volume
            if volume.size_mb != state.size_limit_mb:
                _fit(volume, state.size_limit_mb, patience_s)
            if volume.mount < 0:
                volume.take()
        except (OSError, HostError) as exc:
            said = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise HostError(f"state of {_name(agent)}: {said}") from exc
        return volume


def _name(agent: TaskAgent) -> str:
    return "/".join(agent.key)


def _open_image(path: Path, size_mb: int) -> _Volume:
    """Attach an image, made now if there is none.

    Raises: OSError, HostError.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    is_new = not path.exists()
    if is_new:
        _make_image(path, size_mb)
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        volume = _Volume(path, image, LoopDevice.attach(image))
    except BaseException:
        os.close(image)
        raise
    if is_new:
        volume.take()
        os.rmdir("lost+found", dir_fd=volume.root)  # e2fsck makes it anew when it needs it
        os.fchmod(volume.root, stat.S_IRWXU)
    return volume


def _is_writable(volume: _Volume) -> bool:
    """Try it: after an error, recent kernels (6.15) refuse every write and call the file system writable."""
    try:
        os.close(os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=volume.root))
    except OSError as exc:
        return exc.errno in _FULL
    return True


def _check_host(volume: _Volume) -> None:
    """See that the host has room for what a run may write: the image is sparse, and its errors are no ENOSPC inside.

    Raises: HostError caused by ENOSPC.
    """
    image, host = os.fstat(volume.image), os.fstatvfs(volume.image)
    missing = image.st_size - image.st_blocks * _SECTOR_BYTES
    if host.f_bavail * host.f_frsize < min(missing, _HOST_ROOM_BYTES):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise HostError(f"the file system of {volume.path} is full; make room in it") from full


def _make_image(path: Path, size_mb: int) -> None:
    """Make a sparse image; it takes its name when it is complete."""
    block = 1024 if size_mb < _SMALL_MB else 4096
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _image_bytes(size_mb, block))
    finally:
        os.close(fd)
    options = ["-b", str(block), "-J", f"size={block // 1024}", "-m", "0", "-e", "remount-ro"]
    _run_tool("mkfs.ext4", "-q", "-F", *options, "-E", f"root_owner={STATE_UID}:{STATE_UID}", str(draft))
    draft.rename(path)


def _image_bytes(size_mb: int, block: int) -> int:
    """What the agent may have, and the journal: 1 MiB with blocks of 1 KiB, 4 MiB with blocks of 4 KiB."""
    return (size_mb + block // 1024) * _MIB


def _fit(volume: _Volume, size_mb: int, patience_s: float) -> None:
    """Grow a volume to its limit; no run has it now. One that is larger stays as it is: what is in it is the agent's.

    Raises: OSError, HostError.
    """
    blocks, log_block = _SUPERBLOCK.unpack(os.pread(volume.image, _SUPERBLOCK.size, _SUPERBLOCK_AT))
    block = 1024 << log_block
    wanted = _image_bytes(size_mb, block)
    if blocks * block < wanted:
        volume.leave()
        _wait_unmounted(volume.device.path, patience_s)
        os.ftruncate(volume.image, wanted)
        volume.device.grow()
        _run_tool("e2fsck", "-f", "-p", volume.device.path, accepted=(0, 1))
        _run_tool("resize2fs", volume.device.path)
    elif blocks * block > wanted:
        _LOG.warning(
            "state %s: it has %d MB and keeps them; for sizeLimitMB %d, save its files, stop the runtime and remove it",
            volume.path, blocks * block // _MIB - block // 1024, size_mb,
        )  # fmt: skip
    volume.size_mb = size_mb


def _wait_unmounted(device: str, patience_s: float) -> None:
    """Wait until nothing has the device mounted: an exclusive open is refused before.

    Raises: HostError.
    """
    deadline_mono_s = time.monotonic() + patience_s
    while True:
        try:
            os.close(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline_mono_s:
                raise HostError(f"{device} is still in use: {exc.strerror}") from exc
            time.sleep(0.01)  # in a thread; the kernel tells nobody
        else:
            return


def _run_tool(name: str, *arguments: str, accepted: tuple[int, ...] = (0,)) -> None:
    """Run a tool of e2fsprogs without capabilities: it is root only to open root's files.

    Raises: HostError with what it said.
    """
    path = shutil.which(name, path=_TOOLS)
    if path is None:
        raise HostError(f"{name} is not installed; apt-get install e2fsprogs")
    done = subprocess.run(
        [*_NO_CAPABILITIES, path, *arguments],
        capture_output=True, text=True, check=False, env={"PATH": _TOOLS}, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode not in accepted:
        raise HostError(f"{name} {arguments[-1]}: {(done.stderr or done.stdout).strip()[:500]}")
