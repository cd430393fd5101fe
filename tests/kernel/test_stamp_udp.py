"""UDP: DNS reaches the sandbox's resolver, loopback is free, everything else is EPERM."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest
from harness import EGRESS_V4, FAR_V4, FAR_V6, METADATA_V4, Sandbox, errno_of
from instances import DEADLINE_S

pytestmark = pytest.mark.kernel


def udp(family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE_S)
    return sock


def echo(sandbox: Sandbox, count: int = 1) -> list[tuple[str, int]]:
    """Play the resolver: answer each query with itself, reversed."""
    sources = []
    for _ in range(count):
        query, source = sandbox.listeners["dns_udp"].recvfrom(512)
        sandbox.listeners["dns_udp"].sendto(query[::-1], source)
        sources.append(source)
    return sources


NAMESERVERS = [(socket.AF_INET, FAR_V4), (socket.AF_INET6, f"::ffff:{FAR_V4}"), (socket.AF_INET, EGRESS_V4)]


@pytest.mark.parametrize(("family", "server"), NAMESERVERS, ids=["v4", "mapped", "resolver"])
def test_an_unconnected_socket_asks_any_nameserver(sandbox: Sandbox, family: int, server: str) -> None:
    def agent() -> tuple[bytes, tuple[str, int]]:
        sock = udp(family)
        sock.sendto(b"query", (server, 53))
        answer, source = sock.recvfrom(512)
        return answer, source[:2]

    child = sandbox.spawn(agent)
    echo(sandbox)
    assert child.result() == (b"yreuq", (server, 53))


@pytest.mark.parametrize(("family", "server"), NAMESERVERS, ids=["v4", "mapped", "resolver"])
def test_a_connected_socket_sees_the_nameserver_it_asked(sandbox: Sandbox, family: int, server: str) -> None:
    def agent() -> list[object]:
        sock = udp(family)
        sock.connect((server, 53))
        seen: list[object] = [sock.getpeername()[:2]]
        for _ in range(2):
            sock.send(b"query")
            answer, source = sock.recvfrom(512)
            seen += [answer, source[:2]]
        return seen

    child = sandbox.spawn(agent)
    echo(sandbox, 2)
    assert child.result() == [(server, 53), *[b"yreuq", (server, 53)] * 2]


def test_several_nameservers_on_one_socket(sandbox: Sandbox) -> None:
    def agent() -> list[str]:
        sock = udp()
        seen = []
        for server in ("8.8.8.8", "1.1.1.1", EGRESS_V4, "9.9.9.9"):
            sock.sendto(b"query", (server, 53))
            seen.append(sock.recvfrom(512)[1][0])
        return seen

    child = sandbox.spawn(agent)
    echo(sandbox, 4)
    assert child.result() == ["8.8.8.8", "1.1.1.1", EGRESS_V4, "9.9.9.9"]


def test_everything_else_is_refused(sandbox: Sandbox, counted: Callable[[str], int]) -> None:
    targets = [
        (FAR_V4, 443),
        (FAR_V4, 123),
        (EGRESS_V4, 15001),
        (METADATA_V4, 80),
        ("100.64.0.1", 9),
        ("224.0.0.1", 5353),
    ]
    targets6 = [(FAR_V6, 443), (f"::ffff:{FAR_V4}", 443), ("fd00:c1::2", 9), ("ff02::1", 5353)]

    def agent() -> list[int | None]:
        sock, sock6 = udp(), udp(socket.AF_INET6)
        answers = [errno_of(sock.sendto, b"x", target) for target in targets]
        answers += [errno_of(sock.connect, target) for target in targets]
        answers += [errno_of(sock6.sendto, b"x", target) for target in targets6]
        answers += [errno_of(sock6.connect, target) for target in targets6]
        return answers

    wanted = 2 * (len(targets) + len(targets6))
    assert sandbox.run(agent) == [errno.EPERM] * wanted
    assert counted("refused_udp") == wanted


def test_dns_over_ipv6_is_refused_not_lost(sandbox: Sandbox, counted: Callable[[str], int]) -> None:
    """There is one resolver, on IPv4. A clear error lets a stub resolver go on to its next nameserver at once."""

    def agent() -> list[int | None]:
        sock = udp(socket.AF_INET6)
        return [errno_of(sock.sendto, b"x", (FAR_V6, 53)), errno_of(sock.connect, (FAR_V6, 53))]

    assert sandbox.run(agent) == [errno.EPERM] * 2
    assert counted("refused_udp_dns6") == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::"])
@pytest.mark.parametrize("port", [53, 9999])
def test_loopback_is_free(sandbox: Sandbox, address: str, port: int) -> None:
    """Also for an own nameserver: the test binds port 53 as root, as an agent with that right could."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    home = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)

    def agent() -> tuple[bytes, bytes]:
        server = udp(family)
        server.bind((home, port))
        client = udp(family)
        client.sendto(b"unconnected", (address, port))
        first = server.recv(64)
        client.connect((address, port))
        client.send(b"connected")
        assert client.getpeername()[:2] == (home, port)
        return first, server.recv(64)

    assert sandbox.run(agent, uid=0) == (b"unconnected", b"connected")


def test_a_connect_to_any_from_the_resolvers_address_stays_on_loopback(sandbox: Sandbox) -> None:
    """0.0.0.0 would be the bound address: the resolver's socket reached by another way than the DNS rule."""

    def agent() -> str:
        sock = udp()
        sock.bind((EGRESS_V4, 0))
        sock.connect(("0.0.0.0", 4444))
        return sock.getpeername()[0]

    assert sandbox.run(agent) == "127.0.0.1"


def test_a_socket_goes_from_dns_to_loopback_and_shows_it(sandbox: Sandbox) -> None:
    def agent() -> list[tuple[str, int]]:
        sock = udp()
        sock.connect((FAR_V4, 53))
        first = sock.getpeername()
        sock.connect(("127.0.0.1", 5555))
        return [first, sock.getpeername()]

    assert sandbox.run(agent) == [(FAR_V4, 53), ("127.0.0.1", 5555)]
