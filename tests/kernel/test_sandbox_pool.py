"""The pool's count, and what a crash of either process leaves."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from host_harness import (
    LAYOUT,
    assert_nothing_left,
    count_leftovers,
    running_host,
    start_runtime,
    task_agent,
    until_gone,
)
from instances import DEADLINE_S, DIES_WITH_US

from clrk.core.errors import HostError
from clrk.core.ids import SandboxId
from clrk.netns.namespace import NETNS_DIR
from clrk.netns.reconcile import remove_leftovers
from clrk.runtime.cgroup import Cgroups, find_hierarchy
from clrk.runtime.pool import PoolExhaustedError
from clrk.runtime.spawner import ReserveRequest, Spawner, SpawnRequest

pytestmark = pytest.mark.kernel

# A runtime that starts sleeping sandboxes, says the spawner's pid, and waits to be killed.
RUNTIME = """
import asyncio, os, sys
from host_harness import running_host, task_agent
async def main():
    async with running_host() as host:
        script = "import os, time; os.write(1, b'up'); time.sleep(600)"
        for number in range(int(sys.argv[1])):
            sandbox = await host.pool.acquire()
            _, stdout, _ = sandbox.open_stdio()
            os.set_blocking(stdout, True)
            await sandbox.spawn(agent=task_agent("/usr/bin/python3", "-I", "-c", script), environment={})
            if sys.argv[2] == "wait":
                await asyncio.to_thread(os.read, stdout, 2)
        print(host.spawner.pid, flush=True)
        await host.spawner.wait_died()
asyncio.run(main())
"""


async def test_warm_cold_and_exhausted() -> None:
    async with running_host(ready=1, max_sandboxes=2) as host:
        first = await host.pool.acquire()
        second = await host.pool.acquire()
        assert not first.warm  # made ahead, but for nobody in particular
        assert {first.sandbox_id, second.sandbox_id} & set(os.listdir(host.cgroups.v2_dir)) == {
            first.sandbox_id, second.sandbox_id,
        }  # fmt: skip
        with pytest.raises(PoolExhaustedError, match="the limit is 2"):
            await host.pool.acquire()
        await first.remove()
        third = await host.pool.acquire()
        assert third.sandbox_id not in (first.sandbox_id, second.sandbox_id)


@pytest.fixture
def open_files() -> Iterator[Callable[[int], None]]:
    """Set the soft limit of this process; taken back at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_there_are_no_more_sandboxes_than_the_runtime_has_fds_for(open_files: Callable[[int], None]) -> None:
    open_files(170)  # of which 128 are for the runtime itself, and 20 for each sandbox
    async with running_host(ready=1) as host:
        taken = [await host.pool.acquire() for _ in range(2)]
        with pytest.raises(PoolExhaustedError, match="the limit is 2"):
            await host.pool.acquire()
        assert len({sandbox.uid for sandbox in taken}) == 2


async def test_the_operators_limit_of_open_files_holds_in_the_sandbox() -> None:
    async with running_host(ready=0, max_open_files=100) as host:
        assert (await host.sh("ulimit -Hn; ulimit -Sn; ulimit -n 101")).out == "100\n100\n"


async def test_the_delayed_refill_looks_at_the_limit_again() -> None:
    async with running_host(ready=2, max_sandboxes=3) as host:
        first = await host.pool.acquire()  # now the refill waits for _REFILL_DELAY_S
        for _ in range(2):
            await host.pool.acquire()
        with pytest.raises(PoolExhaustedError):
            await host.pool.acquire()
        await asyncio.sleep(0.3)  # the delay is what this is about
        with pytest.raises(PoolExhaustedError, match="3 sandboxes are in use; the limit is 3"):
            await host.pool.acquire()
        await first.remove()
        await host.pool.acquire()


async def test_no_ready_sandboxes_means_cold_ones() -> None:
    async with running_host(ready=0) as host:
        sandbox = await host.pool.acquire()
        assert not sandbox.warm
        await sandbox.remove()


