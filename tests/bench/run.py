"""`make bench`: three ratios, each measured in alternation inside this one run.

On a shared machine absolute rates move by factors between runs; the ratio of two things measured in turn does not.
Every figure is the median of the per-round ratios, with the quartiles beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "tests")]
from stack import Daemon, agent, document  # noqa: E402 - tests are folders, not packages

from clrk.core import wire  # noqa: E402
from clrk.core.ids import NetnsName, new_invocation_id, new_sandbox_id  # noqa: E402
from clrk.core.layout import HostLayout  # noqa: E402
from clrk.core.messages import StartedFd  # noqa: E402
from clrk.ebpf.header import HeaderFields, build_headers  # noqa: E402
from clrk.ebpf.loader import Stamp  # noqa: E402
from clrk.netns import plan  # noqa: E402
from clrk.netns.namespace import Namespace, NamespaceMaker, ensure_netns_dir, remove  # noqa: E402
from clrk.runtime.cgroup import Cgroup, Cgroups  # noqa: E402

START_ROUNDS = 60
WARM = 2
CONNECT_ROUNDS, CONNECTS = 20, 500
REQUEST_ROUNDS, REQUEST_SECONDS, REQUEST_CONNECTIONS = 5, 3, 16


def main() -> None:
    """Measure and print."""
    results = []
    with tempfile.TemporaryDirectory(prefix="clrk-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        binary = folder / "stopwatch"
        source = Path(__file__).with_name("stopwatch.c")
        subprocess.run(["gcc", "-O2", "-static", "-o", binary, source], check=True)
        with upstream(folder) as address, daemon(folder, binary, address) as running:
            results.extend(bench_start(running, binary))
            results.append(bench_requests(running, address))
        results.append(bench_connect(binary))
    report(results)


# --- what is measured ---------------------------------------------------------------------------------------------


def bench_start(running: Daemon, binary: Path) -> list[dict[str, object]]:
    """HTTP request → the agent's first instruction, against bare bubblewrap → the same program's first instruction."""
    bare = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", str(binary), "now"]

    def through_clrk(name: str) -> float:
        wait_refilled()
        start = time.monotonic_ns()
        with urllib.request.urlopen(f"{running.url}/agents/{name}") as answer:
            return (int(answer.read()) - start) / 1e6

    def through_bwrap() -> float:
        wait_refilled()
        start = time.monotonic_ns()
        return (int(subprocess.run(bare, capture_output=True, check=True).stdout) - start) / 1e6

    def cold() -> float:
        return through_clrk("now")

    def warm() -> float:
        return through_clrk("warm")

    return [
        alternate("request → first instruction ÷ bare bwrap", "ms", cold, through_bwrap, START_ROUNDS),
        alternate("the same, of a warm sandbox ÷ bare bwrap", "ms", warm, through_bwrap, START_ROUNDS),
        alternate("the same, warm ÷ not", "ms", warm, cold, START_ROUNDS),
    ]


def wait_refilled() -> None:
    """Wait until the used sandbox is replaced: its replacement shall not be made while something is measured."""
    deadline_s = time.monotonic() + 10
    while waiting_launchers() < WARM:
        if time.monotonic() > deadline_s:
            raise SystemExit("the warm pool is not refilled")
        time.sleep(0.02)
    time.sleep(0.1)  # and those for anybody


def waiting_launchers() -> int:
    """Count prepared sandboxes by their last process: nobody else's program is called so."""
    count = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            count += entry.name.isdigit() and (entry / "comm").read_text() == "launch\n"
    return count


def bench_connect(binary: Path) -> dict[str, object]:
    """connect() + 64 bytes + 1 byte back, stamped by the kernel, against the same in a namespace without the hooks."""
    layout = HostLayout("clrkbench")
    with contextlib.ExitStack() as undo:
        ensure_netns_dir()
        maker = NamespaceMaker()
        undo.callback(maker.close)
        groups = Cgroups.open(layout)
        undo.callback(groups.close)
        groups.remove_leftovers()
        group = groups.create(new_sandbox_id())
        undo.callback(group.remove)
        stamped, plain = (namespace(maker, layout, undo) for _ in range(2))
        stamp = undo.enter_context(Stamp.attach(layout, groups.v2_dir))
        headers = build_headers(fields(stamped.name))
        for where, skip in ((stamped, wire.HEADER_SIZE), (plain, 0)):
            undo.enter_context(server(binary, where, skip))

        def dial(where: Namespace, address: str, port: int, cgroup: Cgroup | None) -> float:
            # The records that a gateway would take at accept are dropped here, outside the measurement.
            stamp.unregister(stamped.cookie)
            stamp.register(stamped.cookie, *headers)
            command = [binary, "dial", address, str(port), str(CONNECTS)]
            return int(inside(command, where, cgroup).strip()) / 1e3

        return alternate(
            "connect + first byte, stamped ÷ plain", "µs",
            lambda: dial(stamped, "203.0.113.1", 80, group),
            lambda: dial(plain, plan.EGRESS_V4, wire.PORT_EGRESS, None),
            CONNECT_ROUNDS,
        )  # fmt: skip


