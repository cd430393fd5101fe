"""What a test run that was killed has left on the host is removed by the next one, and nothing of one that lives."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from host_harness import start_runtime
from instances import cleaning_alone

pytestmark = pytest.mark.kernel

RUN = """
import asyncio, subprocess, tempfile
from host_harness import LAYOUT, running_host
async def main():
    folder = tempfile.mkdtemp(prefix=f"{LAYOUT.instance}-")
    subprocess.run(["mount", "-t", "tmpfs", LAYOUT.instance, folder], check=True)
    async with running_host(ready=2) as host:
        await (await host.pool.acquire()).remove()
        print(LAYOUT.instance, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def found(name: str) -> dict[str, int]:
    """Count what there is of an instance."""
    return {
        "namespaces": len([entry for entry in os.listdir("/run/netns") if entry.startswith(f"{name}-")]),
        "cgroups": len(list(Path("/sys/fs/cgroup").glob(f"**/{name}"))),
        "mounts": Path("/proc/self/mounts").read_text().count(f"\n{name} "),
        "folders": len([*Path(tempfile.gettempdir()).glob(f"{name}-*"), *Path("/run").glob(name)]),
    }


def test_the_dead_are_cleaned_up_after_and_the_living_left_alone() -> None:
    with start_runtime(RUN, owner="") as run:
        assert run.stdout is not None
        name = run.stdout.readline().strip()
        assert name == f"clrkt{run.pid}h"
        with cleaning_alone() as clean:
            assert name not in clean()
        assert all(found(name).values()), found(name)
        with cleaning_alone() as clean:
            run.kill()
            run.wait()
            assert all(found(name).values()), found(name)
            assert name in clean()
        assert not any(found(name).values()), found(name)
        with cleaning_alone() as clean:
            assert name not in clean()
