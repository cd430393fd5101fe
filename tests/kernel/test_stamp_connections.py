"""What connect() leads to: the stamp, the flow record, and the destinations that are left alone or refused."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from harness import (
    AGENT_UID,
    EGRESS_V4,
    EGRESS_V6,
    FAR_V4,
    FAR_V6,
    METADATA_V4,
    METADATA_V6,
    Sandbox,
    dial,
    errno_of,
    parse_with_oracle,
)
from instances import DEADLINE_S

from clrk.core import wire

pytestmark = pytest.mark.kernel

MAPPED = f"::ffff:{FAR_V4}"


@pytest.mark.parametrize(
    ("address", "listener"), [(FAR_V4, "egress4"), (FAR_V6, "egress6"), (MAPPED, "egress4")], ids=["v4", "v6", "mapped"]
)
def test_the_stamp_is_what_the_record_implies(sandbox: Sandbox, address: str, listener: str) -> None:
    def agent() -> Any:
        sock = dial(address, 443)
        sock.sendall(b"hello")
        return sock.getpeername()[:2], sock.getsockname()[:2], sock.recv(16)

    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    child = sandbox.spawn(agent)
    conn = sandbox.accept(listener)
    record = sandbox.take(conn)
    header = conn.read(wire.HEADER_SIZE)
    assert conn.read(5) == b"hello"
    conn.sock.sendall(b"answer")
    peer, source, answer = child.result()

    assert record is not None
    assert (record.dst, record.dst_port) == (ip_address(FAR_V6 if listener == "egress6" else FAR_V4), 443)
    assert record.family == conn.family
    assert (record.tgid, record.uid) == (child.pid, AGENT_UID)
    assert record.comm == Path("/proc/self/comm").read_bytes().strip()
    assert before_ns < record.connect_ns < time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert header == sandbox.expected_header(conn, record)

    parsed = parse_with_oracle(header)
    assert parsed.dest == (record.dst, 443)
    assert parsed.source == (ip_address(conn.peer[0]), conn.peer[1])
    assert parsed.tlv[0xEB] == struct.pack(
        "!QQII16s", record.cookie, record.connect_ns, child.pid, AGENT_UID, record.comm
    )
    assert parsed.tlv[0xE2] == b"tester"
    assert parsed.tlv[0xE5] == sandbox.fields.invocation_id.encode()
    assert peer == (address, 443)
    assert source[1] == conn.peer[1]
    assert answer == b"answer"


def test_the_record_is_there_when_accept_returns(sandbox: Sandbox) -> None:
    def agent() -> None:
        for _ in range(300):
            dial(FAR_V4, 22).close()

    child = sandbox.spawn(agent)
    for _ in range(300):
        conn = sandbox.accept()
        record = sandbox.take(conn)
        assert record is not None
        assert record.dst_port == 22
        assert conn.read_all() == b""
        conn.sock.close()
    child.result()


def test_the_server_may_speak_first(sandbox: Sandbox) -> None:
    def agent() -> bytes:
        sock = dial(FAR_V4, 25)
        greeting = sock.recv(64)
        sock.sendall(b"EHLO\r\n")
        return greeting

    child = sandbox.spawn(agent)
    conn = sandbox.accept()
    record = sandbox.take(conn)
    conn.sock.sendall(b"220 ready\r\n")
    assert record is not None
    assert conn.read(wire.HEADER_SIZE) == sandbox.expected_header(conn, record)
    assert conn.read_all() == b"EHLO\r\n"
    assert child.result() == b"220 ready\r\n"


def test_each_record_has_its_own_local_source_address(sandbox: Sandbox) -> None:
    """One source port on two local addresses: two connections, two records."""

    def agent() -> None:
        socks = []
        for source, target in (("100.64.0.1", "192.0.2.1"), (METADATA_V4, "192.0.2.2")):
            sock = socket.socket()
            sock.bind((source, 40000))
            sock.connect((target, 443))
            socks.append(sock)
        for sock in socks:
            sock.sendall(b"x")

    child = sandbox.spawn(agent)
    seen = {}
    for _ in range(2):
        conn = sandbox.accept()
        record = sandbox.take(conn)
        assert record is not None
        assert conn.read(wire.HEADER_SIZE) == sandbox.expected_header(conn, record)
        seen[conn.peer] = str(record.dst)
    child.result()
    assert seen == {("100.64.0.1", 40000): "192.0.2.1", (METADATA_V4, 40000): "192.0.2.2"}


@pytest.mark.parametrize(
    ("address", "port", "listener"),
    [
        (METADATA_V4, 80, "metadata4"),
        (f"::ffff:{METADATA_V4}", 80, "metadata4"),
        (METADATA_V6, 80, "metadata6"),
        (EGRESS_V4, 4318, "otlp"),
        (EGRESS_V4, 53, "dns_tcp"),
    ],
)
def test_services_of_ours_pass_untouched(sandbox: Sandbox, address: str, port: int, listener: str) -> None:
    def agent() -> tuple[str, int]:
        sock = dial(address, port)
        sock.sendall(b"plain")
        return sock.getpeername()[:2]

    child = sandbox.spawn(agent)
    conn = sandbox.accept(listener)
    assert conn.read_all() == b"plain"
    assert child.result() == (address, port)
    assert sandbox.take(conn) is None


@pytest.mark.parametrize(("address", "port"), [(METADATA_V4, 443), (METADATA_V6, 8080), (EGRESS_V4, 80)])
def test_other_ports_of_our_addresses_are_redirected(sandbox: Sandbox, address: str, port: int) -> None:
    child = sandbox.spawn(lambda: dial(address, port).sendall(b"x"))
    _, record = sandbox.accept_stamped("egress6" if ":" in address else "egress4")
    child.result()
    assert (str(record.dst), record.dst_port) == (address, port)


@pytest.mark.parametrize("address", [EGRESS_V4, f"::ffff:{EGRESS_V4}", EGRESS_V6])
def test_the_egress_listener_can_not_be_dialled(sandbox: Sandbox, counted: Callable[[str], int], address: str) -> None:
    assert sandbox.run(errno_of, dial, address, 15001) == errno.EPERM
    assert counted("refused_connect_listener") == 1
    assert sandbox.nothing_waits()


@pytest.mark.parametrize("address", ["0.0.0.0", "::ffff:0.0.0.0", "::"])
def test_a_connect_to_any_from_the_listeners_address_is_loopback(sandbox: Sandbox, address: str) -> None:
    """The kernel would read 0.0.0.0 as the address the socket is bound to: the listener's, past the hook."""

    def agent() -> int | None:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        source = {"0.0.0.0": EGRESS_V4, "::ffff:0.0.0.0": f"::ffff:{EGRESS_V4}", "::": EGRESS_V6}[address]
        sock.bind((source, 0))
        sock.settimeout(DEADLINE_S)
        return errno_of(sock.connect, (address, 15001))

    assert sandbox.run(agent) == errno.ECONNREFUSED
    assert sandbox.nothing_waits("egress4")
    assert sandbox.nothing_waits("egress6")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_the_agents_own(sandbox: Sandbox, counted: Callable[[str], int], address: str) -> None:
    def agent() -> bytes:
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        server.bind((address, 8080))
        server.listen()
        client = dial(address, 8080)
        client.sendall(b"to myself")
        conn, _ = server.accept()
        assert conn.getpeername() == client.getsockname()
        assert client.getpeername()[:2] == (address, 8080)
        return conn.recv(1000)

    assert sandbox.run(agent) == b"to myself"
    assert counted("connect_redirected") == 0
    assert counted("stamped") == 0


