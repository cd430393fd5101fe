"""How many sandboxes are prepared, for which agents and for how long; and how those end that nobody used."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import Host, assert_nothing_left, count_leftovers, running_host, start_runtime, until_gone
from instances import DEADLINE_S
from warm_host import OTHER_LAYOUT, Clock, filled, finish, run, until, waiting_processes, warm_agent

from clrk.core.errors import HostError
from clrk.netns.reconcile import remove_leftovers
from clrk.runtime.cgroup import Cgroups, find_hierarchy
from clrk.runtime.pool import PoolExhaustedError

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_host() -> AsyncIterator[Host]:
    async with running_host(ready=0) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def host(module_host: Host) -> AsyncIterator[Host]:
    """The module's host; no agent has anything prepared."""
    yield module_host
    module_host.pool.set_agents([])
    await until(module_host.pool, lambda: not waiting_processes())


# --- how many -------------------------------------------------------------------------------------------------------


async def test_used_ones_are_replaced_and_counts_say_so() -> None:
    async with running_host(ready=1, layout=OTHER_LAYOUT) as host:
        agent = warm_agent("/bin/true", size=2)
        await filled(host, agent)
        assert host.pool.counts() == {"ready": 1, "warm": 2, "running": 0}
        sandbox = await host.pool.acquire(agent)
        assert host.pool.counts()["running"] == 1
        await until(host.pool, lambda: host.pool.counts() == {"ready": 1, "warm": 2, "running": 1})
        assert (await finish(sandbox, agent)).exit.exit_code == 0
        assert host.pool.counts() == {"ready": 1, "warm": 2, "running": 0}
        assert host.pool.warm_agents() == {"default/warm": 2}


async def test_they_give_way_to_runs_at_the_hosts_limit() -> None:
    async with running_host(ready=0, max_sandboxes=3, layout=OTHER_LAYOUT) as host:
        old, used = warm_agent("/bin/true", name="old"), warm_agent("/bin/true", name="used", size=2)
        other = warm_agent("/bin/true", name="other")
        host.pool.set_agents([old, used])
        await until(host.pool, lambda: host.pool.counts()["warm"] == 3)
        first = await host.pool.acquire(used)
        assert first.warm
        second = await host.pool.acquire(other)
        assert not second.warm
        assert host.pool.warm_agents() == {"default/used": 1}  # the one nobody invoked gave way
        third = await host.pool.acquire(other)
        assert host.pool.warm_agents() == {}
        with pytest.raises(PoolExhaustedError, match="the limit is 3"):
            await host.pool.acquire(old)
        for sandbox in (first, second, third):
            await sandbox.remove()
        await until(host.pool, lambda: host.pool.counts()["warm"] == 3)


async def test_at_the_limit_those_made_for_anybody_become_the_agents() -> None:
    async with running_host(ready=2, max_sandboxes=2, layout=OTHER_LAYOUT) as host:
        await filled(host, warm_agent("/bin/true", size=2))
        assert host.pool.counts() == {"ready": 0, "warm": 2, "running": 0}


async def test_nothing_is_kept_for_an_agent_that_nobody_invokes() -> None:
    clock = Clock()
    async with running_host(ready=0, clock=clock, layout=OTHER_LAYOUT) as host:
        agent = warm_agent("/bin/true", warmPoolIdleTTL="10m")
        await filled(host, agent)
        clock.now_s += 599
        host.pool.set_agents([agent])  # a reload that changes nothing is no invocation
        assert host.pool.counts()["warm"] == 1
        clock.now_s += 1
        host.pool.set_agents([agent])
        await until(host.pool, lambda: not waiting_processes())
        assert host.pool.counts() == {"ready": 0, "warm": 0, "running": 0}
        sandbox = await host.pool.acquire(agent)
        assert not sandbox.warm
        clock.now_s += 3600  # a long run is no idleness
        host.pool.set_agents([agent])
        await until(host.pool, lambda: host.pool.counts()["warm"] == 1)
        await finish(sandbox, agent)
        assert (await run(host, agent, warm=True)).exit.exit_code == 0


async def test_a_reload_replaces_what_changed_and_nothing_else(host: Host) -> None:
    same, changed, gone = (warm_agent("/bin/echo", "1", name=name) for name in ("same", "changed", "gone"))
    await filled(host, same, changed, gone)
    before = set(waiting_processes())
    new = warm_agent("/bin/echo", "2", name="changed")
    await filled(host, same, new)
    await until(host.pool, lambda: len(waiting_processes()) == 2)
    assert len(before & set(waiting_processes())) == 1
    assert (await run(host, changed, warm=False)).out == "1\n"  # a run that began with the old resources
    assert (await run(host, new, warm=True)).out == "2\n"


