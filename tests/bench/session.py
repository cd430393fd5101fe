"""Time the guide's debugging session with `clrk`, over the store of `tests/bench/store.py --keep FOLDER`.

    .venv/bin/python -P tests/bench/store.py --keep /var/tmp/million
    .venv/bin/python -P tests/bench/session.py /var/tmp/million

Each command is a process of its own, as at a prompt, against the real admin API on a unix socket. The first row is
`clrk --version`: what a process costs by itself.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from asked import Asked, open_kept, run
from span_samples import admin_sources, agent, config

from clrk.gateway.admin.app import build_admin_app
from clrk.gateway.agents import AgentTable
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.records import InvocationFilter
from clrk.gateway.telemetry.store import TraceStore

CLRK = str(Path(sys.executable).parent / "clrk")


async def refuse(_request: web.Request, _namespace: str, _name: str) -> web.StreamResponse:
    raise web.HTTPNotFound


async def run_command(socket: str, arguments: list[str]) -> str:
    """Run one command to its end. Returns: how many lines it printed."""
    process = await asyncio.create_subprocess_exec(
        CLRK, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": socket},
    )  # fmt: skip
    out, _ = await process.communicate()
    if process.returncode != 0:
        sys.exit(f"clrk {' '.join(arguments)}: exit code {process.returncode}")
    return str(out.count(b"\n"))


async def session(store: TraceStore) -> list[list[str]]:
    """Return the commands of the guide: window and agent, the interesting call, the chain, the trigger and caller."""
    until_ns = time.time_ns() - 12 * 3600 * 10**9
    found = await store.list_invocations(InvocationFilter(agent="agent-3", until_ns=until_ns), limit=1)
    record = found[0].record
    assert [page async for page in store.spans(SpanFilter(invocation_id=record.invocation_id))]
    window = ["--since", "13h", "--until", "12h"]
    return [
        ["--version"],
        ["traces", "--agent", "agent-3", *window],
        ["traces", "--agent", "agent-3", *window, "--model", "claude-sonnet-5", "--min-input-tokens", "1000"],
        ["traces", "--agent", "agent-3", *window, "--denied"],
        ["traces", "--agent", "agent-3", *window, "--errors"],
        ["traces", "--denied"],
        ["agents", "invocations", "agent-3", *window],
        ["agents", "invocations", "agent-3", "--denied"],
        ["trace", record.invocation_id],
        ["trace", record.invocation_id[:18], "--json"],
        ["agents", "logs", f"agent-3/{record.invocation_id}"],
    ]


async def measure(folder: Path) -> int:
    """Ask; returns the number of commands that took too long."""
    store = await open_kept(folder)
    telemetry = Telemetry(store, {})
    app = build_admin_app(
        store=store, catalogue=AgentTable(config([], [agent()])), run_task=refuse, **admin_sources(telemetry)
    )
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    asked = Asked("clrk …", "lines")
    with tempfile.TemporaryDirectory() as short:
        await web.UnixSite(runner, f"{short}/s").start()
        for arguments in await session(store):
            await asked.ask(" ".join(arguments), partial(run_command, f"{short}/s", arguments))
        await runner.cleanup()
    await telemetry.close()
    return asked.slow


if __name__ == "__main__":
    run(measure, __doc__)