async def test_close_removes_running_sandboxes_and_refuses_more() -> None:
    before = count_leftovers()
    async with running_host() as host:
        sandbox = await host.pool.acquire()
        for fd in sandbox.open_stdio():
            os.close(fd)
        await sandbox.spawn(agent=task_agent("/bin/sleep", "600"), environment={})
        await host.pool.close()
        with pytest.raises(PoolExhaustedError):
            await host.pool.acquire()
    await assert_nothing_left(before)
    assert not LAYOUT.run_dir.exists()


async def test_a_cancelled_acquire_loses_nothing() -> None:
    async with running_host(ready=0, max_sandboxes=1) as host:
        acquiring = asyncio.create_task(host.pool.acquire())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        acquiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await acquiring
        sandbox = await host.pool.acquire()
        await sandbox.remove()


async def test_a_taken_cgroup_name_fails_the_making_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_host(ready=0) as host:
        monkeypatch.setattr("clrk.runtime.pool.new_sandbox_id", lambda: SandboxId("aaaaaaaa"))
        taken = host.cgroups.create(SandboxId("aaaaaaaa"))
        before = count_leftovers()
        with pytest.raises(HostError, match="File exists"):
            await host.pool.acquire()
        await assert_nothing_left(before)
        taken.remove()
        await (await host.pool.acquire()).remove()


async def test_a_namespace_that_can_not_be_made_leaves_no_process_and_no_cgroup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_host(ready=0) as host:
        await (await host.pool.acquire()).remove()
        before = count_leftovers()
        monkeypatch.setattr("clrk.netns.namespace.ADDRESSES", (("203.0.113.1", 99),))
        with pytest.raises(HostError, match="configure lo"):
            await host.pool.acquire()
        await assert_nothing_left(before)


@asynccontextmanager
async def other_runtime(moment: str) -> AsyncIterator[tuple[subprocess.Popen[str], int]]:
    """A runtime with three sandboxes, in a process of its own. Yields it and its spawner's pid."""
    with start_runtime(RUNTIME, "3", moment) as runtime:
        try:
            assert runtime.stdout is not None
            yield runtime, int(await asyncio.to_thread(runtime.stdout.readline))
        finally:
            runtime.kill()


@pytest.mark.parametrize("moment", ["wait", "at once"])  # at once: bwrap still sets up; its pid 1 outlives its monitor
async def test_kill_9_of_the_runtime_ends_the_sandboxes_and_the_next_start_is_clean(moment: str) -> None:
    before = count_leftovers()
    async with other_runtime(moment) as (runtime, _):
        runtime.kill()
        await asyncio.to_thread(wait_empty, LAYOUT.cgroup_name)
        await until_gone(lambda: Counter(processes=count_leftovers()["processes"]), before)
        left = count_leftovers()
    assert left["namespaces"] >= 3
    assert left["cgroups"] >= 3
    cgroups = Cgroups.open(LAYOUT)
    assert len(cgroups.remove_leftovers()) >= 3
    assert len(remove_leftovers(LAYOUT.netns_prefix)) >= 3
    assert cgroups.remove_leftovers() == ()
    cgroups.close()
    await assert_nothing_left(before)
    async with running_host() as host:
        assert (await host.sh("echo again")).out == "again\n"


async def test_kill_9_of_the_spawner_lets_the_runtime_remove_everything() -> None:
    before = count_leftovers()
    async with other_runtime("at once") as (runtime, spawner_pid):
        os.kill(spawner_pid, signal.SIGKILL)
        assert await asyncio.to_thread(runtime.wait, DEADLINE_S) == 0
    await assert_nothing_left(before)


def wait_empty(name: str) -> None:
    """Wait until no process is left below a cgroup: the kernel notifies pollers of cgroup.events."""
    root = find_hierarchy(Path("/proc/self/mounts").read_text()).v2
    with open(root / name / "cgroup.events", "rb", buffering=0) as events:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events.fileno(), 256, 0):
            assert poller.poll(DEADLINE_S * 1000), "processes live on"


