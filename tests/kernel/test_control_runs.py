"""Runs of TaskAgents as the control protocol has them: real sandboxes, and what becomes of one that can not be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from control_desk import (
    TRACEPARENT,
    Desk,
    Host,
    ask,
    control_host,
    left_on_host,
    make_agent,
    make_pair,
    make_resources,
    open_desk,
    read_all,
)
from instances import DEADLINE_S

from clrk.core.errors import HostError
from clrk.core.ids import new_invocation_id
from clrk.core.messages import Exited, ExitReason, Removed, Spawned, Started, StartedFd, StartFailed, StartFailure
from clrk.core.resources import TaskAgent
from clrk.runtime.runs import start_failure

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


# --- one run --------------------------------------------------------------------------------------------------------


async def test_a_run_from_start_to_removed(desk: Desk, host: Host) -> None:
    request = desk.start(ask())
    (started,) = await desk.peer.hear_all(Started)
    fds, desk.peer.fds = desk.peer.fds, []
    assert len(fds) == len(StartedFd)
    listeners = [socket.socket(fileno=os.dup(fd)) for fd in fds[: StartedFd.STDIN]]
    assert [sock.getsockname()[:2] for sock in listeners] == [
        ("169.254.0.1", 15001), ("fd00:c1::1", 15001), ("169.254.169.254", 80), ("fd00:ec2::254", 80),
        ("169.254.0.1", 53), ("169.254.0.1", 53), ("169.254.0.1", 4318),
    ]  # fmt: skip
    for sock in listeners:
        sock.close()
    for part in (b"echo", request.run_id.encode(), TRACEPARENT.encode(), started.sandbox_id.encode()):
        assert part in started.header_v4
        assert part in started.header_v6
    os.write(fds[StartedFd.STDIN], b"hello\n")
    assert await read_all(fds[StartedFd.STDOUT]) == b"got hello\n"
    assert await read_all(fds[StartedFd.STDERR]) == b"oops\n"
    for fd in fds[: StartedFd.STDOUT]:
        os.close(fd)
    spawned, exited, removed = await desk.peer.hear_all(Spawned, Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.EXITED, 7)
    times = (
        started.acquire_start_ns, started.acquire_end_ns, spawned.spawn_start_ns, spawned.spawn_end_ns,
        exited.exit_ns, removed.teardown_start_ns, removed.teardown_end_ns,
    )  # fmt: skip
    assert list(times) == sorted(times)
    assert {message.run_id for message in (started, spawned, exited, removed)} == {request.run_id}
    assert not any(started.sandbox_id in name for name in left_on_host(host))


async def test_a_timeout_may_be_shortened_by_the_request(desk: Desk) -> None:
    desk.start(ask("sleep", timeout_s=0.3))
    *_, exited, _ = await desk.peer.hear_all(Started, Spawned, Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.TIMEOUT, 137)


async def test_the_agents_own_timeout_can_not_be_lengthened(desk: Desk) -> None:
    short = make_agent("sleep", "exec sleep 1000", timeout="300ms")
    desk.runs.resources = make_resources(short)
    desk.start(ask("sleep", timeout_s=3600.0))
    *_, exited, _ = await desk.peer.hear_all(Started, Spawned, Exited, Removed)
    assert exited.reason is ExitReason.TIMEOUT


async def test_stop_kills_a_run(desk: Desk) -> None:
    request = desk.start(ask("sleep"))
    await desk.peer.hear_all(Started, Spawned)
    desk.runs.stop(request.run_id, desk.channel)
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 137)


async def test_stop_right_behind_start_is_not_lost(desk: Desk) -> None:
    request = desk.start(ask("sleep"))
    desk.runs.stop(request.run_id, desk.channel)
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.SANDBOX_FAILED


async def test_listeners_of_a_sandbox_that_linger_hold_up_no_removal(desk: Desk) -> None:
    """The gateway has them too: one becomes a connection to another's backlog, with bytes that nobody will read."""
    request = desk.start(ask("sleep"))
    await desk.peer.hear_all(Started)
    with (
        socket.socket(fileno=os.dup(desk.peer.fds[StartedFd.EGRESS_V4])) as sock,
        socket.socket(fileno=os.dup(desk.peer.fds[StartedFd.METADATA_V4])) as other,
    ):
        sock.shutdown(socket.SHUT_RDWR)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        sock.settimeout(DEADLINE_S)
        sock.connect(other.getsockname())
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(65_536))
    await desk.peer.hear_all(Spawned)  # which drops the fds of Started
    desk.runs.stop(request.run_id, desk.channel)
    exited, removed = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, removed.run_id) == (ExitReason.STOPPED, request.run_id)


