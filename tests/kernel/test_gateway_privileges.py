"""The gateway's drop of privileges, in a real process that starts as root."""

import os
import subprocess
import sys
import textwrap

import pytest
from instances import DEADLINE_S, DIES_WITH_US

pytestmark = pytest.mark.kernel

UID = 2_987_654


def run_as_root(body, **kwargs):
    """Run Python code in a fresh process, with the functions under test imported."""
    head = "import os, resource\nfrom clrk.core.errors import HostError\nfrom clrk.gateway.privileges import *\n"
    return subprocess.run(
        [sys.executable, "-P", "-c", head + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        **kwargs,
    )


def test_nothing_is_left():
    done = run_as_root(
        f"""
        os.setgroups([0, 4, 27])
        drop_privileges({UID}, {UID})
        for line in open("/proc/self/status"):
            if line.startswith(("Cap", "Uid", "Gid", "Groups", "NoNewPrivs")):
                print(" ".join(line.split()))
        print(resource.getrlimit(resource.RLIMIT_CORE))
        """
    )
    assert done.returncode == 0, done.stderr
    zero = "0" * 16
    assert done.stdout.splitlines() == [
        f"Uid: {UID} {UID} {UID} {UID}",
        f"Gid: {UID} {UID} {UID} {UID}",
        "Groups:",
        *(f"{name}: {zero}" for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
        "NoNewPrivs: 1",
        "(0, 0)",
    ]


@pytest.mark.parametrize(
    "attempt",
    [
        "os.setuid(0)",
        "os.setresgid(0, 0, 0)",
        "os.setgroups([0])",
        "open('/etc/shadow')",
        "os.chroot('/')",
        "os.kill(1, 0)",
        "os.mkdir('/sys/fs/cgroup/clrk-test-escape')",
    ],
)
def test_there_is_no_way_back(attempt):
    done = run_as_root(f"drop_privileges({UID}, {UID})\n{attempt}\n")
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


def test_set_user_id_programs_give_nothing():
    done = run_as_root(
        f"drop_privileges({UID}, {UID})\nos.execv('/bin/su', ['su', '-c', 'id -u'])", stdin=subprocess.DEVNULL
    )
    assert done.returncode != 0
    assert done.stdout.strip() != "0"


def test_its_memory_is_not_for_its_own_uid():
    """Another process of the gateway's uid can not read it: it is not dumpable."""
    reader, writer = os.pipe()
    body = f"drop_privileges({UID}, {UID}); os.write({writer}, b'x'); signal.pause()"
    head = "import os, signal\nfrom clrk.gateway.privileges import *\n"
    with subprocess.Popen([sys.executable, "-P", "-c", head + body], pass_fds=(writer,)) as target:
        try:
            assert os.read(reader, 1) == b"x"
            peek = subprocess.run(
                ["cat", f"/proc/{target.pid}/environ"],
                user=UID,
                group=UID,
                extra_groups=[],
                capture_output=True,
                check=False,
            )
            assert peek.returncode != 0
            assert b"Permission denied" in peek.stderr
        finally:
            target.kill()
            os.close(reader)
            os.close(writer)


def test_it_dies_with_its_parent():
    reader, writer = os.pipe()
    child = f"drop_privileges({UID}, {UID}); os.write({writer}, str(os.getpid()).encode()); signal.pause()"
    head = "import os, signal, sys\nfrom clrk.gateway.privileges import *\n"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {head + child!r}], close_fds=False)"
    with subprocess.Popen([*DIES_WITH_US, sys.executable, "-P", "-c", parent], pass_fds=(writer,)) as process:
        os.close(writer)
        pid = int(os.read(reader, 16))
        pidfd = os.pidfd_open(pid)
        process.kill()
    assert os.read(reader, 1) == b""  # the last writer is gone
    os.close(pidfd)
    os.close(reader)


@pytest.mark.parametrize(("uid", "gid"), [(0, UID), (UID, 0), (-1, UID)])
def test_root_is_refused(uid, gid):
    done = run_as_root(f"drop_privileges({uid}, {gid})")
    assert "does not run as" in done.stderr


def test_what_is_left_is_named():
    done = run_as_root(f"""
        try:
            check_privileges({UID}, {UID})
        except HostError as exc:
            print(exc)
    """)
    for left in ("CapEff", "CapBnd", "uids", "no_new_privs", "dumpable", "parent-death"):
        assert left in done.stdout


def test_the_program_refuses_to_start_without_the_power_to_drop():
    """Imported as root: the checkout may be under a folder that nobody else can enter."""
    done = run_as_root(
        f"""
        import sys
        import uvloop
        from clrk.gateway import serve
        from clrk.gateway.main import main
        os.setgroups([])
        os.setgid({UID + 1})
        os.setuid({UID + 1})
        sys.argv = "clrk-gateway --uid {UID} --gid {UID} --control-fd 0 --state-dir /tmp".split()
        sys.exit(main())
        """
    )
    assert done.returncode == 1
    assert "drop of privileges" in done.stderr
