"""A stamped socket behaves as a plain one: each scenario runs on both, and what client and server see must agree.

Plain is a connection to the OTLP listener, which passes the hooks untouched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import EGRESS_V4, FAR_V4, FAR_V6, Accepted, Sandbox, dial
from instances import DEADLINE_S

from clrk.core import wire

pytestmark = pytest.mark.kernel

MIB = 1 << 20
SO_ZEROCOPY, MSG_ZEROCOPY, SIOCOUTQ = 60, 0x4000000, termios.TIOCOUTQ
PATTERN = hashlib.shake_128(b"clrk").digest(8 * MIB)

Client = Callable[[socket.socket], Any]
Server = Callable[[Accepted], Any]


def digest(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


def read_to_end(conn: Accepted) -> Any:
    return digest(conn.read_all())


def both(sandbox: Sandbox, client: Client, server: Server = read_to_end) -> Any:
    """Run the scenario on a plain and on a stamped socket; return what both saw, which must be the same."""
    seen = []
    for target, listener in (((EGRESS_V4, 4318), "otlp"), ((FAR_V4, 443), "egress4"), ((FAR_V6, 443), "egress6")):

        def agent(target: tuple[str, int] = target) -> Any:
            sock = dial(*target)
            sock.settimeout(None)
            return client(sock)

        child = sandbox.spawn(agent)
        conn = sandbox.accept(listener)
        record = sandbox.take(conn)
        assert (record is None) == (listener == "otlp")
        if record is not None:
            assert conn.read(wire.HEADER_SIZE) == sandbox.expected_header(conn, record)
        at_server = server(conn)
        conn.sock.close()
        seen.append((child.result(), at_server))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    return seen[0]


@pytest.mark.parametrize("size", [1, 64, 65536, 65537, MIB], ids=str)
def test_size_of_the_first_message(sandbox: Sandbox, size: int) -> None:
    client, server = both(sandbox, lambda sock: sock.sendall(PATTERN[:size]))
    assert (client, server) == (None, digest(PATTERN[:size]))


def test_a_send_says_what_it_sent(sandbox: Sandbox) -> None:
    client, _ = both(sandbox, lambda sock: [sock.send(b""), sock.send(b"x"), sock.send(b"y" * 5000)])
    assert client == [0, 1, 5000]


def test_many_messages(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> int:
        at, size = 0, 1
        while at < len(PATTERN) // 4:
            sock.sendall(PATTERN[at : at + size])
            at, size = at + size, size * 3 % 100_003
        return at

    sent, received = both(sandbox, client)
    assert received == digest(PATTERN[:sent])


@pytest.mark.parametrize(("count", "size"), [(500, 37), (60, 5000), (1, 200_000)])
def test_writev(sandbox: Sandbox, count: int, size: int) -> None:
    def client(sock: socket.socket) -> int:
        return os.writev(sock.fileno(), [PATTERN[i * size : (i + 1) * size] for i in range(count)])

    sent, server = both(sandbox, client)
    assert (sent, server) == (count * size, digest(PATTERN[: count * size]))


def test_sendfile_as_first_write(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> None:
        source = os.memfd_create("pattern")
        os.write(source, PATTERN[: 2 * MIB])
        sent = 0
        while sent < 2 * MIB:
            sent += os.sendfile(sock.fileno(), source, sent, 2 * MIB - sent)

    assert both(sandbox, client)[1] == digest(PATTERN[: 2 * MIB])


def test_splice_as_first_write(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> None:
        read_end, write_end = os.pipe()
        for at in range(0, MIB, 65536):
            os.write(write_end, PATTERN[at : at + 65536])
            left = 65536
            while left:
                left -= os.splice(read_end, sock.fileno(), left)

    assert both(sandbox, client)[1] == digest(PATTERN[:MIB])


@pytest.mark.parametrize("first", ["cork", "more"])
def test_corked_first_write(sandbox: Sandbox, first: str) -> None:
    def client(sock: socket.socket) -> None:
        if first == "cork":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            sock.sendall(b"part one, ")
            sock.sendall(b"part two")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        else:
            sock.send(b"part one, ", socket.MSG_MORE)
            sock.send(b"part two")

    assert both(sandbox, client)[1] == digest(b"part one, part two")


def test_zerocopy_completions(sandbox: Sandbox) -> None:
    sends = 64

    def client(sock: socket.socket) -> int:
        sock.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        completed = 0

        def reap(flags: int) -> int:
            try:
                _, ancillary, _, _ = sock.recvmsg(0, 512, socket.MSG_ERRQUEUE | flags)
            except BlockingIOError:
                return 0
            _, _, data = ancillary[0]
            first, last = struct.unpack_from("=II", data, 8)  # struct sock_extended_err: ee_info, ee_data
            return last - first + 1

        poller = select.poll()
        poller.register(sock, 0)
        sock.sendall(b"plain")  # a stamped *first* message counts as two sends: ebpf/README.md, limits
        for n in range(sends):
            chunk = memoryview(PATTERN)[n * 32768 : (n + 1) * 32768]  # no copy: the kernel reads it later
            while chunk:
                chunk = chunk[sock.send(chunk, MSG_ZEROCOPY) :]
        while completed < sends and poller.poll(DEADLINE_S * 1000):
            completed += reap(socket.MSG_DONTWAIT)
        while (late := reap(socket.MSG_DONTWAIT)) or poller.poll(50):
            completed += late
        return completed

    completed, server = both(sandbox, client)
    assert (completed, server) == (sends, digest(b"plain" + PATTERN[: sends * 32768]))


def test_half_close_with_data_in_flight(sandbox: Sandbox) -> None:
    """A socket that stayed in the SOCKHASH fails this in most runs: recv() says EAGAIN."""

    def client(sock: socket.socket) -> Any:
        sock.sendall(PATTERN[:MIB])
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
        return digest(data)

    def server(conn: Accepted) -> Any:
        received = conn.read_all()
        conn.sock.sendall(PATTERN[MIB : 2 * MIB])
        return digest(received)

    for _ in range(12):
        assert both(sandbox, client, server) == (digest(PATTERN[MIB : 2 * MIB]), digest(PATTERN[:MIB]))


def test_fionread_poll_and_lowat(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> list[Any]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 5000)
        epoll = select.epoll()
        epoll.register(sock, select.EPOLLIN | select.EPOLLET)
        sock.sendall(b"request")
        events = epoll.poll(DEADLINE_S)
        waiting, unsent = bytearray(4), bytearray(4)
        fcntl.ioctl(sock, termios.FIONREAD, waiting)
        fcntl.ioctl(sock, SIOCOUTQ, unsent)
        seen = [[event for _, event in events], int.from_bytes(waiting, "little"), int.from_bytes(unsent, "little")]
        return [*seen, digest(sock.recv(5000, socket.MSG_WAITALL))]

    def server(conn: Accepted) -> bytes:
        request = conn.read(7)
        conn.sock.sendall(PATTERN[:5000])
        return request

    seen, request = both(sandbox, client, server)
    assert (seen, request) == ([[select.EPOLLIN], 5000, 0, digest(PATTERN[:5000])], b"request")


def test_fionread_before_the_first_send(sandbox: Sandbox) -> None:
    """The server speaks first, to a socket that is still in the SOCKHASH: known to differ, so only data is compared."""

    def client(sock: socket.socket) -> bytes:
        greeting = sock.recv(9, socket.MSG_WAITALL)
        sock.sendall(b"x")
        return greeting + sock.recv(4, socket.MSG_WAITALL)

    child = sandbox.spawn(lambda: client(dial(FAR_V4, 25)))
    conn = sandbox.accept()
    conn.sock.sendall(b"220 hello")
    record = sandbox.take(conn)
    assert record is not None
    assert conn.read(wire.HEADER_SIZE + 1) == sandbox.expected_header(conn, record) + b"x"
    conn.sock.sendall(b"more")
    assert child.result() == b"220 hellomore"


def test_requests_and_answers(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> list[int]:
        sizes = []
        for n in range(200):
            sock.sendall(struct.pack("!I", n))
            sizes.append(len(sock.recv(n * 10 + 1, socket.MSG_WAITALL)))
        return sizes

    def server(conn: Accepted) -> int:
        for n in range(200):
            assert conn.read(4) == struct.pack("!I", n)
            conn.sock.sendall(PATTERN[: n * 10 + 1])
        return conn.sock.fileno() > 0

    assert both(sandbox, client, server)[0] == [n * 10 + 1 for n in range(200)]


def test_non_blocking_with_a_small_buffer_and_a_slow_reader(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        sock.setblocking(False)
        left = memoryview(PATTERN)[: 300 * 1024]
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                select.select([], [sock], [])

    def server(conn: Accepted) -> Any:
        data = b""
        while chunk := conn.sock.recv(1500):
            data += chunk
        return digest(data)

    assert both(sandbox, client, server)[1] == digest(PATTERN[: 300 * 1024])


def test_sockets_shared_by_fork(sandbox: Sandbox) -> None:
    """Parent and child write in turn; the child writes first."""

    def client(sock: socket.socket) -> None:
        here, there = socket.socketpair()
        if (pid := os.fork()) == 0:
            for n in range(50):
                sock.sendall(b"child%04d." % n)
                there.send(b"x")
                there.recv(1)
            os._exit(0)
        for n in range(50):
            here.recv(1)
            sock.sendall(b"parent%04d." % n)
            here.send(b"x")
        os.waitpid(pid, 0)

    wanted = b"".join(b"child%04d.parent%04d." % (n, n) for n in range(50))
    assert both(sandbox, client)[1] == digest(wanted)


def test_a_duplicate_outlives_the_original(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> bytes:
        copy = sock.dup()
        sock.close()
        copy.sendall(b"by the copy")
        return copy.recv(2, socket.MSG_WAITALL)

    def server(conn: Accepted) -> bytes:
        data = conn.read(11)
        conn.sock.sendall(b"ok")
        return data

    assert both(sandbox, client, server) == (b"ok", b"by the copy")


def test_both_directions_at_once(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> Any:
        received = []

        def read() -> None:
            data = b""
            while chunk := sock.recv(65536):
                data += chunk
            received.append(digest(data))

        sock.sendall(PATTERN[:1])
        reader = threading.Thread(target=read)
        reader.start()
        sock.sendall(PATTERN[1 : 4 * MIB])
        sock.shutdown(socket.SHUT_WR)
        reader.join()
        return received

    def server(conn: Accepted) -> Any:
        writer = threading.Thread(
            target=lambda: (conn.sock.sendall(PATTERN[4 * MIB :]), conn.sock.shutdown(socket.SHUT_WR))
        )
        writer.start()
        received = digest(conn.read_all())
        writer.join()
        return received

    assert both(sandbox, client, server) == ([digest(PATTERN[4 * MIB :])], digest(PATTERN[: 4 * MIB]))


def test_a_reader_that_waits_before_the_first_send(sandbox: Sandbox) -> None:
    """The reader enters recv() while the socket is in the SOCKHASH, and is still in it when the socket has left."""

    def client(sock: socket.socket) -> bytes:
        received = []
        reader = threading.Thread(target=lambda: received.append(sock.recv(6, socket.MSG_WAITALL)))
        reader.start()
        state = Path(f"/proc/self/task/{reader.native_id}/syscall")
        while not state.read_text().startswith("45 "):  # recvfrom on x86_64
            os.sched_yield()
        sock.sendall(b"request")
        reader.join()
        return received[0]

    def server(conn: Accepted) -> bytes:
        request = conn.read(7)
        conn.sock.sendall(b"answer")
        return request

    for _ in range(20):
        assert both(sandbox, client, server) == (b"answer", b"request")


def test_a_reset_is_a_reset(sandbox: Sandbox) -> None:
    def client(sock: socket.socket) -> int | None:
        sock.sendall(b"x")
        try:
            sock.recv(1)
        except OSError as exc:
            return exc.errno
        return None

    def server(conn: Accepted) -> bytes:
        data = conn.read(1)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.sock.close()
        return data

    assert both(sandbox, client, server) == (errno.ECONNRESET, b"x")


def test_the_socket_is_out_of_the_sockhash_after_the_first_send(
    sandbox: Sandbox, counted: Callable[[str], int]
) -> None:
    here, there = socket.socketpair()

    def agent() -> None:
        sock = dial(FAR_V4, 443)
        there.send(b"1")
        there.recv(1)
        sock.sendall(b"x")
        there.send(b"2")
        there.recv(1)

    child = sandbox.spawn(agent)
    here.recv(1)
    assert sandbox.stamp.entries()["socks"] == 1
    here.send(b"n")
    here.recv(1)
    assert sandbox.stamp.entries()["socks"] == 0
    assert counted("sockmap_left") == counted("stamped") == 1
    here.send(b"n")
    child.result()
    here.close()
    there.close()
