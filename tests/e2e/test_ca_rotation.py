"""`clrk-runtime ca rotate` beneath running agents, and who can not read the CA's key."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from stack import BIN, Daemon, StandIn, agent, document, egress, invoke

INSTANCE = instance("ro")
TLS_ONCE = """
import hashlib, os, socket, ssl
bundle = hashlib.sha256(open(os.environ["SSL_CERT_FILE"], "rb").read()).hexdigest()[:12]
def once():
    context = ssl.create_default_context()  # a context of its own: nothing is resumed
    with socket.create_connection(("files.internal", 443), 60) as sock:
        with context.wrap_socket(sock, server_hostname="files.internal"):
            print("trusted", bundle, flush=True)
"""
ONCE = TLS_ONCE + "once()"
STEADY = TLS_ONCE + "import time\nwhile True: once(); time.sleep(0.3)"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, providers: StandIn) -> Iterator[Daemon]:
    python = ["/usr/bin/python3", "-I", "-c"]
    documents = [
        *egress(providers),
        agent("once", [*python, ONCE]),
        agent("steady", [*python, STEADY]),
        agent("warm", [*python, ONCE], warmPoolSize=1),
        document("DaemonAgent", "guard", template={"spec": {"command": [*python, STEADY]}}),
    ]
    daemon = Daemon(tmp_path_factory.mktemp("rotating"), INSTANCE, documents)
    daemon.start()
    yield daemon
    assert daemon.stop() == 0, daemon.log()


async def ask(daemon: Daemon, caller: aiohttp.ClientSession, name: str) -> str:
    return (await invoke(caller, daemon, name, ""))[0]


async def lines_of(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in answer.content:
        yield line.decode().strip()


async def rotate(daemon: Daemon) -> None:
    """Rotate, and return when the gateway signs with the new CA."""

    def generations() -> int:
        return daemon.log_path.read_text(errors="replace").count("ready: generation ")

    before = generations()
    arguments = ["ca", "rotate", "--instance", INSTANCE, "-c", str(daemon.config)]
    done = await asyncio.to_thread(subprocess.run, [BIN / "clrk-runtime", *arguments], capture_output=True, check=True)
    assert b"sha256 " in done.stdout
    async with asyncio.timeout(DEADLINE_S):
        while generations() == before:
            await asyncio.sleep(0.05)


async def test_running_sandboxes_keep_their_ca_and_new_ones_get_the_new_one(
    own: Daemon, caller: aiohttp.ClientSession
) -> None:
    before = await ask(own, caller, "once")
    assert await ask(own, caller, "warm") == before
    async with asyncio.timeout(DEADLINE_S), caller.get(f"{own.url}/agents/steady") as running:
        steady = lines_of(running)
        assert await anext(steady) + "\n" == before
        key = (own.state_dir / "ca/ca.key").read_bytes()
        await rotate(own)
        after = await ask(own, caller, "once")
        assert after != before
        for _ in range(3):
            assert await ask(own, caller, "warm") == after  # none that was prepared with the former CA
        for _ in range(3):  # connections that began after the rotation
            assert await anext(steady) + "\n" == before
    assert sorted(os.listdir(own.state_dir / "ca")) == ["ca.crt", "ca.key"]
    secret = key.splitlines()[1]
    assert [path for path, raw in own.kept().items() if secret in raw] == []  # of the former key


async def test_a_daemon_outlives_more_rotations_than_are_kept_for_nobody(own: Daemon) -> None:
    """It is not restarted: what it trusts is signed for it as long as it runs, however many CAs came after."""

    async def said(more_than: int) -> list[str]:
        async with asyncio.timeout(DEADLINE_S):
            while len(lines := own.clrk("agents", "logs", "guard").splitlines()) <= more_than:
                await asyncio.sleep(0.1)
        return lines

    first = (await said(0))[0]
    for _ in range(3):
        await rotate(own)
    before = len(await said(0))
    lines = await said(before + 1)  # connections that began after the last rotation
    assert {line.partition("trusted")[2] for line in lines} == {first.partition("trusted")[2]}


READ = (
    "import sys\ntry: open(sys.argv[1], 'rb').read(1); print('read')\nexcept OSError as exc: print(type(exc).__name__)"
)


def test_nobody_else_reads_the_key(own: Daemon) -> None:
    pid = own.gateway_pid()
    gateway_uid = int(
        next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Uid:" in line).split()[1]
    )
    for uid in (65_534, gateway_uid):
        for path in (own.state_dir / "ca/ca.key", f"/proc/{pid}/mem", f"/proc/{pid}/environ", f"/proc/{pid}/root/etc"):
            done = subprocess.run(
                ["/usr/bin/python3", "-I", "-c", READ, str(path)], user=uid, group=uid, extra_groups=[],
                cwd="/", capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.stdout.strip() == "PermissionError", (uid, path, done)
    limits = Path(f"/proc/{pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    assert Path(f"/proc/{pid}/mem").stat().st_uid == 0  # not dumpable: the kernel writes no core, whatever the pattern


# The checkout may be where no other user gets: what is needed of it is read before root is given up.
AS_NOBODY = (
    "import os, sys; from clrk.runtime import ca, cli, reconcile; from clrk.runtime.config import load; "
    "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(cli.main(sys.argv[1:]))"
)


def test_an_ordinary_user_can_not_rotate(own: Daemon) -> None:
    certificate = (own.state_dir / "ca/ca.crt").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        config = Path(folder, "resources.yaml")
        config.write_text(own.config.read_text().partition("\n---\n")[0])  # the Runtime
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, "ca", "rotate", "--instance", INSTANCE, "-c", config],
            cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert "use sudo" in done.stderr
    assert (own.state_dir / "ca/ca.crt").read_bytes() == certificate
