"""2,000 generated exchanges, each directly and through the gateway: both ends see the same, in the same steps.

What may differ is written once, in forward.CHANGED_IN_REQUESTS and CHANGED_IN_RESPONSES. CLRK_DIFFERENTIAL_SEED runs
others than those of every day; a failure says which to give.
"""

from __future__ import annotations

import asyncio
import os
from itertools import zip_longest

import h11
import pytest
import uvloop
from differential import STEP_S, Reader, Run, Server, ask
from differential_shapes import NAME, Exchange, connections
from egress_lab import aliased, laboratory, upstream
from relayed_exchange import ALLOW
from tls_material import Authority

BLOCKS, SIZE = 8, 250
AT_ONCE = 32
SEED = int(os.environ.get("CLRK_DIFFERENTIAL_SEED", "1"))


async def carry(group: list[Exchange], server: Server, connect) -> list[Run]:
    """Carry the exchanges of one connection."""
    runs = [server.runs.setdefault(exchange.number, Run()) for exchange in group]
    reader, writer = await connect()
    stream = Reader(reader, h11.CLIENT)
    try:
        for exchange, run in zip(group, runs, strict=True):
            try:
                async with asyncio.timeout(STEP_S):
                    if not await ask(exchange, run, stream, writer):
                        break
            except TimeoutError:
                run.client.append(("stopped",))
                break
    finally:
        writer.transport.abort()
    return runs


async def carry_all(groups: list[list[Exchange]], server: Server, connect) -> dict[int, tuple[list, list]]:
    """Return what client and server saw, by exchange."""
    server.runs.clear()
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(group: list[Exchange]) -> list[Run]:
        async with slots:
            return await carry(group, server, connect)

    async with asyncio.TaskGroup() as tasks:
        for group in groups:
            tasks.create_task(one(group))
    return {number: (run.client, run.server) for number, run in server.runs.items()}


def same(relayed: list[tuple], direct: list[tuple], hint: str) -> None:
    if relayed != direct:
        pairs = enumerate(zip_longest(relayed, direct))
        at, (mine, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        pytest.fail(f"{hint}\nstep {at}\nthrough the gateway: {mine}\ndirectly:            {theirs}", pytrace=False)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("part", range(BLOCKS // 2))
async def test_through_the_gateway_is_as_direct(part):
    """Each event loop carries its half of the blocks, and half of those over TLS."""
    block = part * 2 + isinstance(asyncio.get_running_loop(), uvloop.Loop)
    seed, tls = SEED * BLOCKS + block, part % 2 == 1
    groups = connections(seed, SIZE)
    server, theirs = Server(), Authority("upstream CA")
    server.exchanges = {exchange.number: exchange for group in groups for exchange in group}
    context = theirs.server_context([NAME]) if tls else None
    async with upstream(server, context) as port, laboratory(
        gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem
    ) as lab:  # fmt: skip
        trusting = theirs.client_context() if tls else None

        async def directly():
            return await asyncio.open_connection(
                "127.0.0.1", port, ssl=trusting, server_hostname=NAME if tls else None
            )  # fmt: skip

        async def through_the_gateway():
            wire = await (lab.dial_tls(NAME) if tls else lab.dial(NAME, 80))
            return wire.reader, wire.writer

        direct = await carry_all(groups, server, directly)
        relayed = await carry_all(groups, server, through_the_gateway)
        spans = await lab.recorder.wait(SIZE)
    for number, exchange in server.exchanges.items():
        hint = f"CLRK_DIFFERENTIAL_SEED={SEED} block {block}, exchange {number}: {exchange.method} {exchange.facts}"
        assert ("stopped",) not in direct[number][0], f"the generated exchange can not be carried; {hint}"
        same(relayed[number][0], direct[number][0], f"the client saw something else; {hint}")
        if exchange.ending in ("keep", "close"):  # what was under way when the answer broke may be cut anywhere
            same(relayed[number][1], direct[number][1], f"the server saw something else; {hint}")
    assert len(spans) == SIZE, f"one span each; CLRK_DIFFERENTIAL_SEED={SEED} block {block}"
