"""Bytes that wait in sockets are memory too: an agent must not use up the host's TCP buffers over its own loopback."""

from __future__ import annotations

import pytest
from host_harness import running_host

pytestmark = pytest.mark.kernel

FILL = """
import socket
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
held, queued = [], 0
for _ in range(100):
    held.append(socket.create_connection(listener.getsockname()))
    held.append(listener.accept()[0])
    held[-2].setblocking(False)
    try:
        while True:
            queued += held[-2].send(bytes(65536))
    except BlockingIOError:
        pass
print(queued)
"""


async def test_bytes_in_sockets_are_bounded_by_the_memory_limit() -> None:
    """Without a bound, 100 connections of nobody's reading hold about 250 MB; the kernel lets each have a little."""
    async with running_host(ready=0) as host:
        ran = await host.python(FILL, resources={"memory": "32Mi"})
    if ran.exit.oom:  # cgroup v2 counts them in the one limit
        return
    assert ran.err == ""
    assert int(ran.out) < 3 * 32 * 2**20
