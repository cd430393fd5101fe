"""Which sockets an agent may make, and what it may bind."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest
from harness import EGRESS_V4, EGRESS_V6, METADATA_V4, METADATA_V6, Sandbox, errno_of

pytestmark = pytest.mark.kernel

IPPROTO_UDPLITE, IPPROTO_MPTCP, IPPROTO_SCTP = 136, 262, 132


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tcp_and_udp_exist(sandbox: Sandbox, family: int) -> None:
    assert sandbox.run(errno_of, socket.socket, family, socket.SOCK_STREAM) is None
    assert sandbox.run(errno_of, socket.socket, family, socket.SOCK_DGRAM) is None


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        (socket.SOCK_DGRAM, IPPROTO_UDPLITE),
        (socket.SOCK_RAW, socket.IPPROTO_ICMP),
        (socket.SOCK_RAW, socket.IPPROTO_RAW),
        (socket.SOCK_RAW, socket.IPPROTO_TCP),
    ],
    ids=["udplite", "icmp", "raw", "raw-tcp"],
)
def test_nothing_else_does_not_even_for_root(
    sandbox: Sandbox, counted: Callable[[str], int], family: int, kind: int, protocol: int
) -> None:
    outside = errno_of(lambda: socket.socket(family, kind, protocol).close())
    assert outside is None, "outside the cgroup the socket can be made: it is the hook that refuses"
    assert sandbox.run(errno_of, socket.socket, family, kind, protocol, uid=0) == errno.EPERM
    assert counted("refused_socket") == 1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_ping_sockets(make_sandbox: Callable[..., Sandbox], counted: Callable[[str], int], family: int) -> None:
    sandbox = make_sandbox(sysctls={"net/ipv4/ping_group_range": "0 2147483647"})
    protocol = 58 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    assert sandbox.run(errno_of, socket.socket, family, socket.SOCK_DGRAM, protocol) == errno.EPERM
    assert counted("refused_socket") == 1


def test_mptcp(make_sandbox: Callable[..., Sandbox], counted: Callable[[str], int]) -> None:
    """With the sysctl off the protocol does not exist; with it on, the hook refuses it."""
    on = make_sandbox(sysctls={"net/mptcp/enabled": "1"})
    assert errno_of(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()) is None
    assert on.run(errno_of, socket.socket, socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) == errno.EPERM
    assert counted("refused_socket") == 1
    off = make_sandbox()
    assert off.run(errno_of, socket.socket, socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) == errno.ENOPROTOOPT


OURS_V4 = [(address, port) for address in ("0.0.0.0", EGRESS_V4, METADATA_V4, "100.64.0.1") for port in (15001, 4318)]
OURS_V6 = [(address, port) for address in ("::", EGRESS_V6, METADATA_V6, "fd00:c1::2") for port in (15001, 4318)]
OURS_MAPPED = [(f"::ffff:{address}", port) for address, port in OURS_V4]
LOW = [("0.0.0.0", 80), ("0.0.0.0", 53), (METADATA_V4, 80), (EGRESS_V4, 53)]


def bind_reusing(address: str, port: int, kind: int) -> None:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if ":" in address:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_the_listeners_ports_can_not_be_taken(
    make_sandbox: Callable[..., Sandbox], counted: Callable[[str], int], kind: int
) -> None:
    """Not even when the gateway's listeners are gone, and not by root (whose ports 53 and 80 would be)."""
    sandbox = make_sandbox(register=True)
    for listener in sandbox.listeners.values():
        listener.close()
    for uid, targets in ((65534, OURS_V4 + OURS_V6 + OURS_MAPPED), (0, OURS_V4 + OURS_V6 + OURS_MAPPED + LOW)):
        answers = sandbox.run(lambda t=targets: [errno_of(bind_reusing, *target, kind) for target in t], uid=uid)
        assert answers == [errno.EPERM] * len(targets)
    assert counted("refused_bind") == 2 * len(OURS_V4 + OURS_V6 + OURS_MAPPED) + len(LOW)


def test_without_the_hook_the_gateways_port_could_be_taken(make_sandbox: Callable[..., Sandbox]) -> None:
    """The attack itself: outside the cgroup (no hook) an unprivileged process binds the abandoned port."""
    sandbox = make_sandbox()
    for listener in sandbox.listeners.values():
        listener.close()
    sandbox.cgroup = sandbox.cgroup.parent  # the v2 root: no program of ours
    assert sandbox.run(errno_of, bind_reusing, EGRESS_V4, 15001, socket.SOCK_STREAM) is None


def test_agents_bind_what_is_theirs(sandbox: Sandbox) -> None:
    targets = [
        ("127.0.0.1", 8080),
        ("127.0.0.1", 15001),
        ("::1", 4318),
        ("::ffff:127.0.0.1", 15001),
        ("0.0.0.0", 8081),
        ("::", 8082),
        ("100.64.0.1", 8083),
        ("0.0.0.0", 0),
        ("::", 0),
    ]
    assert sandbox.run(lambda: [errno_of(bind_reusing, *target, socket.SOCK_STREAM) for target in targets]) == [
        None
    ] * len(targets)


def test_port_zero_never_becomes_one_of_ours(make_sandbox: Callable[..., Sandbox]) -> None:
    """The reserved ports keep bind(0), listen() and connect() away from 15001 when nothing else is left."""
    narrow = {"net/ipv4/ip_local_port_range": "15000 15001"}
    sandbox = make_sandbox(sysctls=narrow)
    sandbox.listeners["egress4"].close()

    def agent() -> tuple[list[int], int | None]:
        held = [socket.socket()]
        held[0].bind((EGRESS_V4, 0))
        another = socket.socket()
        return [sock.getsockname()[1] for sock in held], errno_of(another.bind, (EGRESS_V4, 0))

    assert sandbox.run(agent) == ([15000], errno.EADDRINUSE)
    open_ports = make_sandbox(sysctls={**narrow, "net/ipv4/ip_local_reserved_ports": ""})
    open_ports.listeners["egress4"].close()

    def unreserved() -> set[int]:
        held = [socket.socket(), socket.socket()]
        for sock in held:
            sock.bind((EGRESS_V4, 0))
        return {sock.getsockname()[1] for sock in held}

    assert open_ports.run(unreserved) == {15000, 15001}, "without the sysctl the kernel would hand it out"
