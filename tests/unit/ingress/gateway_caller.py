"""A gateway in this process as its callers see it, and what its operator reads of them."""

import asyncio
import contextlib
import json
from dataclasses import dataclass

import aiohttp
from scripted_runtime import ScriptedRuntime


@contextlib.asynccontextmanager
async def running_gateway(agents, folder, **client_options):
    """Run a gateway with these agents; it must neither crash nor leave a pipe open."""
    runtime = ScriptedRuntime(agents, folder)
    await runtime.start()
    async with aiohttp.ClientSession(**client_options) as client:
        yield Gateway(runtime, client)
    await runtime.stop()
    assert runtime.crashes == []
    assert runtime.left_open == []


def problem(status, headers, body):
    """Check a problem document; returns it."""
    assert headers["Content-Type"] == "application/problem+json"
    found = json.loads(body)
    assert found["status"] == status
    assert found["invocation_id"] == headers["X-Clrk-Invocation-ID"]
    return found


@dataclass
class Gateway:
    """What a test holds: the runtime's knobs, and a caller."""

    runtime: ScriptedRuntime
    client: aiohttp.ClientSession

    @property
    def url(self):
        return f"http://127.0.0.1:{self.runtime.ingress_port}"

    async def call(self, path, method="POST", **kwargs):
        """Return status, headers and body of a whole answer."""
        async with self.client.request(method, self.url + path, **kwargs) as response:
            return response.status, response.headers, await response.read()

    async def raw(self, request):
        """Send bytes; return reader and writer of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.runtime.ingress_port)
        writer.write(request)
        return reader, writer

    async def spans(self, invocation_id, name=None):
        """Return the spans of an invocation, read as `clrk trace --json` reads them."""
        connector = aiohttp.UnixConnector(str(self.runtime.state_dir / "admin.sock"))
        async with aiohttp.ClientSession(connector=connector) as client:
            async with client.get(f"http://clrk/v1/traces/{invocation_id}") as response:
                assert response.status == 200, await response.text()
                found = [json.loads(line) for line in (await response.text()).splitlines()]
        return [span for span in found if name in (None, span["name"])]

    async def span(self, invocation_id, name):
        """Return the one span of this name, as soon as it is recorded."""
        async with asyncio.timeout(20):
            while True:
                try:
                    found = await self.spans(invocation_id, name)
                except AssertionError:
                    found = []
                if found:
                    assert len(found) == 1
                    return found[0]
                await asyncio.sleep(0.02)

    def phase(self, invocation_id):
        """Return what the gateway remembers."""
        return self.runtime.app._parts.invocations.record(invocation_id).phase