def test_an_unknown_namespace_may_do_nothing(
    make_sandbox: Callable[..., Sandbox], counted: Callable[[str], int]
) -> None:
    stranger = make_sandbox(register=False)
    assert stranger.run(errno_of, socket.socket, socket.AF_INET, socket.SOCK_STREAM) == errno.EPERM
    assert stranger.run(errno_of, socket.socket, socket.AF_INET6, socket.SOCK_DGRAM) == errno.EPERM
    assert counted("refused_unknown_netns") == 2

    # Sockets made while it was known do not outlive that.
    stranger.register()
    here, there = socket.socketpair()

    def agent() -> list[int | None]:
        tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp6, udp6 = socket.socket(socket.AF_INET6), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        there.send(b"made")
        there.recv(1)
        return [
            errno_of(tcp.bind, ("127.0.0.1", 8080)),
            errno_of(tcp6.bind, ("::1", 8080)),
            errno_of(tcp.connect, (FAR_V4, 443)),
            errno_of(tcp.connect, ("127.0.0.1", 443)),
            errno_of(tcp6.connect, (FAR_V6, 443)),
            errno_of(udp.connect, (FAR_V4, 53)),
            errno_of(udp.sendto, b"x", (FAR_V4, 53)),
            errno_of(udp6.sendto, b"x", ("::1", 53)),
        ]

    child = stranger.spawn(agent)
    assert here.recv(4) == b"made"
    stranger.stamp.unregister(stranger.cookie)
    here.send(b"x")
    assert child.result() == [errno.EPERM] * 8
    here.close()
    there.close()


