"""The files, environment and descriptors that an agent finds in a sandbox, and no others (CONTRACT section 8)."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import LAYOUT, Host, read_all, run_in, running_host, task_agent, wait_readable

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


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/sudoers", "/etc/ssh", "/etc/clrk", "/etc/machine-id",
        "/root", "/home", "/var/lib", "/var/log", "/boot", "/srv", "/mnt", "/media",
        pytest.param(str(LAYOUT.run_dir), id="run_dir"), "/run/netns", "/run/systemd", "/run/dbus",
        "/sys/fs", "/sys/kernel", "/dev/kmsg", "/dev/mem",
        "/dev/vda", "/dev/kvm",
    ],
)  # fmt: skip
async def test_absent(host: Host, path: str) -> None:
    ran = await host.python(f"import os; print(os.path.lexists({path!r}))")
    assert ran.out.strip() == "False"


async def test_folders_of_this_host_alone_are_absent_and_so_are_their_sockets(host: Host) -> None:
    """A read-only mount does not keep an agent from connecting to a service's socket in it: nothing would be traced."""
    folder = Path(f"/{LAYOUT.instance}-data")
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
    of_the_host = Path("/tmp", f"{LAYOUT.instance}-file")
    of_the_host.write_text("host")
    try:
        first = await host.sh("ls -A /tmp /dev/shm /run; touch /tmp/mine /dev/shm/mine && ls /tmp")
        second = await host.sh("ls -A /tmp /dev/shm; ls -A /var/tmp/")
    finally:
        of_the_host.unlink()
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


@pytest.mark.parametrize("path", ["/opt/agent", "/opt/a/b/c", "/usr/local/lib/agent-x", "/usr/share/agent-x"])
async def test_a_mount_may_lie_where_the_host_has_nothing(host: Host, secret_tree: Path, path: str) -> None:
    """What else is in the folders above is there as before, and still read-only."""
    above = Path(*Path(path).parts[:2])
    beside = set(os.listdir(above))
    script = f"cat {path}/public; ls {above}; touch /usr/x {path}/x {Path(path).parent}/x; true"
    ran = await host.sh(script, mounts=[{"hostPath": str(secret_tree), "path": path}])
    first, *listed = ran.out.split()
    assert (first, ran.err.count("Read-only file system")) == ("public", 3), ran
    assert beside & set(os.listdir(above)) <= set(listed)  # other tests make and remove folders there


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


async def test_only_the_three_fds(host: Host) -> None:
    with open("/etc/passwd") as inheritable:
        os.set_inheritable(inheritable.fileno(), True)
        ran = await host.python("import os; print(sorted(os.listdir('/proc/self/fd'), key=int)[:-1])")
    assert ran.out.strip() == "['0', '1', '2']"


async def test_stdio_can_be_opened_by_path(host: Host) -> None:
    ran = await host.sh("echo out > /dev/stdout; echo err > /dev/stderr; echo more | tee /dev/stderr")
    assert (ran.out, ran.err) == ("out\nmore\n", "err\nmore\n")


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
