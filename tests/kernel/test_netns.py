"""Namespaces with only `lo`: what is in them, and that nothing of them stays."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from instances import DEADLINE_S, instance

from clrk.core.errors import HostError
from clrk.core.ids import NetnsName
from clrk.core.messages import StartedFd
from clrk.netns import namespace, plan, reconcile
from clrk.netns.namespace import NETNS_DIR, Namespace, NamespaceMaker
from clrk.netns.sockets import read_cookie

pytestmark = pytest.mark.kernel

PREFIX = f"{instance('n')}-"
NAME = NetnsName(f"{PREFIX}0000000a")


@pytest.fixture
def maker() -> Iterator[NamespaceMaker]:
    namespace.ensure_netns_dir()
    maker = NamespaceMaker()
    yield maker
    maker.close()
    reconcile.remove_leftovers(PREFIX)


@pytest.fixture
def space(maker: NamespaceMaker) -> Iterator[Namespace]:
    made = maker.submit(NAME).result()
    yield made
    made.close()


def run_inside(*command: str) -> str:
    return subprocess.run(["ip", "netns", "exec", NAME, *command], capture_output=True, text=True, check=True).stdout


def test_without_a_free_fd_the_reason_is_named(maker: NamespaceMaker) -> None:
    """Any other exception than a HostError would end the pool's refill, and leave callers without an answer."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    maker.submit(NAME).result().close()  # the thread runs
    namespace.remove(NAME)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        failed = maker.submit(NAME).exception(DEADLINE_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(failed, HostError)
    assert str(failed) == f"make network namespace {NAME}: Too many open files"
    maker.submit(NAME).result().close()


def test_only_lo_is_there(space: Namespace) -> None:
    lines = run_inside("ip", "-o", "link").splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["lo"]
    assert "UP" in lines[0]


def test_addresses_and_routes(space: Namespace) -> None:
    shown = run_inside("ip", "-o", "addr")
    for address, length in plan.ADDRESSES:
        assert f" {address}/{length} " in shown
    assert "tentative" not in shown
    assert "default dev lo" in run_inside("ip", "route")
    assert "default dev lo" in run_inside("ip", "-6", "route")


def test_listeners_are_in_order_and_inside(space: Namespace) -> None:
    assert len(space.listeners) == StartedFd.STDIN
    for fd, listener in plan.LISTENERS.items():
        sock = space.listeners[fd]
        assert sock.getsockname()[:2] == (listener.address, listener.port)
        assert read_cookie(sock) == space.cookie
        assert not sock.getblocking()
        assert not os.get_inheritable(sock.fileno())
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
    with socket.socket() as outside:
        assert read_cookie(outside) != space.cookie


def test_sysctls_hold_inside_and_the_host_keeps_its_own(maker: NamespaceMaker) -> None:
    settings = [sysctl for sysctl in (*plan.SYSCTLS, plan.TSTAMP_ALLOW_DATA) if os.path.exists(sysctl.path)]
    before = [Path(sysctl.path).read_text() for sysctl in settings]
    space = maker.submit(NAME).result()
    try:
        for sysctl in settings:
            # The kernel prints ranges with a tab, and merges adjacent ports.
            assert run_inside("cat", sysctl.path).split() == sysctl.value.split(), sysctl.name
        assert [Path(sysctl.path).read_text() for sysctl in settings] == before
    finally:
        space.close()


def test_no_packet_leaves(space: Namespace) -> None:
    script = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.connect(('93.184.216.34', 53))\n"
        "print(s.getsockname()[0] in ('127.0.0.1', '100.64.0.1', '169.254.0.1', '169.254.169.254'))\n"
        "t = socket.socket()\n"
        "t.settimeout(0.2)\n"
        "print(t.connect_ex(('93.184.216.34', 80)) != 0)\n"
    )
    assert run_inside("/usr/bin/python3", "-I", "-c", script).split() == ["True", "True"]


def test_nobody_else_can_take_a_listeners_port(space: Namespace) -> None:
    script = (
        "import socket, sys\n"
        "for address in ('169.254.0.1', '0.0.0.0'):\n"
        "    s = socket.socket()\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "    try:\n"
        "        s.bind((address, 15001)); s.listen(); print('bound')\n"
        "    except OSError as exc: print(exc.errno)\n"
    )
    assert run_inside("/usr/bin/python3", "-I", "-c", script).split() == [str(errno.EADDRINUSE)] * 2


def test_maker_returns_to_the_host_namespace(space: Namespace, maker: NamespaceMaker) -> None:
    assert maker._executor.submit(os.readlink, "/proc/thread-self/ns/net").result() == os.readlink("/proc/self/ns/net")


def test_a_taken_name_fails_and_leaves_the_other_alone(space: Namespace, maker: NamespaceMaker) -> None:
    gc.collect()
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="File exists"):
        maker.submit(NAME).result()
    assert set(os.listdir("/proc/self/fd")) == fds
    assert "169.254.0.1" in run_inside("ip", "-o", "addr")
    assert maker._executor.submit(os.readlink, "/proc/thread-self/ns/net").result() == os.readlink("/proc/self/ns/net")


def test_remove_is_idempotent(space: Namespace) -> None:
    namespace.remove(NAME)
    namespace.remove(NAME)
    assert not (NETNS_DIR / NAME).exists()


def test_reconcile_removes_by_owned_prefix_only(space: Namespace) -> None:
    others = [NETNS_DIR / name for name in (f"{NAME}2", f"{PREFIX}xyz", f"x{NAME}", f"{PREFIX}0000000A")]
    for path in others:
        path.touch(exist_ok=False)
    try:
        assert reconcile.remove_leftovers(PREFIX) == (NAME,)
        assert all(path.exists() for path in others)
        assert not (NETNS_DIR / NAME).exists()
    finally:
        for path in others:
            path.unlink()


def test_reconcile_survives_a_file_that_was_never_mounted(maker: NamespaceMaker) -> None:
    (NETNS_DIR / NAME).touch()
    assert reconcile.remove_leftovers(PREFIX) == (NAME,)
