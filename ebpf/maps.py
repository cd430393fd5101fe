"""The bpf(2) system call as far as clrk needs it: maps, cgroup attachments, links. Typed; errors are OSError.

bcc wraps neither links nor queries, and its tables do not know SOCKHASH, so this speaks to the kernel itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

from clrk.core.errors import HostError

# include/uapi/linux/bpf.h, enum bpf_cmd
_MAP_LOOKUP_ELEM: Final = 1
_MAP_UPDATE_ELEM: Final = 2
_MAP_DELETE_ELEM: Final = 3
_MAP_GET_NEXT_KEY: Final = 4
_PROG_ATTACH: Final = 8
_PROG_DETACH: Final = 9
_PROG_GET_FD_BY_ID: Final = 13
_OBJ_GET_INFO_BY_FD: Final = 15
_PROG_QUERY: Final = 16
_LINK_CREATE: Final = 28
_LINK_GET_FD_BY_ID: Final = 30
_LINK_GET_NEXT_ID: Final = 31
_LINK_DETACH: Final = 34

_LINK_TYPE_CGROUP: Final = 3
_MAX_PROGS_PER_HOOK: Final = 64  # BPF_CGROUP_MAX_PROGS

_SYSCALL_NUMBER: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_libc: Final = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    number = _SYSCALL_NUMBER.get(platform.machine())
    if number is None:
        raise HostError(f"bpf(2): the system call's number on {platform.machine()} is not known to clrk")
    result = int(_libc.syscall(number, command, ctypes.byref(attr), len(attr)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _attr(raw: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(raw, len(raw))


@dataclass(frozen=True, slots=True)
class Map:
    """One map by its fd, which belongs to somebody else and must outlive this object."""

    fd: int
    key_size: int
    value_size: int

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value, or None."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            self._element(_MAP_LOOKUP_ELEM, key, value)
        except FileNotFoundError:
            return None
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Insert or replace."""
        if len(value) != self.value_size:
            raise ValueError(f"value of {len(value)} bytes for a map of {self.value_size}")
        self._element(_MAP_UPDATE_ELEM, key, _attr(value))

    def delete(self, key: bytes) -> bool:
        """Remove; say whether it was there."""
        try:
            self._element(_MAP_DELETE_ELEM, key, None)
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[bytes]:
        """Walk the keys. A key deleted while the walk stands on it restarts the walk (the kernel's rule), so keys may
        repeat; the caller that deletes collects first."""
        key: bytes | None = None
        while True:
            following = ctypes.create_string_buffer(self.key_size)
            try:
                self._element(_MAP_GET_NEXT_KEY, key, following)
            except FileNotFoundError:
                return
            key = following.raw
            yield key

    def _element(self, command: int, key: bytes | None, value: ctypes.Array[ctypes.c_char] | None) -> None:
        if key is not None and len(key) != self.key_size:
            raise ValueError(f"key of {len(key)} bytes for a map of {self.key_size}")
        key_buffer = None if key is None else _attr(key)
        raw = struct.pack("=I4xQQQ", self.fd, _address(key_buffer), _address(value), 0)
        _bpf(command, _attr(raw))


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return 0 if buffer is None else ctypes.addressof(buffer)


def attach_program(target_fd: int, program_fd: int, attach_type: int) -> None:
    """Attach to a map; lasts as long as the map."""
    _bpf(_PROG_ATTACH, _attr(struct.pack("=IIII", target_fd, program_fd, attach_type, 0)))


def create_link(program_fd: int, target_fd: int, attach_type: int) -> int:
    """Attach to a cgroup; return the link's fd. The attachment ends with the last copy of the fd."""
    return _bpf(_LINK_CREATE, _attr(struct.pack("=IIII", program_fd, target_fd, attach_type, 0)))


def attached_programs(cgroup_fd: int, attach_type: int) -> tuple[int, ...]:
    """Return the ids of the programs attached to this very cgroup, by link or without."""
    ids = (ctypes.c_uint32 * _MAX_PROGS_PER_HOOK)()
    attr = _attr(struct.pack("=IIIIQI4x", cgroup_fd, attach_type, 0, 0, ctypes.addressof(ids), _MAX_PROGS_PER_HOOK))
    _bpf(_PROG_QUERY, attr)
    count: int = struct.unpack_from("=I", attr.raw, 24)[0]
    return tuple(ids[:count])


def detach_links(cgroup_fd: int) -> int:
    """Detach every link to this very cgroup, whoever holds it; return how many there were."""
    cgroup_id = os.fstat(cgroup_fd).st_ino
    detached = 0
    for link_id in list(_link_ids()):
        try:
            link_fd = _by_id(_LINK_GET_FD_BY_ID, link_id)
        except FileNotFoundError:
            continue  # gone since the walk
        try:
            if _cgroup_of_link(link_fd) == cgroup_id:
                _bpf(_LINK_DETACH, _attr(struct.pack("=I", link_fd)))
                detached += 1
        finally:
            os.close(link_fd)
    return detached


def detach_programs(cgroup_fd: int, attach_type: int) -> int:
    """Detach what was attached to this very cgroup without a link; return how many there were."""
    detached = 0
    for program_id in attached_programs(cgroup_fd, attach_type):
        try:
            program_fd = _by_id(_PROG_GET_FD_BY_ID, program_id)
        except FileNotFoundError:
            continue
        try:
            _bpf(_PROG_DETACH, _attr(struct.pack("=IIII", cgroup_fd, program_fd, attach_type, 0)))
            detached += 1
        except FileNotFoundError:
            continue  # detached by itself since the query
        finally:
            os.close(program_fd)
    return detached


def _by_id(command: int, object_id: int) -> int:
    return _bpf(command, _attr(struct.pack("=III", object_id, 0, 0)))


def _link_ids() -> Iterator[int]:
    link_id = 0
    while True:
        attr = _attr(struct.pack("=III", link_id, 0, 0))
        try:
            _bpf(_LINK_GET_NEXT_ID, attr)
        except FileNotFoundError:
            return
        link_id = struct.unpack_from("=I", attr.raw, 4)[0]
        yield link_id


def _cgroup_of_link(link_fd: int) -> int | None:
    info = ctypes.create_string_buffer(32)  # struct bpf_link_info up to the cgroup part
    _bpf(_OBJ_GET_INFO_BY_FD, _attr(struct.pack("=IIQ", link_fd, len(info), ctypes.addressof(info))))
    link_type: int = struct.unpack_from("=I", info.raw, 0)[0]
    cgroup_id: int = struct.unpack_from("=Q", info.raw, 16)[0]
    return cgroup_id if link_type == _LINK_TYPE_CGROUP else None


def counter_names() -> tuple[str, ...]:
    """Return the counters' names in the order of their indexes, read from lib/counters.h."""
    text = resources.files(__package__).joinpath("lib/counters.h").read_text(encoding="ascii")
    return tuple(name.lower() for name in re.findall(r"^\tCLRK_COUNT_(\w+),$", text, re.MULTILINE))
