"""Every known way of getting bytes in front of the stamp, or of using a stamp that one has seen (KERNEL.md section 3).

Each test first shows that the attack works against a gateway that looks at the first bytes alone (or with the
protecting sysctl off), and then that the flow record refuses it: the header that the record implies never arrives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import AGENT_UID, EGRESS_V4, FAR_V4, Accepted, Sandbox, dial, errno_of, parse_with_oracle
from instances import DEADLINE_S

from clrk.core import wire
from clrk.core.wire import FlowRecord

pytestmark = pytest.mark.kernel

MSG_FASTOPEN, TCP_FASTOPEN_CONNECT = 0x20000000, 30
SO_TIMESTAMPING = 37
TX_SOFTWARE, SOFTWARE, OPT_TX_SCHED = 1 << 1, 1 << 4, 1 << 8
DIALLED, PRETENDED = (FAR_V4, 443), ("10.9.8.7", 5432)


def forge(sandbox: Sandbox) -> bytes:
    """What an agent that knows its template would write: a well-formed header with another destination and sender."""
    header = bytearray(sandbox.templates[0])
    header[16:28] = (
        socket.inet_aton("100.64.0.1") + socket.inet_aton(PRETENDED[0]) + struct.pack("!HH", 4, PRETENDED[1])
    )
    header[31:71] = struct.pack("!QQII16s", 1, 2, 1, 0, b"root-daemon")
    return bytes(header)


def naive_gateway_believes(sandbox: Sandbox, first: bytes) -> bool:
    """A gateway without the record: whatever parses and carries the sandbox's own TLVs is taken for the stamp."""
    return len(first) == wire.HEADER_SIZE and first[71:] == sandbox.templates[0][71:]


def accept_forged(sandbox: Sandbox) -> tuple[Accepted, FlowRecord, bytes]:
    """Accept one connection whose first bytes are the agent's own; show that the record gives it away."""
    conn = sandbox.accept()
    record = sandbox.take(conn)
    first = conn.read(wire.HEADER_SIZE)
    assert naive_gateway_believes(sandbox, first), "the attack did not work: this test proves nothing"
    assert parse_with_oracle(first).dest[0].compressed == PRETENDED[0]
    assert record is not None
    assert (str(record.dst), record.dst_port) == DIALLED
    assert first != sandbox.expected_header(conn, record)
    return conn, record, first