async def test_a_replaced_mount_is_seen_at_once(host: Host, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    script = tmp_path / "agent.sh"
    script.write_text("echo old\n")
    mounts = {"mounts": [{"hostPath": str(script), "path": "/opt/agent.sh"}]}
    agent = warm_agent("/bin/sh", "/opt/agent.sh", template=mounts)
    await filled(host, agent)
    (tmp_path / "new").write_text("echo new\n")
    (tmp_path / "new").rename(script)
    assert (await run(host, agent, warm=False)).out == "new\n"
    await until(host.pool, lambda: host.pool.counts()["warm"] == 1)
    assert (await run(host, agent, warm=True)).out == "new\n"


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
async def test_one_that_dies_while_it_waits_is_replaced_after_a_while(signum: signal.Signals) -> None:
    clock = Clock()
    async with running_host(ready=0, clock=clock, layout=OTHER_LAYOUT) as host:
        agent = warm_agent("/bin/echo", "fine")
        await filled(host, agent)
        (pid,) = waiting_processes()
        os.kill(pid, signum)
        await until(host.pool, lambda: host.pool.counts()["warm"] == 0)
        assert (await run(host, agent, warm=False)).out == "fine\n"
        clock.now_s += 2
        await filled(host, agent)
        assert (await run(host, agent, warm=True)).out == "fine\n"


async def test_a_view_that_can_not_be_built_is_said_and_not_tried_for_ever(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clrk.runtime.sandbox._EXEC_TIMEOUT_S", DEADLINE_S)  # so that spawn() waits for bwrap's end
    agent = warm_agent("/bin/true", template={"workdir": "/no/such/folder"})
    host.pool.set_agents([agent])
    await until(host.pool, lambda: "not prepared ahead" in caplog.text)
    assert "/no/such/folder" in caplog.text  # bwrap's own words
    with pytest.raises(HostError, match="bwrap ended with 1"):
        await run(host, agent, warm=False)
    assert caplog.text.count("not prepared ahead") == 1


async def test_no_agents_any_more_and_close_leave_nothing(host: Host) -> None:
    before = count_leftovers()
    await filled(host, warm_agent("/bin/true", size=3))
    host.pool.set_agents([])
    await until_gone(count_leftovers, before)
    async with running_host(ready=0, layout=OTHER_LAYOUT) as other:
        await filled(other, warm_agent("/bin/true", size=3))
    assert waiting_processes() == []
    assert count_leftovers(OTHER_LAYOUT.netns_prefix)["namespaces"] == 0
    await assert_nothing_left(before)


RUNTIME = """
import asyncio
from host_harness import running_host
from warm_host import OTHER_LAYOUT, filled, warm_agent
async def main():
    async with running_host(ready=0, layout=OTHER_LAYOUT) as host:
        await filled(host, warm_agent("/bin/true", size=3))
        print("filled", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@asynccontextmanager
async def other_runtime() -> AsyncIterator[subprocess.Popen[str]]:
    with start_runtime(RUNTIME) as runtime:
        try:
            assert runtime.stdout is not None
            assert await asyncio.to_thread(runtime.stdout.readline) == "filled\n"
            yield runtime
        finally:
            runtime.kill()


async def test_kill_9_of_the_runtime_ends_who_waits() -> None:
    async with other_runtime() as runtime:
        assert len(waiting_processes()) == 3
        runtime.kill()
        await asyncio.to_thread(runtime.wait)
        root = find_hierarchy(Path("/proc/self/mounts").read_text()).v2
        deadline_s = time.monotonic() + DEADLINE_S
        while "populated 1" in (root / OTHER_LAYOUT.cgroup_name / "cgroup.events").read_text():
            assert time.monotonic() < deadline_s, "processes live on"
    assert waiting_processes() == []
    cgroups = Cgroups.open(OTHER_LAYOUT)
    assert len(cgroups.remove_leftovers()) == 3
    assert len(remove_leftovers(OTHER_LAYOUT.netns_prefix)) == 3
    cgroups.close()
    shutil.rmtree(OTHER_LAYOUT.run_dir)  # the view of the one that was killed; a runtime's next start makes it anew
