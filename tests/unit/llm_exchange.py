"""Runs one exchange through an interpreter, cut in any way, as the HTTP relay does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from clrk.gateway.interpret import Facts, RequestHead, ResponseHead
from clrk.gateway.recognise import recognise

JSON = (("Content-Type", "application/json"),)
SSE = (("Content-Type", "text/event-stream; charset=utf-8"), ("Transfer-Encoding", "chunked"))


def post(host: str, path: str, *headers: tuple[str, str]) -> RequestHead:
    return RequestHead("POST", "https", host, 443, path, "", headers or JSON)


def cuts(body: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, every split in two (of bodies that are not too long), and random pieces."""
    yield [body]
    yield [body[at : at + 1] for at in range(len(body))]
    step = max(1, len(body) // 400)
    for at in range(1, len(body), step):
        yield [body[:at], body[at:]]
    rng = random.Random(len(body))
    for _ in range(20):
        marks = sorted(rng.choices(range(len(body) + 1), k=rng.randrange(1, 12)))
        yield [body[start:end] for start, end in zip([0, *marks], [*marks, len(body)], strict=True)]


def exchange(
    head: RequestHead,
    request: bytes,
    response: ResponseHead | None,
    chunks: Iterable[bytes],
    *,
    complete: bool = True,
    rewrite: bool = True,
) -> tuple[Facts, bytes, bytes]:
    """Return the facts, what went upstream and what the agent got."""
    interpreter = recognise(head)
    assert interpreter is not None
    sent = request
    if rewrite and interpreter.wants_whole_request:
        sent = interpreter.rewrite_request(request)
    half = len(request) // 2
    interpreter.request_data(request[:half])
    interpreter.request_data(request[half:])
    interpreter.request_end()
    received = bytearray()
    if response is not None:
        interpreter.response_head(response, 0.125)
        for index, chunk in enumerate(chunks):
            received += interpreter.response_data(chunk, 0.25 + index)
    received += interpreter.response_end(complete=complete)
    return interpreter.facts(), sent, bytes(received)


def same_facts_however_cut(
    head: RequestHead, request: bytes, response: ResponseHead, body: bytes
) -> tuple[Facts, bytes]:
    """Check that every cut gives the same facts and the same bytes, and return those."""
    want: tuple[Facts, bytes] | None = None
    for chunks in cuts(body):
        facts, _, received = exchange(head, request, response, chunks)
        facts.attributes.pop("gen_ai.response.time_to_first_chunk", None)
        want = want or (facts, received)
        assert (facts, received) == want
    assert want is not None
    return want


def event(data: Any, name: str | None = None, eol: str = "\n") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return ((f"event: {name}{eol}" if name else "") + f"data: {text}{eol}{eol}").encode()
