"""The state of agents (`spec.state`): a folder that outlives a run, with a size that holds.

Theory of operation. Each agent has an ext4 image under the state folder, attached to one loop device and mounted, but
nowhere: the mount is an fd of the runtime, and each run gets another one of the same file system, in the mount
namespace of its own sandbox. So there is no path by which the host, another agent, or root by mistake could walk into
an agent's files, and nothing to unmount after a crash: the kernel does it with the last holder. Content comes into the
image through the kernel's file system alone; no tool of the host ever parses it.

Runs that share a state do not overlap: a claim is held from before a run begins until all its processes are gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import stat
import struct
import subprocess
import threading
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
_EXT4_IOC_RESIZE_FS: Final = 0x40086610  # fs/ext4/ext4.h: _IOW('f', 16, __u64)
_MKFS_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"

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
    """A mounted image. root is its top folder."""

    path: Path
    image: int
    device: LoopDevice
    mount: int
    root: int
    told_size_mb: int = 0

    def close(self) -> None:
        for fd in (self.root, self.mount, self.image):
            os.close(fd)
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
        device = self._open(agent).device.path
        try:
            return mount_ext4(device)
        except OSError as exc:
            raise HostError(f"state of {_name(agent)}: {exc.strerror}") from exc

    def keep_only(self, agents: Iterable[Agent]) -> None:
        """Unmount what no agent of these has, runs that still go aside; the images stay."""
        wanted = {agent.key for agent in agents if isinstance(agent, TaskAgent) and agent.spec.state is not None}
        with self._opening:
            for key in self._volumes.keys() - wanted:
                volume = self._volumes.pop(key)
                _LOG.info("state of %s/%s: no agent has it any more; its files stay in %s", *key, volume.path)
                volume.close()

    def close(self) -> None:
        """Unmount everything. Idempotent."""
        self.keep_only(())

    def _check_room(self, agent: TaskAgent) -> None:
        volume = self._open(agent)
        state = agent.spec.state
        assert state is not None  # noqa: S101 - it was opened
        status = os.fstatvfs(volume.root)
        if status.f_flag & os.ST_RDONLY:
            raise HostError(f"state of {_name(agent)}: errors in it; stop the runtime and run e2fsck -f {volume.path}")
        if status.f_bavail * status.f_frsize < _ROOM_BYTES or status.f_favail == 0:
            raise StateFullError(
                f"state of {_name(agent)} is full: {state.size_limit_mb} MB, spec.state.sizeLimitMB; raise it and "
                f"reload, or stop the runtime and remove {volume.path} to begin with none"
            )

    def _open(self, agent: TaskAgent) -> _Volume:
        """Return the agent's volume, made at the first call, and of the size that the agent has now."""
        state = agent.spec.state
        assert state is not None  # noqa: S101 - callers ask for agents with state only
        with self._opening:
            volume = self._volumes.get(agent.key)
            try:
                if volume is None:
                    namespace, name = agent.key
                    path = self._folder / f"{namespace}.{name}.ext4"
                    volume = self._volumes[agent.key] = _open_volume(path, state.size_limit_mb)
                if volume.told_size_mb != state.size_limit_mb:
                    _fit(volume, state.size_limit_mb)
            except OSError as exc:
                raise HostError(f"state of {_name(agent)}: {exc.strerror or exc}") from exc
            return volume


def _name(agent: TaskAgent) -> str:
    return "/".join(agent.key)


def _open_volume(path: Path, size_mb: int) -> _Volume:
    """Mount an image, made now if there is none.

    Raises: OSError, HostError.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    is_new = not path.exists()
    if is_new:
        _make_image(path, size_mb)
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        device = LoopDevice.attach(image)
        try:
            mount = mount_ext4(device.path)
        except BaseException:
            device.close()
            raise
    except BaseException:
        os.close(image)
        raise
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    if is_new:
        os.rmdir("lost+found", dir_fd=root)  # e2fsck makes it anew when it needs it
        os.fchmod(root, stat.S_IRWXU)
    return _Volume(path, image, device, mount, root)


def _make_image(path: Path, size_mb: int) -> None:
    """Make a sparse image; it takes its name when it is complete."""
    mkfs = shutil.which("mkfs.ext4", path=_MKFS_PATH)
    if mkfs is None:
        raise HostError("mkfs.ext4 is not installed; apt-get install e2fsprogs")
    block = 1024 if size_mb < _SMALL_MB else 4096
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _image_bytes(size_mb, block))
    finally:
        os.close(fd)
    options = ["-b", str(block), "-J", f"size={block // 1024}", "-m", "0", "-e", "remount-ro"]
    owner = ["-E", f"root_owner={STATE_UID}:{STATE_UID}"]
    command = [mkfs, "-q", "-F", *options, *owner, str(draft)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": _MKFS_PATH}, timeout=120)
    if done.returncode != 0:
        draft.unlink()
        raise HostError(f"{' '.join(command)}: {done.stderr.strip()[:500]}")
    draft.rename(path)


def _image_bytes(size_mb: int, block: int) -> int:
    """What the agent may have, and the journal: 1 MiB with blocks of 1 KiB, 4 MiB with blocks of 4 KiB."""
    return (size_mb + block // 1024) * _MIB


def _fit(volume: _Volume, size_mb: int) -> None:
    """Grow a volume, mounted as it is. It never shrinks: the kernel can not do that while it is in use."""
    block = os.fstatvfs(volume.root).f_frsize
    size, wanted = os.fstat(volume.image).st_size, _image_bytes(size_mb, block)
    if wanted < size:
        _LOG.warning(
            "state %s: it has %d MB and keeps them; for sizeLimitMB %d, save its files, stop the runtime and remove it",
            volume.path, size // _MIB - block // 1024, size_mb,
        )  # fmt: skip
    else:
        if wanted > size:
            os.ftruncate(volume.image, wanted)
            volume.device.grow()
        # Also when only the file has grown, before a crash; nothing happens when it fits.
        fcntl.ioctl(volume.root, _EXT4_IOC_RESIZE_FS, struct.pack("=Q", wanted // block))
    volume.told_size_mb = size_mb
