"""A gateway supervisor whose gateways are the test: it reads what each one is told, and answers for it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from control_desk import AGENTS, LAYOUT, SPEC, Host, Peer, make_pair, make_resources, open_pool
from instances import DEADLINE_S, DIES_WITH_US, OWNER

from clrk.core.messages import PROTOCOL_VERSION, Configure, Counters, Ready
from clrk.runtime.ca import Authorities
from clrk.runtime.gateway_config import build_gateway_config
from clrk.runtime.gateway_process import GatewayProcess
from clrk.runtime.gateway_supervisor import GatewaySupervisor
from clrk.runtime.listeners import HostListeners
from clrk.runtime.runs import Runs


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


@contextlib.asynccontextmanager
async def open_lives(host: Host) -> AsyncIterator[Lives]:
    """Supervise; afterwards nothing of any life is left."""
    queue: asyncio.Queue[tuple[GatewayProcess, Peer]] = asyncio.Queue()
    peers: list[Peer] = []
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> GatewayProcess:
        channel, peer = make_pair()
        processes.append(subprocess.Popen([*DIES_WITH_US, "sleep", "1000"]))
        process = GatewayProcess(channel, processes[-1])
        peers.append(peer)
        queue.put_nowait((process, peer))
        return process

    spec = SPEC.model_copy(update={"ingress": loopback(), "admin": loopback()})
    with contextlib.closing(HostListeners.open(LAYOUT, spec)) as listeners:
        async with open_pool(host) as pool:
            supervisor = GatewaySupervisor(
                start_process=start,
                build_config=lambda resources: build_gateway_config(resources, Authorities(host.authority)),
                listeners=listeners,
                flows_fd=host.stamp.flows_fd,
                counters=lambda: Counters(host.stamp.counters(), pool.counts(), pool.warm_agents()),
                resources=make_resources(*AGENTS),
            )
            supervisor.runs = Runs(pool, make_resources(*AGENTS), max_runs=2)
            task = asyncio.get_running_loop().create_task(supervisor.run())
            try:
                yield Lives(supervisor, queue, task)
            finally:
                task.cancel()
                for process in processes:
                    process.kill()  # these do not end by themselves when their channel does
                await asyncio.gather(task, return_exceptions=True)
                await supervisor.runs.stop_all()
                for peer in peers:
                    peer.close()


def loopback() -> Any:
    """At an address of this process alone: nobody else takes the port while a gateway's listener is opened anew."""
    return SPEC.ingress.model_copy(update={"listen": f"{IPv4Address('127.128.0.0') + OWNER}:0"})
