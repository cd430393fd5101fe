"""The page in Debian's Chromium: looks, keys, live updates, hostile content. What the browser does is in drive.mjs.

Its screenshots stay in .output/browser.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from instances import DIES_WITH_US
from page_samples import PAYLOADS, Health, States, fill, invocation_record, page_config, record_many, record_run
from span_samples import MS, identity

from clrk.gateway.admin.app import build_health_app
from clrk.gateway.admin.page.app import add_page
from clrk.gateway.admin.page.token import PageToken
from clrk.gateway.admin.page.views import PageSources
from clrk.gateway.agents import AgentTable
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.pipeline import Telemetry

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / ".output/browser"
TIMEOUT_S = 600  # half a minute where nothing else runs
CHECKS = (
    "screenshots light", "screenshots dark", "screenshots phone", "token", "payloads do not run", "waterfall",
    "keyboard", "accessible names", "contrast", "filters", "live", "copy", "without script", "another site",
)  # fmt: skip


class Served:
    """The page over a filled store, and what it does while the browser looks on."""

    def __init__(self, telemetry, base, token):
        self.telemetry = telemetry
        self.base = base
        self.token = token
        self.late = identity()
        self.late_start = 0

    async def act(self, what):
        """Do what the driver asked for; returns what it has to know."""
        if what == "arrive":
            self.late_start = time.time_ns()
            self.telemetry.record_invocation(
                invocation_record(self.late, phase=Phase.RUNNING, created_ns=self.late_start)
            )  # fmt: skip
            record_run(self.telemetry, self.late, self.late_start)
        else:
            self.telemetry.record_invocation(invocation_record(self.late, created_ns=self.late_start, took_ns=900 * MS))
        await self.telemetry.flush()
        return {"id": self.late.invocation_id}


@contextlib.asynccontextmanager
async def serve(folder):
    """Serve the page as the gateway does."""
    telemetry = Telemetry.open(folder, page_config())
    made = fill(telemetry)
    made["many"] = record_many(telemetry, 10_000)
    await telemetry.flush()
    token = PageToken.of(folder)
    app = build_health_app(lambda: True)
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    add_page(app, PageSources(telemetry.store, AgentTable(page_config()), States(), Health()), token, port)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    try:
        yield Served(telemetry, f"http://127.0.0.1:{port}", token.text), made
    finally:
        await runner.cleanup()
        await telemetry.close()


async def drive(served, made):
    """Run the driver to its end; returns what each check found, "" when nothing."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    driver = await asyncio.create_subprocess_exec(
        *DIES_WITH_US, "node", "drive.mjs", cwd=HERE, limit=2**20,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=os.environ | {"HOME": str(OUTPUT)},
    )  # fmt: skip
    found = {}

    def tell(value):
        driver.stdin.write(json.dumps(value).encode() + b"\n")

    # What the page shows of the last two payloads is tested in tests/unit/test_page_html.py: escapes, and a cut.
    shown = [payload for payload in PAYLOADS if payload.isprintable() and len(payload) < 1000]
    ids = {name: who.invocation_id for name, who in made.items()}
    try:
        tell({"base": served.base, "token": served.token, "ids": ids, "output": str(OUTPUT), "payloads": shown})
        async with asyncio.timeout(TIMEOUT_S):
            async for line in driver.stdout:
                said = json.loads(line)
                if "ask" in said:
                    tell(await served.act(said["ask"]))
                elif "check" in said:
                    found[said["check"]] = said.get("error", "")
            await driver.wait()
    finally:
        if driver.returncode is None:
            driver.kill()
            await driver.wait()
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def findings(tmp_path_factory):
    """One browser for all checks."""
    async with serve(tmp_path_factory.mktemp("page")) as (served, made):
        return await drive(served, made)


@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", CHECKS)
async def test_in_the_browser(findings, check):
    assert findings.get(check, "the driver did not come so far") == ""


@pytest.mark.asyncio(loop_scope="module")
async def test_no_check_is_forgotten(findings):
    assert tuple(findings) == CHECKS
