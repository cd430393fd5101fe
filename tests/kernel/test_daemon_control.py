"""The runtime's side of the control protocol: real sandboxes, and a peer that says whatever a hostile gateway might."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from clrk.core import control, wire
from clrk.core.control import RUNTIME_MESSAGES
from clrk.core.errors import HostError
from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import new_invocation_id
from clrk.core.layout import HostLayout
from clrk.core.messages import (
    PROTOCOL_VERSION,
    AgentKey,
    AgentKind,
    Configure,
    ConfigureFd,
    Counters,
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
    StartRun,
    StopRun,
)
from clrk.core.resources import (
    Agent,
    DaemonAgent,
    RuntimeSpec,
    TaskAgent,
    UidRange,
)
from clrk.ebpf.loader import Stamp
from clrk.runtime import ca
from clrk.runtime.cgroup import Cgroups
from clrk.runtime.config.declared import Resources
from clrk.runtime.control_channel import ControlChannel
from clrk.runtime.gateway_config import build_gateway_config
from clrk.runtime.gateway_process import GatewayProcess
from clrk.runtime.gateway_supervisor import GatewaySupervisor
from clrk.runtime.listeners import HostListeners
from clrk.runtime.pool import SandboxPool
from clrk.runtime.reconcile import InstanceLock, remove_leftovers
from clrk.runtime.runs import Runs, start_failure
from clrk.runtime.spawner import Spawner
from clrk.runtime.view import HostView

# One loop for all: the spawner belongs to the loop that used it first.
pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]

LAYOUT = HostLayout(f"ctl{os.getpid() % 100_000}")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPEC = RuntimeSpec(uid_range=UidRange(start=2_300_000, count=50), state_dir="/nonexistent")
DEADLINE_S = 20.0


def make_agent(name: str, script: str, **spec: Any) -> TaskAgent:
    template = {"spec": {"command": ["/bin/bash", "-c", script]}}
    value = {"kind": "TaskAgent", "metadata": {"name": name}, "spec": {"template": template, **spec}}
    return TaskAgent.model_validate(value)


def make_daemon(name: str, script: str) -> DaemonAgent:
    template = {"spec": {"command": ["/bin/bash", "-c", script]}}
    value = {"kind": "DaemonAgent", "metadata": {"name": name}, "spec": {"template": template}}
    return DaemonAgent.model_validate(value)


AGENTS = [
    make_agent("echo", 'read line; echo "got $line"; echo oops >&2; exit 7'),
    make_agent("sleep", "exec sleep 1000"),
    make_agent("hog", "exec python3 -c 'x = [bytearray(1 << 20) for _ in range(1000)]'", resources={"memory": "32Mi"}),
    make_daemon("loop", "trap 'echo ending; exit 3' TERM; echo up; while :; do read -t 0.05 _ <> <(:); done"),
    make_daemon("stubborn", "trap '' TERM; echo up; sleep 1000; sleep 1000"),
]


def make_resources(*agents: Agent) -> Resources:
    return Resources(
        runtime=SPEC,
        agents={agent.key: agent for agent in agents if isinstance(agent, TaskAgent)},
        daemons={agent.key: agent for agent in agents if isinstance(agent, DaemonAgent)},
        gateways={}, routes={}, secrets={}, upstream_ca_pem={}, jwks_files={}, environment_files={},
    )  # fmt: skip


# --- the host's parts -----------------------------------------------------------------------------------------------


@dataclass
class Host:
    """What the daemon takes before it starts a gateway."""

    spawner: Spawner
    cgroups: Cgroups
    view: HostView
    stamp: Stamp
    authority: ca.HostCa


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    lock = InstanceLock.take(LAYOUT)
    with contextlib.ExitStack() as undo:
        undo.callback(lock.release)
        spawner = Spawner.start()
        undo.callback(spawner.close)
        cgroups = Cgroups.open(LAYOUT)
        undo.callback(cgroups.close)
        remove_leftovers(LAYOUT, cgroups)
        authority = ca.load_or_create(tmp_path_factory.mktemp("state"))
        view = HostView.prepare(LAYOUT, ca_cert_pem=authority.cert_pem)
        undo.callback(view.remove)
        stamp = undo.enter_context(Stamp.attach(LAYOUT, cgroups.v2_dir))
        yield Host(spawner, cgroups, view, stamp, authority)


@contextlib.asynccontextmanager
async def open_pool(host: Host) -> AsyncIterator[SandboxPool]:
    pool = SandboxPool(
        layout=LAYOUT, spec=SPEC, cgroups=host.cgroups, spawner=host.spawner, view=host.view, stamp=host.stamp, ready=1
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
    assert left_on_host(host) == []


def left_on_host(host: Host) -> list[str]:
    namespaces = [name for name in os.listdir("/run/netns") if name.startswith(LAYOUT.netns_prefix)]
    return namespaces + [entry.name for entry in host.cgroups.v2_dir.iterdir() if entry.is_dir()]


# --- the peer -------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """The far end of a control channel."""

    sock: socket.socket
    fds: list[int] = field(default_factory=list)

    def say(self, message: msgspec.Struct, fds: tuple[int, ...] = ()) -> None:
        control.send(self.sock, message, fds)

    async def hear(self, *, counters: bool = False) -> Any:
        """Return the next message, but no Counters unless asked for; None at the end. Its fds are kept in `fds`."""
        loop = asyncio.get_running_loop()
        while True:
            ready = loop.create_future()
            loop.add_reader(self.sock, lambda ready=ready: None if ready.done() else ready.set_result(None))
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await ready
            finally:
                loop.remove_reader(self.sock)
            try:
                received = control.receive(self.sock, RUNTIME_MESSAGES)
            except ConnectionResetError:  # it closed with something of ours unread
                return None
            if received is None:
                return None
            self.drop_fds()
            message, self.fds = received
            if counters or not isinstance(message, Counters):
                return message

    async def hear_counters(self) -> Counters:
        """Return the next Counters, past anything else."""
        while not isinstance(message := await self.hear(counters=True), Counters):
            assert message is not None
        return message

    async def hear_all(self, *kinds: type[msgspec.Struct]) -> list[Any]:
        """Return one message of each kind, in this order."""
        heard = [await self.hear() for _ in kinds]
        assert [type(message) for message in heard] == list(kinds), heard
        return heard

    def drop_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def close(self) -> None:
        self.drop_fds()
        self.sock.close()


def make_pair() -> tuple[ControlChannel, Peer]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    return ControlChannel(ours), Peer(theirs)


def ask(agent: str = "echo", timeout_s: float = 0.0) -> StartRun:
    return StartRun(new_invocation_id(), AgentKey("default", agent), TRACEPARENT, "", timeout_s)


@dataclass
class Desk:
    """Runs with one channel."""

    runs: Runs
    channel: ControlChannel
    peer: Peer

    def start(self, request: StartRun) -> StartRun:
        self.runs.start(request, self.channel)
        return request


@pytest_asyncio.fixture(loop_scope="module")
async def desk(host: Host) -> AsyncIterator[Desk]:
    async with open_pool(host) as pool:
        channel, peer = make_pair()
        runs = Runs(pool, make_resources(*AGENTS), max_runs=2)
        yield Desk(runs, channel, peer)
        await runs.stop_all()
        channel.close()
        peer.close()


async def read_all(fd: int) -> bytes:
    os.set_blocking(fd, True)
    with os.fdopen(fd, "rb") as stream:
        return await asyncio.to_thread(stream.read)


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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 8))
        sock.settimeout(3)
        sock.connect(other.getsockname())
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(65_536))
    await desk.peer.hear_all(Spawned)  # which drops the fds of Started
    began_s = time.monotonic()
    desk.runs.stop(request.run_id, desk.channel)
    await desk.peer.hear_all(Exited, Removed)
    assert time.monotonic() - began_s < 4


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


async def test_a_peer_that_dies_before_started(desk: Desk) -> None:
    desk.start(ask("sleep"))
    desk.peer.close()
    async with asyncio.timeout(DEADLINE_S):
        await desk.runs.stop_all()


# --- daemons --------------------------------------------------------------------------------------------------------


def ask_daemon(agent: str, **fields: Any) -> StartRun:
    return StartRun(str(uuid.uuid4()), AgentKey("default", agent), kind=AgentKind.DAEMON, **fields)


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


async def test_a_daemon_is_stamped_without_an_invocation_and_has_five_seconds_to_end(desk: Desk) -> None:
    request, started, stdout = await start_daemon(desk, "loop")
    for raw in (started.header_v4, started.header_v6):
        stamp = read_stamp(raw)
        assert stamp[wire.TLV_AGENT_KIND] == b"\0"
        assert stamp[wire.TLV_AGENT_NAME] == b"loop"
        assert not {wire.TLV_INVOCATION_ID, wire.TLV_TRACEPARENT} & set(stamp)
    desk.runs.stop(request.run_id, desk.channel, 5.0)
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 3)  # what its handler of SIGTERM says
    assert await read_all(stdout) == b"ending\n"


def read_stamp(raw: bytes) -> dict[int, bytes]:
    """Return the TLVs of a template; its addresses and its connection are for the kernel to fill in."""
    found, at = {}, 16 + int.from_bytes(raw[14:16], "big")
    start = 16 + (12 if raw[13] == 0x11 else 36)
    while start < at:
        size = int.from_bytes(raw[start + 1 : start + 3], "big")
        found[raw[start]] = raw[start + 3 : start + 3 + size]
        start += 3 + size
    return found


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


async def test_the_hosts_own_shutdown_ends_daemons_gently_and_leaves_invocations(desk: Desk) -> None:
    _, _, stdout = await start_daemon(desk, "loop")
    desk.start(ask("sleep"))
    await desk.peer.hear_all(Started, Spawned)
    desk.runs.stop_daemons()
    exited, _ = await desk.peer.hear_all(Exited, Removed)
    assert (exited.reason, exited.exit_code) == (ExitReason.STOPPED, 3)
    os.close(stdout)


# --- lives of the gateway -------------------------------------------------------------------------------------------


@dataclass
class Lives:
    """A supervisor whose gateways are this test."""

    supervisor: GatewaySupervisor
    started: asyncio.Queue[tuple[GatewayProcess, Peer]]
    task: asyncio.Task[None]

    async def next(self) -> tuple[GatewayProcess, Peer]:
        async with asyncio.timeout(DEADLINE_S):
            return await self.started.get()

    async def next_ready(self) -> tuple[GatewayProcess, Peer, int]:
        process, peer = await self.next()
        (configure,) = await peer.hear_all(Configure)
        peer.say(Ready(PROTOCOL_VERSION, configure.generation))
        return process, peer, configure.generation


@pytest_asyncio.fixture(loop_scope="module")
async def lives(host: Host, tmp_path: Path) -> AsyncIterator[Lives]:
    queue: asyncio.Queue[tuple[GatewayProcess, Peer]] = asyncio.Queue()
    peers: list[Peer] = []
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> GatewayProcess:
        channel, peer = make_pair()
        processes.append(subprocess.Popen(["sleep", "1000"]))
        process = GatewayProcess(channel, processes[-1])
        peers.append(peer)
        queue.put_nowait((process, peer))
        return process

    spec = SPEC.model_copy(update={"ingress": loopback(), "admin": loopback()})
    with contextlib.closing(HostListeners.open(LAYOUT, spec)) as listeners:
        async with open_pool(host) as pool:
            supervisor = GatewaySupervisor(
                start_process=start,
                build_config=lambda resources: build_gateway_config(resources, host.authority),
                listeners=listeners,
                flows_fd=host.stamp.flows_fd,
                counters=lambda: Counters(host.stamp.counters(), pool.counts(), pool.warm_agents()),
                resources=make_resources(*AGENTS),
            )
            supervisor.runs = Runs(pool, make_resources(*AGENTS), max_runs=2)
            task = asyncio.get_running_loop().create_task(supervisor.run())
            yield Lives(supervisor, queue, task)
            task.cancel()
            for process in processes:
                process.kill()  # these do not end by themselves when their channel does
            await asyncio.gather(task, return_exceptions=True)
            await supervisor.runs.stop_all()
            for peer in peers:
                peer.close()


def loopback() -> Any:
    return SPEC.ingress.model_copy(update={"listen": "127.0.0.1:0"})


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
    ids=lambda message: msgspec.json.encode(message).decode()[:60],
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


async def test_a_reload_while_the_gateway_dies_is_for_the_next_one(lives: Lives) -> None:
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    peer.close()
    await lives.supervisor.reload(make_resources(make_agent("other", "exit 3")))
    _, peer, _ = await lives.next_ready()
    peer.say(ask("other"))
    *_, exited, _ = await peer.hear_all(Started, Spawned, Exited, Removed)
    assert exited.exit_code == 3


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
    for index in shared:
        with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
            sock.accept()[0].close()


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
        began_s = time.monotonic()
        _, peer, _ = await lives.next_ready()
        for index in (ConfigureFd.INGRESS, ConfigureFd.ADMIN_TCP):
            with socket.socket(fileno=os.dup(peer.fds[index])) as sock:
                socket.create_connection(sock.getsockname(), 3).close()
        with socket.socket(fileno=os.dup(peer.fds[ConfigureFd.INGRESS])) as sock:
            sock.shutdown(socket.SHUT_RDWR)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
            sock.setblocking(True)
            sock.connect(deaf.getsockname())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65_536))
        peer.close()
        await lives.next_ready()
        assert time.monotonic() - began_s < 6


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
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 8))
        if packet == "behind a bad message":
            peer.sock.send(b"nonsense")
        words = msgspec.msgpack.encode(StopRun(new_invocation_id()))
        socket.send_fds(peer.sock, [words], [unread.fileno()] * (100 if packet == "more than are taken" else 1))
        began_s = time.monotonic()
        unread.close()
        assert await peer.hear() is None
        assert time.monotonic() - began_s < 4
        await lives.next_ready()
        assert time.monotonic() - began_s < 4


def open_files() -> list[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names


async def test_a_gateway_that_speaks_before_ready_is_replaced_at_first_only_by_an_error(lives: Lives) -> None:
    _, peer = await lives.next()
    await peer.hear_all(Configure)
    peer.say(ask())
    with pytest.raises(Exception, match="did not become ready: StartRun before Ready"):
        await lives.task


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
    _, peer, _ = await lives.next_ready()
    await lives.supervisor.ready.wait()
    await lives.supervisor.drain()
    peer.close()
    async with asyncio.timeout(DEADLINE_S):
        await lives.supervisor.drained.wait()


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
        peer.say(StopRun(request.run_id, 5.0))
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
