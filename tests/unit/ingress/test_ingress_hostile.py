"""What hostile callers and agents were found to achieve on the ingress and the metadata service, and must not again."""

import asyncio

from clrk.core.messages import Drain


async def ready(gateway):
    async with gateway.client.get(f"http://127.0.0.1:{gateway.runtime.health_port}/readyz") as response:
        return response.status


async def test_a_draining_host_is_not_ready(gateway):
    assert await ready(gateway) == 200
    first = asyncio.create_task(gateway.call("/agents/one"))
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    gateway.runtime.send(Drain())
    await gateway.runtime.until(lambda: gateway.runtime.app._draining)
    assert await ready(gateway) == 503
    gateway.runtime.open_gate()
    assert (await first)[0] == 200
