"""One gateway after another: what each is given, what is taken from the one before, and the end of the last."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from control_desk import (
    AGENTS,
    Host,
    ask,
    ask_daemon,
    control_host,
    left_on_host,
    make_agent,
    make_resources,
)
from gateway_lives import Lives, open_lives
from instances import DEADLINE_S

from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import new_invocation_id
from clrk.core.messages import (
    PROTOCOL_VERSION,
    Configure,
    ConfigureFd,
    Drain,
    Drained,
    Exited,
    ExitReason,
    Ready,
    ReloadRefused,
    Removed,
    Spawned,
    Started,
    StartedFd,
    StartFailed,
    StartFailure,
    StopRun,
)
from clrk.core.resources import TaskAgent

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


async def test_configure_carries_everything_and_no_secret(lives: Lives) -> None:
    _, peer = await lives.next()
    (configure,) = await peer.hear_all(Configure)
    assert configure.version == PROTOCOL_VERSION
    assert len(peer.fds) == len(ConfigureFd)
    with pytest.raises(OSError, match="Operation not permitted"):  # sealed
        os.pwrite(peer.fds[ConfigureFd.CONFIG], b"x", 0)
    config = GatewayConfig.model_validate_json(Path(f"/proc/self/fd/{peer.fds[ConfigureFd.CONFIG]}").read_bytes())
    assert [agent.revision for agent in config.agents] == [
        agent.revision for agent in AGENTS if isinstance(agent, TaskAgent)
    ]
    assert "127.0.0.1" in config.host_addresses
    assert "PRIVATE KEY" in config.ca_key_pem
    for index in (ConfigureFd.INGRESS, ConfigureFd.ADMIN_TCP, ConfigureFd.ADMIN_UNIX):
        with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


async def test_a_dead_gateway_is_replaced_and_its_runs_are_removed(lives: Lives, host: Host) -> None:
    first, peer, generation = await lives.next_ready()
    peer.say(ask("sleep"))
    started, _ = await peer.hear_all(Started, Spawned)
    peer.close()
    second, peer, later = await lives.next_ready()
    assert (second.pid != first.pid, later > generation) == (True, True)
    assert not any(started.sandbox_id in name for name in left_on_host(host))
    peer.say(ask())
    await peer.hear_all(Started, Spawned)


async def test_a_reload_while_the_gateway_dies_is_for_the_next_one(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    peer.close()
    await lives.supervisor.reload(make_resources(make_agent("other", "exit 3")))
    _, peer, _ = await lives.next_ready()
    peer.say(ask("other"))
    *_, exited, _ = await peer.hear_all(Started, Spawned, Exited, Removed)
    assert exited.exit_code == 3


async def test_reload_counts_from_the_gateways_ready_on(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    other = make_agent("other", "exit 3")
    await lives.supervisor.reload(make_resources(other))
    (configure,) = await peer.hear_all(Configure)
    assert len(peer.fds) == 1  # the sockets are there already
    peer.say(ask("other"))
    (failed,) = await peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.UNKNOWN_AGENT
    peer.say(Ready(PROTOCOL_VERSION, configure.generation))
    peer.say(ask("other"))
    *_, exited, _ = await peer.hear_all(Started, Spawned, Exited, Removed)
    assert exited.exit_code == 3
    peer.say(ask("echo"))
    (failed,) = await peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.UNKNOWN_AGENT


async def test_stop_run_by_message(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    request = ask("sleep")
    peer.say(request)
    await peer.hear_all(Started, Spawned)
    peer.say(StopRun(new_invocation_id()))  # unknown: ignored
    peer.say(StopRun(request.run_id))
    exited, _ = await peer.hear_all(Exited, Removed)
    assert exited.reason is ExitReason.STOPPED


async def test_drain_and_drained(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    await lives.supervisor.drain()
    await peer.hear_all(Drain)
    assert not lives.supervisor.drained.is_set()
    peer.say(Drained())
    async with asyncio.timeout(DEADLINE_S):
        await lives.supervisor.drained.wait()


async def test_a_gateway_that_dies_while_draining_has_drained(lives: Lives) -> None:
    process, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    await lives.supervisor.drain()
    assert not lives.supervisor.drained.is_set()  # it lives, and has not said so
    peer.close()
    async with asyncio.timeout(DEADLINE_S):
        await lives.supervisor.drained.wait()
        await lives.task
    assert not Path(f"/proc/{process.pid}").exists()
    assert lives.started.empty()  # no other is started for a host that shuts down


async def test_stop_run_carries_its_grace(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    request = ask_daemon("loop")
    peer.say(request)
    await peer.hear_all(Started)
    stdout = os.dup(peer.fds[StartedFd.STDOUT])
    await peer.hear_all(Spawned)
    os.set_blocking(stdout, True)
    with os.fdopen(stdout, "rb") as stream:
        assert await asyncio.to_thread(stream.readline) == b"up\n"
        peer.say(StopRun(request.run_id, DEADLINE_S))
        exited, _ = await peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 3)


async def test_counters_name_the_sandboxes_too(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    counters = await peer.hear_counters()
    assert counters.values.keys() == lives.supervisor._counters().values.keys()
    assert set(counters.sandboxes) == {"ready", "warm", "running"}
    peer.say(ask("sleep"))
    async with asyncio.timeout(DEADLINE_S):
        while (await peer.hear_counters()).sandboxes["running"] != 1:
            continue


async def test_a_refused_reload_is_told_to_the_gateway_bounded(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    await lives.supervisor.refuse_reload([f"{number}: " + "ü" * 2000 for number in range(1000)])
    (refused,) = await peer.hear_all(ReloadRefused)
    assert len(refused.problems) == 64
    assert refused.problems[0].startswith("0: ü")
