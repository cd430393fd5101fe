"""These tests run on the gateway's own event loop, against a scripted runtime."""

from pathlib import Path

import aiohttp
import pytest
import uvloop
from scripted_runtime import AGENTS, Gateway, ScriptedRuntime


def pytest_asyncio_loop_factories(item):
    """Use uvloop, as main.py does, for the tests of this folder."""
    return {"uvloop": uvloop.new_event_loop} if Path(__file__).parent in item.path.parents else None


@pytest.fixture
async def gateway(tmp_path):
    """A gateway in this process, configured and ready, with real agents."""
    runtime = ScriptedRuntime(AGENTS, tmp_path)
    await runtime.start()
    async with aiohttp.ClientSession() as client:
        yield Gateway(runtime, client)
    await runtime.stop()
    assert runtime.crashes == []
    assert runtime.left_open == []
