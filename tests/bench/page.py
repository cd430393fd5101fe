"""Time every view of the page over the store of `tests/bench/store.py --keep FOLDER`, asked over HTTP.

    .venv/bin/python -P tests/bench/store.py --keep /var/tmp/million
    .venv/bin/python -P tests/bench/page.py /var/tmp/million

One invocation of 10,000 spans is added
first, unless it is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from asked import Asked, open_kept, run
from page_client import page_of
from page_samples import record_many

from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.records import InvocationFilter

RARE = "text-embedding-rare"
DAY_NS = 24 * 3600 * 1_000_000_000


async def measure(folder: Path) -> int:
    """Ask; returns the number of views that took too long."""
    store = await open_kept(folder)
    telemetry = Telemetry(store, {})
    middle = InvocationFilter(agent="agent-3", until_ns=time.time_ns() - DAY_NS // 2)
    sample = (await store.list_invocations(middle, limit=1))[0].record
    large = await store.list_invocations(InvocationFilter(agent="support"), limit=1)
    many = large[0].record.invocation_id if large else record_many(telemetry, 10_000).invocation_id
    await store.flush(60)
    views = [
        "/", "/?agent=agent-3", "/?agent=agent-3&since=14h&until=13h",
        f"/?before={sample.created_ns}-{sample.invocation_id}",
        "/?phase=Failed", "/?phase=Timeout", "/?trigger=cron", "/?trigger=nobody", "/?denied=true", "/?errors=true",
        "/?agent=agent-3&denied=true&since=1h", "/?model=claude-sonnet-5", f"/?model={RARE}", "/?model=*rare*",
        "/?system=nobody", "/?min_input_tokens=50000", f"/?agent=agent-3&model={RARE}&errors=true",
        "/?agent=nobody", f"/invocations/{sample.invocation_id}", f"/traces/{sample.trace_id}", f"/invocations/{many}",
        f"/invocations/{many}?offset=9800", f"/find?id={sample.invocation_id[:8]}", "/agents",
        "/agents/default/watcher", "/agents/default/agent-3/logs", "/health",
    ]  # fmt: skip
    asked = Asked("view", "status, KiB")
    async with page_of(telemetry) as page:
        for view in views:

            async def ask(view: str = view) -> str:
                response = await page.get(view)
                return f"{response.status}, {len(await response.read()) // 1024}"

            await asked.ask(view, ask)
    await telemetry.close()
    return asked.slow


if __name__ == "__main__":
    run(measure, __doc__)
