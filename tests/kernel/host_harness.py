"""A pool of real sandboxes for tests of the host side. No BPF: attribution is not what these tests prove."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instances import DEADLINE_S, DIES_WITH_US, FIRST_UID, OWNER, OWNER_VARIABLE, instance

from clrk.core.layout import HostLayout
from clrk.core.resources import HostLimits, RuntimeSpec, TaskAgent, UidRange
from clrk.runtime.cgroup import Cgroups, find_hierarchy
from clrk.runtime.pool import SandboxPool
from clrk.runtime.sandbox import Sandbox, SandboxExit
from clrk.runtime.spawner import Spawner
from clrk.runtime.view import HostView

LAYOUT = HostLayout(instance("h"))


class RecordingRegistry:
    """Stands where the kernel's table of templates is; says what is registered."""

    def __init__(self) -> None:
        self.cookies: set[int] = set()

    def register(self, netns_cookie: int, header_v4: bytes, header_v6: bytes) -> None:
        self.cookies.add(netns_cookie)

    def unregister(self, netns_cookie: int) -> None:
        self.cookies.discard(netns_cookie)


@dataclass(frozen=True)
class Outcome:
    out: str
    err: str
    exit: SandboxExit


@dataclass
class Host:
    pool: SandboxPool
    spawner: Spawner
    cgroups: Cgroups
    view: HostView
    stamp: RecordingRegistry

    async def run(self, *command: str, environment: Mapping[str, str] | None = None, **spec: Any) -> Outcome:
        """Run a command to its end in a sandbox of its own, which is removed."""
        sandbox = await self.pool.acquire()
        try:
            return await run_in(sandbox, *command, environment=environment, **spec)
        finally:
            await sandbox.remove()

    async def sh(self, script: str, **spec: Any) -> Outcome:
        return await self.run("/bin/sh", "-c", script, **spec)

    async def python(self, script: str, **spec: Any) -> Outcome:
        return await self.run("/usr/bin/python3", "-I", "-c", script, **spec)


def task_agent(*command: str, resources: Mapping[str, Any] | None = None, **template: Any) -> TaskAgent:
    spec = {"template": {"spec": {"command": list(command), **template}}, "resources": dict(resources or {})}
    return TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": "host-test"}, "spec": spec})


async def run_in(sandbox: Sandbox, *command: str, environment: Mapping[str, str] | None = None, **spec: Any) -> Outcome:
    stdin, stdout, stderr = sandbox.open_stdio()
    os.close(stdin)
    reading = asyncio.gather(read_all(stdout), read_all(stderr))
    try:
        await sandbox.spawn(agent=task_agent(*command, **spec), environment=environment or {})
        ended = await sandbox.wait()
    finally:
        sandbox.kill()
    out, err = await reading
    return Outcome(out, err, ended)


async def read_all(fd: int) -> str:
    os.set_blocking(fd, True)

    def read() -> bytes:
        with open(fd, "rb") as stream:
            return stream.read()

    return (await asyncio.to_thread(read)).decode()


def wait_readable(fd: int) -> bytes:
    """Return what comes next from a pipe; blocks until then."""
    os.set_blocking(fd, True)
    return os.read(fd, 4096)


def start_runtime(source: str, *arguments: str, owner: str = str(OWNER)) -> subprocess.Popen[str]:
    """Run a Python program, which may import this folder's modules: a runtime to be killed. owner: of its instances."""
    here = Path(__file__).parent
    return subprocess.Popen(
        [*DIES_WITH_US, sys.executable, "-c", source, *arguments], stdout=subprocess.PIPE, text=True,
        env=os.environ | {OWNER_VARIABLE: owner, "PYTHONPATH": f"{here}:{here.parent}"},
    )  # fmt: skip


@asynccontextmanager
async def running_host(
    *,
    ready: int = 1,
    max_sandboxes: int = 64,
    max_open_files: int = 4096,
    layout: HostLayout = LAYOUT,
    state_dir: str = "/nonexistent",
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Host]:
    spawner = Spawner.start()
    try:
        cgroups = Cgroups.open(layout)
        view = HostView.prepare(layout, ca_cert_pem="-----BEGIN CERTIFICATE-----\nours\n-----END CERTIFICATE-----\n")
        stamp = RecordingRegistry()
        spec = RuntimeSpec(
            uid_range=UidRange(start=FIRST_UID, count=1000),
            limits=HostLimits(max_sandboxes=max_sandboxes, max_open_files=max_open_files),
            state_dir=state_dir,
        )
        pool = SandboxPool(
            layout=layout, spec=spec, cgroups=cgroups, spawner=spawner, view=view, stamp=stamp, ready=ready, clock=clock
        )
        await pool.start()
        try:
            yield Host(pool, spawner, cgroups, view, stamp)
        finally:
            await pool.close()
            view.remove()
            layout.run_dir.rmdir()
            cgroups.close()
    finally:
        spawner.close()


async def until_gone(count: Callable[[], Counter[str]], before: Counter[str]) -> None:
    """Wait until there is no more of anything than before: a process leaves its cgroup before it is gone itself."""
    deadline_s = time.monotonic() + DEADLINE_S
    while left := count() - before:
        assert time.monotonic() < deadline_s, left
        await asyncio.sleep(0.01)


async def assert_nothing_left(before: Counter[str]) -> None:
    """What remove() answers for is gone when it returns; processes that left their cgroup follow."""
    left = count_leftovers() - before
    assert set(left) <= {"processes"}, left
    await until_gone(count_leftovers, before)


def count_leftovers(prefix: str = LAYOUT.netns_prefix) -> Counter[str]:
    """Everything of the host that a sandbox could leave behind, counted."""
    hierarchy = find_hierarchy(Path("/proc/self/mounts").read_text())
    parents = [root / prefix[:-1] for root in (hierarchy.v2, *hierarchy.v1.values())]
    groups = [path for parent in parents if parent.is_dir() for path in parent.iterdir() if path.is_dir()]
    owned = re.compile(re.escape(prefix) + "[0-9a-f]{8}")
    uids = subprocess.run(["ps", "-eo", "uid="], capture_output=True, text=True, check=True).stdout.split()
    return Counter(
        namespaces=sum(owned.fullmatch(name) is not None for name in os.listdir("/run/netns")),
        cgroups=len(groups),
        mounts=sum(f"/{prefix}" in line for line in Path("/proc/self/mounts").read_text().splitlines()),
        processes=sum(FIRST_UID <= int(uid) < FIRST_UID + 1000 for uid in uids),
        fds=len(os.listdir("/proc/self/fd")),
    )
