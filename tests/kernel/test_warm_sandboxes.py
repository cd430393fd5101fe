"""Sandboxes prepared for one agent: as closed as any other, nobody's before their run, and never used twice."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import FIRST_UID, LAYOUT, Host, Outcome, count_leftovers, read_all, running_host

from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.core.resources import TaskAgent
from clrk.netns.reconcile import remove_leftovers
from clrk.runtime.cgroup import Cgroups, find_hierarchy
from clrk.runtime.pool import PoolExhaustedError, SandboxPool
from clrk.runtime.sandbox import Sandbox
from clrk.runtime.view import LAUNCHER

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]

OTHER_LAYOUT = HostLayout(f"{LAYOUT.instance}b")  # hosts of one test, beside that of the module


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
    async with asyncio.timeout(20):
        while not condition():
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


# --- as any other sandbox -------------------------------------------------------------------------------------------

LOOK = (
    "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Sig(Ign|Blk|Cgt))' /proc/self/status; id; env | sort; "
    "ls -l /proc/self/fd | sed 's/.* //; s/[0-9]*]//'; cat /proc/self/limits /proc/self/oom_score_adj; pwd; "
    "awk '{print $5, $6, $NF}' /proc/self/mountinfo; stat -c '%A %u %g %n' /* /run/* /run/clrk/* /tmp; "
    "hostname; ls /proc"
)


async def test_a_warm_run_is_what_a_cold_one_is(host: Host) -> None:
    agent = warm_agent("/bin/sh", "-c", LOOK)
    cold = await run(host, agent, warm=False, TOKEN="x", LD_DEBUG="", PATH="/usr/bin:/bin", LC_ALL="C")
    await filled(host, agent)
    warm = await run(host, agent, warm=True, TOKEN="x", LD_DEBUG="", PATH="/usr/bin:/bin", LC_ALL="C")
    assert cold.exit.exit_code == warm.exit.exit_code == 0, (cold.err, warm.err)

    def same(text: str) -> str:
        text = re.sub(rf"\b{FIRST_UID // 1000}\d{{3}}\b", "UID", text)
        return re.sub(r"\b\d\d:\d\d\b|/proc/\d+/fd|pids?:\d+", "", text)

    assert same(warm.out) == same(cold.out)
    assert "CapBnd:\t0000000000000000" in warm.out
    assert "NoNewPrivs:\t1" in warm.out
    assert "Seccomp:\t2" in warm.out


async def test_who_waits_has_dropped_everything_and_knows_nothing(host: Host) -> None:
    agent = warm_agent("/bin/sh", "-c", "echo ran", template={"env": [{"name": "TOKEN", "value": "hunter2"}]})
    await filled(host, agent)
    (pid,) = waiting_processes()
    status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
    assert {name: int(status[name], 16) for name in status if name.startswith("Cap")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0
    )
    assert len(set(status["Uid"].split()) | set(status["Gid"].split())) == 1
    assert in_range(int(status["Uid"].split()[0]))
    assert (status["Groups"].strip(), status["NoNewPrivs"], status["Seccomp"]) == ("", "1", "2")
    assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_an_unknown_command_is_said_as_in_a_cold_run(host: Host) -> None:
    agent = warm_agent("/no/such/program")
    await filled(host, agent)
    ran = await run(host, agent, warm=True)
    assert (ran.exit.exit_code, ran.out) == (127, "")
    assert ran.err == "clrk: /no/such/program: No such file or directory\n"
    folder = warm_agent("/tmp")
    assert (await run(host, folder, warm=False)).exit.exit_code == 126


async def test_the_command_is_looked_for_in_the_agents_own_path(host: Host) -> None:
    agent = warm_agent("sh", "-c", "echo found")
    await filled(host, agent)
    assert (await run(host, agent, warm=True)).out == "found\n"
    assert (await run(host, agent, warm=False, PATH="/tmp")).exit.exit_code == 127


# --- one invocation's alone -----------------------------------------------------------------------------------------


async def test_the_environment_of_one_invocation_is_never_in_another(host: Host) -> None:
    agent = warm_agent("/bin/sh", "-c", "env", size=3)
    await filled(host, agent)
    sandboxes = [await host.pool.acquire(agent) for _ in range(3)]
    assert len({sandbox.sandbox_id for sandbox in sandboxes}) == 3
    runs = (finish(box, agent, **{f"ONLY_{index}": f"v{index}"}) for index, box in enumerate(sandboxes))
    for index, ran in enumerate(await asyncio.gather(*runs)):
        assert re.findall(r"ONLY_\d=v\d", ran.out) == [f"ONLY_{index}=v{index}"]


@pytest.mark.parametrize("warm", [True, False])
async def test_a_long_environment_arrives_whole(host: Host, warm: bool) -> None:
    agent = warm_agent("/bin/sh", "-c", "env | wc -c")
    if warm:
        await filled(host, agent)
    ran = await run(host, agent, warm=warm, **{f"V{index}": "x" * 100_000 for index in range(9)})
    assert int(ran.out) > 900_000


async def test_a_prepared_sandbox_runs_its_own_agent_only(host: Host) -> None:
    agent = warm_agent("/bin/true")
    await filled(host, agent)
    sandbox = await host.pool.acquire(agent)
    with pytest.raises(HostError, match="another agent"):
        await sandbox.spawn(agent=warm_agent("/bin/false"), environment={})
    with pytest.raises(HostError, match="one spawn"):
        await sandbox.spawn(agent=agent, environment={})
    await sandbox.remove()


async def test_a_neighbour_can_not_reach_who_waits(host: Host) -> None:
    agent = warm_agent("/bin/true")
    await filled(host, agent)
    (pid,) = waiting_processes()
    ran = await host.python(
        "import os\n"
        f"for number in ({pid}, *range(3, 40)):\n"
        "    try: os.kill(number, 9); print('killed', number)\n"
        "    except ProcessLookupError: pass\n"
        "    except PermissionError as exc: print(exc, number)\n"
        "print(open('/proc/net/unix').read().count('@'), os.listdir('/run/clrk'))\n"
    )
    assert ran.out == "0 ['launch']\n"
    assert waiting_processes() == [pid]
    # The launcher in its own hands does nothing either: it can not drop what it does not have.
    ran = await host.sh("/run/clrk/launch 1 /bin/true 7<>/tmp/x; echo $?")
    assert ran.out == "125\n"


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
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
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
    await until(host.pool, lambda: count_leftovers() == before)
    async with running_host(ready=0, layout=OTHER_LAYOUT) as other:
        await filled(other, warm_agent("/bin/true", size=3))
    assert waiting_processes() == []
    assert count_leftovers(OTHER_LAYOUT.netns_prefix)["namespaces"] == 0
    assert count_leftovers() == before


RUNTIME = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from host_harness import running_host
from test_warm_sandboxes import OTHER_LAYOUT, filled, warm_agent
async def main():
    async with running_host(ready=0, layout=OTHER_LAYOUT) as host:
        await filled(host, warm_agent("/bin/true", size=3))
        print("filled", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@asynccontextmanager
async def other_runtime() -> AsyncIterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", RUNTIME], stdout=subprocess.PIPE, text=True) as runtime:
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
        deadline_s = time.monotonic() + 10
        while "populated 1" in (root / OTHER_LAYOUT.cgroup_name / "cgroup.events").read_text():
            assert time.monotonic() < deadline_s, "processes live on"
    assert waiting_processes() == []
    cgroups = Cgroups.open(OTHER_LAYOUT)
    assert len(cgroups.remove_leftovers()) == 3
    assert len(remove_leftovers(OTHER_LAYOUT.netns_prefix)) == 3
    cgroups.close()
    shutil.rmtree(OTHER_LAYOUT.run_dir)  # the view of the one that was killed; a runtime's next start makes it anew


@pytest.mark.parametrize(
    "order",
    [
        b"",
        b"\x05\x00",
        b"\x05\x00\x00\x00A=b",
        b"\x01\x00\x10\x00" + b"A" * 1_048_577,
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00A=b",
    ],
    ids=["nothing", "half a length", "half of it", "a byte too long", "the longest length", "no NUL at the end"],
)
async def test_the_launcher_executes_nothing_without_a_whole_order(order: bytes, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    ours, theirs = socket.socketpair()
    command = [LAUNCHER, str(FIRST_UID), "/bin/touch", tmp_path / "ran"]
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)  # SO_SNDBUFFORCE
        ours.sendall(order)
        ours.shutdown(socket.SHUT_WR)
        prepare = f"os.dup2({theirs.fileno()}, 7); os.execv(sys.argv[1], sys.argv[1:])"
        argv = [sys.executable, "-c", f"import os, sys; {prepare}", *command]
        done = await asyncio.to_thread(
            subprocess.run, argv, pass_fds=[theirs.fileno()], capture_output=True, timeout=10, check=False
        )
        assert done.returncode == 125
        assert ours.recv(8) == b"R"
    assert list(tmp_path.iterdir()) == []
