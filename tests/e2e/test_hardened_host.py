"""A host whose root has umask 077, as hardening guides ask for: sandboxes must still read what is made for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import instance
from stack import Daemon, agent

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


@pytest.fixture
def hardened(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that inherited umask 077. LD_BIND_NOW is set after the drop, by a tool that root copied."""
    command = ["/bin/cat", "/etc/resolv.conf"]
    running = Daemon(tmp_path, instance("ha"), [agent("cat", command, env={"LD_BIND_NOW": "1"})])
    before = os.umask(0o077)
    try:
        running.start()
    finally:
        os.umask(before)
    yield running
    assert running.stop() == 0, running.log()


async def test_umask_077(hardened: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{hardened.url}/agents/cat", data="x", headers={"content-type": "text/plain"}) as answer:
        text = await answer.text()
    assert answer.status == 200, text + hardened.log()
    assert text.startswith("nameserver 169.254.0.1\n")
