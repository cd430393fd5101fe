"""A shell grants 1024 open files at first; the daemon takes what it may, and says so when that limits it."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import instance
from stack import Daemon, agent

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


@pytest.fixture
def starved(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon that was started with these soft and hard limits of open files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    tmp_path.chmod(0o755)
    running = Daemon(tmp_path, instance("fd"), [agent("sleep", ["/bin/sleep", "1"])])
    resource.setrlimit(resource.RLIMIT_NOFILE, (request.param, limits[1]))
    try:
        running.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    yield running
    assert running.stop() == 0, running.log()


@pytest.mark.parametrize("starved", [300], indirect=True)
async def test_a_low_soft_limit_is_raised(starved: Daemon, caller: aiohttp.ClientSession) -> None:
    async def call() -> int:
        async with caller.post(f"{starved.url}/agents/sleep", data="x", headers={"content-type": "text/plain"}) as got:
            await got.read()
            return got.status

    assert await asyncio.gather(*(call() for _ in range(40))) == [200] * 40
