"""The runtime's end of a control channel with real sandboxes behind it, and a peer that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from instances import DEADLINE_S, FIRST_UID, instance

from clrk.core import control
from clrk.core.control import RUNTIME_MESSAGES
from clrk.core.ids import new_invocation_id
from clrk.core.layout import HostLayout
from clrk.core.messages import AgentKey, AgentKind, Counters, StartRun
from clrk.core.resources import Agent, DaemonAgent, RuntimeSpec, TaskAgent, UidRange
from clrk.ebpf.loader import Stamp
from clrk.runtime import ca
from clrk.runtime.cgroup import Cgroups
from clrk.runtime.config.declared import Resources
from clrk.runtime.control_channel import ControlChannel
from clrk.runtime.pool import SandboxPool
from clrk.runtime.reconcile import InstanceLock, remove_leftovers
from clrk.runtime.runs import Runs
from clrk.runtime.spawner import Spawner
from clrk.runtime.view import HostView

LAYOUT = HostLayout(instance("d"))
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPEC = RuntimeSpec(uid_range=UidRange(start=FIRST_UID, count=50), state_dir="/nonexistent")


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


@contextlib.contextmanager
def control_host(state_dir: Path) -> Iterator[Host]:
    """Take the host's parts, and give all of them back."""
    lock = InstanceLock.take(LAYOUT)
    with contextlib.ExitStack() as undo:
        undo.callback(lock.release)
        spawner = Spawner.start()
        undo.callback(spawner.close)
        cgroups = Cgroups.open(LAYOUT)
        undo.callback(cgroups.close)
        remove_leftovers(LAYOUT, cgroups)
        authority = ca.load_or_create(state_dir)
        view = HostView.prepare(LAYOUT, ca_cert_pem=authority.cert_pem)
        undo.callback(view.remove)
        stamp = undo.enter_context(Stamp.attach(LAYOUT, cgroups.v2_dir))
        yield Host(spawner, cgroups, view, stamp, authority)


@contextlib.asynccontextmanager
async def open_pool(host: Host) -> AsyncIterator[SandboxPool]:
    """A pool that leaves nothing on the host."""
    pool = SandboxPool(
        layout=LAYOUT, spec=SPEC, cgroups=host.cgroups, spawner=host.spawner, view=host.view, stamp=host.stamp, ready=1
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
    assert (left := left_on_host(host)) == [], left


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


def ask_daemon(agent: str, **fields: Any) -> StartRun:
    return StartRun(str(uuid.uuid4()), AgentKey("default", agent), kind=AgentKind.DAEMON, **fields)


@dataclass
class Desk:
    """Runs with one channel."""

    pool: SandboxPool
    runs: Runs
    channel: ControlChannel
    peer: Peer

    def start(self, request: StartRun) -> StartRun:
        self.runs.start(request, self.channel)
        return request


@contextlib.asynccontextmanager
async def open_desk(host: Host) -> AsyncIterator[Desk]:
    async with open_pool(host) as pool:
        channel, peer = make_pair()
        runs = Runs(pool, make_resources(*AGENTS), max_runs=2)
        try:
            yield Desk(pool, runs, channel, peer)
        finally:
            await runs.stop_all()
            channel.close()
            peer.close()


async def read_all(fd: int) -> bytes:
    os.set_blocking(fd, True)
    with os.fdopen(fd, "rb") as stream:
        return await asyncio.to_thread(stream.read)
