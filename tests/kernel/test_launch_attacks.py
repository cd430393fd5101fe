"""Attempts to run as root in a sandbox before the drop, or to have an agent begin with what is the caller's."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

import pytest
import pytest_asyncio
from host_harness import Host, Outcome, read_all, running_host
from instances import DEADLINE_S, FIRST_UID, instance

from clrk.core.errors import HostError
from clrk.core.resources import TaskAgent
from clrk.runtime.isolation import encode_environment, plan_run
from clrk.runtime.view import LAUNCHER, HostView

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]

STATE = "/var/clrk/state"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with running_host(ready=0, state_dir=str(tmp_path_factory.mktemp("clrk-state"))) as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A rootfs that somebody else made, with nothing of its own but /var/clrk."""
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "image/var/clrk").mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (tmp_path / "image" / name).symlink_to(f"usr/{name}")
    return tmp_path / "image"


def agent_of(image: Path, script: str, **mount: object) -> TaskAgent:
    mounts = [{"hostPath": "/usr", "path": "/usr"}, {"hostPath": str(LAUNCHER), "path": "/opt/program"}]
    template = {
        "command": ["/usr/bin/bash", "-c", script],
        "rootfs": str(image),
        "mounts": mounts + [mount] * bool(mount),
    }
    spec = {"template": {"spec": template}, "maxConcurrent": 1, "state": {"sizeLimitMB": 4}}
    return TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": "image"}, "spec": spec})


async def run(host: Host, agent: TaskAgent) -> Outcome:
    sandbox = await host.pool.acquire(agent)
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        os.close(stdin)
        reading = asyncio.gather(read_all(stdout), read_all(stderr))
        await sandbox.spawn(agent=agent, environment={})
        ended = await sandbox.wait()
    finally:
        await sandbox.remove()
    return Outcome(*await reading, ended)


@pytest.mark.parametrize(
    "target", ["../../run/clrk", "../../run", "../..", "/newroot/run/clrk", "../../../oldroot/tmp", "/oldroot/tmp"]
)
async def test_a_link_in_the_rootfs_moves_no_state_over_the_launcher(host: Host, image: Path, target: str) -> None:
    """bwrap follows it, as root: the agent's own file would be executed with three capabilities."""
    plant = (
        f"chmod 755 {STATE}; mkdir -p {STATE}/clrk; cp /opt/program {STATE}/launch; cp /opt/program {STATE}/clrk/launch"
    )
    assert (await run(host, agent_of(image, plant))).exit.exit_code == 0
    (image / "var/clrk/state").symlink_to(target)
    with pytest.raises(HostError, match=rf"{STATE}: {image}/var/clrk/state is a link; name the place that it leads to"):
        await run(host, agent_of(image, "true"))


async def test_a_link_in_a_mounted_folder_moves_no_other_mount(host: Host, image: Path, tmp_path: Path) -> None:
    for name in ("shown", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "shown/work").symlink_to("../../run/clrk")
    agent = agent_of(image, "true", hostPath=str(tmp_path / "shown"), path="/srv")
    agent.spec.template.spec.mounts.append(
        agent.spec.template.spec.mounts[0].model_copy(update={"host_path": str(tmp_path / "work"), "path": "/srv/work"})
    )
    with pytest.raises(HostError, match="shown/work is a link"):
        await run(host, agent)


async def test_an_agent_begins_with_no_signal_blocked_or_ignored() -> None:
    """Whoever starts the runtime may have blocked SIGTERM: a daemon would never see its stop."""
    order = encode_environment(agent_of(Path("/"), "true").spec.template.spec, {})
    ours, theirs = socket.socketpair()
    block = f"signal.pthread_sigmask(signal.SIG_BLOCK, {{{signal.SIGTERM:d}, {signal.SIGUSR1:d}, 40}})"
    ignore = f"[signal.signal(number, signal.SIG_IGN) for number in ({signal.SIGQUIT:d}, {signal.SIGTERM:d}, 50)]"
    become = f"os.dup2({theirs.fileno()}, 7); os.execv(sys.argv[1], sys.argv[1:])"
    script = f"import os, signal, sys; {block}; {ignore}; {become}"
    look = ["/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
    with ours, theirs:
        ours.sendall(order)
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", script, LAUNCHER, str(FIRST_UID), *look],
            pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert done.stdout.split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16], done.stderr


async def test_a_child_whose_spawner_died_at_once_ends(tmp_path: Path) -> None:
    """It holds the spawner's socket: the runtime would wait for ever for the end of a spawner that is gone."""
    (tmp_path / "procs").touch()
    script = (
        "import os, socket; from clrk.runtime.spawner_process import ReserveRequest, _run_child; "
        "request = ReserveRequest([os.environ['PROCS']], 64, 0); link, far = socket.socketpair(); "
        "_run_child(request, link, int(os.environ['SPAWNER']))"
    )
    environment = {"PROCS": str(tmp_path / "procs"), "SPAWNER": "1"}  # not the parent that it has
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], env=environment, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 127
    assert (tmp_path / "procs").read_text() == ""


@pytest.mark.parametrize("rootfs", ["/", "//", "/.", "/usr/..", "IMAGE"])
async def test_the_state_folder_is_covered_however_its_rootfs_is_written(image: Path, rootfs: str) -> None:
    secret = image / "srv/clrk" if rootfs == "IMAGE" else Path(f"/opt/{instance('h')}-state")
    secret.mkdir(parents=True)
    try:
        (secret / "readable").write_text("x")
        view = HostView(image, image, (PurePosixPath(secret),), "")
        template = agent_of(image if rootfs == "IMAGE" else Path("/"), "true").spec.template.spec
        template = template.model_copy(update={"rootfs": str(image) if rootfs == "IMAGE" else rootfs})
        options = plan_run(template, view, uid=FIRST_UID, memory=1 << 26).options
        place = "/srv/clrk" if rootfs == "IMAGE" else str(secret)
        assert f"\0--perms\x000000\0--tmpfs\0{place}\0".encode() in options
    finally:
        shutil.rmtree(secret)
