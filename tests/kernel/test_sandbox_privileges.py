"""Whom an agent runs as, and what the kernel refuses it (CONTRACT section 8)."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from host_harness import Host, run_in, running_host

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with running_host() as running:
        yield running


async def test_uid_gid_and_groups_are_the_sandboxs_own(host: Host) -> None:
    sandbox = await host.pool.acquire()
    try:
        ran = await run_in(sandbox, "/bin/sh", "-c", "id -u; id -g; id -G; id -un; id -gn; cd ~ && pwd")
    finally:
        await sandbox.remove()
    uid = str(sandbox.uid)
    assert ran.out.split() == [uid, uid, uid, "agent", "agent", "/tmp"]
    assert ran.exit.exit_code == 0


async def test_no_privilege_is_left(host: Host) -> None:
    ran = await host.sh("cat /proc/self/status")
    status = dict(line.split(":\t", 1) for line in ran.out.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


async def test_setuid_programs_give_nothing(host: Host) -> None:
    """su is setuid root on the host; no_new_privs makes it a plain program."""
    assert os.stat("/usr/bin/su").st_mode & 0o4000
    ran = await host.sh("cp /usr/bin/su /tmp/x; grep -c . /etc/shadow; su -c id")
    assert "uid=0" not in ran.out
    assert ran.exit.exit_code != 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", errno.EAFNOSUPPORT),
        ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", errno.EAFNOSUPPORT),
        ("socket.socket(38, socket.SOCK_SEQPACKET)", errno.EAFNOSUPPORT),  # AF_ALG
        ("socket.socket(45, socket.SOCK_DGRAM)", errno.EAFNOSUPPORT),
        ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)", errno.EPROTONOSUPPORT),  # audit
        ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)", errno.EPROTONOSUPPORT),  # sock_diag
        ("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", errno.EPERM),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)", errno.EACCES),
        ("syscall(425, 8, ctypes.create_string_buffer(256))", errno.EPERM),  # io_uring_setup
        ("syscall(41, 40, 1, 0)", errno.EAFNOSUPPORT),  # socket(AF_VSOCK)
        ("syscall(41, ctypes.c_ulong(0x100000028), 1, 0)", errno.EAFNOSUPPORT),  # its upper half is ignored
        ("syscall(272, 0x10000000)", errno.EPERM),  # unshare(CLONE_NEWUSER)
        ("syscall(272, 0x40000000)", errno.EPERM),  # unshare(CLONE_NEWNET)
        ("syscall(272, 0x10020000)", errno.EPERM),  # two flags at once
        ("syscall(56, 0x10000000 | 17, 0, 0, 0, 0)", errno.EPERM),  # clone(CLONE_NEWUSER)
        ("syscall(435, 0, 88)", errno.ENOSYS),  # clone3
        ("syscall(308, 0, 0)", errno.EPERM),  # setns
        ("syscall(165, b'none', b'/tmp', b'tmpfs', 0, 0)", errno.EPERM),  # mount
        ("syscall(166, b'/tmp', 2)", errno.EPERM),  # umount2
        ("syscall(428, -100, b'/', 0)", errno.EPERM),  # open_tree
        ("syscall(430, b'tmpfs', 0)", errno.EPERM),  # fsopen
        ("syscall(321, 0, 0, 0)", errno.EPERM),  # bpf
        ("syscall(298, 0, 0, 0, 0, 0)", errno.EPERM),  # perf_event_open
        ("syscall(323, 0)", errno.EPERM),  # userfaultfd
        ("syscall(250, 0, 0)", errno.EPERM),  # keyctl
        ("syscall(101, 0, 0, 0, 0)", errno.EPERM),  # ptrace(TRACEME)
        ("syscall(246, 0, 0, 0, 0)", errno.EPERM),  # kexec_load
        ("syscall(135, 0x0040000)", errno.EPERM),  # personality(ADDR_NO_RANDOMIZE)
        ("syscall(135, 0x0400000)", errno.EPERM),  # personality(READ_IMPLIES_EXEC)
        ("syscall(16, 0, 0x5412, b'x')", errno.EPERM),  # ioctl(TIOCSTI)
        ("syscall(16, 0, ctypes.c_ulong(0x100005412), b'x')", errno.EPERM),  # its upper half is ignored
        ("syscall(170, b'x', 1)", errno.EPERM),  # sethostname
        ("os.chroot('/tmp')", errno.EPERM),
        ("os.setuid(0)", errno.EPERM),
        ("os.mknod('/tmp/m', 0o20666, os.makedev(1, 1))", errno.EPERM),
        ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))", errno.EPERM),
        ("open('/etc/x', 'w')", errno.EROFS),
        ("open('/usr/x', 'w')", errno.EROFS),
        ("open('/x', 'w')", errno.EROFS),
        ("open('/proc/sys/net/ipv4/tcp_fastopen', 'w')", errno.EACCES),
        ("open('/proc/1/environ')", errno.EACCES),
        ("os.kill(1, 9)", errno.EPERM),
    ],
)
async def test_refused_with(host: Host, call: str, expected: int) -> None:
    ran = await host.python(
        "import ctypes, os, socket\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def syscall(*arguments):\n"
        "    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
        f"try: print({call})\n"
        "except OSError as exc: print(exc.errno)\n"
    )
    assert ran.out.strip() == str(expected), ran.err


async def test_what_programs_need_still_works(host: Host) -> None:
    ran = await host.python(
        "import socket, threading, subprocess, multiprocessing, tempfile, platform, pwd, os\n"
        "for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):\n"
        "    socket.socket(family).close()\n"
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()\n"
        "socket.socketpair()\n"
        "t = threading.Thread(target=lambda: None); t.start(); t.join()\n"
        "subprocess.run(['/bin/true'], check=True)\n"
        "multiprocessing.Lock()\n"  # /dev/shm
        "tempfile.TemporaryFile()\n"
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())\n"
        "s6 = socket.create_server(('::1', 0), family=socket.AF_INET6)\n"
        "c6 = socket.create_connection(s6.getsockname()[:2])\n"
        "print(socket.gethostbyname('localhost'), socket.gethostbyname(socket.gethostname()))\n"
        "print(pwd.getpwuid(os.getuid()).pw_name)\n"
    )
    assert ran.err == ""
    assert ran.out.split() == ["127.0.0.1", "127.0.1.1", "agent"]


async def test_a_32_bit_call_is_fatal(host: Host) -> None:
    """int 0x80 from 64-bit code reaches the i386 table, which the filter does not describe."""
    ran = await host.python(
        "import ctypes, mmap\n"
        "m = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n"
        "print('survived')\n"
    )
    assert "survived" not in ran.out
    assert ran.exit.exit_code in (128 + 31, 128 + 11)  # SIGSYS; SIGSEGV on a kernel without the i386 table
