"""Take flow records out of the kernel's map through a passed descriptor.

An unprivileged process may look up and delete through a map descriptor it was given; it can create nothing
(shared/KERNEL.md, "This kind of machine"; Linux 6.0 or newer).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Final, Protocol

from clrk.core import wire
from clrk.core.errors import HostError
from clrk.core.wire import FlowRecord

_BPF_MAP_LOOKUP_AND_DELETE_ELEM: Final = 21  # include/uapi/linux/bpf.h, enum bpf_cmd
_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}


class FlowSource(Protocol):
    """Where flow records come from."""

    def take(self, key: bytes) -> FlowRecord | None:
        """Remove and return the record of a connection; None when the kernel wrote none."""


class _MapElement(ctypes.Structure):
    """The map-element member of `union bpf_attr`."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class FlowMap:
    """The `clrk_flows` map behind a descriptor that the runtime passed. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        number = _SYS_BPF.get(platform.machine())
        if number is None:
            raise HostError(f"bpf(2) has no known number on {platform.machine()}")
        self._number = number
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._key = ctypes.create_string_buffer(wire.FLOW_KEY.size)
        self._value = ctypes.create_string_buffer(wire.FLOW.size)
        self._attr = _MapElement(fd, 0, ctypes.addressof(self._key), ctypes.addressof(self._value), 0)

    def take(self, key: bytes) -> FlowRecord | None:
        """Remove and return the record of a connection.

        Shape: key as wire.pack_flow_key makes it. Cost: one system call, about 8 us.
        Raises: HostError when the descriptor is no such map.
        """
        if len(key) != wire.FLOW_KEY.size:
            raise ValueError(f"flow key has {len(key)} bytes, not {wire.FLOW_KEY.size}")
        ctypes.memmove(self._key, key, len(key))
        size = ctypes.sizeof(self._attr)
        if self._syscall(self._number, _BPF_MAP_LOOKUP_AND_DELETE_ELEM, ctypes.byref(self._attr), size) == 0:
            return FlowRecord.unpack(self._value.raw)
        number = ctypes.get_errno()
        if number == errno.ENOENT:
            return None
        raise HostError(f"take a flow record from descriptor {self._attr.map_fd}: {os.strerror(number)}")
