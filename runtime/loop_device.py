"""Loop devices: a file as a block device. One device for each file, ever: two would destroy the file system in it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError

_LOOP_CONFIGURE: Final = 0x4C0A  # include/uapi/linux/loop.h
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS_AUTOCLEAR: Final = 4
# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt type and key size, flags; names, key.
_INFO: Final = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s64s")
_ATTEMPTS: Final = 16


class LoopDevice:
    """Holds the device; when the last holder or mount is gone, the kernel detaches it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path: Final = path
        self._fd = fd

    @classmethod
    def attach(cls, image: int) -> LoopDevice:
        """Attach an open file, or find the device that it is attached to already.

        Raises: HostError.
        """
        try:
            return _find(image) or _attach(image)
        except OSError as exc:
            hint = "; is the module loop loaded?" if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else ""
            raise HostError(f"loop device: {exc.strerror}{hint}") from exc

    def grow(self) -> None:
        """Take over the size of a file that has grown. Raises: OSError."""
        fcntl.ioctl(self._fd, _LOOP_SET_CAPACITY)

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)


def _find(image: int) -> LoopDevice | None:
    wanted = os.fstat(image)
    for entry in sorted(Path("/sys/block").glob("loop*")):
        if not (entry / "loop").is_dir():  # nothing is attached
            continue
        path = f"/dev/{entry.name}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # from now on it is not detached
        except OSError:
            continue
        try:
            device, inode, *_ = _INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size)))
        except OSError:  # detached before we had it
            os.close(fd)
            continue
        if (device, inode) == (wanted.st_dev, wanted.st_ino):
            return LoopDevice(path, fd)
        os.close(fd)
    return None


def _attach(image: int) -> LoopDevice:
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
    config = _CONFIG.pack(image, 0, info, b"")
    for _ in range(_ATTEMPTS):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        finally:
            os.close(control)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
        except OSError as exc:
            os.close(fd)
            if exc.errno == errno.EBUSY:  # somebody else took it between the two
                continue
            raise
        return LoopDevice(path, fd)
    raise OSError(errno.EBUSY, "no loop device stays free")
