"""A connection belongs to one invocation on both sides of the gateway, however long upstream and agent keep it."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import instance
from stack import Daemon, agent, document, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

THREE_CALLS = """
import http.client, os
line = http.client.HTTPConnection("kept.internal", 80)
for number in range(3):
    line.request("GET", f"/{os.environ['CLRK_INVOCATION_ID']}/{number}")
    assert line.getresponse().read() == b"ok"
print("done")
"""


class KeptAlive(socketserver.ThreadingTCPServer):
    """Answers as often as it is asked; notes what came over each of its connections."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: dict[int, list[str]] = {}


class _Handler(socketserver.StreamRequestHandler):
    server: KeptAlive

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.server.paths.setdefault(self.client_address[1], []).append(line.split()[1].decode())
            while self.rfile.readline() not in (b"\r\n", b""):
                continue
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def upstream() -> Iterator[KeptAlive]:
    with KeptAlive() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_no_connection_is_used_by_two_invocations(
    tmp_path: Path, upstream: KeptAlive, caller: aiohttp.ClientSession
) -> None:
    alias = {"hostnames": ["kept.internal"], "address": f"127.0.0.1:{upstream.server_address[1]}"}
    documents = [
        document("EgressGateway", "default", hostAliases=[alias]),
        document("EgressL4Route", "kept", rules=[{"hostnames": ["kept.internal"], "ports": [80]}]),
        agent("three", ["/usr/bin/python3", "-I", "-S", "-c", THREE_CALLS], warmPoolSize=1),
    ]
    daemon = Daemon(tmp_path, instance("co"), documents)
    daemon.start()
    try:
        ids = []
        for _ in range(3):
            text, invocation_id = await invoke(caller, daemon, "three", "")
            assert text == "done\n"
            ids.append(invocation_id)
    finally:
        assert daemon.stop() == 0, daemon.log()
    by_connection = [{path.split("/")[1] for path in paths} for paths in upstream.paths.values()]
    assert all(len(owners) == 1 for owners in by_connection), by_connection
    assert set().union(*by_connection) == set(ids)
    assert sum(map(len, upstream.paths.values())) == 9
    assert len(upstream.paths) == 3  # kept alive within an invocation, and not one call longer
