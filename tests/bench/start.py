"""What the daemon's start takes, and a crash of its gateway: processor time, and the time without a data path.

    sudo .venv/bin/python -P tests/bench/start.py [--rounds 5] [--against OTHER_CHECKOUT]

Each round starts a daemon without agents, waits until it is ready, kills its gateway and waits until the next one
answers; with --against, in turn with another checkout, each with its own environment. Both have their modules compiled
by the first round, which does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "tests")]
import stack  # noqa: E402 - tests are folders, not packages

_TICKS = os.sysconf("SC_CLK_TCK")
_PARTS = {
    "runtime until ready, CPU": "runtime", "gateway until ready, CPU": "gateway", "start until ready": "start",
    "gateway killed → the next one answers": "restart",
}  # fmt: skip


def cpu_s(pid: int) -> float:
    """Return the processor time of a process and of its children that have ended (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def measure(checkout: Path, folder: Path) -> dict[str, float]:
    """Start, kill the gateway, stop; return seconds."""
    stack.BIN = checkout / ".venv/bin"
    daemon = stack.Daemon(folder, "clrkbench", [])
    began_s = time.monotonic()
    daemon.start()
    found = {"start": time.monotonic() - began_s}
    try:
        gateway = daemon.gateway_pid()
        assert gateway is not None
        found |= {"runtime": cpu_s(daemon.process.pid), "gateway": cpu_s(gateway)}
        began_s = time.monotonic()
        daemon.kill_gateway()
        while not _answers(daemon):
            pass
        return found | {"restart": time.monotonic() - began_s}
    finally:
        daemon.stop()


def _answers(daemon: stack.Daemon) -> bool:
    """Ask; who comes while there is no gateway waits in the backlog. One that was being served when it died is cut."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{daemon.admin_port}/readyz") as answer:
        return answer.status == 200
    return False


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    checkouts = [ROOT, *([given.against.resolve()] if given.against else [])]
    rounds: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for number in range(given.rounds + 1):
        for checkout in checkouts if number % 2 else reversed(checkouts):
            with tempfile.TemporaryDirectory(prefix="clrk-start-") as name:
                Path(name).chmod(0o755)
                rounds[checkout].append(measure(checkout, Path(name)))
    print("| measured | s |" + (" before, s | ratio | quartiles |" if given.against else ""))
    print("|---|---|" + ("---|---|---|" if given.against else ""))
    for title, part in _PARTS.items():
        ours, *others = ([one[part] for one in rounds[checkout][1:]] for checkout in checkouts)
        line = f"| {title} | {statistics.median(ours):.2f} |"
        for other in others:
            ratios = [here / there for here, there in zip(ours, other, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line += f" {statistics.median(other):.2f} | **{middle:.2f}** | {low:.2f} to {high:.2f} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