async def test_only_the_life_that_started_a_run_can_stop_it(desk: Desk) -> None:
    request = desk.start(ask("sleep", timeout_s=1.0))
    await desk.peer.hear_all(Started, Spawned)
    stranger, peer = make_pair()
    desk.runs.stop(request.run_id, stranger)
    desk.runs.stop(new_invocation_id(), desk.channel)
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert exited.reason is ExitReason.TIMEOUT
    stranger.close()
    peer.close()


async def test_a_memory_hog_ends_as_oom(desk: Desk) -> None:
    desk.start(ask("hog"))
    *_, exited, _ = await desk.peer.hear_all(Started, Spawned, Exited, Removed)
    assert exited.reason is ExitReason.OOM
    assert exited.max_rss_bytes > 0


# --- refusals -------------------------------------------------------------------------------------------------------


async def test_an_unknown_agent(desk: Desk) -> None:
    desk.start(ask("nobody"))
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert (failed.reason, failed.message) == (StartFailure.UNKNOWN_AGENT, "no TaskAgent default/nobody")


async def test_an_error_of_the_runtime_is_told_too(desk: Desk, host: Host) -> None:
    """A Secret that is gone (loading refuses that) stands for any bug: the caller must not wait for ever."""
    env = [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k"}}}]
    broken = TaskAgent.model_validate(
        {
            "kind": "TaskAgent", "metadata": {"name": "broken"},
            "spec": {"template": {"spec": {"command": ["/bin/true"], "env": env}}},
        }
    )  # fmt: skip
    desk.runs.resources = make_resources(broken)
    desk.start(ask("broken"))
    started, failed = await desk.peer.hear_all(Started, StartFailed)
    assert failed.reason is StartFailure.SANDBOX_FAILED
    assert not any(started.sandbox_id in name for name in left_on_host(host))


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (OSError(errno.EMFILE, ""), StartFailure.POOL_EXHAUSTED),
        (OSError(errno.ENOSPC, ""), StartFailure.POOL_EXHAUSTED),
        (OSError(errno.ENOENT, ""), StartFailure.SANDBOX_FAILED),
        (None, StartFailure.SANDBOX_FAILED),
    ],
)
async def test_a_full_host_is_not_a_broken_sandbox(cause: OSError | None, reason: StartFailure) -> None:
    outer = HostError("make x")
    outer.__cause__ = cause
    assert start_failure(outer) is reason


async def test_an_id_that_is_running_changes_nothing_of_the_first(desk: Desk) -> None:
    request = desk.start(ask("sleep"))
    await desk.peer.hear_all(Started, Spawned)
    desk.start(request)
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.SANDBOX_FAILED
    desk.runs.stop(request.run_id, desk.channel)
    await desk.peer.hear_all(Exited, Removed)


async def test_more_runs_than_the_host_may_have(desk: Desk) -> None:
    for _ in range(2):
        desk.start(ask("sleep"))
        await desk.peer.hear_all(Started, Spawned)
    desk.start(ask("sleep"))
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.POOL_EXHAUSTED


async def test_nothing_starts_while_draining(desk: Desk) -> None:
    desk.runs.draining = True
    desk.start(ask())
    (failed,) = await desk.peer.hear_all(StartFailed)
    assert failed.reason is StartFailure.DRAINING


async def test_when_the_peer_is_gone_its_runs_are_removed(desk: Desk, host: Host) -> None:
    desk.start(ask("sleep"))
    started, _ = await desk.peer.hear_all(Started, Spawned)
    desk.peer.close()
    async with asyncio.timeout(DEADLINE_S):
        await desk.runs.stop_all(desk.channel)
    assert not any(started.sandbox_id in name for name in left_on_host(host))


async def test_a_peer_that_dies_before_started(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Its run ends in the deadline, holds no sandbox any more, and is no error of the runtime's."""
    desk.start(ask("sleep"))
    assert len(desk.runs._tasks) == 1
    desk.peer.close()
    async with asyncio.timeout(DEADLINE_S):
        await desk.runs.stop_all()
    assert (desk.runs._tasks, desk.runs._runs) == ({}, {})
    assert desk.pool.counts()["running"] == 0
    assert "crashed" not in caplog.text
