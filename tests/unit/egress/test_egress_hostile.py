"""What hostile agents and upstreams were found to achieve, and must not again."""

from __future__ import annotations

import asyncio
import gc
from functools import partial

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.gateway.egress import service
from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME]}]


class Quiet:
    """An interpreter that recognises nothing; rewrites when it has something to write."""

    def __init__(self, rewrite: bytes = b"") -> None:
        self.rewrite = rewrite

    @property
    def wants_whole_request(self) -> bool:
        return bool(self.rewrite)

    def rewrite_request(self, body: bytes) -> bytes:
        return self.rewrite or body

    def request_data(self, chunk: bytes) -> None:
        """Look away."""

    def request_end(self) -> None:
        """Look away."""

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Look away."""

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        return b""

    def facts(self) -> Facts:
        return Facts("")


def recogniser(interpreter):
    def recognise(head: RequestHead):
        return interpreter

    return recognise


async def exchange(request: bytes, *, recognise=None, rules=ALLOW, reply: bytes = answer(b"reply")):
    """Return the heads that went up, what came down, and the span."""
    heads: list[bytes] = []

    async def handle(reader, writer):
        heads.append((await read_request(reader))[0])
        writer.write(reply)

    async with upstream(handle) as port, laboratory(
        gateway=aliased(port, NAME), rules=rules, recognise=recognise
    ) as lab:  # fmt: skip
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(request)
        return heads, raw, (await lab.recorder.wait())[0]


def post(body: bytes, headers: bytes = b"") -> bytes:
    head = b"POST /v1/x HTTP/1.1\r\nHost: tools.internal\r\nConnection: close\r\n"
    return head + headers + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def test_an_exchange_that_was_none_of_the_interpreters_keeps_the_http_name():
    _, _, span = await exchange(post(b"{}"), recognise=recogniser(Quiet()))
    assert span.name == "POST tools.internal"


@pytest.mark.parametrize(
    "headers", [b"", b"Accept-Encoding: gzip, br\r\n", b"accept-encoding: gzip\r\nAccept-Encoding: br\r\n"]
)
async def test_a_rewritten_request_asks_for_a_plain_answer(headers):
    heads, _, _ = await exchange(post(b"{}", headers), recognise=recogniser(Quiet(b"{more}")))
    asked = [line for line in heads[0].split(b"\r\n") if line.lower().startswith(b"accept-encoding:")]
    assert [line.partition(b": ")[2] for line in asked] == [b"identity"]


async def test_a_request_that_was_not_rewritten_keeps_its_accept_encoding():
    heads, _, _ = await exchange(post(b"{}", b"Accept-Encoding: gzip, br\r\n"), recognise=recogniser(Quiet()))
    assert b"Accept-Encoding: gzip, br\r\n" in heads[0]


async def test_a_denied_request_says_what_it_asked_for():
    rules = [{"hostnames": [NAME], "http": {"methods": ["GET"]}}]
    _, raw, span = await exchange(
        b"DELETE /orders/1?api_key=secret HTTP/1.1\r\nHost: tools.internal\r\n\r\n", rules=rules
    )
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.name == "egress.dial.denied"
    found = span.attributes
    assert found["http.request.method"] == "DELETE"
    assert found["url.full"] == "http://tools.internal/orders/1?api_key=REDACTED"
    assert (found["server.address"], found["server.port"]) == ("tools.internal", 80)


async def test_a_request_that_gets_no_answer_says_what_it_asked_for():
    _, raw, span = await exchange(b"PUT /x HTTP/1.1\r\nHost: tools.internal\r\n\r\n", reply=b"nonsense\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert span.name == "egress.dial.failed"
    assert (span.attributes["http.request.method"], span.attributes["url.full"]) == ("PUT", "http://tools.internal/x")


async def test_an_endless_row_of_interim_answers_is_no_answer():
    """The stream never falls silent, so no idle timeout would end it."""
    ended = asyncio.Event()

    async def handle(reader, writer):
        try:
            await read_request(reader)
            while True:
                writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)
                await writer.drain()
        finally:
            ended.set()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n")
        span = (await lab.recorder.wait())[0]
        async with asyncio.timeout(60):
            await ended.wait()
    assert b"HTTP/1.1 502 Bad Gateway\r\n" in raw
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "bad_response_interim")


@pytest.mark.parametrize("name", ["api.openai.com", NAME])
async def test_one_run_keeps_no_more_than_its_allowance(name, monkeypatch):
    """Requests that never end, from many connections at once: collected for rewriting, or suspected to be MCP."""
    allowance = Allowance(600_000)
    monkeypatch.setattr(service, "_Kept", partial(service._Kept, allowance=allowance))
    arrived = asyncio.Queue()

    async def swallow(reader, writer):
        while data := await reader.read(65_536):
            arrived.put_nowait(len(data))

    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {name}\r\nContent-Type: application/json\r\n"
    head += "Mcp-Session-Id: 1\r\nContent-Length: 1000000\r\n\r\n"
    async with upstream(swallow) as port, laboratory(
        gateway=aliased(port, name), rules=[{"hostnames": [name]}], recognise="real"
    ) as lab:  # fmt: skip
        wires = [await lab.dial(name, 80) for _ in range(3)]
        for wire in wires:
            wire.writer.write(head.encode() + b"a" * 400_000)
        total = 0
        async with asyncio.timeout(25):
            while total < 800_000:  # two do not fit any more: they pass without being kept
                total += await arrived.get()
        assert 0 <= allowance.left < 600_000
        for wire in wires:
            wire.close()
        await lab.recorder.wait(3)
    gc.collect()
    assert allowance.left == 600_000
