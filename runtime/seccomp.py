"""The system call filter of agents, built once and passed to bwrap as bytes.

A deny list on top of what an unprivileged uid in its own namespaces can not do anyway: it keeps whole kernel
subsystems, in which such limits have failed before, out of reach. Programs must meet errors they know how to handle,
hence EPERM, ENOSYS or EAFNOSUPPORT rather than a kill.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from functools import cache
from typing import Final

import seccomp

_DENIED: Final = (
    # io_uring opens sockets and files behind the filter's back (KERNEL.md section 3).
    "io_uring_setup", "io_uring_enter", "io_uring_register",
    # kernel subsystems that no agent needs
    "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "lookup_dcookie", "fanotify_init",
    "ptrace", "kcmp", "modify_ldt",
    # mounts and namespaces
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "setns", "name_to_handle_at", "open_by_handle_at", "quotactl", "quotactl_fd", "swapon", "swapoff",
    # the machine
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "acct", "syslog",
    "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "iopl", "ioperm", "vhangup", "nfsservctl", "uselib",
    "ustat", "sysfs", "_sysctl", "sethostname", "setdomainname", "move_pages", "migrate_pages",
)  # fmt: skip

_NAMESPACE_FLAGS: Final = (
    0x00000080,  # CLONE_NEWTIME
    0x00020000,  # CLONE_NEWNS
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
)
_CLONE_NEWTIME: Final = 0x00000080  # in clone() these bits are the exit signal

_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_NETLINK_ROUTE: Final = 0
_INT_MASK: Final = 0xFFFFFFFF  # the kernel reads these arguments as int and ignores the upper half

_TIOCSTI: Final = 0x5412  # puts input into a terminal
_TIOCLINUX: Final = 0x541C


@cache
def build_filter() -> bytes:
    """Return the BPF program as struct sock_filter[], for this machine's architecture.

    Foreign architectures (i386 and x32 calls on x86-64) kill the process: libseccomp's default.
    """
    program = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in _DENIED:
        _deny(program, errno.EPERM, name)
    # Its flags lie in memory, where a filter can not look; the C library falls back to clone().
    _deny(program, errno.ENOSYS, "clone3")
    for flag in _NAMESPACE_FLAGS:
        _deny(program, errno.EPERM, "unshare", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
        if flag != _CLONE_NEWTIME:
            _deny(program, errno.EPERM, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    _restrict_sockets(program)
    for request in (_TIOCSTI, _TIOCLINUX):
        _deny(program, errno.EPERM, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, _INT_MASK, request))
    _restrict_personality(program)
    with tempfile.TemporaryFile() as exported:
        program.export_bpf(exported)
        return os.pread(exported.fileno(), os.fstat(exported.fileno()).st_size, 0)


def _restrict_sockets(program: seccomp.SyscallFilter) -> None:
    """Deny every family but ours. One rule a family: libseccomp takes one comparison for each argument of a rule."""
    for call in ("socket", "socketpair"):
        for family in range(max(_FAMILIES)):
            if family not in _FAMILIES:
                _deny(program, errno.EAFNOSUPPORT, call, seccomp.Arg(0, seccomp.MASKED_EQ, _INT_MASK, family))
        # Also catches an upper half that is not zero.
        _deny(program, errno.EAFNOSUPPORT, call, seccomp.Arg(0, seccomp.GT, max(_FAMILIES)))
        _deny(
            program,
            errno.EPROTONOSUPPORT,
            call,
            seccomp.Arg(0, seccomp.EQ, socket.AF_NETLINK),
            seccomp.Arg(2, seccomp.NE, _NETLINK_ROUTE),
        )


def _restrict_personality(program: seccomp.SyscallFilter) -> None:
    """Allow only PER_LINUX (0) and the query (all ones): other values weaken the process, ADDR_NO_RANDOMIZE for one.

    A 32-bit number other than these two has a set bit whose next bit, cyclically, is clear: one rule for each.
    """
    for bit in range(32):
        here, after = 1 << bit, 1 << (bit + 1) % 32
        _deny(program, errno.EPERM, "personality", seccomp.Arg(0, seccomp.MASKED_EQ, here | after, here))


def _deny(program: seccomp.SyscallFilter, code: int, name: str, *arguments: seccomp.Arg) -> None:
    program.add_rule(seccomp.ERRNO(code), name, *arguments)
