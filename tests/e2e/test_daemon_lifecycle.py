"""The daemon as an operator meets it: one per instance, reloads, stops, restarts its gateway, shows it little."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import yaml
from instances import DEADLINE_S, instance
from stack import BIN, Daemon, agent

from clrk.core.layout import HostLayout

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

INSTANCE, OTHER_INSTANCE, OWN_INSTANCE = instance("li"), instance("lj"), instance("lo")


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that works as before after each test."""
    yield from started(tmp_path_factory.mktemp("standing"), INSTANCE)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon to be stopped."""
    yield from started(tmp_path, OWN_INSTANCE)


@pytest.fixture
def reloaded(standing: Daemon) -> Iterator[Daemon]:
    """A daemon whose file may be written over."""
    before = standing.config.read_text()
    yield standing
    standing.config.write_text(before)
    standing.clrk("apply")


def started(folder: Path, name: str) -> Iterator[Daemon]:
    documents = [agent("hello", ["/bin/echo", "hello"]), agent("sleepy", ["/bin/sleep", "3600"])]
    documents += [agent("napping", ["/bin/bash", "-c", "/bin/sleep 3600; echo rested"])]
    running = Daemon(folder, name, documents)
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        assert running.stop() == 0, running.log()
    assert left_on_host(name) == []


def left_on_host(name: str) -> list[str]:
    """What there is of an instance on the host."""
    layout = HostLayout(name)
    found = [name for name in os.listdir("/run/netns") if name.startswith(layout.netns_prefix)]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{layout.cgroup_name}")]
    return found + ([str(layout.run_dir)] if layout.run_dir.exists() else [])


async def until(caller: aiohttp.ClientSession, url: str, wanted: Callable[[int], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async with caller.get(url) as answer:
                    if wanted(answer.status):
                        return
            except aiohttp.ClientError:
                pass  # the gateway that had this connection is gone
            await asyncio.sleep(0.02)


async def wait_for_log(daemon: Daemon, text: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while text not in daemon.log():
            await asyncio.sleep(0.02)


async def refusal(name: str, config: Path) -> str:
    """Start another runtime, which must not come up; return what it says."""
    command = [BIN / "clrk-runtime", "serve", "--instance", name, "-c", config]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 1
    return done.stderr


async def test_a_second_runtime_of_the_same_instance_is_refused(
    standing: Daemon, caller: aiohttp.ClientSession
) -> None:
    said = await refusal(INSTANCE, standing.config)
    assert standing.process is not None
    assert f"a runtime of instance '{INSTANCE}' is running already (pid {standing.process.pid})" in said
    async with caller.get(f"{standing.url}/agents/hello") as answer:  # and the first is unharmed
        assert await answer.text() == "hello\n"


async def test_a_state_folder_in_use_is_named(standing: Daemon) -> None:
    said = await refusal(OTHER_INSTANCE, standing.config)
    assert f"spec.stateDir {standing.state_dir} is in use by another runtime" in said


async def test_an_address_in_use_is_named(standing: Daemon, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(standing.config.read_text().replace(str(standing.state_dir), str(tmp_path / "other-state")))
    said = await refusal(OTHER_INSTANCE, other)
    assert f"listen on 127.0.0.1:{standing.ingress_port} (spec.ingress.listen): Address already in use" in said
    assert not Path(f"/run/{OTHER_INSTANCE}").exists()
    assert list(Path("/sys/fs/cgroup").glob(f"*/{OTHER_INSTANCE}")) == []


async def test_reload_takes_a_new_agent(reloaded: Daemon, caller: aiohttp.ClientSession) -> None:
    with reloaded.config.open("a") as config:
        config.write("---\n" + yaml.safe_dump(agent("added", ["/bin/echo", "added"])))
    assert reloaded.process is not None
    reloaded.process.send_signal(signal.SIGHUP)
    await until(caller, f"{reloaded.url}/agents/added", lambda status: status == 200)


async def test_an_invalid_reload_changes_nothing(reloaded: Daemon, caller: aiohttp.ClientSession) -> None:
    reloaded.config.write_text(yaml.safe_dump(agent("hello", ["/bin/echo", "changed"], timeot="3s")))
    assert reloaded.process is not None
    reloaded.process.send_signal(signal.SIGHUP)
    await wait_for_log(reloaded, "nothing was changed")
    assert 'TaskAgent/hello: spec.timeot: unknown field; did you mean "timeout"?' in reloaded.log()
    async with caller.get(f"{reloaded.url}/agents/hello") as answer:
        assert await answer.text() == "hello\n"


async def test_a_reload_does_not_touch_running_invocations(reloaded: Daemon, caller: aiohttp.ClientSession) -> None:
    url = f"{reloaded.url}/agents/sleepy"
    async with asyncio.TaskGroup() as group:
        running = group.create_task(caller.get(url))
        await until_asleep(reloaded)
        reloaded.config.write_text(yaml.safe_dump(agent("added", ["/bin/echo", "added"])))
        assert reloaded.process is not None
        reloaded.process.send_signal(signal.SIGHUP)
        await until(caller, f"{reloaded.url}/agents/added", lambda status: status == 200)
        async with caller.get(url) as answer:
            assert answer.status == 404
        assert not running.done()
        assert pgrep(reloaded, "/bin/sleep")
        running.cancel()


async def until_asleep(daemon: Daemon) -> int:
    """Return the pid of an agent's sleep, once there is one."""
    async with asyncio.timeout(DEADLINE_S):
        while not (pid := await asyncio.to_thread(pgrep, daemon, "/bin/sleep")):
            await asyncio.sleep(0.02)
    return pid