def test_a_send_that_waits_in_syn_sent_is_not_stamped_and_not_believed(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox(backlog=0)
    forged = forge(sandbox)
    full, tell = os.pipe()

    def agent() -> None:
        filler = dial("192.0.2.1", 1)
        os.read(full, 1)
        sock = socket.socket()
        sock.setblocking(False)
        assert sock.connect_ex(DIALLED) == errno.EINPROGRESS
        sock.setblocking(True)
        sock.sendall(forged)  # enters tcp_sendmsg in SYN_SENT, before the socket is in the SOCKHASH
        filler.close()

    child = sandbox.spawn(agent)
    # connect() may return before the listener has the connection. Then the queue is full: the next SYN is dropped.
    assert select.select([sandbox.listeners["egress4"]], [], [], DEADLINE_S)[0]
    os.write(tell, b"x")
    # Leave the queue full until the sender sleeps in its send.
    syscall, deadline = Path(f"/proc/{child.pid}/syscall"), time.monotonic() + DEADLINE_S
    while not (doing := syscall.read_text()).startswith("44 "):  # sendto on x86_64
        assert time.monotonic() < deadline, doing
        os.sched_yield()
    filler = sandbox.accept()
    sandbox.take(filler)
    conn, _, _ = accept_forged(sandbox)
    child.result()
    assert conn.read_all() == b""
    os.close(full)
    os.close(tell)


def test_the_race_for_syn_sent_never_yields_another_destination(sandbox: Sandbox, attacker: Path) -> None:
    rounds = 600
    forged = attacker.with_name("forged")
    forged.write_bytes(forge(sandbox))
    forged.chmod(0o644)

    def agent() -> int:
        command = [str(attacker), DIALLED[0], str(DIALLED[1]), str(rounds), str(forged)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return int(done.stdout)

    child = sandbox.spawn(agent)
    stamped = refused = 0
    for _ in range(rounds):
        conn = sandbox.accept()
        record = sandbox.take(conn)
        assert record is not None
        assert (str(record.dst), record.dst_port) == DIALLED
        first = conn.read(wire.HEADER_SIZE)
        if first == sandbox.expected_header(conn, record):
            stamped += 1
        else:
            refused += 1
            assert naive_gateway_believes(sandbox, first)
        conn.sock.close()
    assert child.result() == rounds
    assert stamped + refused == rounds


def test_fast_open(make_sandbox: Callable[..., Sandbox]) -> None:
    """MSG_FASTOPEN: with the sysctl on, unstamped and not believed; off, it does not exist."""
    open_ = make_sandbox(sysctls={"net/ipv4/tcp_fastopen": "1"})
    forged = forge(open_)

    def agent() -> None:
        socket.socket().sendto(forged, MSG_FASTOPEN, DIALLED)

    child = open_.spawn(agent)
    conn, _, _ = accept_forged(open_)
    child.result()
    assert conn.read_all() == b""

    closed = make_sandbox()
    assert closed.run(errno_of, agent) == errno.EOPNOTSUPP
    assert closed.nothing_waits()


def test_fast_open_connect(make_sandbox: Callable[..., Sandbox]) -> None:
    open_ = make_sandbox(sysctls={"net/ipv4/tcp_fastopen": "1"})

    def agent() -> None:
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        sock.connect(DIALLED)
        sock.sendall(b"x")

    child = open_.spawn(agent)
    conn = open_.accept()
    record = open_.take(conn)
    assert record is not None
    assert (str(record.dst), record.dst_port) == DIALLED
    first = conn.read(wire.HEADER_SIZE)
    assert first in (open_.expected_header(conn, record), b"x")  # the kernel's choice; only the former is believed
    child.result()

    closed = make_sandbox()
    assert closed.run(errno_of, agent) == errno.EOPNOTSUPP
    assert closed.nothing_waits()


def read_back(sock: socket.socket) -> bytes:
    """Everything that transmit timestamps hand back to the sender of what has arrived."""
    unacknowledged, deadline = bytearray(b"\1"), time.monotonic() + DEADLINE_S
    while any(unacknowledged):  # what was acknowledged was transmitted, and its timestamps are there
        assert time.monotonic() < deadline, unacknowledged
        unacknowledged = bytearray(4)
        fcntl.ioctl(sock, termios.TIOCOUTQ, unacknowledged)
        os.sched_yield()
    seen = b""
    poller = select.poll()
    poller.register(sock, 0)  # POLLERR alone
    while poller.poll(0):
        data, ancillary, _, _ = sock.recvmsg(4096, 512, socket.MSG_ERRQUEUE)
        if not ancillary and not data:
            break
        seen += data
    return seen


def send_with_timestamps(target: tuple[str, int]) -> bytes:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, TX_SOFTWARE | SOFTWARE | OPT_TX_SCHED)
    sock.settimeout(DEADLINE_S)
    sock.connect(target)
    sock.sendall(b"x")
    return read_back(sock)


def test_the_header_is_not_readable_by_transmit_timestamps(make_sandbox: Callable[..., Sandbox]) -> None:
    open_, closed = make_sandbox(sysctls={"net/core/tstamp_allow_data": "1"}), make_sandbox()
    seen = {}
    for name, sandbox in (("open", open_), ("closed", closed)):
        child = sandbox.spawn(send_with_timestamps, DIALLED)
        conn, record = sandbox.accept_stamped()
        seen[name] = sandbox.expected_header(conn, record) in child.result()
    assert seen == {"open": True, "closed": False}


def test_a_stolen_header_is_worth_nothing(make_sandbox: Callable[..., Sandbox]) -> None:
    """Read back the own header, change the destination, put it in front of another connection."""
    sandbox = make_sandbox(sysctls={"net/core/tstamp_allow_data": "1", "net/ipv4/tcp_fastopen": "1"})

    def agent() -> bool:
        raw = send_with_timestamps(("192.0.2.1", 80))
        at = raw.find(sandbox.templates[0][:16])
        stolen = bytearray(raw[at : at + wire.HEADER_SIZE])
        stolen[20:24] = socket.inet_aton(PRETENDED[0])
        stolen[26:28] = struct.pack("!H", PRETENDED[1])
        socket.socket().sendto(bytes(stolen), MSG_FASTOPEN, DIALLED)
        return at >= 0

    child = sandbox.spawn(agent)
    sandbox.accept_stamped()
    accept_forged(sandbox)
    assert child.result()


def test_the_own_header_can_not_be_replayed_even_for_its_own_destination(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox(sysctls={"net/core/tstamp_allow_data": "1", "net/ipv4/tcp_fastopen": "1"})

    def agent() -> None:
        raw = send_with_timestamps(DIALLED)
        at = raw.find(sandbox.templates[0][:16])
        sock = socket.socket()
        sock.sendto(raw[at : at + wire.HEADER_SIZE], MSG_FASTOPEN, DIALLED)

    child = sandbox.spawn(agent)
    first, first_record = sandbox.accept_stamped()
    replayed = sandbox.accept()
    record = sandbox.take(replayed)
    assert record is not None
    assert replayed.read(wire.HEADER_SIZE) == sandbox.expected_header(first, first_record)
    assert record.cookie != first_record.cookie
    child.result()


def test_another_sandboxs_header_is_refused(make_sandbox: Callable[..., Sandbox]) -> None:
    victim, thief = make_sandbox(), make_sandbox(sysctls={"net/ipv4/tcp_fastopen": "1"})
    stolen = forge(victim)
    child = thief.spawn(lambda: socket.socket().sendto(stolen, MSG_FASTOPEN, DIALLED))
    conn = thief.accept()
    record = thief.take(conn)
    first = conn.read(wire.HEADER_SIZE)
    child.result()
    assert record is not None
    assert naive_gateway_believes(victim, first), "the attack did not work: this test proves nothing"
    assert first != thief.expected_header(conn, record)
    assert record.uid == AGENT_UID


def test_a_second_header_is_payload(sandbox: Sandbox) -> None:
    forged = forge(sandbox)
    child = sandbox.spawn(lambda: dial(*DIALLED).sendall(forged))
    conn, record = sandbox.accept_stamped()
    assert (str(record.dst), record.dst_port) == DIALLED
    assert conn.read_all() == forged
    child.result()


def test_simultaneous_open_and_self_connect(sandbox: Sandbox) -> None:
    """Two sockets that dial each other meet the gateway instead; on loopback a socket may dial itself as ever."""

    def agent() -> bytes:
        pair = [socket.socket(), socket.socket()]
        for sock, port in zip(pair, (41001, 41002), strict=True):
            sock.bind(("100.64.0.1", port))
        for sock, port in zip(pair, (41002, 41001), strict=True):
            sock.connect(("100.64.0.1", port))
            sock.sendall(b"x")
        alone = socket.socket()
        alone.bind(("127.0.0.1", 41003))
        alone.connect(("127.0.0.1", 41003))
        alone.sendall(b"to myself")
        on_address = socket.socket()
        on_address.bind((EGRESS_V4, 41004))
        on_address.connect((EGRESS_V4, 41004))
        on_address.sendall(b"x")
        return alone.recv(512)

    child = sandbox.spawn(agent)
    seen = set()  # the order in which connections reach the listener is not that of the connect() calls
    for _ in range(3):
        conn, record = sandbox.accept_stamped()
        assert conn.read(1) == b"x"
        seen.add((conn.peer[1], record.dst_port))
    assert seen == {(41001, 41002), (41002, 41001), (41004, 41004)}
    assert child.result() == b"to myself"
    assert sandbox.stamp.entries()["flows"] == 0


def test_a_foreign_source_address_gains_nothing(sandbox: Sandbox) -> None:
    """IP_FREEBIND needs no right: whatever becomes of it, no connection has a record of another source."""

    def agent() -> int | None:
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
        sock.bind(("203.0.113.5", 0))
        sock.settimeout(0.3)
        try:
            sock.connect(DIALLED)
            sock.sendall(b"x")
        except OSError:
            return None
        return sock.getsockname()[1]

    child = sandbox.spawn(agent)
    port = child.result()
    if port is not None:
        conn, record = sandbox.accept_stamped()
        assert conn.peer == ("203.0.113.5", port)
        assert (str(record.dst), record.dst_port) == DIALLED
    assert sandbox.nothing_waits()


def test_no_listener_no_connection(sandbox: Sandbox) -> None:
    """The gateway is gone: connections fail, they do not go elsewhere."""
    for listener in sandbox.listeners.values():
        listener.close()
    assert sandbox.run(errno_of, dial, *DIALLED) == errno.ECONNREFUSED
    assert sandbox.run(errno_of, dial, "2001:db8::1", 443) == errno.ECONNREFUSED


def test_a_namespace_of_the_agents_own_is_unknown(sandbox: Sandbox, counted: Callable[[str], int]) -> None:
    """An own user and network namespace, with an own 169.254.0.1: the cookie is another one, so nothing is stamped."""

    def agent() -> Any:
        return subprocess.run(
            ["unshare", "-Urn", "python3", "-c", "import socket; socket.socket()"],
            check=False,
            capture_output=True,
            text=True,
        ).stderr

    stderr = sandbox.run(agent)
    assert "PermissionError: [Errno 1]" in stderr
    assert counted("refused_unknown_netns") >= 1


def test_two_writers_before_the_first_byte(sandbox: Sandbox) -> None:
    """However many threads race for the first send, the header is in front and each byte arrives once."""
    rounds, writers = 60, 4

    def agent() -> None:
        for _ in range(rounds):
            sock = dial(*DIALLED)
            start = threading.Barrier(writers)

            def write(letter: bytes, sock: socket.socket = sock, start: threading.Barrier = start) -> None:
                start.wait()
                sock.sendall(letter * 5000)

            threads = [threading.Thread(target=write, args=(bytes([65 + n]),)) for n in range(writers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sock.close()

    child = sandbox.spawn(agent)
    for _ in range(rounds):
        conn, _ = sandbox.accept_stamped()
        data = conn.read_all()
        assert Counter(data) == {65 + n: 5000 for n in range(writers)}
        conn.sock.close()
    child.result()
