"""Many invocations at once, with agents, upstreams, callers and the gateway failing at random; then every one of them
has to be accounted for.

What is checked at the end, from the outside alone (callers' answers, the upstream's own log, the admin API):
- an invocation that a caller heard of has exactly one record, in a final phase, one `ingress.dispatch` and, if it ran,
  one `invoke_agent`; one that nobody heard of has left no call;
- each request that the upstream saw is exactly one span, with the invocation that made it;
- nothing is left on the host.

Run by tests/e2e/test_soak.py (small) and by `make soak` (2,000 invocations, ten at a time).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from instances import instance
from leftovers import difference, footprint, settled
from soak_judge import FINAL, Attempt, Verdict, judge
from soak_upstream import upstream
from stack import Daemon, agent, document

from clrk.core.ids import new_invocation_id

WORKER = """
import json, os, sys, time, urllib.request as r
if os.environ.get("SOAK_METADATA"):
    plan = json.load(r.urlopen(os.environ["CLRK_METADATA_URL"] + "/v1/event"))
else:
    plan = json.load(sys.stdin)["data"]
me = os.environ["CLRK_INVOCATION_ID"]
for call in plan["calls"]:
    url = f"{call['base']}{call['path']}?call={call['id']}&inv={me}"
    body = json.dumps({"model": "gpt-4o-mini", "messages": []}).encode() if "completions" in call["path"] else None
    try:
        r.urlopen(r.Request(url, body, {"content-type": "application/json"}), timeout=20).read()
    except OSError:
        pass  # the upstream's part of the soak
end = plan["end"]
if end == "sleep":
    time.sleep(3600)
if end == "crash":
    os.kill(os.getpid(), 11)
if end == "flood":
    sys.stdout.write("x" * 3_000_000)
if end == "half":
    print("half", flush=True)
if os.environ.get("SOAK_METADATA"):
    r.urlopen(r.Request(os.environ["CLRK_METADATA_URL"] + "/v1/response", b"posted")).read()
else:
    print("done")
sys.exit(plan["code"])
"""
PATHS = ["/ok"] * 6 + ["/v1/chat/completions"] * 3 + ["/error", "/reset", "/cut", "/slow", "/big"]
TIMEOUT = "8s"  # of every agent: what does not sleep ends long before, also on a machine that is ten times slower
ENDS = ["well"] * 12 + ["crash", "sleep", "flood", "half"]


@contextlib.contextmanager
def soak_daemon(folder: Path, plain: str, tls: str, ca_file: Path, instance: str) -> Iterator[Daemon]:
    command = ["/usr/bin/python3", "-I", "-S", "-c", WORKER]
    documents = [
        document(
            "EgressGateway", "default", upstreamTLS={"caFile": str(ca_file)},
            hostAliases=[
                {"hostnames": ["plain.soak"], "address": plain}, {"hostnames": ["tls.soak"], "address": tls},
            ],
        ),
        document(
            "EgressL4Route", "soak",
            rules=[{"hostnames": ["plain.soak"], "ports": [80]}, {"hostnames": ["tls.soak"], "ports": [443]}],
        ),
        agent("worker", command, timeout=TIMEOUT),
        agent("warm", command, timeout=TIMEOUT, warmPoolSize=2),
        agent("narrow", command, timeout=TIMEOUT, maxConcurrent=2),
        agent("whole", command, timeout=TIMEOUT, streaming={"enabled": False}),
        agent("meta", command, timeout=TIMEOUT, delivery={"mode": "Metadata"}, env={"SOAK_METADATA": "1"}),
    ]  # fmt: skip
    daemon = Daemon(folder, instance, documents)
    daemon.start()
    try:
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            assert daemon.stop() == 0, daemon.log()


def plan_attempt(chance: random.Random) -> Attempt:
    calls = [
        {
            "base": chance.choice(["http://plain.soak", "https://tls.soak"]),
            "path": chance.choice(PATHS),
            "id": f"{chance.getrandbits(64):016x}",
        }
        for _ in range(chance.randrange(4))
    ]
    end = chance.choice(ENDS)
    plan = {"calls": calls, "end": end, "code": chance.choice([0, 0, 0, 3])}
    name = chance.choice(["worker", "worker", "warm", "narrow", "whole", "meta"])
    return Attempt(new_invocation_id(), name, plan, chance.choice(["patient"] * 8 + ["hasty", "slow"]))


async def attempt(session: aiohttp.ClientSession, daemon: Daemon, this: Attempt) -> None:
    headers = {"X-Clrk-Invocation-ID": this.invocation}
    patience = aiohttp.ClientTimeout(0.15 if this.caller == "hasty" else 60)
    try:
        url = f"{daemon.url}/agents/{this.agent}"
        async with session.post(url, json=this.plan, headers=headers, timeout=patience) as answer:
            this.status = answer.status
            if this.caller == "slow":
                while chunk := await answer.content.read(65_536):
                    this.body += chunk
                    await asyncio.sleep(0.002)
            else:
                this.body = await answer.read()
    except (aiohttp.ClientError, TimeoutError) as exc:
        this.failure = type(exc).__name__


async def soak(
    daemon: Daemon, *, count: int, at_once: int, kills: int, seed: int, progress: bool
) -> tuple[list[Attempt], int]:
    """Make the attempts; returns them and how often the gateway was killed."""
    chance = random.Random(seed)
    attempts = [plan_attempt(chance) for _ in range(count)]
    queue = iter(enumerate(attempts))
    kill_at = {round(count * (number + 1) / (kills + 1)) for number in range(kills)}
    killed = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal killed
        for number, this in queue:
            if number in kill_at:
                while not await asyncio.to_thread(daemon.kill_gateway):
                    await asyncio.sleep(0.05)  # the next of one that was killed before is on its way
                killed += 1
            await attempt(session, daemon, this)
            if progress and number % 100 == 0:
                print(f"  {number} of {count}", file=sys.stderr, flush=True)

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work(session))
    return attempts, killed


async def settle(daemon: Daemon) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wait until no invocation is unfinished; returns the records and all spans."""
    connector = aiohttp.UnixConnector(f"/run/{daemon.instance}/admin.sock")
    async with aiohttp.ClientSession("http://clrk", connector=connector) as session, asyncio.timeout(60):
        while True:
            records = await all_records(session)
            if all(record["phase"] in FINAL for record in records):
                break
            await asyncio.sleep(0.2)
        async with session.get("/v1/traces") as answer:
            assert answer.status == 200, await answer.text()
            return records, [json.loads(line) for line in (await answer.read()).splitlines()]


