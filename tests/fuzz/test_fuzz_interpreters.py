"""Nothing that an agent or an upstream sends makes an interpreter raise, or changes a byte outside the usage chunk."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.recognise import recognise

JSON_HEADER = ("Content-Type", "application/json")
HEADS = [
    RequestHead("POST", "https", "api.anthropic.com", 443, "/v1/messages", "", (JSON_HEADER,)),
    RequestHead("POST", "https", "api.openai.com", 443, "/v1/chat/completions", "", (JSON_HEADER,)),
    RequestHead("POST", "https", "h", 443, "/mcp", "", (JSON_HEADER, ("Mcp-Session-Id", "s"))),
]

KEYS = st.sampled_from(
    """type id model stop_reason usage message delta error choices index finish_reason stream stream_options
    include_usage n stop max_tokens input_tokens output_tokens prompt_tokens completion_tokens prompt_tokens_details
    cached_tokens code jsonrpc method params result name uri isError protocolVersion service_tier
    response_format""".split()
)
WORDS = st.sampled_from(
    [
        "message",
        "message_start",
        "message_delta",
        "error",
        "2.0",
        "tools/call",
        "initialize",
        "stop",
        "gpt-4o",
        "json_object",
    ]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=6).map(lambda value: json.dumps(value).encode())
ASKING = st.just(b'{"model":"gpt-4o","stream":true}')
FINISH = b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
EVENTS = st.lists(
    st.one_of(
        DOCUMENTS.map(lambda raw: b"data: " + raw + b"\n\n"),
        st.just(FINISH),
        st.sampled_from([USAGE, USAGE.replace(b"\n", b"\r\n"), USAGE.replace(b"\n", b"\r"), USAGE[:-1]]),
        st.sampled_from(
            [b"data: [DONE]\n\n", b": ping\n\n", b"\r\n\r\n", b"data: {", b"\r", b"event: x\ndata: {}\r\r"]
        ),
        st.binary(max_size=12),
    ),
    max_size=8,
).map(b"".join)


@pytest.mark.parametrize("head", HEADS, ids=["anthropic", "openai", "mcp"])
@settings(max_examples=300)
@given(
    request_body=st.one_of(ASKING, DOCUMENTS, st.binary(max_size=40)),
    response=st.one_of(EVENTS, DOCUMENTS, st.binary(max_size=60)),
    content_type=st.sampled_from(["text/event-stream", "application/json", ""]),
    encoding=st.sampled_from(["", "gzip", "deflate", "br"]),
    marks=st.lists(st.integers(0, 400), max_size=6),
    complete=st.booleans(),
    status=st.sampled_from([200, 202, 400, 429, 500]),
)
def test_nothing_raises_and_no_byte_is_lost(
    head: RequestHead,
    request_body: bytes,
    response: bytes,
    content_type: str,
    encoding: str,
    marks: list[int],
    complete: bool,
    status: int,
) -> None:
    interpreter = recognise(head)
    assert interpreter is not None
    if interpreter.wants_whole_request:
        interpreter.rewrite_request(request_body)
    interpreter.request_data(request_body)
    interpreter.request_end()
    headers = (("Content-Type", content_type), *([("Content-Encoding", encoding)] if encoding else []))
    interpreter.response_head(ResponseHead(status, headers), 0.1)
    bounds = [0, *sorted(marks), len(response)]
    received = b"".join(
        interpreter.response_data(response[start:end], 0.2) for start, end in itertools.pairwise(bounds)
    )
    received += interpreter.response_end(complete=complete)
    facts = interpreter.facts()
    assert received == _without_usage_chunks(response, received)
    for key, value in facts.attributes.items():
        assert isinstance(key, str)
        assert isinstance(value, str | bool | int | float | list)
        assert len(str(value)) < 128 * 300
    facts.name.encode()


def _without_usage_chunks(response: bytes, received: bytes) -> bytes:
    """Return the response, less whole events with empty choices and a usage, where received leaves them out."""
    if received == response:
        return response
    kept, at = [], 0
    for event in _events(response):
        if received.startswith(event, at):
            kept.append(event)
            at += len(event)
        else:
            data = b"".join(line.partition(b":")[2] for line in event.splitlines() if line.startswith(b"data:"))
            document = json.loads(data)
            assert document["choices"] == []
            assert isinstance(document["usage"], dict)
    return b"".join(kept)


def _events(stream: bytes) -> list[bytes]:
    """Cut a stream behind each blank line."""
    found, start, line_start, at = [], 0, 0, 0
    while at < len(stream):
        width = 2 if stream.startswith(b"\r\n", at) else 1 if stream[at] in b"\r\n" else 0
        if width == 0:
            at += 1
            continue
        blank = at == line_start
        at = line_start = at + width
        if blank:
            found.append(stream[start:at])
            start = at
    return [*found, *([stream[start:]] if start < len(stream) else [])]
