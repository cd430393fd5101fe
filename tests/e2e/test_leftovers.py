"""Nothing is left: after many invocations, and after kill -9 of any part in the middle of some."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from leftovers import difference, footprint, settled
from stack import SOURCE, Daemon, StandIn, agent, egress, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e, pytest.mark.alone]

RUN_SHELL = "import json,os,sys; os.execv('/bin/bash', ['bash', '-c', json.load(sys.stdin)['data']])"


@pytest.fixture
def own(tmp_path: Path, providers: StandIn) -> Iterator[Daemon]:
    """A daemon that may be killed."""
    shell = agent("shell", ["/usr/bin/python3", "-I", "-c", RUN_SHELL])
    running = Daemon(tmp_path, instance("le"), [*egress(providers), shell])
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        assert running.stop() == 0, running.log()
    after = footprint(running)
    assert (after.namespaces, after.processes, after.mounts) == (0, (), 0)
    assert after.cgroups == 0


async def works(caller: aiohttp.ClientSession, daemon: Daemon) -> None:
    assert '"order": "1042"' in (await invoke(caller, daemon, "shell", "curl -sS http://tools.internal/orders/1042"))[0]


async def test_two_hundred_invocations_leave_nothing(own: Daemon, caller: aiohttp.ClientSession) -> None:
    async def several(count: int) -> None:
        for _ in range(count):
            await works(caller, own)

    await several(10)  # caches, pools and thread pools have their size after a few
    before = await asyncio.to_thread(settled, own)
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(several(25))
    after = await asyncio.to_thread(settled, own, before)
    assert difference(before, after) == {}


async def ten_at_the_gate(
    caller: aiohttp.ClientSession, own: Daemon, providers: StandIn
) -> list[asyncio.Task[tuple[int, bytes] | Exception]]:
    """Start ten invocations, and return when each of them is in the middle of a call."""
    gate = secrets.token_hex(4)

    async def one() -> tuple[int, bytes] | Exception:
        source = f"echo started; exec curl -sS http://tools.internal/gate/{gate}"
        try:
            async with caller.post(f"{own.url}/agents/shell", data=source, headers=SOURCE) as answer:
                return answer.status, await answer.read()
        except aiohttp.ClientError as error:
            return error

    tasks = [asyncio.create_task(one()) for _ in range(10)]
    url = f"http://{providers.plain}/gate/{gate}/arrived/10"
    async with caller.get(url, headers={"host": "tools.internal"}, timeout=aiohttp.ClientTimeout(DEADLINE_S)) as answer:
        assert answer.status == 200, own.log()
    return tasks


async def all_failed(tasks: list[asyncio.Task[tuple[int, bytes] | Exception]]) -> None:
    """No caller takes what it got for a whole answer, and none is left waiting."""
    async with asyncio.timeout(DEADLINE_S):
        for result in await asyncio.gather(*tasks):
            assert isinstance(result, Exception), result


@pytest.mark.parametrize("victims", [("gateway",), ("runtime",), ("gateway", "runtime")], ids="+".join)
async def test_kill_in_the_middle_of_ten_invocations(
    own: Daemon, providers: StandIn, caller: aiohttp.ClientSession, victims: tuple[str, ...]
) -> None:
    await works(caller, own)  # the store is made for the first span
    before = await asyncio.to_thread(settled, own)
    tasks = await ten_at_the_gate(caller, own, providers)
    if "gateway" in victims:
        assert own.kill_gateway()
    if "runtime" in victims:
        own.kill()
        await all_failed(tasks)
        own.start()  # in this thread: the daemon dies with the thread that started it
    else:
        await all_failed(tasks)
        await ready_again(caller, own)
    await works(caller, own)
    after = await asyncio.to_thread(settled, own, before)
    assert difference(before, after) == {}


async def ready_again(caller: aiohttp.ClientSession, own: Daemon) -> None:
    """The runtime starts a new gateway within a second or so; until then callers are refused, not left hanging."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async with caller.get(f"http://127.0.0.1:{own.admin_port}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # nobody listens yet
            await asyncio.sleep(0.05)


async def test_killed_twice_in_a_row(own: Daemon, caller: aiohttp.ClientSession) -> None:
    await works(caller, own)
    before = await asyncio.to_thread(settled, own)
    for _ in range(2):
        own.kill()
        own.start()  # in this thread: the daemon dies with the thread that started it
        await works(caller, own)
    after = await asyncio.to_thread(settled, own, before)
    assert difference(before, after) == {}


async def test_sigterm_waits_for_the_running_one(
    own: Daemon, providers: StandIn, caller: aiohttp.ClientSession
) -> None:
    """Drain: the running invocation ends well, new ones are refused, then the daemon leaves with 0."""
    gate = secrets.token_hex(4)
    source = f"curl -sS http://tools.internal/gate/{gate}"
    running = asyncio.create_task(invoke(caller, own, "shell", source))
    headers = {"host": "tools.internal"}
    async with caller.get(f"http://{providers.plain}/gate/{gate}/arrived/1", headers=headers) as answer:
        assert answer.status == 200
    assert own.process is not None
    own.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async with caller.post(f"{own.url}/agents/shell", data="echo no", headers=SOURCE) as answer:
                    if answer.status == 503:
                        break
            except aiohttp.ClientConnectionError:
                break  # no longer listening, or no longer when it was to be accepted: refused as well
    async with caller.post(f"http://{providers.plain}/gate/{gate}/open", headers=headers) as answer:
        assert answer.status == 204
    assert (await running)[0] == "open\n"
    assert await asyncio.to_thread(own.process.wait, DEADLINE_S) == 0
