"""A WebSocket out of a real sandbox: `websockets` on both ends checks every frame, and its compression."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import websockets.asyncio.server
from instances import DEADLINE_S, instance
from stack import ROOT, RUN_PYTHON, Daemon, agent, document, free_port, invoke
from tls_material import Authority

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

NAME = "chat.internal"
CLIENT = """
import asyncio, hashlib, json, random, websockets.asyncio.client
noise = random.Random(1).randbytes(300_000)
text = 'again and again ' * 20_000

async def talk():
    options = {'compression': 'deflate', 'max_size': 2**22, 'proxy': None}
    async with websockets.asyncio.client.connect(URL, **options) as connection:
        same = []
        for message in ['', 'e' * 1000, noise, text, b'', [text[:7], text[7:]]]:
            await connection.send(message)
            same.append(await connection.recv() == (text if isinstance(message, list) else message))
        await (await connection.ping(b'there?'))
        await connection.send('bye')
        await connection.wait_closed()
        return [same, [type(found).__name__ for found in connection.protocol.extensions], connection.close_code]

print(json.dumps(asyncio.run(talk())))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, dict[str, int], Path]]:
    """A daemon whose agent has the test's packages, and the ports behind ws:// and wss://."""
    folder = tmp_path_factory.mktemp("websocket")
    theirs = Authority("chat")
    (folder / "server.pem").write_bytes(b"".join(theirs.issue(names=[NAME, f"tls.{NAME}"])))
    (folder / "ca.pem").write_bytes(theirs.pem)
    ports = {"ws": free_port(), "wss": free_port()}
    hosts = {"ws": NAME, "wss": f"tls.{NAME}"}
    aliases = [{"hostnames": [hosts[key]], "address": f"127.0.0.1:{port}"} for key, port in ports.items()]
    documents = [
        document(
            "EgressGateway", "default", hostAliases=aliases, upstreamTLS={"caFile": str(folder / "ca.pem")}
        ),
        document("EgressL4Route", "chat", rules=[{"hostnames": list(hosts.values()), "ports": [80, 443]}]),
        agent("py", ["/agent/venv/bin/python", "-I", "-c", RUN_PYTHON], mounts={"/agent/venv": ROOT / ".venv"}),
    ]  # fmt: skip
    running = Daemon(folder, instance("ws"), documents)
    running.start()
    yield running, ports, folder
    assert running.stop() == 0, running.log()


async def _echo(connection: Any) -> None:
    async for message in connection:
        if message == "bye":
            await connection.close(4001, "bye")
            return
        await connection.send(message)


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_a_websocket_passes_untouched_through_a_sandbox(
    host: tuple[Daemon, dict[str, int], Path], caller: aiohttp.ClientSession, scheme: str
) -> None:
    daemon, ports, folder = host
    context = None
    if scheme == "wss":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
    name = NAME if scheme == "ws" else f"tls.{NAME}"
    async with asyncio.timeout(DEADLINE_S), websockets.asyncio.server.serve(
        _echo, "127.0.0.1", ports[scheme], ssl=context, compression="deflate", max_size=2**22
    ):  # fmt: skip
        text, invocation_id = await invoke(caller, daemon, "py", f"URL = '{scheme}://{name}/x'\n{CLIENT}")
    same, extensions, code = json.loads(text)
    assert same == [True] * 6
    assert (extensions, code) == (["PerMessageDeflate"], 4001)
    spans = daemon.spans_when_complete(invocation_id)
    (span,) = [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]
    found = span["attributes"]
    assert found["http.response.status_code"] == 101
    assert "error.type" not in found
    # Two compressed texts of 320 KB each, and 300 KB that can not be compressed: had somebody taken them apart on
    # the way, as much again would have passed.
    assert 300_000 < found["clrk.req.bytes"] < 350_000
    assert 300_000 < found["clrk.resp.bytes"] < 350_000
