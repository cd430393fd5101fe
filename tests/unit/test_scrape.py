"""`/metrics` under a local user who asks without end, and never reads the answer."""

from __future__ import annotations

import asyncio
import threading
import time

import aiohttp
import pytest
from aiohttp import web

from clrk.gateway.admin import scrape
from clrk.gateway.admin.app import build_health_app

SIZE = 16 * 2**20


class Rendered:
    """Takes a moment for each reading, and notes how many there were at once."""

    def __init__(self, seconds):
        self.seconds, self.count, self.now, self.most = seconds, 0, 0, 0
        self.lock = threading.Lock()

    def __call__(self):
        with self.lock:
            self.count += 1
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)  # what rendering takes
        with self.lock:
            self.now -= 1
        return b"x" * SIZE + str(self.count).encode(), "text/plain; version=1.0.0; charset=utf-8"


@pytest.fixture
async def served():
    rendered = Rendered(0.05)
    runner = web.AppRunner(build_health_app(lambda: True, rendered), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield rendered, runner.addresses[0][1], runner.server
    await runner.cleanup()


async def test_many_who_ask_at_once_share_one_reading(served):
    rendered, port, _ = served
    async with aiohttp.ClientSession() as session:

        async def ask():
            async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                body = await answer.read()
                return answer.status, answer.headers["Content-Type"], len(body), body[SIZE:]

        found = await asyncio.gather(*(ask() for _ in range(8)))
        assert set(found) == {(200, "text/plain; version=1.0.0; charset=utf-8", SIZE + 1, b"1")}
        assert (rendered.count, rendered.most) == (1, 1)
        async with asyncio.timeout(25):
            while (await ask())[3] == b"1":  # and it does not stay as it was
                continue


async def test_who_does_not_read_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(scrape, "_ANSWER_S", 0.2)
    _, port, server = served
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.transport.pause_reading()
    async with asyncio.timeout(25):
        while server.connections:
            await asyncio.sleep(0.01)
    writer.transport.resume_reading()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(SIZE)
    writer.close()
