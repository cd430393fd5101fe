"""Key sets from a URL: a real server that rotates, fails, stalls, lies."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from issuer import EC, KEYS, OTHER, agent, config, jwks, jwt_extractor, key_server, public_jwk, token
from multidict import CIMultiDict
from tls_material import Authority

from clrk.core.jwks import parse_jwks
from clrk.gateway import jwks as module
from clrk.gateway.identity import Identities
from clrk.gateway.jwks import MAX_AGE_S, MAX_SIZE, RETRY_S, KeysUnavailableError, RemoteKeys
from clrk.gateway.problem import Problem

ROTATED = jwks(public_jwk(OTHER, "new"), public_jwk(EC, "ec"))


class Clock:
    """Time that only tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def identify(identities: Identities, which, text: str):
    return await identities.identify(which, CIMultiDict({"Authorization": f"Bearer {text}"}), b"")


async def test_keys_are_fetched_before_they_are_needed_and_used_from_then_on():
    async with key_server() as server:
        which = agent(jwt_extractor(location=server.url))
        identities = Identities(config(which))
        await server.asked_times(1)
        for _ in range(3):
            assert await identify(identities, which, token()) == (("user", "alice"),)
        assert server.asked == 1
        await identities.close()


async def test_a_rotated_key_is_found_at_once_and_the_old_one_is_forgotten():
    async with key_server() as server:
        clock = Clock()
        remote = RemoteKeys(server.url, clock)
        assert (await remote.keys("ec")).knows("rsa")
        server.serve(ROTATED)
        clock.now += RETRY_S
        keys = await remote.keys("new")
        assert keys == parse_jwks(ROTATED)
        assert not keys.knows("rsa")
        assert server.asked == 2
        remote.close()


async def test_unknown_keys_cause_one_fetch_in_ten_seconds_whoever_asks():
    async with key_server() as server:
        clock = Clock()
        remote = RemoteKeys(server.url, clock)
        await remote.keys("ec")
        for attempt in range(50):
            assert not (await remote.keys(f"unknown-{attempt}")).knows(f"unknown-{attempt}")
        assert server.asked == 1
        clock.now += RETRY_S
        found = await asyncio.gather(*(remote.keys(f"again-{attempt}") for attempt in range(50)))
        assert len(found) == 50
        assert server.asked == 2
        remote.close()


async def test_a_caller_that_leaves_does_not_end_the_fetch_of_the_others():
    async with key_server() as server:
        server.hold = asyncio.Event()
        remote = RemoteKeys(server.url)
        first = asyncio.create_task(remote.keys("ec"))
        second = asyncio.create_task(remote.keys("ec"))
        await server.asked_times(1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        server.hold.set()
        assert (await second).knows("ec")
        assert server.asked == 1
        remote.close()


FAILURES = {
    "status": ("{}", "500 Oops", ""),
    "not JSON": ("<html>", "200 OK", ""),
    "no keys": ('{"keys": []}', "200 OK", ""),
    "redirect": (KEYS, "302 Found", "Location: http://127.0.0.1:1/\r\n"),
    "too large": (KEYS + " " * MAX_SIZE, "200 OK", ""),
    "another coding": (KEYS, "206 Partial Content", ""),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_without_a_key_set_nothing_is_judged(name):
    body, status, headers = FAILURES[name]
    async with key_server() as server:
        server.serve(body, status, headers)
        which = agent(jwt_extractor(location=server.url))
        identities = Identities(config(which))
        with pytest.raises(Problem) as caught:
            await identify(identities, which, token())
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "5"})
        assert "127.0.0.1" not in caught.value.detail
        with pytest.raises(Problem, match="401"):  # what is bad whatever the keys are is said so
            await identify(identities, which, "garbage")
        await identities.close()


async def test_keys_that_were_fetched_hold_while_the_issuer_is_away_but_not_for_ever():
    async with key_server() as server:
        clock = Clock()
        remote = RemoteKeys(server.url, clock)
        await remote.keys("ec")
        server.serve("", "503 Away")
        clock.now += MAX_AGE_S
        assert (await remote.keys("ec")).knows("ec")
        assert (await remote.keys("unknown")).knows("ec")  # asked, in vain
        assert server.asked == 2
        clock.now += 1
        with pytest.raises(KeysUnavailableError):
            await remote.keys("ec")
        remote.close()


async def test_refreshing_goes_on_by_itself_and_after_failures(monkeypatch):
    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    async with key_server() as server:
        remote = RemoteKeys(server.url)
        await server.asked_times(2)
        server.serve("", "500 Oops")
        await server.asked_times(server.asked + 3)
        server.serve(ROTATED)
        await server.asked_times(server.asked + 2)
        assert (await remote.keys("ec")).knows("new")
        remote.close()


async def test_a_server_that_stalls_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "FETCH_S", 0.05)
    async with key_server() as server:
        server.hold = asyncio.Event()
        remote = RemoteKeys(server.url)
        with pytest.raises(KeysUnavailableError):
            await remote.keys("ec")
        server.hold.set()
        remote.close()


async def test_a_server_whose_certificate_nobody_vouches_for(tmp_path):
    from egress.egress_lab import upstream

    async def never(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + KEYS.encode())

    context = Authority("somebody").server_context(["127.0.0.1"])
    assert isinstance(context, ssl.SSLContext)
    async with upstream(never, context) as port:
        remote = RemoteKeys(f"https://127.0.0.1:{port}/keys")
        with pytest.raises(KeysUnavailableError):
            await remote.keys("ec")
        remote.close()


async def test_reconfiguring_keeps_what_was_fetched_and_ends_what_is_not_named():
    async with key_server() as server, key_server() as other:
        first = agent(jwt_extractor(location=server.url))
        second = agent(jwt_extractor(location=other.url))
        identities = Identities(config(first))
        assert await identify(identities, first, token()) == (("user", "alice"),)
        identities.reconfigure(config(first, second))
        assert await identify(identities, second, token()) == (("user", "alice"),)
        assert await identify(identities, first, token()) == (("user", "alice"),)
        assert (server.asked, other.asked) == (1, 1)
        identities.reconfigure(config(second))
        with pytest.raises(Problem, match="503"):
            await identify(identities, first, token())
        await identities.close()
