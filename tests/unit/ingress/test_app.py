"""The app and its control socket: configuration, reload, drain, a runtime that misbehaves or dies."""

import asyncio
import os
import socket
import sqlite3

import aiohttp
import pytest
from scripted_agents import AGENTS, agent
from scripted_runtime import NoEgress, ScriptedRuntime

from clrk.core.control import GATEWAY_MESSAGES, receive, send
from clrk.core.errors import ProtocolError
from clrk.core.ids import new_invocation_id
from clrk.core.messages import (
    PROTOCOL_VERSION,
    Configure,
    Counters,
    Exited,
    ExitReason,
    Ready,
    Removed,
    Started,
    StopRun,
)
from clrk.gateway.app import App, read_config
from clrk.gateway.control_client import ControlClient, ControlError

UNKNOWN = "01890000-0000-7000-8000-0000000000ff"


async def test_reload_swaps_agents_and_running_ones_keep_theirs(gateway):
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    config = gateway.runtime.config
    gateway.runtime.config = config.model_copy(update={"agents": [*AGENTS[:1], agent("new", "echo new")]})
    gateway.runtime.configure(2)
    await gateway.runtime.until(lambda: gateway.runtime.received[-1] == Ready(PROTOCOL_VERSION, 2))
    assert (await gateway.call("/agents/new"))[2] == b"new\n"
    assert (await gateway.call("/agents/one"))[0] == 404
    assert gateway.runtime.egress.config.agents[1].metadata.name == "new"
    gateway.runtime.open_gate()
    assert (await first)[0] == 200


async def test_health(gateway):
    async with gateway.client.get(f"http://127.0.0.1:{gateway.runtime.health_port}/healthz") as response:
        assert response.status == 200


async def test_whoever_connects_to_the_page_leaves_descriptors_for_the_others(gateway):
    held = []
    try:
        for _ in range(256):
            held.append(await asyncio.open_connection("127.0.0.1", gateway.runtime.health_port))
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.runtime.health_port)
        held.append((reader, writer))
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        assert (await gateway.call("/agents/text"))[0] == 200
    finally:
        for _, writer in held:
            writer.close()


async def test_counters_are_kept(gateway):
    gateway.runtime.send(Counters({"stamp_push_failed": 3}))
    await gateway.runtime.until(lambda: gateway.runtime.app.counters.values)
    assert gateway.runtime.app.counters.values == {"stamp_push_failed": 3}


async def test_a_run_that_nobody_waits_for_is_stopped(gateway):
    sockets = socket.socketpair()
    fds = [os.dup(sockets[0].fileno()) for _ in range(10)]
    gateway.runtime.send(Started(UNKNOWN, "0badcafe", "n", 1, 1, b"", b"", False, 0, 0), fds)
    sockets[0].close()
    await gateway.runtime.until(lambda: gateway.runtime.received[-1] == StopRun(UNKNOWN))
    sockets[1].setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(sockets[1], 1) == b""  # every copy is closed
    sockets[1].close()


async def test_late_words_about_unknown_runs_are_passed_over(gateway):
    gateway.runtime.send(Exited(UNKNOWN, ExitReason.EXITED, 0, 0.0, 0, 0))
    gateway.runtime.send(Removed(UNKNOWN, 0, 0))
    assert (await gateway.call("/agents/text"))[0] == 200


async def test_a_runtime_that_breaks_the_order_ends_the_gateway(tmp_path):
    runtime = ScriptedRuntime(AGENTS, tmp_path)
    await runtime.start()
    runtime.send(Configure(PROTOCOL_VERSION, 2), [os.open("/dev/null", os.O_RDONLY) for _ in range(2)])
    with pytest.raises(ProtocolError):
        await asyncio.wait_for(runtime.running, 10)
    runtime.control.close()


@pytest.mark.parametrize("raw", [b"", b"{}", b"not json", b'{"runtime": {"x": "s3cret"}}'])
async def test_an_unusable_configuration_ends_the_gateway_and_is_not_quoted(tmp_path, raw):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    app = App(theirs, tmp_path, lambda *_: NoEgress())
    running = asyncio.create_task(app.run())
    fd = os.memfd_create("config")
    os.write(fd, raw)
    null = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    send(ours, Configure(PROTOCOL_VERSION, 1), [fd, *null])
    with pytest.raises(ProtocolError) as caught:
        await asyncio.wait_for(running, 10)
    assert "s3cret" not in str(caught.value)
    for each in (fd, *null):
        os.close(each)
    ours.close()


