"""One stand-in and one real daemon for the whole session; tests that kill things start their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from instances import clean_host, instance  # noqa: F401 - a fixture
from sdk_lab import sdks  # noqa: F401 - a fixture, for every module the same
from span_contract import violations
from stack import FETCH_AND_RUN, ROOT, RUN_PYTHON, RUN_SHELL, Daemon, StandIn, agent, egress, stand_in


@pytest.fixture(scope="session")
def providers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """The stand-in."""
    with stand_in(tmp_path_factory.mktemp("standin")) as running:
        yield running


@pytest.fixture(scope="session")
def raw_dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled C agent."""
    folder = tmp_path_factory.mktemp("raw")
    folder.chmod(0o755)  # the sandbox has a uid of its own
    subprocess.run(["gcc", "-O2", "-Wall", "-o", folder / "raw_dial", ROOT / "examples/agents/raw_dial.c"], check=True)
    return folder


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, providers: StandIn, raw_dial: Path) -> Iterator[Daemon]:
    """The daemon, with every agent that the tests need."""
    venv, agents = ROOT / ".venv", ROOT / "examples/agents"
    python = ["/usr/bin/python3", "-I", "-c"]
    keys = {"ANTHROPIC_API_KEY": "placeholder", "OPENAI_API_KEY": "placeholder"}
    documents = [
        *egress(providers),
        agent(
            "sdk", ["/agent/venv/bin/python", "-I", "/agent/code/sdk_agent.py"],
            mounts={"/agent/venv": venv, "/agent/code": agents}, env=keys,
        ),
        agent("models", ["/agent/venv/bin/python", "-I", "-c", RUN_PYTHON], mounts={"/agent/venv": venv}, env=keys),
        agent("curl", ["/bin/bash", "-c", 'curl -sS "http://tools.internal/orders/1042?i=$CLRK_INVOCATION_ID"']),
        agent("node", ["/usr/bin/node", "/agent/code/fetch_agent.mjs"], mounts={"/agent/code": agents}),
        agent("python", [*python, RUN_PYTHON], mounts={"/agent/raw": raw_dial}),
        agent("shell", [*python, RUN_SHELL], mounts={"/agent/raw": raw_dial}),
        agent("deaf", ["/bin/echo", "done"]),
        agent("flood", ["/usr/bin/yes", "no end of words"], timeout="10s"),
        agent("sleepy", ["/bin/sleep", "3600"], timeout="1s"),
        agent("single", [*python, RUN_PYTHON], maxConcurrent=1),
        agent("teapot", [*python, FETCH_AND_RUN], delivery={"mode": "Metadata"}),
        agent("whole", [*python, RUN_PYTHON], streaming={"enabled": False}),
        agent("leapling", ["/bin/true"], schedule="0 0 29 2 *", scheduleInput={"report": "leap day"}),
    ]  # fmt: skip
    running = Daemon(tmp_path_factory.mktemp("daemon"), instance("e"), documents)
    running.start()
    yield running
    spans = [json.loads(line) for line in running.clrk("traces", "--json").splitlines()]
    assert running.stop() == 0, running.log()
    assert sorted(set(violations(spans))) == []  # whatever the tests made it record


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client that uses each connection once: a restarted daemon does not know the old ones."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), auto_decompress=False
    ) as session:
        yield session
