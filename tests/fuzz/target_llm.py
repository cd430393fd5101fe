"""Framings, content codings and dialects of OpenAI, Anthropic and Ollama: the same result however the bytes arrive.

A dialect's input is a document or an event stream, by the request line that `HEADS` has for its first byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from splits import ways_to_arrive

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm import include_usage
from clrk.gateway.llm.decompress import Brotli, Decoder, Inflate, Zstd
from clrk.gateway.llm.framing import ArraySplitter, LineSplitter, Splitter
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.json_members import read_members
from clrk.gateway.llm.sse import SseSplitter
from clrk.gateway.recognise import recognise

JSON = ("Content-Type", "application/json")
STREAM = ("Content-Type", "text/event-stream")
MAX_OUTPUT = 1 << 16
ASKING = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
ASKED_FOR = b'{"model":"m","stream":true}'
HOSTS = {
    "/v1/messages": "api.anthropic.com",
    "/v1/chat/completions": "api.openai.com",
    "/v1/completions": "api.openai.com",
    "/v1/responses": "api.openai.com",
    "/v1/embeddings": "api.openai.com",
}


def _framing(make: Callable[[int], Splitter]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        results = []
        for pieces in ways_to_arrive(data):
            splitter = make(64)
            events = []
            for piece in pieces:
                for event in splitter.feed(piece):
                    assert 0 <= event.end <= len(piece)
                    events.append((event.name, event.data))
            last = splitter.finish()
            results.append([*events, (last.name, last.data)] if last is not None else events)
        assert all(result == results[0] for result in results), results[0]
        assert sum(len(found) for _, found in results[0]) <= len(data)

    return target


def _coding(make: Callable[[], Decoder]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        results = []
        for pieces in ways_to_arrive(data):
            decoder = make()
            plain = b"".join(part for piece in pieces for part in decoder.feed(piece))
            assert len(plain) <= MAX_OUTPUT
            # What comes out in front of an error depends on how much was looked at together.
            results.append((decoder.failed, b"" if decoder.failed else plain))
        assert all(result == results[0] for result in results)

    return target


def llm_dialects(data: bytes) -> None:
    """Every dialect reads the bytes as a document and as events, whole or cut, to the same facts and the same bytes."""
    for path, host in HOSTS.items():
        head = RequestHead("POST", "https", host, 443, path, "", (JSON,))
        for response in (ResponseHead(200, (JSON,)), ResponseHead(200, (STREAM,))):
            found = [_follow(head, response, pieces, ASKING) for pieces in _some_ways(data)]
            assert all(result == found[0] for result in found), (path, found[0])
            assert found[0][1] == data


def llm_usage_filter(data: bytes) -> None:
    """Where usage was asked for on the agent's behalf, the facts are the same, and only whole events are missing.

    Which of them may depend on the cuts in a stream that never says that its choices have finished: there a chunk of
    usage that comes cut is passed on.
    """
    head = RequestHead("POST", "https", HOSTS["/v1/chat/completions"], 443, "/v1/chat/completions", "", (JSON,))
    found = [_follow(head, ResponseHead(200, (STREAM,)), pieces, ASKED_FOR) for pieces in _some_ways(data)]
    assert all((facts, size) == (found[0][0], found[0][2]) for facts, _, size in found)
    for _, received, _ in found:
        rest = iter(data)
        assert all(byte in rest for byte in received)  # in order, with nothing put in


def _some_ways(data: bytes) -> list[list[bytes]]:
    ways = list(ways_to_arrive(data))
    return ways[:2] + ways[2::8]


def _follow(
    head: RequestHead, response: ResponseHead, pieces: list[bytes], request: bytes
) -> tuple[object, bytes, int]:
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.rewrite_request(request)
    interpreter.request_data(request)
    interpreter.request_end()
    interpreter.response_head(response, 0.1)
    received = b"".join(interpreter.response_data(piece, 0.2) for piece in pieces)
    received += interpreter.response_end(complete=True)
    facts = interpreter.facts()
    json.dumps(facts.attributes, allow_nan=False).encode()
    facts.attributes.pop("gen_ai.response.time_to_first_chunk", None)
    return facts, received, interpreter.dialect.completion.output_bytes


def llm_requests(data: bytes) -> None:
    """A request is read without an exception; a rewritten one differs by the wish for usage, and is asked for once."""
    for path, host in HOSTS.items():
        interpreter = recognise(RequestHead("POST", "https", host, 443, path, "", (JSON,)))
        assert isinstance(interpreter, LlmInterpreter)
        assert interpreter.dialect.request(data) == interpreter.dialect.request(data)
    sent = include_usage.ask_for_usage(data)
    assert include_usage.ask_for_usage(sent) is sent
    if sent is not data:
        _, before = read_members(data.decode(), wanted=frozenset())
        _, after = read_members(sent.decode(), wanted=frozenset())
        assert after.keys() == before.keys() | {"stream_options"}


TARGETS = {
    "llm_sse": _framing(SseSplitter),
    "llm_json_lines": _framing(LineSplitter),
    "llm_json_array": _framing(ArraySplitter),
    "llm_gzip": _coding(lambda: Inflate(gzip=True, max_output=MAX_OUTPUT)),
    "llm_deflate": _coding(lambda: Inflate(gzip=False, max_output=MAX_OUTPUT)),
    "llm_brotli": _coding(lambda: Brotli(max_output=MAX_OUTPUT)),
    "llm_zstd": _coding(lambda: Zstd(max_output=MAX_OUTPUT)),
    "llm_dialects": llm_dialects,
    "llm_usage_filter": llm_usage_filter,
    "llm_requests": llm_requests,
}
