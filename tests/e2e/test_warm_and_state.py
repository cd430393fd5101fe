"""warmPoolSize and state as their users meet them: over HTTP, in the spans, across a reload."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import yaml
from instances import DEADLINE_S, instance
from stack import Daemon, agent

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

FILE = "/var/clrk/state/notes"


def documents(size_mb: int) -> list[dict[str, Any]]:
    greedy = "head -c 64M /dev/zero > /var/clrk/state/big; echo done"
    return [
        agent("quick", ["/bin/sh", "-c", "echo $CLRK_INVOCATION_ID $TRACEPARENT"], warmPoolSize=1),
        agent(
            "notes", ["/bin/bash", "-c", f"cat {FILE}; echo $CLRK_INVOCATION_ID >> {FILE}"],
            maxConcurrent=1, state={"sizeLimitMB": size_mb},
        ),
        agent("greedy", ["/bin/bash", "-c", greedy], maxConcurrent=1, state={"sizeLimitMB": size_mb}),
        agent("lost", ["/bin/true"]) | {"spec": {"template": {"spec": {"command": ["/bin/true"], "workdir": "/no"}}}},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("stateful"), instance("wa"), documents(8))
    running.start()
    yield running
    assert running.stop() == 0, running.log()


async def call(caller: aiohttp.ClientSession, daemon: Daemon, name: str) -> tuple[int, str, str]:
    """Invoke; returns status, body and invocation id."""
    async with caller.get(f"{daemon.url}/agents/{name}") as answer:
        return answer.status, await answer.text(), answer.headers["X-Clrk-Invocation-ID"]


async def test_a_warm_run_is_its_own_invocations_and_says_so(stateful: Daemon, caller: aiohttp.ClientSession) -> None:
    seen: set[str] = set()
    async with asyncio.timeout(DEADLINE_S):
        while len(seen) < 3:
            before_ns = time.time_ns()
            status, body, invocation_id = await call(caller, stateful, "quick")
            spans = {span["name"].split()[0]: span for span in stateful.spans_when_complete(invocation_id)}
            told, traceparent = body.split()
            assert (status, told) == (200, invocation_id)
            assert traceparent.split("-")[1:3] == [spans["invoke_agent"]["trace_id"], spans["invoke_agent"]["span_id"]]
            acquire, spawn = spans["sandbox.acquire"], spans["sandbox.spawn"]
            if acquire["attributes"]["clrk.sandbox.warm"]:
                seen.add(acquire["attributes"]["clrk.sandbox.id"])
            assert spawn["attributes"]["clrk.sandbox.warm"] == acquire["attributes"]["clrk.sandbox.warm"]
            times = [acquire["start_time_unix_nano"], acquire["end_time_unix_nano"]]
            times += [spawn["start_time_unix_nano"], spawn["end_time_unix_nano"], time.time_ns()]
            assert [before_ns, *times] == sorted([before_ns, *times])


async def test_state_outlives_runs_and_a_full_one_is_507(stateful: Daemon, caller: aiohttp.ClientSession) -> None:
    _, first, one = await call(caller, stateful, "notes")
    _, second, _ = await call(caller, stateful, "notes")
    assert (first, second) == ("", f"{one}\n")
    assert (await call(caller, stateful, "greedy"))[:2] == (200, "done\n")
    async with caller.get(f"{stateful.url}/agents/greedy") as answer:
        problem = await answer.json(content_type="application/problem+json")
    assert answer.status == 507
    assert problem["invocation_id"] == answer.headers["X-Clrk-Invocation-ID"]
    assert "default/greedy is full: 8 MB" in problem["detail"]
    runtime, *_ = yaml.safe_load_all(stateful.config.read_text())
    stateful.config.write_text(yaml.safe_dump_all([runtime, *documents(80)]))
    assert stateful.process is not None
    stateful.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(DEADLINE_S):
        while (await call(caller, stateful, "greedy"))[0] != 200:
            await asyncio.sleep(0.02)  # the reload is done when the new limit is in force
    assert (await call(caller, stateful, "notes"))[1].startswith(f"{one}\n")


async def test_a_view_that_can_not_be_built_is_the_runtimes_failure(
    stateful: Daemon, caller: aiohttp.ClientSession
) -> None:
    status, body, _ = await call(caller, stateful, "lost")
    assert status == 502, body
