"""These tests run on the gateway's own event loop, against a scripted runtime."""

from pathlib import Path

import pytest
import uvloop
from gateway_caller import running_gateway
from scripted_agents import AGENTS


def pytest_asyncio_loop_factories(item):
    """Use uvloop, as main.py does, for the tests of this folder."""
    return {"uvloop": uvloop.new_event_loop} if Path(__file__).parent in item.path.parents else None


@pytest.fixture
async def gateway(tmp_path):
    """A gateway in this process, configured and ready, with real agents."""
    async with running_gateway(AGENTS, tmp_path) as running:
        yield running
