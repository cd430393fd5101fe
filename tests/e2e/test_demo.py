"""`make demo` works, also right after one that was killed in the middle, and leaves nothing running."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from instances import DEADLINE_S, DIES_WITH_US
from stack import ROOT

pytestmark = [pytest.mark.kernel, pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(900)]
DEMO_S = 300.0  # a quarter of a minute where nothing else runs


async def test_the_demo_works_after_one_that_was_killed() -> None:
    killed = await start()
    assert killed.stdout is not None
    async with asyncio.timeout(DEMO_S):
        while b"### 03:14" not in await killed.stdout.readline():
            assert not killed.stdout.at_eof()
    os.kill(killed.pid, signal.SIGKILL)  # its children get SIGTERM from the kernel, and need a moment to end
    await killed.wait()
    async with asyncio.timeout(DEADLINE_S):
        while runtimes():
            await asyncio.sleep(0.1)

    second = await start()
    async with asyncio.timeout(DEMO_S):
        printed, _ = await second.communicate()
    text = printed.decode()
    assert second.returncode == 0, text
    for step in range(1, 6):
        assert f"### Step {step}" in text
    assert "$ clrk agents invocations support" in text
    assert "$ clrk page" in text
    assert runtimes() == []
    assert not Path("/run/clrkdemo").exists()
    assert not [name for name in os.listdir("/run/netns") if name.startswith("clrkdemo-")]


async def start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *DIES_WITH_US, ROOT / "examples/demo/run", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, limit=2**20,
    )  # fmt: skip


def runtimes() -> list[str]:
    """Processes of the demo's instance, and of its stand-in."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if ("clrk-runtime serve --instance clrkdemo" in command or "standin/serve.py --dir" in command) and (
            ".output/demo" in command or "clrkdemo" in command
        ):
            found.append(command)
    return found
