"""Time the guide's debugging session with `clrk`, over the store of `tests/bench/store.py --keep FOLDER`.

    .venv/bin/python -P tests/bench/store.py --keep /var/tmp/million
    .venv/bin/python -P tests/bench/session.py /var/tmp/million

Each command is a process of its own, as at a prompt, against the real admin API on a unix socket; asked seven times,
the table shows the median and the slowest. The first row is `clrk --version`: what a process costs by itself.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from span_samples import admin_sources, agent, config

from clrk.gateway.admin.app import build_admin_app
from clrk.gateway.agents import AgentTable
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.records import InvocationFilter
from clrk.gateway.telemetry.store import TraceStore

CLRK = str(Path(sys.executable).parent / "clrk")
LIMIT_S = 1.0
ROUNDS = 7


async def refuse(_request: web.Request, _namespace: str, _name: str) -> web.StreamResponse:
    raise web.HTTPNotFound


async def time_command(socket: str, arguments: list[str]) -> tuple[list[float], int]:
    """Return milliseconds of each round, and the lines that were printed."""
    times, lines = [], 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            CLRK, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": socket},
        )  # fmt: skip
        out, _ = await process.communicate()
        times.append((time.perf_counter() - start) * 1000)
        if process.returncode != 0:
            sys.exit(f"clrk {' '.join(arguments)}: exit code {process.returncode}")
        lines = out.count(b"\n")
    return times, lines


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
    store = TraceStore(folder / "traces.db", retention_s=365 * 86_400.0, max_file_bytes=2**40)
    telemetry = Telemetry(store, {})
    await store.flush(60)
    app = build_admin_app(
        store=store, catalogue=AgentTable(config([], [agent()])), run_task=refuse, **admin_sources(telemetry)
    )
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    slow = 0
    with tempfile.TemporaryDirectory() as short:
        await web.UnixSite(runner, f"{short}/s").start()
        print(f"{'clrk …':90} {'lines':>6} {'median ms':>10} {'slowest ms':>11}")
        for arguments in await session(store):
            times, lines = await time_command(f"{short}/s", arguments)
            slow += max(times) > LIMIT_S * 1000
            print(f"{' '.join(arguments)[:90]:90} {lines:6} {statistics.median(times):10.0f} {max(times):11.0f}")
        await runner.cleanup()
    await telemetry.close()
    return slow


def main() -> None:
    """Measure the store in the folder that is named."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "traces.db").exists():
        sys.exit(__doc__)
    if slow := asyncio.run(measure(Path(sys.argv[1]))):
        sys.exit(f"{slow} commands took longer than {LIMIT_S} s")


if __name__ == "__main__":
    main()