def bench_requests(running: Daemon, address: str) -> dict[str, object]:
    """Requests a second of wrk through the intercepting gateway, against the same wrk and upstream directly."""
    wrk = ["wrk", "-t", "1", "-c", str(REQUEST_CONNECTIONS), "-d", f"{REQUEST_SECONDS}s"]

    def intercepted() -> float:
        command = " ".join([*wrk, "https://files.internal/"])
        request = urllib.request.Request(
            f"{running.url}/agents/shell", data=command.encode(), headers={"content-type": "text/plain"}
        )
        with urllib.request.urlopen(request) as answer:
            return rate(answer.read().decode())

    def direct() -> float:
        command = [*wrk, "-H", "Host: files.internal", f"https://{address}/"]
        return rate(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return alternate("requests/s, intercepted ÷ direct", "1/s", intercepted, direct, REQUEST_ROUNDS)


def rate(printed: str) -> float:
    """Read wrk's own figure; a run with failed requests measures something else."""
    assert "Non-2xx" not in printed, printed
    assert "Socket errors" not in printed, printed
    return float(next(line for line in printed.splitlines() if line.startswith("Requests/sec:")).split()[1])


def alternate(
    name: str, unit: str, ours: Callable[[], float], reference: Callable[[], float], rounds: int
) -> dict[str, object]:
    """Measure one after the other, the order turned round each time; the first round warms up and does not count."""
    pairs = []
    for number in range(rounds + 1):
        if number % 2:
            second = reference()
            first = ours()
        else:
            first = ours()
            second = reference()
        pairs.append((first, second))
    print(f"{name}: {rounds} rounds", file=sys.stderr, flush=True)
    kept = pairs[1:]
    ratios = sorted(first / second for first, second in kept)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "name": name, "ratio": middle, "quartiles": (low, high), "rounds": rounds, "unit": unit,
        "ours": statistics.median(first for first, _ in kept),
        "reference": statistics.median(second for _, second in kept),
    }  # fmt: skip


def report(results: list[dict[str, object]]) -> None:
    """Print the table of docs/benchmarks.md, and the same as JSON into .output/bench.json."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    print(f"\nLinux {platform.release()}, {os.cpu_count()} CPUs ({cpu}), Python {platform.python_version()}\n")
    print("| measured | ratio (median) | quartiles | ours | reference | rounds |")
    print("|---|---|---|---|---|---|")
    for result in results:
        low, high = result["quartiles"]  # type: ignore[misc]
        unit = result["unit"]
        print(
            f"| {result['name']} | **{result['ratio']:.2f}** | {low:.2f} to {high:.2f} | {result['ours']:.1f} {unit} "
            f"| {result['reference']:.1f} {unit} | {result['rounds']} |"
        )
    out = ROOT / ".output" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2))


# --- what it needs ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[str]:
    """Run upstream.py."""
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, Path(__file__).with_name("upstream.py"), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def daemon(folder: Path, binary: Path, address: str) -> Iterator[Daemon]:
    """Run a clrk of our own, with the upstream behind files.internal."""
    shell = "import json,os,sys; os.execv('/bin/bash', ['bash', '-c', json.load(sys.stdin)['data']])"
    aliases = [{"hostnames": ["files.internal"], "address": address}]
    clock, mounts = ["/agent/bench/stopwatch", "now"], {"/agent/bench/stopwatch": binary}
    running = Daemon(
        folder, "clrkbenchd",
        [
            document("EgressGateway", "default", hostAliases=aliases, upstreamTLS={"caFile": str(folder / "ca.pem")}),
            document("EgressL4Route", "bench", rules=[{"hostnames": ["files.internal"], "ports": [443]}]),
            agent("now", clock, mounts=mounts),
            agent("warm", clock, mounts=mounts, warmPoolSize=WARM),
            agent("shell", ["/usr/bin/python3", "-I", "-c", shell]),
        ],
    )  # fmt: skip
    running.start()
    try:
        yield running
    finally:
        running.stop()


def namespace(maker: NamespaceMaker, layout: HostLayout, undo: contextlib.ExitStack) -> Namespace:
    """Make one namespace, removed at the end."""
    made = maker.submit(NetnsName(f"{layout.netns_prefix}{new_sandbox_id()}")).result()
    undo.callback(remove, made.name)
    undo.callback(made.close)
    return made


def fields(name: NetnsName) -> HeaderFields:
    """A header of ordinary size."""
    return HeaderFields(
        kind=wire.KIND_TASK_AGENT, namespace="default", name="bench", uid=new_invocation_id(), revision="0123456789ab",
        invocation_id=new_invocation_id(), sandbox_id=name[-8:], netns_name=name,
        traceparent="00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    )  # fmt: skip


@contextlib.contextmanager
def server(binary: Path, where: Namespace, skip: int) -> Iterator[None]:
    """Serve the namespace's egress listener; no entering: a socket stays in the namespace that it was made in."""
    listener = where.listeners[StartedFd.EGRESS_V4]
    listener.setblocking(True)
    with subprocess.Popen([binary, "serve", str(skip)], stdin=listener.fileno()) as process:
        try:
            yield
        finally:
            process.kill()


def inside(command: list[str | Path], where: Namespace, cgroup: Cgroup | None) -> str:
    """Run a program in a namespace and, for the stamp, in the cgroup that the programs are attached to."""
    joins = "".join(f"echo $$ > {path}; " for path in cgroup.procs_files) if cgroup else ""
    line = f'{joins}exec nsenter --net="$1" "${{@:2}}"'
    handle = f"/run/netns/{where.name}"
    done = subprocess.run(["bash", "-c", line, "bash", handle, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
