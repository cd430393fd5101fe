"""The gateway's drop of privileges: what is left afterwards is checked, and a gateway that kept anything does not run.

The parent is usually a bwrap that left CAP_SETUID, CAP_SETGID and CAP_SETPCAP, all of which are needed here and gone
afterwards. prctl is untyped and wrapped here only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

import prctl

from clrk.core.errors import HostError

_CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_MAX_OPEN_FILES: Final = 1_048_576


def raise_open_files() -> None:
    """Use as many file descriptors as the hard limit allows. Each connection costs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def drop_privileges(uid: int, gid: int) -> None:
    """Become uid and gid for ever, without groups and capabilities, and die with the parent.

    Raises: HostError when anything of the former power is left; the process must then end.
    Privileges: CAP_SETUID, CAP_SETGID and CAP_SETPCAP, or being uid and gid already (then nothing needs dropping but
        the bounding set, which takes CAP_SETPCAP).
    """
    if uid <= 0 or gid <= 0:
        raise HostError(f"the gateway does not run as uid {uid}, gid {gid}")
    parent = os.getppid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        prctl.set_keepcaps(False)
        _clear_bounding_set()
        prctl.cap_inheritable.limit()  # bwrap leaves what it was told to keep in this set as well
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        prctl.set_no_new_privs(True)
        prctl.set_dumpable(False)
        prctl.set_pdeathsig(signal.SIGKILL)  # after setresuid: a change of credentials clears it
    except OSError as exc:
        raise HostError(f"drop of privileges to uid {uid}: {exc.strerror}") from exc
    if os.getppid() != parent:  # it died before the signal was armed
        raise HostError("the runtime is gone")
    check_privileges(uid, gid)


def check_privileges(uid: int, gid: int) -> None:
    """Refuse a process that has more power than a plain user.

    Raises: HostError that names what is left.
    """
    status = _read_status()
    left = [f"{name} {status[name]}" for name in _CAPABILITY_SETS if int(status[name], 16)]
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        left.append(f"uids {os.getresuid()}, gids {os.getresgid()}")
    if os.getgroups():
        left.append(f"groups {os.getgroups()}")
    if status["NoNewPrivs"] != "1":
        left.append("no_new_privs is off")
    if prctl.get_dumpable():
        left.append("the process is dumpable")
    if prctl.get_pdeathsig() != signal.SIGKILL:
        left.append("no parent-death signal")
    if left:
        raise HostError(f"the gateway refuses to run with: {'; '.join(left)}")


def _clear_bounding_set() -> None:
    """Drop every capability that this kernel knows, also those newer than the prctl module."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for capability in range(last + 1):
        _capbset_drop(capability)


_PR_CAPBSET_DROP: Final = 24  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def _capbset_drop(capability: int) -> None:
    if capability in prctl.ALL_CAPS:
        prctl.capbset_drop(capability)
    elif _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"drop capability {capability}")


def _read_status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