async def test_reconcile_kills_what_still_runs_and_leaves_others_alone() -> None:
    cgroups = Cgroups.open(LAYOUT)
    leftover = cgroups.create(SandboxId("deadbeef"))
    foreign = cgroups.v2_dir / "not-ours"
    foreign.mkdir()
    sleeper = subprocess.Popen([*DIES_WITH_US, "sleep", "600"])
    bystander = subprocess.Popen([*DIES_WITH_US, "sleep", "600"])
    try:
        for path in leftover.procs_files:
            Path(path).write_text(str(sleeper.pid))
        (foreign / "cgroup.procs").write_text(str(bystander.pid))
        assert cgroups.remove_leftovers() == ("deadbeef",)
        assert sleeper.wait(DEADLINE_S) == -signal.SIGKILL
        assert bystander.poll() is None
        assert foreign.is_dir()
    finally:
        for process in (sleeper, bystander):
            process.kill()
            process.wait()
        foreign.rmdir()
        cgroups.close()


# --- the spawner alone ----------------------------------------------------------------------------------------------


async def test_spawner_names_the_step_that_failed() -> None:
    spawner = Spawner.start()
    try:
        bad = ReserveRequest(cgroup_procs=["/sys/fs/cgroup/none/cgroup.procs"], max_open_files=1024, oom_score_adj=0)
        with pytest.raises(HostError, match="cgroup: No such file"):
            await spawner.reserve(bad)
        good = ReserveRequest(cgroup_procs=[], max_open_files=1024, oom_score_adj=0)
        null = os.open("/dev/null", os.O_RDWR)
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        pid = await spawner.reserve(good)
        with pytest.raises(HostError, match="namespace: Invalid argument"):
            await spawner.spawn(SpawnRequest(pid=pid, argv=[b"/bin/true"], environment={}), (null, null, null, null))
        assert (await spawner.wait(pid)).exit_code == 127
        pid = await spawner.reserve(good)
        with pytest.raises(HostError, match="exec: No such file"):
            await spawner.spawn(SpawnRequest(pid=pid, argv=[b"/no/such"], environment={}), (here, null, null, null))
        with pytest.raises(HostError, match="No such process"):
            await spawner.spawn(SpawnRequest(pid=1, argv=[b"/bin/true"], environment={}), (here, null, null, null))
        os.close(null)
        os.close(here)
    finally:
        spawner.close()
        spawner.close()


async def test_spawner_signals_its_own_children_only() -> None:
    spawner = Spawner.start()
    other = subprocess.Popen([*DIES_WITH_US, "sleep", "600"])
    try:
        pid = await spawner.reserve(ReserveRequest(cgroup_procs=[], max_open_files=1024, oom_score_adj=0))
        spawner.kill(other.pid)
        spawner.kill(pid, signal.SIGTERM)
        assert (await spawner.wait(pid)).signal == signal.SIGTERM
        assert other.poll() is None
    finally:
        spawner.close()
        other.kill()
        other.wait()


async def test_everyone_learns_of_the_spawners_death() -> None:
    spawner = Spawner.start()
    pid = await spawner.reserve(ReserveRequest(cgroup_procs=[], max_open_files=1024, oom_score_adj=0))
    waiting = asyncio.create_task(spawner.wait(pid))
    os.kill(spawner.pid, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        await spawner.wait_died()
        with pytest.raises(HostError, match="spawner is gone"):
            await waiting
        with pytest.raises(HostError, match="spawner is gone"):
            await spawner.reserve(ReserveRequest(cgroup_procs=[], max_open_files=1024, oom_score_adj=0))
    spawner.close()


def test_namespaces_of_this_suite_are_gone() -> None:
    assert not [name for name in os.listdir(NETNS_DIR) if name.startswith(LAYOUT.netns_prefix)]
