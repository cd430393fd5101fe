"""An agent's state outlives its runs, holds no more than its limit, and is nobody else's (CONTRACT section 3)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import LAYOUT, Host, Outcome, read_all, running_host, start_runtime
from instances import DEADLINE_S, instance

from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.core.messages import StartFailure
from clrk.core.resources import TaskAgent
from clrk.netns.reconcile import remove_leftovers
from clrk.runtime.cgroup import Cgroups
from clrk.runtime.runs import start_failure
from clrk.runtime.sandbox import Sandbox
from clrk.runtime.state_volume import StateFullError

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]

OTHER_LAYOUT = HostLayout(instance("hs"))
STATE = "/var/clrk/state"


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clrk-state")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(state_dir: Path) -> AsyncIterator[Host]:
    async with running_host(ready=0, state_dir=str(state_dir)) as running:
        yield running
    await until_detached(state_dir)


def keeper(script: str, *, name: str, size_mb: int = 8, **spec: object) -> TaskAgent:
    template = {"command": ["/bin/bash", "-c", script], **spec.pop("template", {})}  # type: ignore[dict-item] # a mapping
    body = {"template": {"spec": template}, "maxConcurrent": 1, "state": {"sizeLimitMB": size_mb}, **spec}
    return TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": name}, "spec": body})


async def run(host: Host, script: str, *, name: str, **spec: object) -> Outcome:
    agent = keeper(script, name=name, **spec)
    return await finish(await host.pool.acquire(agent), agent)


async def finish(sandbox: Sandbox, agent: TaskAgent) -> Outcome:
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        os.close(stdin)
        reading = asyncio.gather(read_all(stdout), read_all(stderr))
        await sandbox.spawn(agent=agent, environment={})
        ended = await sandbox.wait()
    finally:
        await sandbox.remove()
    out, err = await reading
    return Outcome(out, err, ended)


def attached(below: Path) -> list[str]:
    """Images of ours that a loop device has."""
    files = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached since it was listed
            files.append(path.read_text().strip())
    return [path for path in files if path.startswith(str(below))]


async def until_detached(below: Path) -> None:
    """The kernel detaches a loop device when its last holder has let go, and tells nobody."""
    deadline_s = time.monotonic() + DEADLINE_S
    while files := attached(below):
        assert time.monotonic() < deadline_s, files
        await asyncio.sleep(0.01)


def seen_on_the_host() -> str:
    """What the mount tables of this process, and of the spawners', say of ours."""
    return Path("/proc/self/mountinfo").read_text()


async def test_what_is_written_is_there_in_the_next_run_for_another_uid(host: Host) -> None:
    first = await run(
        host, f"id -u; mkdir -m 700 {STATE}/d; echo kept > {STATE}/d/f; chmod 600 {STATE}/d/f", name="keep"
    )
    again = await run(host, f"id -u; cat {STATE}/d/f; stat -c %u:%g:%a {STATE} {STATE}/d/f; ls -A {STATE}", name="keep")
    old, (new, *rest) = first.out.split(), again.out.split()
    assert old != [new]
    assert rest == ["kept", f"{new}:{new}:700", f"{new}:{new}:600", "d"], again.err


async def test_each_agent_has_its_own_and_the_host_has_none(host: Host, state_dir: Path) -> None:
    await run(host, f"echo mine > {STATE}/f", name="one")
    script = f"ls -A {STATE}; ls {state_dir}; find / -name 'default.one*' 2>/dev/null; ls /dev; cat /proc/mounts"
    other = await run(host, script, name="two")
    assert "mine" not in other.out
    assert "default.one" not in other.out
    assert "loop0" not in other.out.split()
    assert other.out.count(" ext4 ") >= 1
    assert other.out.count(STATE) == 1
    assert str(LAYOUT.run_dir) not in seen_on_the_host()
    assert STATE not in seen_on_the_host()
    assert (state_dir / "agents").stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o077 for path in (state_dir / "agents").iterdir()} == {0}


async def test_an_agent_without_state_has_no_such_folder(host: Host) -> None:
    assert (await host.sh(f"ls -d {STATE}")).out == ""


async def test_the_limit_holds_and_a_full_state_is_refused(host: Host, state_dir: Path) -> None:
    ran = await run(host, f"head -c 64M /dev/zero > {STATE}/big; stat -c %s {STATE}/big", name="big")
    assert "No space left on device" in ran.err
    assert 6 << 20 < int(ran.out) <= 8 << 20
    assert (state_dir / "agents/default.big.ext4").stat().st_blocks * 512 <= 10 << 20
    with pytest.raises(StateFullError, match=r"default/big is full: 8 MB, spec.state.sizeLimitMB; raise it") as caught:
        await run(host, "true", name="big")
    assert start_failure(caught.value) is StartFailure.STATE_FULL
    grown = await run(
        host, f"stat -c %s {STATE}/big; df -m --output=size {STATE}; rm {STATE}/big", name="big", size_mb=70
    )
    assert grown.out.split()[0] == ran.out.strip()
    assert 60 <= int(grown.out.split()[2]) <= 70
    assert (await run(host, "true", name="big", size_mb=70)).exit.exit_code == 0