async def all_records(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    query: dict[str, str] = {"limit": "1000"}
    while True:
        try:
            async with session.get("/v1/invocations", params=query) as answer:
                assert answer.status == 200, await answer.text()
                page = await answer.json()
        except aiohttp.ClientConnectionError:  # the gateway is being restarted
            await asyncio.sleep(0.2)
            continue
        records += page["items"]
        if page["before"] is None:
            return records
        query["before"] = page["before"]


async def run(folder: Path, *, count: int, at_once: int, kills: int, seed: int, progress: bool = False) -> Verdict:
    """Do the whole soak with a daemon and an upstream of its own."""
    async with upstream(folder) as (seen, plain, tls, ca_file):
        with soak_daemon(folder, plain, tls, ca_file, instance("so")) as daemon:
            warm_up, _ = await soak(daemon, count=20, at_once=5, kills=0, seed=seed + 1, progress=False)
            await settle(daemon)
            before = await asyncio.to_thread(settled, daemon)
            began = time.monotonic()
            attempts, killed = await soak(
                daemon, count=count, at_once=at_once, kills=kills, seed=seed, progress=progress
            )
            took_s = time.monotonic() - began
            records, spans = await settle(daemon)
            verdict = judge([*warm_up, *attempts], seen, records, spans)
            after = await asyncio.to_thread(settled, daemon, before, but="files")
            left = difference(before, after, but="files")
            verdict.expect(not left, f"left on the host: {left}")
            verdict.facts |= {"seconds": round(took_s, 1), "gateway_kills": killed, "seed": seed}
        gone = footprint(daemon)
        verdict.expect((gone.namespaces, gone.cgroups, gone.processes, gone.mounts) == (0, 0, (), 0), f"left: {gone}")
    return verdict


def main() -> int:
    """Run it from the command line. Returns: 0 when everything is accounted for."""
    parser = argparse.ArgumentParser(description="2,000 invocations with failures; every one is accounted for")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--kills", type=int, default=8, help="of the gateway, with SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="0: a random one, which is printed")
    options = parser.parse_args()
    seed = options.seed or random.randrange(1, 10**9)
    with tempfile.TemporaryDirectory(prefix=f"{instance('so')}-") as name:
        os.chmod(name, 0o755)  # sandboxes have uids of their own
        work = run(
            Path(name), count=options.count, at_once=options.at_once, kills=options.kills, seed=seed, progress=True
        )
        verdict = asyncio.run(work)
    print(json.dumps(verdict.facts, indent=2))
    for problem in verdict.problems[:50]:
        print(f"PROBLEM {problem}")
    print(f"{len(verdict.problems)} problems")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
