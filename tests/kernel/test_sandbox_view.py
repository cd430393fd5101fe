"""What an agent can see and do in a sandbox, and above all what it can not (CONTRACT section 8)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import LAYOUT, Host, read_all, run_in, running_host, task_agent

from clrk.core.errors import HostError
from clrk.runtime.view import CA_BUNDLE, CA_VARIABLES

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]

DEFAULT_NAMES = {"PATH", "HOME", "PWD", *CA_VARIABLES}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with running_host() as running:
        yield running


@pytest.fixture
def secret_tree(tmp_path: Path) -> Iterator[Path]:
    """A host folder outside of what sandboxes see, with a public and a private file."""
    tmp_path.chmod(0o755)
    (tmp_path / "public").write_text("public\n")
    (tmp_path / "private").write_text("private\n")
    (tmp_path / "private").chmod(0o600)
    return tmp_path


# --- identity and privileges ----------------------------------------------------------------------------------------


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


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/sudoers", "/etc/ssh", "/etc/clrk", "/etc/machine-id",
        "/root", "/home", "/var/lib", "/var/log", "/boot", "/srv", "/mnt", "/media",
        str(LAYOUT.run_dir), "/run/netns", "/run/systemd", "/run/dbus",
        "/sys/fs", "/sys/kernel", "/dev/kmsg", "/dev/mem",
        "/dev/vda", "/dev/kvm",
    ],
)  # fmt: skip
async def test_absent(host: Host, path: str) -> None:
    ran = await host.python(f"import os; print(os.path.lexists({path!r}))")
    assert ran.out.strip() == "False"


async def test_folders_of_this_host_alone_are_absent_and_so_are_their_sockets(host: Host) -> None:
    """A read-only mount does not keep an agent from connecting to a service's socket in it: nothing would be traced."""
    folder = Path(f"/clrkh-data-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        with socket.socket(socket.AF_UNIX) as service:
            service.bind(str(folder / "service.sock"))
            service.listen()
            (folder / "service.sock").chmod(0o666)
            script = f"import socket; print(socket.socket(socket.AF_UNIX).connect_ex('{folder}/service.sock'))"
            ran = await host.python(script)
    finally:
        shutil.rmtree(folder)
    assert ran.out.strip() == str(errno.ENOENT)


async def test_etc_holds_nothing_that_the_world_may_not_read(host: Host) -> None:
    hidden = [
        os.path.join(folder, name)
        for folder, folders, names in os.walk("/etc")
        for name in (*folders, *names)
        if not os.path.islink(path := os.path.join(folder, name)) and not os.stat(path).st_mode & 0o004
    ]
    assert hidden, "this host has no private file under /etc: the test would prove nothing"
    ran = await host.python(f"import os; print([path for path in {hidden!r} if os.path.lexists(path)])")
    assert ran.out.strip() == "[]"


async def test_the_network_files_are_the_sandboxs(host: Host) -> None:
    ran = await host.sh("cat /etc/resolv.conf /etc/hosts /etc/hostname; hostname; grep hosts: /etc/nsswitch.conf")
    assert ran.out.startswith("nameserver 169.254.0.1\n")
    assert "127.0.0.1 localhost" in ran.out
    assert ran.out.splitlines()[-3:] == ["sandbox", "sandbox", "hosts: files dns"]


async def test_the_ca_bundle_is_the_systems_and_ours(host: Host) -> None:
    paths = [CA_BUNDLE, "/etc/ssl/cert.pem", "/etc/pki/tls/certs/ca-bundle.crt"]
    ran = await host.sh(f"cat {' '.join(paths)}; env")
    bundle, _, environment = ran.out.rpartition("-----\n")
    assert bundle.count("\nours\n") == len(paths)
    assert bundle.count("-----BEGIN CERTIFICATE-----") > 3 * 50
    assert {line for line in environment.splitlines() if line.endswith(CA_BUNDLE)} == {
        f"{name}={CA_BUNDLE}" for name in CA_VARIABLES
    }


async def test_tmp_is_private_and_empty(host: Host) -> None:
    with open("/tmp/clrk-host-tests-file", "w") as stream:
        stream.write("host")
    try:
        first = await host.sh("ls -A /tmp /dev/shm /run; touch /tmp/mine /dev/shm/mine && ls /tmp")
        second = await host.sh("ls -A /tmp /dev/shm; ls -A /var/tmp/")
    finally:
        os.unlink("/tmp/clrk-host-tests-file")
    assert first.out.split() == ["/dev/shm:", "/run:", "clrk", "/tmp:", "mine"]
    assert second.out.split() == ["/dev/shm:", "/tmp:"]


async def test_tmp_has_a_size(host: Host) -> None:
    ran = await host.sh("head -c 64M /dev/zero > /tmp/big; stat -c %s /tmp/big", resources={"memory": "64Mi"})
    assert int(ran.out) <= 32 * 2**20
    assert "No space left" in ran.err
    assert not ran.exit.oom


async def test_mounts_are_as_declared(host: Host, secret_tree: Path) -> None:
    mounts = [
        {"hostPath": str(secret_tree), "path": "/data/deep/ro"},
        {"hostPath": str(secret_tree), "path": "/tmp/rw", "readOnly": False},
    ]
    ran = await host.sh(
        "cat /data/deep/ro/public; cat /data/deep/ro/private; echo x > /data/deep/ro/new", mounts=mounts
    )
    assert ran.out == "public\n"
    assert "Permission denied" in ran.err
    assert "Read-only file system" in ran.err
    secret_tree.chmod(0o777)
    await host.sh("echo written > /tmp/rw/new", mounts=mounts)
    assert (secret_tree / "new").read_text() == "written\n"


async def test_a_missing_mount_source_fails_the_spawn(host: Host) -> None:
    with pytest.raises(HostError, match="/no/such/folder does not exist"):
        await host.sh("true", mounts=[{"hostPath": "/no/such/folder", "path": "/data"}])


async def test_another_rootfs(host: Host, tmp_path: Path) -> None:
    """A folder with one static program and an /etc of its own; the drop does not depend on what is in it."""
    tmp_path.chmod(0o755)
    for folder in ("bin", "etc", "lib64", "lib/x86_64-linux-gnu", "private"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "private").chmod(0o700)
    (tmp_path / "etc/shadow").write_text("secret")
    (tmp_path / "etc/shadow").chmod(0o600)
    (tmp_path / "etc/motd").write_text("from the image\n")
    for source, target in (
        ("/bin/dash", "bin/sh"),
        ("/bin/cat", "bin/cat"),
        ("/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libc.so.6"),
    ):
        subprocess.run(["cp", "-L", source, tmp_path / target], check=True)
    script = "cat /etc/motd /etc/resolv.conf; echo /*; cat /etc/shadow; cat /proc/self/status"
    ran = await host.sh(script, rootfs=str(tmp_path))
    assert ran.out.startswith("from the image\nnameserver 169.254.0.1\n")
    assert "/usr" not in ran.out
    assert "/private" not in ran.out
    assert "No such file" in ran.err
    assert "CapEff:\t0000000000000000" in ran.out


@pytest.fixture(params=["bundle", "certs", "etc"])
def linked_image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image in whose /etc something is a link to a host path that the sandbox must not see."""
    tmp_path.chmod(0o755)
    private, image = tmp_path / "private", tmp_path / "image"
    private.mkdir(mode=0o700)
    (private / "ca-certificates.crt").write_text("from the host\n")
    for source in ("/bin/sh", "/bin/cat", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"):
        (image / source[1:]).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-L", source, image / source[1:]], check=True)
    certs = image / "etc/ssl/certs"
    certs.mkdir(parents=True)
    link, target = {
        "bundle": (certs / "ca-certificates.crt", private / "ca-certificates.crt"),
        "certs": (certs, private),
        "etc": (image / "etc", tmp_path / "private-etc"),
    }[request.param]
    (tmp_path / "private-etc/ssl").mkdir(parents=True)
    (tmp_path / "private-etc/ssl/certs").symlink_to(private)
    (tmp_path / "private-etc/ca-certificates.crt").write_text("from the host\n")
    (tmp_path / "private-etc").chmod(0o755)
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(target)
    return image


async def test_an_image_can_not_show_host_files_by_links(host: Host, linked_image: Path) -> None:
    private = linked_image.parent / "private"
    script = f"cat {CA_BUNDLE} /etc/ca-certificates.crt /etc/ssl/cert.pem; cat /etc/resolv.conf"
    ran = await host.sh(script, rootfs=str(linked_image))
    assert "from the host" not in ran.out
    assert ran.out.endswith("nameserver 169.254.0.1\noptions timeout:2 attempts:2 ndots:1\n")
    assert os.listdir(private) == ["ca-certificates.crt"]  # nothing was added on the host either
    assert (private / "ca-certificates.crt").read_text() == "from the host\n"


async def test_workdir_and_an_unknown_command(host: Host) -> None:
    assert (await host.sh("pwd", workdir="/usr/lib")).out == "/usr/lib\n"
    missing = await host.run("/no/such/program")
    assert missing.exit.exit_code == 127
    assert "No such file" in missing.err


# --- environment and fds --------------------------------------------------------------------------------------------


async def test_the_environment_is_only_what_is_listed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_SECRET", "x")
    ran = await host.run("/usr/bin/env", "-0", environment={"GREETING": "a b\nc=d", "PATH": "/usr/bin"})
    seen = dict(item.split("=", 1) for item in ran.out.rstrip("\0").split("\0"))
    assert seen.keys() == DEFAULT_NAMES | {"GREETING"}
    assert seen["GREETING"] == "a b\nc=d"
    assert seen["PATH"] == "/usr/bin"


async def test_loader_variables_reach_the_agent_but_not_the_drop(host: Host, tmp_path: Path) -> None:
    """A library that an agent could have written in an earlier run must not be loaded while there are capabilities."""
    tmp_path.chmod(0o755)
    source = tmp_path / "early.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        '__attribute__((constructor)) static void f(void) { dprintf(2, "loaded as %d\\n", getuid()); }\n'
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "early.so", source], check=True)
    sandbox = await host.pool.acquire()
    try:
        ran = await run_in(
            sandbox, "/bin/true",
            environment={"LD_PRELOAD": "/tmp/lib/early.so"}, mounts=[{"hostPath": str(tmp_path), "path": "/tmp/lib"}],
        )  # fmt: skip
    finally:
        await sandbox.remove()
    assert ran.err.splitlines() == [f"loaded as {sandbox.uid}"]


async def test_an_images_preload_file_is_not_for_the_drop(host: Host, tmp_path: Path) -> None:
    """The loader of setpriv would load what /etc/ld.so.preload names, as root and with CAP_SETUID."""
    tmp_path.chmod(0o755)
    for source in ("/bin/sh", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"):
        (tmp_path / source[1:]).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-L", source, tmp_path / source[1:]], check=True)
    program = (
        "#include <stdio.h>\n#include <unistd.h>\n"
        '__attribute__((constructor)) static void f(void) { dprintf(2, "loaded as %d\\n", getuid()); }\n'
    )
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", tmp_path / "lib/early.so", "-"]
    subprocess.run(command, input=program, text=True, check=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.preload").write_text("/lib/early.so\n")
    ran = await host.sh("true", rootfs=str(tmp_path))
    assert (ran.err, ran.exit.exit_code) == ("", 0)


async def test_secrets_are_not_on_any_command_line(host: Host) -> None:
    secret = f"hunter2-{os.urandom(8).hex()}"
    sandbox = await host.pool.acquire()
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        agent = task_agent("/bin/sh", "-c", "echo $TOKEN; read line")
        # The last two only look like variables of the loader and the C library.
        secrets = dict.fromkeys(("TOKEN", "LANGSMITH_API_KEY", "LD_SDK_KEY"), secret)
        spawned = await sandbox.spawn(agent=agent, environment=secrets)
        assert await asyncio.to_thread(wait_readable, stdout) == f"{secret}\n".encode()
        family = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True, check=True).stdout
        assert f"/run/clrk/launch {sandbox.uid}" in family
        assert secret not in family
        assert secret.encode() not in Path(f"/proc/{spawned.pid}/environ").read_bytes()
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        await sandbox.wait()
    finally:
        await sandbox.remove()


def wait_readable(fd: int) -> bytes:
    os.set_blocking(fd, True)
    return os.read(fd, 4096)


async def test_only_the_three_fds(host: Host) -> None:
    inheritable = os.dup2(os.open("/etc/passwd", os.O_RDONLY), 200, inheritable=True)
    try:
        ran = await host.python("import os; print(sorted(os.listdir('/proc/self/fd'), key=int)[:-1])")
    finally:
        os.close(inheritable)
    assert ran.out.strip() == "['0', '1', '2']"


async def test_stdio_can_be_opened_by_path(host: Host) -> None:
    ran = await host.sh("echo out > /dev/stdout; echo err > /dev/stderr; echo more | tee /dev/stderr")
    assert (ran.out, ran.err) == ("out\nmore\n", "err\nmore\n")


# --- other sandboxes, and the host's processes and sockets ------------------------------------------------------------


@asynccontextmanager
async def sleeping(host: Host) -> AsyncIterator[int]:
    """Another sandbox with a listening socket and a file. Yields the pid of its first process on the host."""
    sandbox = await host.pool.acquire()
    script = (
        "import socket, sys\n"
        "open('/tmp/neighbour', 'w').write('x'); open('/dev/shm/neighbour', 'w').write('x')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0clrk-neighbour'); s.listen()\n"
        "t = socket.create_server(('127.0.0.1', 8099))\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        agent = task_agent("/usr/bin/python3", "-I", "-c", script)
        spawned = await sandbox.spawn(agent=agent, environment={})
        assert await asyncio.to_thread(wait_readable, stdout) == b"ready\n"
        yield spawned.pid
        for fd in (stdin, stdout, stderr):
            os.close(fd)
    finally:
        await sandbox.remove()


async def test_a_neighbour_is_invisible(host: Host) -> None:
    async with sleeping(host) as pid:
        ran = await host.python(
            "import os, socket, json\n"
            "def attempt(f):\n"
            "    try: f(); return 0\n"
            "    except OSError as exc: return exc.errno\n"
            "unix = socket.socket(socket.AF_UNIX)\n"
            "print(json.dumps([\n"
            "    sorted(int(name) for name in os.listdir('/proc') if name.isdigit()),\n"
            "    attempt(lambda: unix.connect('\\0clrk-neighbour')),\n"
            "    attempt(lambda: socket.create_connection(('127.0.0.1', 8099))),\n"
            f"    attempt(lambda: os.kill({pid}, 0)),\n"
            "    os.path.exists('/tmp/neighbour') or os.path.exists('/dev/shm/neighbour'),\n"
            "]))\n"
        )
    assert json.loads(ran.out) == [[1, 2], errno.ECONNREFUSED, errno.ECONNREFUSED, errno.ESRCH, False]


async def test_sandboxes_share_no_uid_no_namespace_and_no_cookie(host: Host) -> None:
    names = ("net", "pid", "mnt", "ipc", "uts", "cgroup")
    async with sleeping(host) as pid:
        first = {name: os.readlink(f"/proc/{await agent_pid(pid)}/ns/{name}") for name in names}
        sandbox = await host.pool.acquire()
        try:
            ran = await run_in(sandbox, "/bin/sh", "-c", "cd /proc/self/ns && readlink " + " ".join(names))
        finally:
            await sandbox.remove()
        other = await host.pool.acquire()
        try:
            assert other.uid != sandbox.uid
            assert other.netns_cookie != sandbox.netns_cookie
        finally:
            await other.remove()
    for name, second in zip(names, ran.out.split(), strict=True):
        assert len({os.readlink(f"/proc/self/ns/{name}"), first[name], second}) == 3, name


async def agent_pid(monitor: int) -> int:
    """The agent is the only child of bwrap's pid 1, which is the only child of its monitor."""
    children = [Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()]
    children.append(Path(f"/proc/{children[0][0]}/task/{children[0][0]}/children").read_text().split())
    return int(children[1][0])


async def test_host_abstract_sockets_are_out_of_reach(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0clrk-host-service")
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\0clrk-host-service")  # it is there
        ran = await host.python(
            "import socket\n"
            "try: socket.socket(socket.AF_UNIX).connect('\\0clrk-host-service'); print('reached')\n"
            "except OSError as exc: print(exc.errno)\n"
        )
    assert ran.out.strip() == str(errno.ECONNREFUSED)


async def test_host_loopback_is_out_of_reach(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})))"
        assert (await host.python(script)).out.strip() == str(errno.ECONNREFUSED)