async def test_a_million_names_do_not_help(host: Host) -> None:
    """Inodes are part of the limit."""
    script = (
        f'cd {STATE}; python3 -c "import os\ntry:\n for n in range(10**6): os.close(os.open(str(n), os.O_CREAT))\n'
        'except OSError as exc: print(exc.errno, n < 20000)"'
    )
    assert (await run(host, script, name="names", size_mb=2)).out == "28 True\n"
    with pytest.raises(StateFullError):
        await run(host, "true", name="names", size_mb=2)


async def test_a_smaller_limit_takes_nothing_away_and_is_said(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    await run(host, f"echo kept > {STATE}/f", name="less", size_mb=20)
    assert (await run(host, f"cat {STATE}/f", name="less", size_mb=10)).out == "kept\n"
    assert "it has 20 MB and keeps them; for sizeLimitMB 10" in caplog.text


async def test_tricks_with_files_stay_in_the_sandbox(host: Host, tmp_path: Path) -> None:
    """Links, setuid files, fifos, sockets and devices: nobody follows, runs or opens them on the host."""
    target = tmp_path / "target"
    target.mkdir(mode=0o777)
    script = (
        f"cd {STATE}; ln -s / root; ln -s {target} out; ln -s /etc/shadow shadow; cp /bin/sleep s; chmod 6755 s;"
        "mkfifo p; mknod null c 1 3; mknod disk b 7 0; mkdir deep; cd deep; for n in $(seq 99); do mkdir d; cd d; done;"
        f"python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('{STATE}/sock')\"; chmod 0 {STATE}"
    )
    ran = await run(host, script, name="tricks")
    assert ran.err.count("Operation not permitted") == 2  # the two devices
    again = await run(
        host,
        f"chmod 700 {STATE}; cd {STATE}; echo *; cat shadow; ls out/; ls root/root; ln root/etc/hostname hard; "
        "stat -c %U s; ./s 0 && grep -c '^Uid:.*\\b0\\b' /proc/self/status",
        name="tricks",
    )
    assert again.out.startswith("deep out p root s shadow sock\nagent\n0\n"), again
    assert again.err.count("No such file") == 3  # shadow, out, /root
    assert "Invalid cross-device link" in again.err
    assert list(target.iterdir()) == []


async def test_a_killed_run_leaves_a_usable_state(host: Host) -> None:
    agent = keeper(f"echo kept > {STATE}/f; echo up; while true; do echo x >> {STATE}/more; done", name="killed")
    sandbox = await host.pool.acquire(agent)
    stdin, stdout, stderr = sandbox.open_stdio()
    await sandbox.spawn(agent=agent, environment={})
    os.set_blocking(stdout, True)
    assert await asyncio.to_thread(os.read, stdout, 16) == b"up\n"
    sandbox.kill()
    await sandbox.remove()
    for fd in (stdin, stdout, stderr):
        os.close(fd)
    assert (await run(host, f"cat {STATE}/f; rm {STATE}/*; ls {STATE}", name="killed")).out == "kept\n"


async def test_two_runs_never_have_it_at_once(host: Host) -> None:
    """Whatever the gateway asks for: the second begins when every process of the first is gone."""
    script = f"test ! -e {STATE}/busy || echo overlap; touch {STATE}/busy; sleep 0.1; rm {STATE}/busy; echo done"
    ran = await asyncio.gather(*(run(host, script, name="busy") for _ in range(4)))
    assert [one.out for one in ran] == ["done\n"] * 4


async def test_a_warm_run_has_it_too_and_it_grows_under_a_warm_one(host: Host) -> None:
    async def prepared(size_mb: int) -> TaskAgent:
        agent = keeper(
            f"cat {STATE}/f; echo kept > {STATE}/f; df -m --output=size {STATE}",
            name="w",
            warmPoolSize=1,
            size_mb=size_mb,
        )
        host.pool.set_agents([agent])
        async with asyncio.timeout(DEADLINE_S):
            while host.pool.warm_agents() != {"default/w": 1}:
                await host.pool.changed()
        return agent

    first = await prepared(8)
    sandbox = await host.pool.acquire(first)
    assert sandbox.warm
    assert "No such file" in (await finish(sandbox, first)).err
    second = await prepared(30)
    sandbox = await host.pool.acquire(second)
    ran = await finish(sandbox, second)
    host.pool.set_agents([])
    kept, _, size = ran.out.split()
    assert kept == "kept"
    assert 25 <= int(size) <= 30


async def test_a_state_that_can_not_grow_yet_holds_up_no_other(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A run of before a reload may go on for an hour; a warm sandbox of after it does not wait, and lets others by."""
    before = keeper("exec sleep 1000", name="long")
    sandbox = await host.pool.acquire(before)
    spawning = asyncio.create_task(finish(sandbox, before))
    try:
        host.pool.set_agents([keeper("true", name="long", size_mb=16, warmPoolSize=1)])
        async with asyncio.timeout(DEADLINE_S):
            while "long: not prepared ahead" not in caplog.text:
                assert (await run(host, "true", name="swift")).exit.exit_code == 0
    finally:
        sandbox.kill()
        await spawning
        host.pool.set_agents([])
    assert "is still in use" in caplog.text


async def test_an_agent_that_is_gone_is_unmounted_and_its_files_stay(host: Host, state_dir: Path) -> None:
    await run(host, f"echo kept > {STATE}/f", name="gone")
    image = str(state_dir / "agents/default.gone.ext4")
    assert image in attached(state_dir)
    host.pool.set_agents([])
    await until_detached(state_dir / "agents/default.gone.ext4")
    assert (await run(host, f"cat {STATE}/f", name="gone")).out == "kept\n"


async def test_a_broken_image_fails_the_run_with_its_name(host: Host, state_dir: Path) -> None:
    (state_dir / "agents").mkdir(mode=0o700, exist_ok=True)
    (state_dir / "agents/default.broken.ext4").write_bytes(bytes(4 << 20))
    with pytest.raises(HostError, match="state of default/broken: e2fsck"):
        await run(host, "true", name="broken")


async def test_a_full_host_is_said_before_and_after_it_costs_something(tmp_path: Path) -> None:
    """Images are sparse. A write that the host has no block for is an error of the device, and ext4 takes no more."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", OTHER_LAYOUT.instance, tmp_path], check=True)
    ballast = tmp_path / "ballast"
    try:
        async with running_host(ready=0, state_dir=str(tmp_path), layout=OTHER_LAYOUT) as other:
            assert (
                await run(other, f"echo kept > {STATE}/f; sync -f {STATE}/f", name="full", size_mb=64)
            ).exit.exit_code == 0
            ballast.write_bytes(bytes(80 << 20))
            with pytest.raises(HostError, match=r"full.ext4 is full; make room in it") as caught:
                await run(other, "true", name="full", size_mb=64)
            assert start_failure(caught.value) is StartFailure.POOL_EXHAUSTED
            ballast.unlink()
            agent = keeper(f"head -c 60M /dev/urandom > {STATE}/big; "
                           f"i=0; while sync -f {STATE}/f && mkdir {STATE}/$((i++)); do :; done; true",
                           name="full", size_mb=64)  # fmt: skip
            sandbox = await other.pool.acquire(agent)
            ballast.write_bytes(bytes(80 << 20))  # while it runs
            await finish(sandbox, agent)
            ballast.unlink()
            with pytest.raises(HostError, match=r"errors in it; stop the runtime and run e2fsck -f") as caught:
                await run(other, "true", name="full", size_mb=64)
            assert start_failure(caught.value) is StartFailure.SANDBOX_FAILED
        async with running_host(ready=0, state_dir=str(tmp_path), layout=OTHER_LAYOUT) as other:
            assert (await run(other, f"cat {STATE}/f", name="full", size_mb=64)).out == "kept\n"
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


