"""Runs of DaemonAgents as the control protocol has them: without an invocation, once each, and stopped with a grace."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from control_desk import TRACEPARENT, Desk, Host, ask, ask_daemon, control_host, open_desk, read_all
from instances import DEADLINE_S

from clrk.core import wire
from clrk.core.ids import new_invocation_id
from clrk.core.messages import (
    AgentKey,
    Exited,
    ExitReason,
    Removed,
    Spawned,
    Started,
    StartedFd,
    StartFailed,
    StartFailure,
    StartRun,
)

# One loop for all: the spawner belongs to the loop that used it first.
pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with control_host(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def desk(host: Host) -> AsyncIterator[Desk]:
    async with open_desk(host) as opened:
        yield opened


async def start_daemon(desk: Desk, agent: str) -> tuple[StartRun, Started, int]:
    """Start one and wait for its first line; return the request, Started and the read end of its stdout."""
    request = desk.start(ask_daemon(agent))
    (started,) = await desk.peer.hear_all(Started)
    stdout = os.dup(desk.peer.fds[StartedFd.STDOUT])
    await desk.peer.hear_all(Spawned)
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(stdout, ready.set)
    async with asyncio.timeout(DEADLINE_S):
        await ready.wait()
    loop.remove_reader(stdout)
    assert os.read(stdout, 100) == b"up\n"
    return request, started, stdout


def read_stamp(raw: bytes) -> dict[int, bytes]:
    """Return the TLVs of a template; its addresses and its connection are for the kernel to fill in."""
    found, at = {}, 16 + int.from_bytes(raw[14:16], "big")
    start = 16 + (12 if raw[13] == 0x11 else 36)
    while start < at:
        size = int.from_bytes(raw[start + 1 : start + 3], "big")
        found[raw[start]] = raw[start + 3 : start + 3 + size]
        start += 3 + size
    return found


async def test_a_daemon_is_stamped_without_an_invocation_and_has_its_grace_to_end(desk: Desk) -> None:
    request, started, stdout = await start_daemon(desk, "loop")
    for raw in (started.header_v4, started.header_v6):
        stamp = read_stamp(raw)
        assert stamp[wire.TLV_AGENT_KIND] == b"\0"
        assert stamp[wire.TLV_AGENT_NAME] == b"loop"
        assert not {wire.TLV_INVOCATION_ID, wire.TLV_TRACEPARENT} & set(stamp)
    desk.runs.stop(request.run_id, desk.channel, DEADLINE_S)
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 3)  # what its handler of SIGTERM says
    assert await read_all(stdout) == b"ending\n"


async def test_a_daemon_that_ignores_sigterm_is_killed_when_its_grace_is_over(desk: Desk) -> None:
    request, _, stdout = await start_daemon(desk, "stubborn")
    began_s = time.monotonic()
    desk.runs.stop(request.run_id, desk.channel, 0.5)
    desk.runs.stop(request.run_id, desk.channel, 60.0)  # it can not be made longer
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 137)
    assert time.monotonic() - began_s >= 0.5
    os.close(stdout)


async def test_a_grace_is_cut_short_by_a_stop_without_one(desk: Desk) -> None:
    request, _, stdout = await start_daemon(desk, "stubborn")
    desk.runs.stop(request.run_id, desk.channel, 60.0)
    desk.runs.stop(request.run_id, desk.channel)
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 137)
    os.close(stdout)


async def test_a_daemon_runs_once_and_again_when_it_is_gone(desk: Desk) -> None:
    request, _, stdout = await start_daemon(desk, "loop")
    desk.start(ask_daemon("loop"))
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert (failed.reason, failed.run_id != request.run_id) == (StartFailure.SANDBOX_FAILED, True)
    assert "a daemon runs once" in failed.message
    desk.runs.stop(request.run_id, desk.channel)
    await desk.peer.hear_all(Exited, Removed)
    os.close(stdout)
    request, _, stdout = await start_daemon(desk, "loop")  # Removed means that its name is free
    desk.runs.stop(request.run_id, desk.channel)
    await desk.peer.hear_all(Exited, Removed)
    os.close(stdout)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ask_daemon("echo"), StartFailure.UNKNOWN_AGENT),  # a TaskAgent's name
        (ask("loop"), StartFailure.UNKNOWN_AGENT),  # a DaemonAgent's
        (ask_daemon("loop", traceparent=TRACEPARENT), StartFailure.SANDBOX_FAILED),
        (ask_daemon("loop", baggage="a=1"), StartFailure.SANDBOX_FAILED),
        (ask_daemon("loop", timeout_s=1.0), StartFailure.SANDBOX_FAILED),
        (StartRun(new_invocation_id(), AgentKey("default", "echo")), StartFailure.SANDBOX_FAILED),
    ],
)
async def test_a_run_that_is_not_of_its_kind(desk: Desk, request_: StartRun, reason: StartFailure) -> None:
    desk.start(request_)
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert failed.reason is reason


async def test_the_hosts_own_shutdown_ends_daemons_gently_and_leaves_invocations(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clrk.runtime.runs.DAEMON_GRACE_S", DEADLINE_S)
    _, _, stdout = await start_daemon(desk, "loop")
    desk.start(ask("sleep"))
    await desk.peer.hear_all(Started, Spawned)
    desk.runs.stop_daemons()
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 3)
    os.close(stdout)
