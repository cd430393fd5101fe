"""Lookups that do not end must not cost anybody but who asked."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest

from clrk.gateway.egress.resolve import MAX_LOOKUPS, LimitedResolver, system_resolver


async def test_a_run_holds_few_lookups_even_when_it_gave_them_up():
    running, release, started = [], asyncio.Event(), asyncio.Semaphore(0)

    async def never(name: str, port: int):
        running.append(name)
        started.release()
        await release.wait()
        return [ip_address("192.0.2.1")]

    limited = LimitedResolver(never)
    waiters = [asyncio.ensure_future(limited(f"n{number}", 80)) for number in range(10)]
    for _ in range(MAX_LOOKUPS):
        await started.acquire()
    for waiter in waiters[:MAX_LOOKUPS]:
        waiter.cancel()
    await asyncio.gather(*waiters[:MAX_LOOKUPS], return_exceptions=True)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(running) == MAX_LOOKUPS  # given up, but their threads are not free
    release.set()
    assert await asyncio.gather(*waiters[MAX_LOOKUPS:]) == [[ip_address("192.0.2.1")]] * 6


async def test_the_system_resolver_reads_the_hosts_file():
    assert ip_address("127.0.0.1") in await system_resolver("localhost", 80)


async def test_a_failed_lookup_frees_its_slot():
    async def unknown(name: str, port: int):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    limited = LimitedResolver(unknown)
    for _ in range(MAX_LOOKUPS * 2):
        with pytest.raises(socket.gaierror):
            await limited("nowhere.internal", 80)


async def test_what_getaddrinfo_refuses_is_an_error_of_the_asker():
    with pytest.raises((OSError, UnicodeError)):
        await system_resolver("a" * 300, 80)