async def test_an_image_that_is_a_link_is_not_followed(host: Host, state_dir: Path, tmp_path: Path) -> None:
    (state_dir / "agents").mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (state_dir / "agents/default.link.ext4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="symbolic links"):
        await run(host, "true", name="link")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


RUNTIME = """
import asyncio, os, sys
from host_harness import running_host
from test_state_volume import OTHER_LAYOUT, STATE, keeper
async def main():
    async with running_host(ready=0, layout=OTHER_LAYOUT, state_dir=sys.argv[1]) as host:
        agent = keeper(f"echo kept > {STATE}/f; sync; echo up; sleep 600", name="crash")
        sandbox = await host.pool.acquire(agent)
        _, stdout, _ = sandbox.open_stdio()
        await sandbox.spawn(agent=agent, environment={})
        os.set_blocking(stdout, True)
        await asyncio.to_thread(os.read, stdout, 16)
        print("up", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_kill_9_of_the_runtime_leaves_no_mount_and_no_loop_device(tmp_path: Path) -> None:
    with start_runtime(RUNTIME, str(tmp_path)) as runtime:
        assert runtime.stdout is not None
        assert await asyncio.to_thread(runtime.stdout.readline) == "up\n"
        assert attached(tmp_path)
        runtime.kill()
    await until_detached(tmp_path)
    assert str(tmp_path) not in seen_on_the_host()
    cgroups = Cgroups.open(OTHER_LAYOUT)
    cgroups.remove_leftovers()
    remove_leftovers(OTHER_LAYOUT.netns_prefix)
    cgroups.close()
    async with running_host(ready=0, layout=OTHER_LAYOUT, state_dir=str(tmp_path)) as host:
        assert (await run(host, f"cat {STATE}/f", name="crash")).out == "kept\n"
