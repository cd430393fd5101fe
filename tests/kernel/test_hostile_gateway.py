"""The runtime with a gateway that says and does whatever it can: it ends that gateway, and the next one works."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from control_desk import TRACEPARENT, Host, ask, control_host
from gateway_lives import Lives, open_lives
from instances import DEADLINE_S

from clrk.core.ids import new_invocation_id
from clrk.core.messages import (
    PROTOCOL_VERSION,
    AgentKey,
    Configure,
    ConfigureFd,
    Drain,
    Drained,
    Ready,
    StartFailed,
    StartRun,
    StopRun,
)

# One loop for all: the spawner belongs to the loop that used it first.
pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with control_host(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def lives(host: Host) -> AsyncIterator[Lives]:
    async with open_lives(host) as opened:
        yield opened


def open_files() -> list[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names


@pytest.mark.parametrize(
    "packet",
    [b"\x00garbage", b"\x80", b"x" * 70_000, b"", b'{"type":"Ready"}'],
    ids=["garbage", "empty map", "too long", "nothing", "json"],
)
async def test_a_malformed_packet_ends_the_gateway(lives: Lives, packet: bytes) -> None:
    first, peer, _ = await lives.next_ready()
    peer.sock.send(packet)
    assert await peer.hear() is None
    second, _, _ = await lives.next_ready()
    assert second.pid != first.pid
    assert not Path(f"/proc/{first.pid}").exists()


@pytest.mark.parametrize(
    "message",
    [
        StartRun("not-a-uuid", AgentKey("default", "echo"), TRACEPARENT),
        StartRun(new_invocation_id(), AgentKey("../x", "echo"), TRACEPARENT),
        StartRun(new_invocation_id(), AgentKey("default", "echo"), "00-x"),
        StartRun(new_invocation_id(), AgentKey("default", "echo"), TRACEPARENT, "\n"),
        StartRun(new_invocation_id(), AgentKey("default", "echo"), TRACEPARENT, "", -1.0),
        StartRun(new_invocation_id(), AgentKey("default", "echo"), TRACEPARENT, "", float("nan")),
        Ready(PROTOCOL_VERSION, 99),
        Ready(99, 1),
        Drain(),
        Drained(),
    ],
    ids=[
        "run id",
        "namespace",
        "traceparent",
        "tracestate",
        "negative timeout",
        "timeout is no number",
        "generation",
        "version",
        "drain",
        "drained",
    ],
)
async def test_a_message_that_can_not_be_ends_the_gateway(lives: Lives, message: msgspec.Struct) -> None:
    _, peer, _ = await lives.next_ready()
    peer.say(message)
    assert await peer.hear() is None
    await lives.next_ready()
    assert not lives.supervisor.drained.is_set()


async def test_a_gateway_that_floods_does_not_hold_up_the_runtime(lives: Lives) -> None:
    """Else it could keep the runtime from seeing SIGTERM, deadlines and exits."""
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    for _ in range(100):
        peer.say(StopRun(new_invocation_id()))
    peer.say(ask("nobody"))
    await peer.hear_all(StartFailed)
    counting.cancel()
    assert turns >= 100


async def test_a_gateway_that_asks_and_does_not_read_costs_little(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    blocked = 0
    for _ in range(5000):
        try:
            peer.say(ask("nobody"))
        except BlockingIOError:
            blocked += 1
            await asyncio.sleep(0)
    runs = lives.supervisor.runs
    assert runs is not None
    assert blocked > 0  # the runtime no longer reads
    assert len(runs._tasks) <= 300


async def test_listeners_that_a_gateway_shut_down_are_opened_anew(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    shared = (ConfigureFd.INGRESS, ConfigureFd.ADMIN_TCP, ConfigureFd.ADMIN_UNIX)
    names = []
    for index in shared:
        with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
            names.append((sock.family, sock.getsockname()))
            sock.shutdown(socket.SHUT_RDWR)
    peer.close()
    _, peer, _ = await lives.next_ready()
    for family, name in names:
        with socket.socket(family) as caller:
            caller.connect(name)
            caller.sendall(repr(name).encode())
    for index, (family, name) in zip(shared, names, strict=True):
        with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
            assert (sock.family, sock.getsockname()) == (family, name)  # callers find it where it was
            sock.settimeout(DEADLINE_S)  # connect() may return before the listener has the connection
            with sock.accept()[0] as accepted:
                assert accepted.recv(1000) == repr(name).encode()


async def test_listeners_that_a_gateway_spoiled_work_for_the_next_one(lives: Lives) -> None:
    """A filter that drops every SYN, locked or not; and a listener turned into a connection that is never read."""
    drop = (ctypes.c_char * 8)(*struct.pack("HBBI", 6, 0, 0, 0))  # BPF_RET | BPF_K, 0
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(drop))
    _, peer, _ = await lives.next_ready()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        for index, is_locked in ((ConfigureFd.INGRESS, False), (ConfigureFd.ADMIN_TCP, True)):
            with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
                sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
                sock.setsockopt(socket.SOL_SOCKET, 44, int(is_locked))  # SO_LOCK_FILTER
        peer.close()
        _, peer, _ = await lives.next_ready()
        for index in (ConfigureFd.INGRESS, ConfigureFd.ADMIN_TCP):
            with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
                name = sock.getsockname()
                with socket.create_connection(name, DEADLINE_S) as caller:
                    assert caller.getpeername() == name
        with socket.socket(fileno=os.dup(peer.fds[ConfigureFd.INGRESS])) as sock:
            sock.shutdown(socket.SHUT_RDWR)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            sock.setblocking(True)
            sock.connect(deaf.getsockname())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65_536))
        peer.close()
        _, peer, _ = await lives.next_ready()
        with socket.socket(fileno=os.dup(peer.fds[ConfigureFd.INGRESS])) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


async def test_a_gateway_is_gone_with_its_process_whoever_holds_its_socket(lives: Lives) -> None:
    """It may have passed the socket to an accomplice outside of its pid namespace."""
    first, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    os.kill(first.pid, 9)
    assert await peer.hear() is None
    second, _, _ = await lives.next_ready()
    assert second.pid != first.pid


async def test_fds_from_the_gateway_end_it(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    sent = os.memfd_create("sent-by-the-gateway")
    peer.say(Drained(), (sent, sent))
    os.close(sent)
    assert await peer.hear() is None
    await lives.next()
    # Not a count of all fds: the pool opens and closes its own meanwhile.
    assert [name for name in open_files() if "sent-by-the-gateway" in name] == []


@pytest.mark.parametrize("packet", ["a good message", "behind a bad message", "more than are taken"])
async def test_no_fd_from_the_gateway_holds_up_the_runtime(lives: Lives, packet: str) -> None:
    """Closing the last fd of a TCP socket waits for its peer, as long as the sender has set (SO_LINGER)."""
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    with socket.create_server(("127.0.0.1", 0)) as server:
        unread, reader = socket.create_connection(server.getsockname()), server.accept()[0]
    with reader:
        unread.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                unread.send(bytes(65_536))
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        if packet == "behind a bad message":
            peer.sock.send(b"nonsense")
        words = msgspec.msgpack.encode(StopRun(new_invocation_id()))
        socket.send_fds(peer.sock, [words], [unread.fileno()] * (100 if packet == "more than are taken" else 1))
        unread.close()
        assert await peer.hear() is None
        await lives.next_ready()


async def test_a_gateway_that_speaks_before_ready_is_replaced_at_first_only_by_an_error(lives: Lives) -> None:
    _, peer = await lives.next()
    await peer.hear_all(Configure)
    peer.say(ask())
    with pytest.raises(Exception, match="did not become ready: StartRun before Ready"):
        await lives.task
