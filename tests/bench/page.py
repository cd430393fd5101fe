"""Time every view of the page over the store of `tests/bench/store.py --keep FOLDER`, asked over HTTP.

    .venv/bin/python -P tests/bench/store.py --keep /var/tmp/million
    .venv/bin/python -P tests/bench/page.py /var/tmp/million

Each view is asked seven times; the table shows the median and the slowest. One invocation of 10,000 spans is added
first, unless it is there.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from page_client import page_of
from page_samples import record_many

from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.records import InvocationFilter
from clrk.gateway.telemetry.store import TraceStore

LIMIT_S = 1.0
RARE = "text-embedding-rare"
DAY_NS = 24 * 3600 * 1_000_000_000


async def measure(folder: Path) -> int:
    """Ask; returns the number of views that took too long."""
    store = TraceStore(folder / "traces.db", retention_s=365 * 86_400.0, max_file_bytes=2**40)
    telemetry = Telemetry(store, {})
    await store.flush(60)
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
    slow = 0
    print(f"{'view':75} {'status':6} {'KiB':>6} {'median ms':>10} {'slowest ms':>11}")
    async with page_of(telemetry) as page:
        for view in views:
            times, status, size = [], 0, 0
            for _ in range(7):
                start = time.perf_counter()
                response = await page.get(view)
                times.append((time.perf_counter() - start) * 1000)
                status, size = response.status, len(await response.read())
            slow += max(times) > LIMIT_S * 1000
            print(f"{view[:75]:75} {status:6} {size / 1024:6.0f} {statistics.median(times):10.1f} {max(times):11.1f}")
    await telemetry.close()
    return slow


def main() -> None:
    """Measure the store in the folder that is named."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "traces.db").exists():
        sys.exit(__doc__)
    if slow := asyncio.run(measure(Path(sys.argv[1]))):
        sys.exit(f"{slow} views took longer than {LIMIT_S} s")


if __name__ == "__main__":
    main()
