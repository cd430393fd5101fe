"""Anthropic Messages: payloads as the API reference describes them, and what becomes of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import brotli
import pytest
import zstandard
from llm_exchange import JSON, SSE, event, exchange, post, same_facts_however_cut

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

HEAD = post(
    "api.anthropic.com", "/v1/messages", *JSON, ("x-api-key", "sk-ant-secret"), ("anthropic-version", "2023-06-01")
)
OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)

REQUEST: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 1024,
    "temperature": 1,
    "top_p": 0.9,
    "top_k": 40,
    "stop_sequences": ["END", "\n\nHuman:"],
    "output_config": {"format": {"type": "json_schema", "schema": {}}, "effort": "low"},
    "system": "Answer in one word.",
    "messages": [{"role": "user", "content": "Is the build green?"}],
}
MESSAGE: dict[str, Any] = {
    "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [{"type": "text", "text": "Yes."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 25,
        "cache_creation_input_tokens": 100,
        "cache_read_input_tokens": 2000,
        "cache_creation": {"ephemeral_5m_input_tokens": 60, "ephemeral_1h_input_tokens": 40},
        "output_tokens": 15,
        "service_tier": "standard",
    },
}
BASE: dict[str, AttributeValue] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "anthropic",
    "gen_ai.system": "anthropic",
    "gen_ai.request.model": "claude-sonnet-4-5",
    "gen_ai.request.max_tokens": 1024,
    "gen_ai.request.temperature": 1.0,
    "gen_ai.request.top_p": 0.9,
    "gen_ai.request.top_k": 40.0,
    "gen_ai.request.stop_sequences": ["END", "Human:"],
    "gen_ai.output.type": "json",
}
ANSWER: dict[str, AttributeValue] = {
    "gen_ai.response.id": "msg_01XFDUDYJgAACzvnptvVoYEL",
    "gen_ai.response.model": "claude-sonnet-4-5-20250929",
    "gen_ai.response.finish_reasons": ["end_turn"],
    "gen_ai.usage.input_tokens": 2125,
    "gen_ai.usage.output_tokens": 15,
    "gen_ai.usage.cache_read.input_tokens": 2000,
    "gen_ai.usage.cache_creation.input_tokens": 100,
    "clrk.gen_ai.response.service_tier": "standard",
}


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


def usage_of(attributes: dict[str, AttributeValue]) -> tuple[AttributeValue | None, AttributeValue | None]:
    return attributes.get("gen_ai.usage.input_tokens"), attributes.get("gen_ai.usage.output_tokens")


def start(**usage: int) -> bytes:
    message = MESSAGE | {"content": [], "stop_reason": None, "usage": usage or MESSAGE["usage"] | {"output_tokens": 1}}
    return event({"type": "message_start", "message": message}, "message_start")


def delta(reason: str | None = "end_turn", **usage: Any) -> bytes:
    body = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}
    return event(body, "message_delta")


TEXT_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Y\u00e9s \U0001f600"}}
MIDDLE = (
    event(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        "content_block_start",
    )
    + event({"type": "ping"}, "ping")
    + event(TEXT_DELTA, "content_block_delta")
    + event({"type": "content_block_stop", "index": 0}, "content_block_stop")
)
STOP = event({"type": "message_stop"}, "message_stop")
STREAM = start() + MIDDLE + delta(output_tokens=15) + STOP


def test_message_attributes_names_and_types() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST), OK, raw(MESSAGE))
    cost = facts.attributes.pop("clrk.cost.usd")
    assert facts.attributes == BASE | ANSWER
    assert {key: type(value) for key, value in facts.attributes.items()} == {
        key: type(value) for key, value in (BASE | ANSWER).items()
    }
    assert (facts.name, facts.error_type, facts.status_message) == ("chat claude-sonnet-4-5", None, "")
    assert received == raw(MESSAGE)
    # $3 in, $15 out, $0.30 read, $3.75 and for an hour $6 written, per million.
    assert cost == pytest.approx((25 * 3 + 15 * 15 + 2000 * 0.3 + 60 * 3.75 + 40 * 6) / 1e6)


def test_stream_says_the_same_however_cut() -> None:
    request = raw(REQUEST | {"stream": True})
    facts, received = same_facts_however_cut(HEAD, request, OK_SSE, STREAM)
    assert facts.attributes.pop("clrk.cost.usd") > 0
    assert facts.attributes == BASE | ANSWER | {"gen_ai.request.stream": True}
    assert received == STREAM
    crlf = STREAM.replace(b"\n", b"\r\n")
    assert same_facts_however_cut(HEAD, request, OK_SSE, crlf)[1] == crlf


def test_requests_are_never_rewritten() -> None:
    facts, sent, _ = exchange(HEAD, raw(REQUEST | {"stream": True}), OK_SSE, [STREAM])
    assert sent == raw(REQUEST | {"stream": True})
    assert "clrk.body.request_rewritten" not in facts.attributes


def test_time_to_first_chunk_is_that_of_the_first_event() -> None:
    """semconv 1.41.1: until the first chunk of the stream is received; comments that keep it alive are none."""
    pieces = [b"", b": keep-alive\n\n", STREAM[:30], STREAM[30:1200], STREAM[1200:]]
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK_SSE, pieces)
    assert facts.attributes["gen_ai.response.time_to_first_chunk"] == 0.25 + 3
    assert "gen_ai.response.time_to_first_chunk" not in exchange(HEAD, raw(REQUEST), OK, [raw(MESSAGE)])[0].attributes
    silent, _, _ = exchange(HEAD, raw(REQUEST), OK_SSE, [b": keep-alive\n\n"])
    assert "gen_ai.response.time_to_first_chunk" not in silent.attributes


def test_counts_of_newer_streams_are_cumulative() -> None:
    late = delta(input_tokens=40, cache_read_input_tokens=2000, cache_creation_input_tokens=100, output_tokens=7)
    facts, _, _ = exchange(HEAD, b"{}", OK_SSE, [start() + late + delta(None, output_tokens=9)])
    assert usage_of(facts.attributes) == (2140, 9)
    # Imitations say zero in one of the two places.
    zeros = exchange(HEAD, b"{}", OK_SSE, [start() + delta(input_tokens=0, output_tokens=9)])[0]
    assert usage_of(zeros.attributes) == (2125, 9)
    late_only = exchange(HEAD, b"{}", OK_SSE, [start(input_tokens=0) + delta(input_tokens=12, output_tokens=9)])[0]
    assert usage_of(late_only.attributes) == (12, 9)


def test_an_aborted_stream_has_no_output_count() -> None:
    for complete in (True, False):
        facts, _, received = exchange(HEAD, raw(REQUEST), OK_SSE, [start() + MIDDLE[:150]], complete=complete)
        assert usage_of(facts.attributes) == (2125, None)
        assert facts.attributes["clrk.body.usage_visible"] is False
        assert "clrk.cost.usd" not in facts.attributes
        assert received == start() + MIDDLE[:150]


def test_error_in_mid_stream() -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    body = start() + MIDDLE + event(overloaded, "error")
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST), OK_SSE, body)
    assert (facts.error_type, facts.status_message) == ("overloaded_error", "Overloaded")
    assert facts.attributes["error.type"] == "overloaded_error"
    assert received == body


def test_error_documents() -> None:
    body = raw({"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}, "request_id": "req_1"})
    facts, _, received = exchange(HEAD, raw(REQUEST), ResponseHead(429, JSON), [body])
    assert (facts.error_type, facts.status_message, received) == ("rate_limit_error", "slow down", body)
    assert "clrk.body.usage_visible" not in facts.attributes
    assert "clrk.cost.usd" not in facts.attributes
    # Without a usable code the HTTP status says more.
    vague = raw({"type": "error", "error": {"type": "x" * 80, "message": None}})
    assert exchange(HEAD, raw(REQUEST), ResponseHead(500, JSON), [vague])[0].error_type is None
    assert exchange(HEAD, raw(REQUEST), OK, [vague])[0].error_type == "_OTHER"


def test_keys_quoted_in_errors_are_not_repeated() -> None:
    body = raw({"type": "error", "error": {"type": "authentication_error", "message": "bad key sk-ant-api03-abc_def"}})
    facts, _, _ = exchange(HEAD, raw(REQUEST), ResponseHead(401, JSON), [body])
    assert facts.status_message == "bad key [redacted]"
    assert "sk-ant" not in repr(facts)


def test_nothing_of_the_content_becomes_an_attribute() -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(MESSAGE)])
    for content in ("Yes.", "green", "one word", "sk-ant"):
        assert content not in repr(facts)


@pytest.mark.parametrize("model", ["claude-imaginary-9", "", None, 7, "x" * 300])
def test_an_unknown_model_has_no_cost(model: object) -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST | {"model": model}), OK, [raw(MESSAGE | {"model": model})])
    assert "clrk.cost.usd" not in facts.attributes
    assert usage_of(facts.attributes) == (2125, 15)


def test_the_requested_model_is_priced_when_the_answer_names_none() -> None:
    facts, _, _ = exchange(
        HEAD, raw(REQUEST), OK, [raw({key: value for key, value in MESSAGE.items() if key != "model"})]
    )
    assert facts.attributes["clrk.cost.usd"] > 0


def test_contradicting_counts_have_no_cost() -> None:
    usage = {
        "input_tokens": 0,
        "cache_creation_input_tokens": 1,
        "output_tokens": 1,
        "cache_creation": {"ephemeral_1h_input_tokens": 9},
    }
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(MESSAGE | {"usage": usage})])
    assert "clrk.cost.usd" not in facts.attributes


def test_an_unknown_host_with_this_shape_is_read_but_not_priced() -> None:
    facts, _, _ = exchange(post("llm.internal", "/proxy/v1/messages"), raw(REQUEST), OK, [raw(MESSAGE)])
    assert usage_of(facts.attributes) == (2125, 15)
    assert facts.attributes["gen_ai.system"] == "anthropic"
    assert "clrk.cost.usd" not in facts.attributes


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("br", brotli.compress), ("zstd", zstandard.ZstdCompressor().compress), ("x", bytes)],
)
def test_encoded_answers(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    for plain, head in ((raw(MESSAGE), JSON), (STREAM, SSE)):
        body = pack(plain)
        response = ResponseHead(200, (*head, ("Content-Encoding", encoding)))
        facts, received = same_facts_however_cut(HEAD, raw(REQUEST), response, body)
        assert received == body
        assert (usage_of(facts.attributes) == (2125, 15)) is (encoding != "x")
        assert ("clrk.body.usage_visible" in facts.attributes) is (encoding == "x")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"message"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"type":"message"}',
        raw(MESSAGE)[:-1], raw(MESSAGE) + b"}", raw(MESSAGE | {"usage": None}), raw(MESSAGE | {"usage": [1]}),
        raw(MESSAGE | {"usage": {"input_tokens": "25", "output_tokens": True}}),
        raw(MESSAGE | {"usage": {"input_tokens": -1, "output_tokens": 1.5}}),
        raw(MESSAGE | {"usage": {"input_tokens": 2**64, "output_tokens": 10**400}}),
        raw(MESSAGE | {"usage": {"input_tokens": 2**63 - 1, "cache_read_input_tokens": 1, "output_tokens": 1}}),
        raw(MESSAGE | {"type": "completion"}), raw(MESSAGE | {"type": ["message"]}),
    ],
)  # fmt: skip
def test_malformed_answers_cost_facts_not_calls(body: bytes) -> None:
    facts, received = exchange(HEAD, raw(REQUEST), OK, [body])[::2]
    assert received == body
    assert facts.name == "chat claude-sonnet-4-5"
    assert facts.attributes["clrk.body.usage_visible"] is False
    streamed, _, passed = exchange(
        HEAD, raw(REQUEST), OK_SSE, [event("x", "message_start"), b"data: " + body + b"\n\n"]
    )
    assert streamed.attributes["clrk.body.usage_visible"] is False
    assert passed.endswith(body + b"\n\n")


def test_a_message_start_of_the_wrong_shape_is_skipped() -> None:
    for message in (None, 7, [], "x"):
        body = event({"type": "message_start", "message": message}) + delta(output_tokens=3)
        assert usage_of(exchange(HEAD, b"{}", OK_SSE, [body])[0].attributes) == (None, 3)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b"\xff", b'{"model": {}}', raw({"model": ["x"], "max_tokens": "1", "stream": "yes"})],
)
def test_malformed_requests(body: bytes) -> None:
    facts, _, _ = exchange(HEAD, body, OK, [raw(MESSAGE)])
    assert facts.name == "chat claude-sonnet-4-5-20250929"
    assert [key for key in facts.attributes if key.startswith("gen_ai.request")] == []
    assert usage_of(facts.attributes) == (2125, 15)


def test_enormous_bodies_are_let_go() -> None:
    big = raw(REQUEST | {"messages": "x" * (17 << 20)})
    answer = raw(MESSAGE | {"content": "x" * (17 << 20)})
    facts, _, received = exchange(HEAD, big, OK, [answer[: 1 << 24], answer[1 << 24 :]])
    assert received == answer
    assert "gen_ai.request.model" not in facts.attributes
    assert facts.attributes["clrk.body.usage_visible"] is False


def test_hostile_values_are_bounded() -> None:
    request = REQUEST | {
        "model": "m" * 5000,
        "stop_sequences": ["s" * 5000] * 500,
        "temperature": True,
        "top_p": 10**400,
        "max_tokens": 2**80,
    }
    facts, _, _ = exchange(HEAD, raw(request), OK, [raw(MESSAGE | {"id": "i\n\x00" * 5000, "stop_reason": "r" * 5000})])
    assert facts.attributes["gen_ai.request.model"] == "m" * 256
    assert len(facts.name) < 300
    assert len(repr(facts)) < 128 * 300
    assert "\n" not in str(facts.attributes["gen_ai.response.id"])
    for absent in ("max_tokens", "temperature", "top_p"):
        assert f"gen_ai.request.{absent}" not in facts.attributes


def test_without_an_answer_there_are_still_facts() -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST), None, [], complete=False)
    assert facts.attributes == BASE | {"clrk.body.usage_visible": False}  # nobody knows that anything was billed


@pytest.mark.parametrize(("encoding", "read"), [("gzip", True), ("deflate", False), ("compress", False)])
def test_compressed_requests(encoding: str, read: bool) -> None:
    head = post("api.anthropic.com", "/v1/messages", *JSON, ("Content-Encoding", encoding))
    facts, _, _ = exchange(head, gzip.compress(raw(REQUEST)), OK, [raw(MESSAGE)])
    assert ("gen_ai.request.model" in facts.attributes) is read
    assert usage_of(facts.attributes) == (2125, 15)


@pytest.mark.parametrize(
    ("usage", "listed"),
    [
        ({"service_tier": "standard"}, True),
        ({"service_tier": "priority"}, False),
        ({"service_tier": "batch"}, False),
        ({"speed": "fast"}, False),
        ({"speed": "standard", "inference_geo": "global"}, True),
        ({"inference_geo": "us"}, False),
        ({"service_tier": 7, "speed": None}, True),
    ],
)
def test_calls_that_are_billed_by_other_prices_have_no_cost(usage: dict[str, Any], listed: bool) -> None:
    message = MESSAGE | {"usage": {"input_tokens": 5, "output_tokens": 1} | usage}
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(message)])
    assert ("clrk.cost.usd" in facts.attributes) is listed
    assert facts.attributes.get("clrk.cost.unknown") is (None if listed else True)


def test_tools_thinking_and_the_providers_own_searches() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "EqQBCgIYAhIM"},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "tool_use", "id": "toolu_1", "name": "build_status", "input": {"job": "main"}},
    ]
    usage = {"input_tokens": 1000, "output_tokens": 100, "server_tool_use": {"web_search_requests": 2}}
    message = MESSAGE | {"content": content, "stop_reason": "tool_use", "usage": usage}
    facts, _ = same_facts_however_cut(HEAD, raw(REQUEST), OK, raw(message))
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert facts.attributes["clrk.gen_ai.usage.web_searches"] == 2
    assert facts.attributes["clrk.cost.usd"] == pytest.approx((1000 * 3 + 100 * 15) / 1e6 + 0.02)
    streamed = start(input_tokens=1000) + delta(
        "tool_use", output_tokens=100, server_tool_use={"web_search_requests": 2}
    )
    again, _ = same_facts_however_cut(HEAD, raw(REQUEST), OK_SSE, streamed)
    assert again.attributes["clrk.cost.usd"] == facts.attributes["clrk.cost.usd"]


def test_a_refusal_is_said() -> None:
    refused, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(MESSAGE | {"stop_reason": "refusal"})])
    assert refused.attributes["clrk.gen_ai.refused"] is True
    assert refused.error_type is None
    streamed, _, _ = exchange(HEAD, raw(REQUEST), OK_SSE, [start() + delta("refusal", output_tokens=1)])
    assert streamed.attributes["clrk.gen_ai.refused"] is True
    assert "clrk.gen_ai.refused" not in exchange(HEAD, raw(REQUEST), OK, [raw(MESSAGE)])[0].attributes
