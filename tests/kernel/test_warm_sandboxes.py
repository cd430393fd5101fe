"""Sandboxes prepared for one agent: as closed as any other, nobody's before their run, and never used twice."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import Host, running_host
from instances import DEADLINE_S, FIRST_UID
from warm_host import filled, finish, in_range, run, until, waiting_processes, warm_agent

from clrk.core.errors import HostError
from clrk.runtime.view import LAUNCHER

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
            subprocess.run, argv, pass_fds=[theirs.fileno()], capture_output=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 125
        assert ours.recv(8) == b"R"
    assert list(tmp_path.iterdir()) == []