async def test_the_gateway_ends_with_its_runtime(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    running = asyncio.create_task(App(theirs, tmp_path, lambda *_: NoEgress()).run())
    ours.close()
    assert "closed" in await asyncio.wait_for(running, 10)


async def test_what_is_in_flight_fails_with_the_runtime(gateway):
    """The callers are told, and the spans are in the store when the gateway ends."""
    runtime, mute_id, forever_id = gateway.runtime, new_invocation_id(), new_invocation_id()
    mute = asyncio.create_task(gateway.call("/agents/mute", headers={"X-Clrk-Invocation-ID": mute_id}))
    unstarted = asyncio.create_task(gateway.call("/agents/unstarted"))
    headers = {"X-Clrk-Invocation-ID": forever_id}
    async with asyncio.timeout(20), gateway.client.post(gateway.url + "/agents/forever", headers=headers) as forever:
        assert await forever.content.readany() == b"ready\n"
        await runtime.until(lambda: len(runtime.runs) == 2 and len(runtime.received) == 4)
        asyncio.get_running_loop().remove_reader(runtime.control.fileno())
        runtime.control.shutdown(socket.SHUT_RDWR)
        assert ((await mute)[0], (await unstarted)[0]) == (500, 502)
        with pytest.raises(aiohttp.ClientPayloadError):
            await forever.read()
    await asyncio.wait_for(asyncio.shield(runtime.running), 10)
    with sqlite3.connect(next(runtime.state_dir.glob("*.db*"))) as store:
        dump = "\n".join(store.iterdump())
    store.close()
    for text in ("invoke_agent mute", mute_id, "invoke_agent forever", forever_id):
        assert text in dump


async def test_sigterm_before_configure_ends_at_once(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    app = App(theirs, tmp_path, lambda *_: NoEgress())
    running = asyncio.create_task(app.run())
    app.drain(then_exit=True)
    assert await asyncio.wait_for(running, 10) == "drained"
    ours.close()


async def test_sigterm_waits_for_the_runs_in_flight(gateway):
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    gateway.runtime.app.drain(then_exit=True)
    assert (await gateway.call("/agents/echo"))[0] == 503
    gateway.runtime.open_gate()
    assert (await first)[0] == 200
    assert await asyncio.wait_for(asyncio.shield(gateway.runtime.running), 10) == "drained"


def test_read_config_closes_its_fd():
    fd = os.memfd_create("config")
    with pytest.raises(ProtocolError):
        read_config(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# --- the socket itself ------------------------------------------------------------------------------------------------


class _Handler:
    def __init__(self):
        self.messages = []
        self.gone = []

    def on_message(self, message, fds):
        self.messages.append((message, fds))

    def on_gone(self, reason):
        self.gone.append(reason)


async def test_a_runtime_that_does_not_read_never_blocks_and_loses_nothing():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = ControlClient(theirs, _Handler())
    client.start()
    sent, refusal = 0, None
    while refusal is None:
        try:
            client.send(StopRun(f"{sent:08x}-0000-7000-8000-000000000000"))
            sent += 1
        except ControlError as exc:
            refusal = exc
    assert "does not read" in str(refusal)
    ours.setblocking(False)
    got = []
    async with asyncio.timeout(20):
        while len(got) < sent:
            try:
                found = receive(ours, GATEWAY_MESSAGES)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            got.append(found[0].run_id)
    assert got == [f"{number:08x}-0000-7000-8000-000000000000" for number in range(sent)]
    client.close()
    ours.close()
    with pytest.raises(ControlError):
        client.send(StopRun(UNKNOWN))


async def test_garbage_is_the_end():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handler = _Handler()
    ControlClient(theirs, handler).start()
    socket.send_fds(ours, [b"garbage"], [ours.fileno()])
    async with asyncio.timeout(25):
        while not handler.gone:
            await asyncio.sleep(0)
    assert handler.messages == []
    assert ours.recv(10) == b""
    ours.close()


async def test_a_message_of_the_other_direction_is_the_end():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handler = _Handler()
    ControlClient(theirs, handler).start()
    send(ours, StopRun(UNKNOWN))
    async with asyncio.timeout(25):
        while not handler.gone:
            await asyncio.sleep(0)
    assert len(handler.gone) == 1
    assert handler.messages == []
    assert ours.recv(10) == b""
    ours.close()
