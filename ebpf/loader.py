"""Compiles, loads and attaches the kernel programs, and keeps the registry of sandboxes. The only importer of bcc."""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final, Self

from clrk.core import wire
from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.netns import plan

from . import maps
from .kernel_headers import find_kernel_headers

_log = logging.getLogger(__name__)

# include/uapi/linux/bpf.h, enum bpf_prog_type
_PROG_CGROUP_SOCK: Final = 9
_PROG_SOCK_OPS: Final = 13
_PROG_SK_MSG: Final = 16
_PROG_CGROUP_SOCK_ADDR: Final = 18

_ATTACH_SK_MSG_VERDICT: Final = 7


@dataclass(frozen=True, slots=True)
class _Hook:
    """One program and where it is attached; numbers are those of enum bpf_prog_type and enum bpf_attach_type."""

    function: str
    program_type: int
    attach_type: int


_CGROUP_HOOKS: Final = (
    _Hook("clrk_sock_create", _PROG_CGROUP_SOCK, 2),
    _Hook("clrk_sockops", _PROG_SOCK_OPS, 3),
    _Hook("clrk_bind4", _PROG_CGROUP_SOCK_ADDR, 8),
    _Hook("clrk_bind6", _PROG_CGROUP_SOCK_ADDR, 9),
    _Hook("clrk_connect4", _PROG_CGROUP_SOCK_ADDR, 10),
    _Hook("clrk_connect6", _PROG_CGROUP_SOCK_ADDR, 11),
    _Hook("clrk_sendmsg4", _PROG_CGROUP_SOCK_ADDR, 14),
    _Hook("clrk_sendmsg6", _PROG_CGROUP_SOCK_ADDR, 15),
    _Hook("clrk_recvmsg4", _PROG_CGROUP_SOCK_ADDR, 19),
    _Hook("clrk_recvmsg6", _PROG_CGROUP_SOCK_ADDR, 20),
    _Hook("clrk_getpeername4", _PROG_CGROUP_SOCK_ADDR, 29),
    _Hook("clrk_getpeername6", _PROG_CGROUP_SOCK_ADDR, 30),
)

# The first group: kernel headers of one version and bcc's own of another complain about each other. The second: a
# helper that bcc does not declare would become a call to nowhere.
_CFLAGS: Final = (
    "-Wno-macro-redefined",
    "-Wno-address-of-packed-member",
    "-Wno-unknown-attributes",
    "-Werror=implicit-function-declaration",
    "-fno-strict-aliasing",
)

_COOKIE: Final = struct.Struct("=Q")
_COUNTER_KEY: Final = struct.Struct("=I")
_LOCAL_INCLUDE: Final = re.compile(r'^#include "(lib/\w+\.h)"\n', re.MULTILINE)


