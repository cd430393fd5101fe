"""One socket, several connect() calls: only the last one counts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Callable

import pytest
from harness import EGRESS_V4, FAR_V4, Sandbox, dial, errno_of

from clrk.core import wire

pytestmark = pytest.mark.kernel


def disconnect(sock: socket.socket) -> None:
    """connect(AF_UNSPEC), which Python can not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16):
        raise OSError(ctypes.get_errno(), "disconnect")


def fionread(sock: socket.socket, wanted: int) -> int:
    """What FIONREAD says once wanted bytes can be read."""
    assert len(sock.recv(wanted, socket.MSG_PEEK | socket.MSG_WAITALL)) == wanted
    raw = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, raw)
    return int.from_bytes(raw, "little")


def test_reconnect_after_unspec_is_stamped_with_the_new_destination(
    sandbox: Sandbox, counted: Callable[[str], int]
) -> None:
    here, there = socket.socketpair()

    def agent() -> None:
        sock = socket.socket()
        for last in range(1, 7):
            sock.connect((f"192.0.2.{last}", 1000 + last))
            if last % 3:  # every third says nothing, and goes on with the header still owed
                sock.sendall(b"x")
            there.recv(1)
            disconnect(sock)

    child = sandbox.spawn(agent)
    for last in range(1, 7):
        conn = sandbox.accept()
        record = sandbox.take(conn)
        assert record is not None
        assert (str(record.dst), record.dst_port) == (f"192.0.2.{last}", 1000 + last)
        if last % 3:
            assert conn.read(wire.HEADER_SIZE + 1) == sandbox.expected_header(conn, record) + b"x"
        here.send(b"n")
    child.result()
    assert counted("stamped") == counted("sockmap_left") == 4
    assert sandbox.stamp.entries()["socks"] == 0
    here.close()
    there.close()


def test_reconnect_to_loopback_takes_no_stamp_along(sandbox: Sandbox) -> None:
    def agent() -> bytes:
        server = socket.create_server(("127.0.0.1", 9000))
        sock = dial(FAR_V4, 443)  # in the SOCKHASH, header not yet written
        disconnect(sock)
        sock.connect(("127.0.0.1", 9000))
        sock.sendall(b"plain")
        assert sock.getpeername() == ("127.0.0.1", 9000)
        conn = server.accept()[0]
        conn.sendall(b"back")
        assert fionread(sock, 4) == 4  # a socket that were still in the SOCKHASH would say 0
        return conn.recv(4096)

    assert sandbox.run(agent) == b"plain"
    assert sandbox.stamp.entries()["socks"] == 0


def test_a_failed_connect_leaves_no_destination_behind(sandbox: Sandbox) -> None:
    def agent() -> None:
        sock = socket.socket()
        assert errno_of(sock.connect, (EGRESS_V4, 15001)) == errno.EPERM
        sock.connect((FAR_V4, 443))
        sock.sendall(b"x")
        blocked = socket.socket()
        blocked.bind(("100.64.0.1", 0))
        blocked.connect(("192.0.2.7", 7))
        blocked.sendall(b"x")

    child = sandbox.spawn(agent)
    destinations = {str(sandbox.accept_stamped()[1].dst) for _ in range(2)}
    child.result()
    assert destinations == {FAR_V4, "192.0.2.7"}


def test_concurrent_connects_of_one_socket_yield_one_true_record(sandbox: Sandbox) -> None:
    """Two threads race connect() on one socket; what the record says is what getpeername says.

    By source ports: the order in which connections reach the listener is not that of the connect() calls.
    """
    rounds = 200

    def agent() -> list[tuple[int, tuple[str, int]]]:
        peers = []
        for _ in range(rounds):
            sock = socket.socket()
            start = threading.Barrier(2)

            def race(target: tuple[str, int], sock: socket.socket = sock, start: threading.Barrier = start) -> None:
                start.wait()
                errno_of(sock.connect, target)

            threads = [threading.Thread(target=race, args=((f"192.0.2.{n}", n),)) for n in (1, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peers.append((sock.getsockname()[1], sock.getpeername()))
            sock.sendall(b"x")
            sock.close()
        return peers

    child = sandbox.spawn(agent)
    seen = []
    for _ in range(rounds):
        conn, record = sandbox.accept_stamped()
        seen.append((conn.peer[1], (str(record.dst), record.dst_port)))
        assert conn.read_all() == b"x"
    assert sorted(child.result()) == sorted(seen)
