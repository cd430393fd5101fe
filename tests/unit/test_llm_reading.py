"""Large bodies are read within a bounded time, and say the same as small ones."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cost import as_objects, assert_cheap
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import JSON, exchange, post

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm.json_members import read_members
from clrk.gateway.llm.reading import ABSENT, SMALL_BYTES, reader

MAX_COST = 4  # of the baseline; before, these took up to 30 times as much, once for each call
LARGE = 16 << 20
OK = ResponseHead(200, JSON)
OPENAI = post("api.openai.com", "/v1/chat/completions")
RESPONSES = post("api.openai.com", "/v1/responses")
ANTHROPIC = post("api.anthropic.com", "/v1/messages")
GEMINI = post("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-flash:generateContent")
VERTEX = post("aiplatform.googleapis.com", "/v1/projects/p/locations/l/publishers/mistralai/models/m:rawPredict")
CONVERSE, LLAMA, TITAN = (
    post("bedrock-runtime.us-east-1.amazonaws.com", f"/model/{model}")
    for model in ("m/converse", "meta.llama3-8b-instruct-v1/invoke", "amazon.titan-embed-text-v1/invoke")
)
GOOGLES = b'"usageMetadata":{"promptTokenCount":7,"candidatesTokenCount":8}}'
AWSS = b'"usage":{"inputTokens":7,"outputTokens":8}}'
USAGE = b'"usage":{"prompt_tokens":7,"completion_tokens":8}'


class Item(msgspec.Struct):
    size: Any = None


class Thing(msgspec.Struct):
    name: Any = msgspec.field(default=None, name="thing-name")
    raw: msgspec.Raw = ABSENT
    items: list[Item] | None = None


read_thing = reader(Thing)


@pytest.mark.parametrize("padding", [0, SMALL_BYTES])
@pytest.mark.parametrize(
    ("body", "want"),
    [
        ({"thing-name": "x", "raw": [1], "items": [{"size": 2}, {}]}, ("x", b"[1]", [2, None])),
        ({"thing-name": {"a": None}, "other": [1]}, ({"a": None}, b"", None)),
        ({"thing-name": None, "items": None}, (None, b"", None)),
    ],
)
def test_large_and_small_say_the_same(body: dict[str, Any], want: tuple[Any, ...], padding: int) -> None:
    found = read_thing(json.dumps({"padding": "x" * padding, **body}, separators=(",", ":")).encode())
    assert found is not None
    sizes = [item.size for item in found.items] if found.items is not None else None
    assert (found.name, bytes(found.raw), sizes) == want


@pytest.mark.parametrize("padding", [b"", b" " * SMALL_BYTES])
@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"null", b"{", b'{"thing-name":}', b"[" * 5000, b"\xff"])
def test_what_is_no_object_is_none(body: bytes, padding: bytes) -> None:
    assert read_thing(padding + body) is None


def test_a_large_member_of_the_wrong_kind_costs_that_member() -> None:
    body = b'{"thing-name":"x","items":[{"size":' + b"1" * SMALL_BYTES + b"},7]}"
    found = read_thing(body)
    assert found is not None
    assert (found.name, found.items) == ("x", None)


def test_members_that_are_too_much_are_absent() -> None:
    many = b'{"thing-name":[' + b"[]," * SMALL_BYTES + b'[]],"items":[' + b"{}," * 200_000 + b'{}],"raw":1}'
    found = read_thing(many)
    assert found is not None
    assert (found.name, found.items, bytes(found.raw)) == (None, None, b"1")


def fill(unit: bytes, size: int = LARGE - 2000) -> bytes:
    return (unit * (size // len(unit))).rstrip(b",")


ANSWERS: dict[str, tuple[RequestHead, bytes, int | None]] = {
    "a text": (OPENAI, b'{"choices":[{"message":{"content":"' + fill(b"x") + b'"}}],' + USAGE + b"}", 7),
    "code": (OPENAI, b'{"choices":[{"message":{"content":"' + fill(b"int main(){}" * 20) + b'"}}],' + USAGE + b"}", 7),
    "many choices": (OPENAI, b'{"choices":[' + fill(b"{},") + b"]," + USAGE + b"}", 7),
    "much usage": (OPENAI, b'{"usage":{"a":[' + fill(b"[],") + b"]}}", None),
    "much that is skipped": (OPENAI, b'{"a":[' + fill(b"[],") + b"]," + USAGE + b"}", 7),
    "many deltas": (OPENAI, b'{"choices":[{"delta":[' + fill(b"{},") + b"]}]," + USAGE + b"}", 7),
    "much output": (RESPONSES, b'{"output":[' + fill(b"{},") + b'],"usage":{"input_tokens":7,"output_tokens":8}}', 7),
    "much content": (
        ANTHROPIC,
        b'{"type":"message","content":[' + fill(b'{"a":[]},') + b'],"usage":{"input_tokens":7,"output_tokens":8}}',
        7,
    ),
    "a picture": (
        GEMINI,
        b'{"candidates":[{"content":{"parts":[{"inlineData":{"data":"' + fill(b"QUJD") + b'"}}]}}],' + GOOGLES,
        7,
    ),
    "many candidates": (GEMINI, b'{"candidates":[' + fill(b"{},") + b"]," + GOOGLES, 7),
    "many parts": (GEMINI, b'{"candidates":[{"content":{"parts":[' + fill(b"{},") + b"]}}]," + GOOGLES, 7),
    "many errors": (GEMINI, b"[" + fill(b"{},") + b"{}]", None),
    "many errors of a publisher's": (VERTEX, b"[" + fill(b"{},") + b"{}]", None),
    "a long answer": (CONVERSE, b'{"output":[' + fill(b"{},") + b"]," + AWSS, 7),
    "many answers": (
        LLAMA,
        b'{"outputs":[' + fill(b"{},") + b'],"prompt_token_count":7,"generation_token_count":8}',
        7,
    ),
    "much of a vector": (TITAN, b'{"embedding":[' + fill(b"0.1,") + b'],"inputTextTokenCount":7}', 7),
    "many ids": (ANTHROPIC, b'{"type":"message","id":[' + fill(b"{},") + b"]}", None),
}


@pytest.mark.parametrize(("head", "body", "tokens"), ANSWERS.values(), ids=ANSWERS)
def test_enormous_answers_are_soon_read(head: RequestHead, body: bytes, tokens: int | None) -> None:
    facts, _, received = exchange(head, b'{"model":"m"}', OK, [body])
    assert received == body
    assert facts.attributes.get("gen_ai.usage.input_tokens") == tokens
    assert_cheap(lambda: exchange(head, b'{"model":"m"}', OK, [body]), as_objects, MAX_COST)


REQUESTS = {
    "texts": (b'"messages":[' + fill(b'{"role":"user","content":"{[x"},', 8 << 20) + b"]", True),
    "brackets": (b'"messages":[' + fill(b"[],", 8 << 20) + b"]", False),
    "stops": (b'"stop":[' + fill(b"[],", 8 << 20) + b"]", False),
    "prompts": (b'"prompt":[' + fill(b'"a",', 8 << 20) + b"]", False),
}


@pytest.mark.parametrize(("members", "asked"), REQUESTS.values(), ids=REQUESTS)
def test_enormous_requests_are_soon_read(members: bytes, asked: bool) -> None:
    body = b'{"model":"m","stream":true,' + members + b"}"
    facts, sent, _ = exchange(OPENAI, body, OK, [b"{}"])
    assert facts.name == "chat m"
    if not asked:
        assert sent is body or facts.attributes["clrk.body.request_rewritten"]
    assert_cheap(lambda: exchange(OPENAI, body, OK, [b"{}"]), as_objects, MAX_COST)


CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":%b}}'
MCP_BODIES = {
    "arguments": (CALL % (b"[" + fill(b"[],") + b"]"), b'{"jsonrpc":"2.0","id":1,"result":{}}', "tools/call x"),
    "a result": (
        CALL % b"{}",
        b'{"jsonrpc":"2.0","id":1,"result":{"content":[' + fill(b"{},") + b"]}}",
        "tools/call x",
    ),
    "a batch": (b"[" + fill((CALL % b"{}") + b",") + b"]", b"[" + fill(b"{},") + b"]", ""),
    "an id": (b'[{"jsonrpc":"2.0","method":"ping","id":[' + fill(b"[],") + b"]}]", b"[]", ""),
}


@pytest.mark.parametrize(("request_body", "answer", "name"), MCP_BODIES.values(), ids=MCP_BODIES)
def test_enormous_messages_of_mcp_are_soon_read(request_body: bytes, answer: bytes, name: str) -> None:
    head = post("mcp.internal", "/mcp", *JSON, ("Mcp-Session-Id", "s"))
    facts, _, received = exchange(head, request_body, OK, [answer])
    assert (facts.name, received) == (name, answer)
    assert_cheap(lambda: exchange(head, request_body, OK, [answer]), as_objects, MAX_COST)


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text('ab"\\[]{},:\n', max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=10,
)


@given(st.dictionaries(st.text('ab"\\[]{', max_size=3), JSON_VALUES, max_size=5), st.sampled_from([None, 1]))
def test_what_is_walked_over_ends_where_it_would_be_read_to(members: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(members, indent=indent)
    read, walked = read_members(text), read_members(text, wanted=frozenset("a"))
    assert read[0] == walked[0]
    assert {name: (found.start, found.end) for name, found in read[1].items()} == {
        name: (found.start, found.end) for name, found in walked[1].items()
    }
    assert all(walked[1][name].value == value for name, value in members.items() if name == "a")


@pytest.mark.parametrize("text", ['{"x":[', '{"x":{"a":"]}', '{"x":[}', '{"x":["\\"]}', '{"x":' + "[]" * 3])
def test_what_has_no_end_is_no_object(text: str) -> None:
    with pytest.raises(ValueError, match=r"no end|no }|Expecting"):
        read_members(text, wanted=frozenset("a"))
