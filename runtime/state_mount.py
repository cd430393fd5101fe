"""The system calls behind an agent's state: a mount that lies nowhere until a sandbox's own namespace has it."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Final

STATE_UID: Final = 1000  # who owns every file in the image, whichever uid the run has

# The same numbers on every architecture: include/uapi/asm-generic/unistd.h.
_MOVE_MOUNT: Final = 429
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_MOUNT_SETATTR: Final = 442

_CLONE_NEWNS: Final = 0x00020000  # include/uapi/linux/sched.h
_CLONE_NEWUSER: Final = 0x10000000
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4  # this and what follows: include/uapi/linux/mount.h
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOUNT_ATTR_NOSUID: Final = 0x2
_MOUNT_ATTR_NODEV: Final = 0x4
_MOUNT_ATTR_IDMAP: Final = 0x00100000
_MS_REC_SLAVE: Final = 0x4000 | 1 << 19

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def mount_ext4(device: str) -> int:
    """Mount a device nowhere: no path leads to it, and the kernel unmounts it when its last holder is gone.

    Returns: the mount, as a close-on-exec fd. Mounts of one device share one file system.
    Raises: OSError.
    """
    context = _call("fsopen", _FSOPEN, b"ext4", _FSOPEN_CLOEXEC)
    try:
        _call("set the device", _FSCONFIG, context, _FSCONFIG_SET_STRING, b"source", device.encode(), 0)
        _call("set discard", _FSCONFIG, context, _FSCONFIG_SET_FLAG, b"discard", None, 0)
        _call("mount", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    finally:
        os.close(context)


def attach_state(mount: int, target: bytes, uid: int) -> None:
    """Put a detached mount at target in a mount namespace of this process's own; its files belong to uid there.

    The owner is translated by the mount (mount_setattr(2), ID-mapped mounts), so nobody walks through an agent's files
    to change it. Closes the fd. Call in a single-threaded process that is about to exec.
    Raises: OSError.
    """
    users = _make_user_namespace(uid)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, users)
    _call("map owners", _MOUNT_SETATTR, mount, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    if _LIBC.unshare(_CLONE_NEWNS) != 0 or _LIBC.mount(None, b"/", None, _MS_REC_SLAVE, None) != 0:
        raise OSError(ctypes.get_errno(), "unshare mounts")
    _call("move_mount", _MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)
    os.close(users)
    os.close(mount)


def _make_user_namespace(uid: int) -> int:
    """Return a user namespace in which STATE_UID is this uid, and nobody else is anybody. A child holds it for us."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            theirs.send(b"1" if _LIBC.unshare(_CLONE_NEWUSER) == 0 else b"0")
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    try:
        if ours.recv(1) != b"1":
            raise OSError(1, "unshare users")
        for name in ("uid_map", "gid_map"):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"%d %d 1" % (STATE_UID, uid))
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result