async def test_only_lo_is_seen(host: Host) -> None:
    ran = await host.python("import socket; print([name for _, name in socket.if_nameindex()])")
    assert ran.out.strip() == "['lo']"


async def test_reading_a_pipe_to_its_end(host: Host) -> None:
    """A megabyte through each pipe, more than one pipe holds, arrives whole."""
    sandbox = await host.pool.acquire()
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        await sandbox.spawn(agent=task_agent("/bin/sh", "-c", "tee /dev/stderr"), environment={})
        reading = asyncio.gather(read_all(stdout), read_all(stderr))
        os.set_blocking(stdin, True)

        def feed() -> None:
            with open(stdin, "wb") as stream:
                stream.write(b"0123456789abcdef" * 65_536)

        await asyncio.to_thread(feed)
        out, err = await reading
        assert out == err == "0123456789abcdef" * 65_536
    finally:
        await sandbox.remove()


@pytest.mark.parametrize("path", ["/opt/agent", "/opt/a/b/c", "/usr/local/lib/agent-x", "/usr/share/agent-x"])
async def test_a_mount_may_lie_where_the_host_has_nothing(host: Host, secret_tree: Path, path: str) -> None:
    """What else is in the folders above is there as before, and still read-only."""
    beside = sorted(os.listdir(Path("/", *Path(path).parts[1:2])))
    script = f"cat {path}/public; ls {Path(*Path(path).parts[:2])}; touch /usr/x {path}/x {Path(path).parent}/x; true"
    ran = await host.sh(script, mounts=[{"hostPath": str(secret_tree), "path": path}])
    first, *listed = ran.out.split()
    assert (first, ran.err.count("Read-only file system")) == ("public", 3), ran
    assert sorted({*listed, *beside}) == sorted(listed)