class Stamp:
    """The programs of one instance, attached to its parent cgroup for as long as this object lives.

    Attachments are BPF links held by this process, the maps are not pinned: when the process ends, however it ends,
    the kernel detaches and frees everything, and nothing gets out of a sandbox meanwhile (its namespace has no way
    out). A process that was forked and not exec'ed holds copies of the fds: fork such helpers before attach().
    Methods that use maps may be called from any thread; close() only when no other call is running.
    """

    def __init__(self, bpf: Any, undo: ExitStack) -> None:
        """Take over a loaded object; use attach()."""
        self._undo = undo
        self._sandboxes = _open_map(bpf, "clrk_sandboxes", _COOKIE.size, wire.SANDBOX.size)
        self._flows = _open_map(bpf, "clrk_flows", wire.FLOW_KEY.size, wire.FLOW.size)
        self._socks = _open_map(bpf, "clrk_socks", _COOKIE.size, 4)
        self._counters = _open_map(bpf, "clrk_counters", _COUNTER_KEY.size, 8)

    @classmethod
    def attach(cls, layout: HostLayout, cgroup_dir: Path) -> Stamp:
        """Compile, load and attach to the instance's parent cgroup; from then on its processes have no network.

        Shape: cgroup_dir is the existing directory <v2 root>/<layout.cgroup_name>.
        Side effects: first detaches whatever a predecessor left on this cgroup, links of a process still running
            included: the caller holds the instance's lock.
        Privileges: CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN (to walk links); Linux 5.15.
        Cost: about 0.6 s, most of it the compiler.
        Raises: HostError.
        """
        if cgroup_dir.name != layout.cgroup_name:
            raise HostError(f"attach to {cgroup_dir}: not the cgroup of instance {layout.instance}")
        with ExitStack() as undo:
            bpf = _compile()
            undo.callback(bpf.cleanup)
            cgroup_fd = _open_cgroup(cgroup_dir)
            try:
                _remove_leftovers(cgroup_dir, cgroup_fd)
                stamp = cls(bpf, undo)
                stamp._attach_stamp(bpf)
                for hook in _CGROUP_HOOKS:
                    link_fd = _attach_hook(bpf, hook, cgroup_dir, cgroup_fd)
                    undo.callback(os.close, link_fd)
            finally:
                os.close(cgroup_fd)
            stamp._undo = undo.pop_all()
        return stamp

    def register(self, netns_cookie: int, header_v4: bytes, header_v6: bytes) -> None:
        """Make a network namespace known, or replace its templates; until then the kernel refuses all it does.

        Shape: netns_cookie is SO_NETNS_COOKIE of a socket made inside; the templates come from build_headers().
        Raises: ValueError for a template of the wrong size; HostError if the map is full.
        """
        if len(header_v4) != wire.HEADER_SIZE or len(header_v6) != wire.HEADER_SIZE:
            raise ValueError(f"header templates must have {wire.HEADER_SIZE} bytes")
        value = wire.SANDBOX.pack(
            IPv4Address(plan.EGRESS_V4).packed,
            IPv6Address(plan.EGRESS_V6).packed,
            IPv4Address(plan.METADATA_V4).packed,
            IPv6Address(plan.METADATA_V6).packed,
            header_v4,
            header_v6,
        )
        try:
            self._sandboxes.update(_COOKIE.pack(netns_cookie), value)
        except OSError as exc:
            raise HostError(f"register netns cookie {netns_cookie}: {exc.strerror}") from exc

    def unregister(self, netns_cookie: int) -> None:
        """Forget a namespace and the flow records that nobody took; harmless for one that is not known."""
        key = _COOKIE.pack(netns_cookie)
        self._sandboxes.delete(key)
        for flow_key in [flow_key for flow_key in self._flows.keys() if flow_key.startswith(key)]:
            self._flows.delete(flow_key)

    @property
    def flows_fd(self) -> int:
        """Map of flow records, `struct clrk_flow_key` -> `struct clrk_flow`; borrowed, valid until close()."""
        return self._flows.fd

    def counters(self) -> dict[str, int]:
        """Return every counter of lib/counters.h by name: monotonic since attach()."""
        values = {}
        for index, name in enumerate(maps.counter_names()):
            raw = self._counters.lookup(_COUNTER_KEY.pack(index))
            values[name] = 0 if raw is None else _COOKIE.unpack(raw)[0]
        return values

    def entries(self) -> dict[str, int]:
        """Return how many entries each map holds: sandboxes, flows, socks."""
        counted = {"sandboxes": self._sandboxes, "flows": self._flows, "socks": self._socks}
        return {name: len(set(table.keys())) for name, table in counted.items()}

    def close(self) -> None:
        """Detach everything and free the maps; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach_stamp(self, bpf: Any) -> None:
        """Attach sk_msg to the SOCKHASH: without a link, it lives exactly as long as the map."""
        program_fd = _load(bpf, "clrk_stamp", _PROG_SK_MSG, _ATTACH_SK_MSG_VERDICT)
        try:
            maps.attach_program(self._socks.fd, program_fd, _ATTACH_SK_MSG_VERDICT)
        except OSError as exc:
            raise HostError(f"attach clrk_stamp to clrk_socks: {exc.strerror}; needs CAP_NET_ADMIN") from exc


def check_programs() -> dict[str, str]:
    """Compile everything, and load each program without attaching it.

    Returns: program -> why the kernel refuses it, "" when it takes it.
    Privileges: CAP_BPF, CAP_NET_ADMIN.
    Raises: HostError when they can not be compiled.
    """
    bpf = _compile()
    wanted = [("clrk_stamp", _PROG_SK_MSG, _ATTACH_SK_MSG_VERDICT)]
    wanted += [(hook.function, hook.program_type, hook.attach_type) for hook in _CGROUP_HOOKS]
    found: dict[str, str] = {}
    try:
        for function, program_type, attach_type in wanted:
            try:
                _load(bpf, function, program_type, attach_type)
                found[function] = ""
            except HostError as exc:
                found[function] = str(exc)
    finally:
        bpf.cleanup()
    return found


def read_source() -> str:
    """Return stamp.bpf.c with the files of lib/ pasted in, each once, with #line marks.

    bcc rewrites map operations in the main file only, so the preprocessor must not be the one to include them.
    """
    folder = resources.files(__package__)
    pasted: set[str] = set()

    def paste(name: str) -> str:
        text = folder.joinpath(name).read_text(encoding="ascii")

        def expand(match: re.Match[str]) -> str:
            included = match[1]
            line = text.count("\n", 0, match.end()) + 1
            if included in pasted:
                return "\n"
            pasted.add(included)
            return f'#line 1 "ebpf/{included}"\n{paste(included)}#line {line} "ebpf/{name}"\n'

        return _LOCAL_INCLUDE.sub(expand, text)

    return f'#line 1 "ebpf/stamp.bpf.c"\n{paste("stamp.bpf.c")}'


def _compile() -> Any:
    bpf_class = _import_bcc()
    headers = find_kernel_headers()
    with resources.as_file(resources.files("clrk.core").joinpath("wire.h")) as wire_h, headers.environment():
        cflags = [*_CFLAGS, f"-I{wire_h.parent}", *headers.cflags]
        try:
            return bpf_class(text=read_source().encode(), cflags=cflags)
        except Exception as exc:  # bcc raises bare Exception; the compiler's messages are on stderr
            raise HostError(f"compile stamp.bpf.c: {exc}") from exc


def _import_bcc() -> Callable[..., Any]:
    try:
        from bcc import BPF
    except ImportError as exc:
        raise HostError(
            f"import bcc: {exc}; apt install python3-bpfcc, and use a virtual environment of /usr/bin/python3 with "
            "--system-site-packages"
        ) from exc
    bpf_class: Callable[..., Any] = BPF
    return bpf_class


def _load(bpf: Any, function: str, program_type: int, attach_type: int) -> int:
    try:
        loaded = bpf.load_func(function.encode(), program_type, attach_type=attach_type)
    except Exception as exc:  # bcc raises bare Exception; the verifier's log is on stderr
        raise HostError(f"load {function}: {exc}; needs CAP_BPF and CAP_NET_ADMIN, Linux 5.15 or newer") from exc
    return int(loaded.fd)


def _open_map(bpf: Any, name: str, key_size: int, value_size: int) -> maps.Map:
    from bcc import lib  # bcc's own tables can not show a SOCKHASH

    return maps.Map(int(lib.bpf_table_fd(bpf.module, name.encode())), key_size, value_size)


def _open_cgroup(cgroup_dir: Path) -> int:
    try:
        return os.open(cgroup_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError(f"open cgroup {cgroup_dir}: {exc.strerror}") from exc


def _attach_hook(bpf: Any, hook: _Hook, cgroup_dir: Path, cgroup_fd: int) -> int:
    program_fd = _load(bpf, hook.function, hook.program_type, hook.attach_type)
    try:
        return maps.create_link(program_fd, cgroup_fd, hook.attach_type)
    except OSError as exc:
        raise HostError(
            f"attach {hook.function} to {cgroup_dir}: {exc.strerror}; needs a cgroup v2 directory and CAP_BPF"
        ) from exc


def _remove_leftovers(cgroup_dir: Path, cgroup_fd: int) -> None:
    """Programs of two runtimes on one cgroup run one after the other: the second would see rewritten addresses."""
    try:
        removed = maps.detach_links(cgroup_fd)
        for hook in _CGROUP_HOOKS:
            removed += maps.detach_programs(cgroup_fd, hook.attach_type)
    except OSError as exc:
        raise HostError(f"detach what is left on {cgroup_dir}: {exc.strerror}; needs CAP_SYS_ADMIN") from exc
    if removed:
        _log.info("detached %d programs that a predecessor left on %s", removed, cgroup_dir)