def test_a_send_after_unregister_is_dropped(sandbox: Sandbox, counted: Callable[[str], int]) -> None:
    here, there = socket.socketpair()

    def agent() -> int | None:
        sock = dial(FAR_V4, 443)
        there.send(b"connected")
        there.recv(1)
        return errno_of(sock.send, b"late")

    child = sandbox.spawn(agent)
    here.recv(16)
    conn = sandbox.accept()
    sandbox.stamp.unregister(sandbox.cookie)
    assert sandbox.take(conn) is None  # unregister removed the record that nobody had taken
    here.send(b"x")
    assert child.result() == errno.EACCES
    assert conn.read_all() == b""
    assert counted("dropped_unknown_netns") == 1
    here.close()
    there.close()


def test_accepted_sockets_and_listeners_of_the_agent_leave_no_record(sandbox: Sandbox) -> None:
    """A passive open is never a flow: only ACTIVE_ESTABLISHED writes records."""

    def agent() -> None:
        server = socket.create_server(("100.64.0.1", 9000))
        sock = dial("100.64.0.1", 9000)  # not loopback: goes to the gateway, as every destination does
        sock.sendall(b"x")
        server.settimeout(0)
        assert errno_of(server.accept) == errno.EAGAIN

    child = sandbox.spawn(agent)
    _, record = sandbox.accept_stamped()
    child.result()
    assert (str(record.dst), record.dst_port) == ("100.64.0.1", 9000)
    assert sandbox.stamp.entries()["flows"] == 0


def test_who_connected_is_who_is_named(sandbox: Sandbox) -> None:
    """The header names the process that called connect(), whoever sends the first byte."""

    def agent() -> int:
        ctypes.CDLL(None).prctl(15, b"sixteen-chars-xy", 0, 0, 0)  # PR_SET_NAME
        sock = dial(FAR_V4, 443)
        if (pid := os.fork()) == 0:
            sock.sendall(b"from the child")
            os._exit(0)
        os.waitpid(pid, 0)
        return os.getpid()

    child = sandbox.spawn(agent, uid=12345)
    conn, record = sandbox.accept_stamped()
    assert conn.read_all() == b"from the child"
    assert record.tgid == child.result()
    assert (record.comm, record.uid) == (b"sixteen-chars-x", 12345)


def test_non_blocking_connect_and_send(sandbox: Sandbox) -> None:
    def agent() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        assert sock.connect_ex((FAR_V4, 443)) in (0, errno.EINPROGRESS)
        sock.settimeout(DEADLINE_S)
        sock.sendall(b"as soon as possible")

    child = sandbox.spawn(agent)
    conn, _ = sandbox.accept_stamped()
    assert conn.read_all() == b"as soon as possible"
    child.result()


def test_empty_connections_have_no_header(sandbox: Sandbox, counted: Callable[[str], int]) -> None:
    def agent() -> None:
        dial(FAR_V4, 443).close()
        dial(FAR_V4, 443).send(b"")

    child = sandbox.spawn(agent)
    for _ in range(2):
        conn = sandbox.accept()
        assert sandbox.take(conn) is not None
        assert conn.read_all() == b""
    child.result()
    assert counted("stamped") == 0


def test_templates_can_be_replaced(sandbox: Sandbox) -> None:
    """A warm sandbox is registered first and told its invocation later."""
    sandbox.templates = tuple(t.replace(b"tester", b"second") for t in sandbox.templates)  # type: ignore[assignment]
    sandbox.register()
    child = sandbox.spawn(lambda: dial(FAR_V4, 443).sendall(b"x"))
    conn = sandbox.accept()
    record = sandbox.take(conn)
    header = conn.read(wire.HEADER_SIZE)
    child.result()
    assert record is not None
    assert parse_with_oracle(header).tlv[0xE2] == b"second"
    assert header == sandbox.expected_header(conn, record)
