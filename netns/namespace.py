"""Makes, finds and removes the network namespaces of sandboxes.

Theory of operation. One dedicated thread (NamespaceMaker) does everything that must happen *inside* a namespace:
unshare(CLONE_NEWNET) moves that thread alone into a fresh namespace owned by the user namespace of the process;
addresses, routes and sysctls are set and the listeners opened there; the namespace is bind-mounted under /run/netns,
so that `ip netns exec` finds it; then the thread goes back to where it came from. No other thread ever changes its
namespace, and no pooled thread is used, because a failure half-way would leave that thread in the wrong one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from clrk.core.errors import HostError
from clrk.core.ids import NetnsName

from .plan import ADDRESSES, SYSCTLS, TSTAMP_ALLOW_DATA, Sysctl
from .sockets import open_listeners, read_cookie

NETNS_DIR: Final = Path("/run/netns")  # where iproute2 looks

_CLONE_NEWNET: Final = 0x40000000  # include/uapi/linux/sched.h
_MS_BIND: Final = 0x1000  # include/uapi/linux/mount.h
_MS_REC: Final = 0x4000
_MS_SHARED: Final = 1 << 20
_MNT_DETACH: Final = 2
_EINVAL: Final = 22
_ENOENT: Final = 2

_LOOPBACK_INDEX: Final = 1
_IFA_F_NODAD: Final = 0x02  # include/uapi/linux/if_addr.h
_SCOPE_LINK: Final = 253

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A configured namespace with its open listeners.

    Shape: listeners are in StartedFd order; handle is an open fd of the namespace for setns.
    Side effects: the holder closes listeners and handle, and calls `remove`.
    """

    name: NetnsName
    cookie: int
    handle: int
    listeners: tuple[socket.socket, ...]

    def close(self) -> None:
        """Close what this process holds of the namespace; idempotent for the sockets, once for the handle."""
        for sock in self.listeners:
            sock.close()
        os.close(self.handle)


class NamespaceMaker:
    """The thread that enters namespaces."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clrk-netns")

    def submit(self, name: NetnsName) -> Future[Namespace]:
        """Make the namespace in the maker's thread.

        Raises: (through the future) HostError; nothing of the namespace is left then.
        Privileges: CAP_SYS_ADMIN.
        """
        return self._executor.submit(_create_or_explain, name)

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def ensure_netns_dir() -> None:
    """Make /run/netns a shared mount point, as iproute2 does: namespaces removed here vanish in every mount namespace.

    Raises: HostError.
    Privileges: CAP_SYS_ADMIN.
    """
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        _mount(None, str(NETNS_DIR), _MS_SHARED | _MS_REC)
    except OSError as exc:
        if exc.errno != _EINVAL:  # EINVAL: not a mount point yet
            raise HostError(f"make {NETNS_DIR} a shared mount: {exc.strerror}") from exc
        _mount(str(NETNS_DIR), str(NETNS_DIR), _MS_BIND | _MS_REC)
        _mount(None, str(NETNS_DIR), _MS_SHARED | _MS_REC)


def remove(name: NetnsName) -> None:
    """Unmount and unlink the namespace's file. Idempotent.

    Raises: HostError when the file can not go.
    """
    path = NETNS_DIR / name
    # Once for each mount stacked on the file; EINVAL says that none is left, ENOENT that the file is gone.
    while _LIBC.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        _LOG.debug("namespace unmounted", extra={"netns": name})
    if (code := ctypes.get_errno()) not in (_EINVAL, _ENOENT):
        raise HostError(f"unmount {path}: {os.strerror(code)}")
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise HostError(f"unlink {path}: {exc.strerror}") from exc


def _create_or_explain(name: NetnsName) -> Namespace:
    try:
        return _create(name)
    except OSError as exc:  # no fd or memory left: what is opened on the way has no message of its own
        raise HostError(f"make network namespace {name}: {exc.strerror}") from exc


def _create(name: NetnsName) -> Namespace:
    with ExitStack() as undo:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, home)
        undo.callback(_enter, home)
        _check(_LIBC.unshare(_CLONE_NEWNET), f"create network namespace {name}")
        _configure(name)
        listeners = open_listeners()
        with ExitStack() as half_made:
            for sock in listeners:
                half_made.callback(sock.close)
            cookie = read_cookie(listeners[0])
            handle = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            half_made.callback(os.close, handle)
            _make_pin(name)  # fails if the name is taken: then it is not ours to remove
            half_made.callback(remove, name)
            _pin(name)
            half_made.pop_all()
        return Namespace(name=name, cookie=cookie, handle=handle, listeners=listeners)


def _enter(handle: int) -> None:
    """Move the calling thread into a namespace. A maker stranded in a sandbox's must not go on: fatal if it fails."""
    _check(_LIBC.setns(handle, _CLONE_NEWNET), "return to the host's network namespace")


def _make_pin(name: NetnsName) -> None:
    try:
        os.close(os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except OSError as exc:
        raise HostError(f"make {NETNS_DIR / name}: {exc.strerror}") from exc


def _pin(name: NetnsName) -> None:
    try:
        _mount(f"/proc/self/task/{threading.get_native_id()}/ns/net", str(NETNS_DIR / name), _MS_BIND)
    except OSError as exc:
        raise HostError(f"pin network namespace at {NETNS_DIR / name}: {exc.strerror}") from exc


def _configure(name: NetnsName) -> None:
    for setting in SYSCTLS:
        _write_sysctl(setting)
    _write_tstamp_allow_data()
    try:
        with IPRoute() as route:
            route.link("set", index=_LOOPBACK_INDEX, state="up")
            for address, length in ADDRESSES:
                flags = _IFA_F_NODAD if ":" in address else 0
                route.addr("add", index=_LOOPBACK_INDEX, address=address, prefixlen=length, flags=flags)
            # Link scope and an explicit 0.0.0.0/0: the kernel refuses a default route of global scope through lo.
            route.route("add", dst="0.0.0.0/0", oif=_LOOPBACK_INDEX, scope=_SCOPE_LINK)
            route.route("add", dst="::/0", oif=_LOOPBACK_INDEX, family=socket.AF_INET6)
    except NetlinkError as exc:
        raise HostError(f"configure lo of {name}: {exc}; needs IPv4 and IPv6 in the kernel") from exc


def _write_sysctl(setting: Sysctl) -> None:
    try:
        Path(setting.path).write_text(setting.value)
    except FileNotFoundError:
        if setting.required:
            raise HostError(f"{setting.name} does not exist; the kernel lacks what clrk needs") from None
    except OSError as exc:
        raise HostError(f"set {setting.name}={setting.value}: {exc.strerror}") from exc


def _write_tstamp_allow_data() -> None:
    """Write it only where it is per namespace: there, a fresh namespace shows files of its own.

    A host-wide file would change the host. net.core holds per-namespace files only, outside the initial namespace,
    since Linux registers the host-wide table there alone.
    """
    if os.path.exists(TSTAMP_ALLOW_DATA.path):
        _write_sysctl(TSTAMP_ALLOW_DATA)


def _mount(source: str | None, target: str, flags: int) -> None:
    raw_source = None if source is None else os.fsencode(source)
    if _LIBC.mount(raw_source, os.fsencode(target), None, flags, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def _check(result: int, action: str) -> None:
    if result != 0:
        raise HostError(f"{action}: {os.strerror(ctypes.get_errno())}; needs CAP_SYS_ADMIN")