def pgrep(daemon: Daemon, program: str) -> int:
    """Return the pid of an agent of this daemon that runs program, 0 when there is none."""
    for procs in Path("/sys/fs/cgroup").glob(f"*/{daemon.instance}/*/cgroup.procs"):
        for pid in procs.read_text().split():
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(program.encode()):
                    return int(pid)
            except OSError:
                continue
    return 0


async def test_a_second_sigterm_does_not_wait_for_invocations(own: Daemon, caller: aiohttp.ClientSession) -> None:
    async def call() -> object:
        try:
            async with caller.get(f"{own.url}/agents/sleepy") as answer:
                return answer.status
        except aiohttp.ClientError as error:
            return error

    running = asyncio.create_task(call())
    await until_asleep(own)
    assert own.process is not None
    own.process.send_signal(signal.SIGTERM)
    await wait_for_log(own, "draining")
    assert own.process.poll() is None  # it waits for the invocation
    own.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(own.process.wait, DEADLINE_S) == 0
    assert "still in flight" not in own.log()  # what it says when the time to drain is over
    assert await running != 200


async def test_ctrl_c_drains_as_well(own: Daemon, caller: aiohttp.ClientSession) -> None:
    """A terminal signals the whole foreground group: runtime, spawner, and what they started there."""
    running = asyncio.create_task(caller.get(f"{own.url}/agents/napping"))
    asleep = await until_asleep(own)
    assert own.process is not None
    os.killpg(own.process.pid, signal.SIGINT)
    await wait_for_log(own, "draining")
    os.kill(asleep, signal.SIGTERM)
    answer = await running
    assert (answer.status, await answer.text()) == (200, "rested\n")
    assert await asyncio.to_thread(own.process.wait, DEADLINE_S) == 0
    assert "is gone" not in own.log()


async def test_a_gateway_that_dies_is_back_within_a_second_or_so(
    standing: Daemon, caller: aiohttp.ClientSession
) -> None:
    """Also three times in a row; callers meanwhile wait in the backlog of the runtime's listener."""
    for _ in range(3):
        assert standing.kill_gateway()
        async with caller.get(f"{standing.url}/agents/hello", timeout=aiohttp.ClientTimeout(DEADLINE_S)) as answer:
            assert (answer.status, await answer.text()) == (200, "hello\n")


async def test_the_gateway_sees_little_of_the_host(standing: Daemon, caller: aiohttp.ClientSession) -> None:
    root = f"/proc/{standing.gateway_pid()}/root"
    assert set(os.listdir(f"{root}/etc")) & {"shadow", "sudoers", "clrk", "ssh", "machine-id"} == set()
    for hidden in ("/home", "/var/log", "/run/netns", str(standing.state_dir / "ca"), str(standing.config), "/sys/fs"):
        assert not os.path.lexists(root + hidden), hidden
    assert os.listdir(f"{root}{standing.state_dir}") == ["gateway"]
    processes = [name for name in os.listdir(f"{root}/proc") if name.isdigit()]
    assert len(processes) <= 3  # its own pid namespace


async def test_who_may_use_the_admin_socket(standing: Daemon) -> None:
    status = HostLayout(INSTANCE).admin_socket.stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_uid == 0


async def test_the_ca_key_is_nowhere_but_in_its_file(standing: Daemon, caller: aiohttp.ClientSession) -> None:
    key = (standing.state_dir / "ca" / "ca.key").read_text().splitlines()[1].encode()
    kept = {path: raw for path, raw in standing.kept().items() if path.parent.name != "ca"}
    kept |= {path: path.read_bytes() for path in HostLayout(INSTANCE).run_dir.rglob("*") if path.is_file()}
    assert [path for path, raw in kept.items() if key in raw] == []
