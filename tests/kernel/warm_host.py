"""Agents that have sandboxes prepared, and what of these there is on the host."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from host_harness import Host, Outcome, read_all
from instances import DEADLINE_S, FIRST_UID, instance

from clrk.core.layout import HostLayout
from clrk.core.resources import TaskAgent
from clrk.runtime.pool import SandboxPool
from clrk.runtime.sandbox import Sandbox

OTHER_LAYOUT = HostLayout(instance("hb"))  # hosts of one test, beside that of the module


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def warm_agent(*command: str, name: str = "warm", size: int = 1, **spec: object) -> TaskAgent:
    template = {"command": list(command), **spec.pop("template", {})}  # type: ignore[dict-item] # a mapping
    body = {"template": {"spec": template}, "warmPoolSize": size, **spec}
    return TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": name}, "spec": body})


async def until(pool: SandboxPool, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, (pool.counts(), pool.warm_agents())
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # what is not the pool's, a process say, changes without its word
                await pool.changed()


async def filled(host: Host, *agents: TaskAgent) -> None:
    """Make these all the agents, and wait until what they ask for is prepared."""
    host.pool.set_agents(agents)
    wanted = {"/".join(agent.key): agent.spec.warm_pool_size for agent in agents}
    await until(host.pool, lambda: host.pool.warm_agents() == wanted)


async def finish(sandbox: Sandbox, agent: TaskAgent, **environment: str) -> Outcome:
    stdin, stdout, stderr = sandbox.open_stdio()
    os.close(stdin)
    reading = asyncio.gather(read_all(stdout), read_all(stderr))
    try:
        await sandbox.spawn(agent=agent, environment=environment)
        ended = await sandbox.wait()
    finally:
        await sandbox.remove()
        out, err = await reading
    return Outcome(out, err, ended)


async def run(host: Host, agent: TaskAgent, *, warm: bool, **environment: str) -> Outcome:
    sandbox = await host.pool.acquire(agent)
    assert sandbox.warm is warm
    return await finish(sandbox, agent, **environment)


def waiting_processes() -> list[int]:
    """The launchers that wait: processes of our uids."""
    shown = subprocess.run(["ps", "-eo", "pid=,uid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in shown.splitlines()]
    return [int(pid) for pid, uid, args in rows if args.startswith("/run/clrk/launch") and in_range(int(uid))]


def in_range(uid: int) -> bool:
    return FIRST_UID <= uid < FIRST_UID + 1000
