"""OpenAI Chat Completions: payloads as the API reference describes them."""

from __future__ import annotations

from typing import Any

import pytest
from llm_exchange import JSON, event, exchange, post, same_facts_however_cut
from openai_payloads import BEFORE, COMPLETION, COST, DONE, HEAD, OK, OK_SSE, ONE, REQUEST, raw

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

BASE: dict[str, AttributeValue] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.system": "openai",
    "openai.api.type": "chat_completions",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.request.max_tokens": 256,
    "gen_ai.request.temperature": 0.0,
    "gen_ai.request.top_p": 1.0,
    "gen_ai.request.stop_sequences": ["END"],
    "gen_ai.request.seed": 42,
    "gen_ai.request.frequency_penalty": 0.5,
    "gen_ai.request.presence_penalty": -0.5,
    "gen_ai.request.choice.count": 2,
    "gen_ai.output.type": "json",
    "openai.request.service_tier": "flex",
}
ANSWER: dict[str, AttributeValue] = {
    "gen_ai.response.id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
    "gen_ai.response.model": "gpt-4o-2024-08-06",
    "gen_ai.response.finish_reasons": ["stop", "length"],
    "gen_ai.usage.input_tokens": 1000,
    "gen_ai.usage.output_tokens": 100,
    "gen_ai.usage.cache_read.input_tokens": 400,
    "gen_ai.usage.reasoning.output_tokens": 64,
    "openai.response.service_tier": "default",
    "openai.response.system_fingerprint": "fp_44709d6fcb",
}


def test_completion_attributes_names_and_types() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST), OK, raw(COMPLETION))
    assert facts.attributes.pop("clrk.cost.usd") == pytest.approx(COST)
    assert facts.attributes == BASE | ANSWER
    assert {key: type(value) for key, value in facts.attributes.items()} == {
        key: type(value) for key, value in (BASE | ANSWER).items()
    }
    assert (facts.name, facts.error_type, received) == ("chat gpt-4o", None, raw(COMPLETION))


@pytest.mark.parametrize(
    ("request_fields", "key", "value"),
    [
        ({"max_tokens": 7}, "gen_ai.request.max_tokens", 256),
        ({"max_tokens": 7, "max_completion_tokens": None}, "gen_ai.request.max_tokens", 7),
        ({"stop": ["a", 7, "b"]}, "gen_ai.request.stop_sequences", ["a", "b"]),
        ({"stop": []}, "gen_ai.request.stop_sequences", None),
        ({"n": 1}, "gen_ai.request.choice.count", None),
        ({"service_tier": "auto"}, "openai.request.service_tier", None),
        ({"response_format": {"type": "text"}}, "gen_ai.output.type", "text"),
        ({"response_format": {"type": "grammar"}}, "gen_ai.output.type", None),
        ({"response_format": "json"}, "gen_ai.output.type", None),
        ({"stream": False}, "gen_ai.request.stream", None),
        ({"stream": True}, "gen_ai.request.stream", True),
        ({"top_k": 5}, "gen_ai.request.top_k", 5.0),
        ({"seed": True}, "gen_ai.request.seed", None),
    ],
)
def test_request_fields(request_fields: dict[str, Any], key: str, value: AttributeValue | None) -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST | request_fields), OK, [raw(COMPLETION)], rewrite=False)
    assert facts.attributes.get(key) == value


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            {"message": "Rate limit", "type": "requests", "param": None, "code": "rate_limit_exceeded"},
            "rate_limit_exceeded",
            "Rate limit",
        ),
        ({"message": "No money", "type": "insufficient_quota", "code": None}, "insufficient_quota", "No money"),
        ({"message": "Bad gateway", "code": 502}, "502", "Bad gateway"),
        (
            {"message": "key sk-proj-abcdefgh is wrong", "code": "invalid_api_key"},
            "invalid_api_key",
            "key [redacted] is wrong",
        ),
        ("model not found", "_OTHER", ""),
        ({}, "_OTHER", ""),
    ],
)
def test_errors_in_documents_and_in_mid_stream(error: object, kind: str, message: str) -> None:
    body = raw({"error": error})
    refused, _, _ = exchange(HEAD, raw(REQUEST), ResponseHead(429, JSON), [body])
    assert (refused.error_type, refused.status_message) == (None if kind == "_OTHER" else kind, message)
    assert "clrk.body.usage_visible" not in refused.attributes
    for extra in ({}, {"choices": "none"}):
        stream = BEFORE + event({"error": error, **extra})
        broken, _, received = exchange(HEAD, raw(ONE), OK_SSE, [stream])
        assert (broken.error_type, broken.attributes["error.type"]) == (kind, kind)
        assert received == stream


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, raw(COMPLETION)[:-1], raw({"choices": "x", "error": None}),
        raw({"choices": [], "usage": 7}),
        raw({"choices": [{"index": -1, "finish_reason": 7}], "usage": {"prompt_tokens": "1"}, "error": False}),
    ],
)  # fmt: skip
def test_malformed_answers_cost_facts_not_calls(body: bytes) -> None:
    facts, _, received = exchange(HEAD, raw(REQUEST), OK, [body])
    assert (facts.name, received, facts.error_type) == ("chat gpt-4o", body, None)
    assert facts.attributes["clrk.body.usage_visible"] is False
    streamed = BEFORE + b"data: " + body + b"\n\n" + DONE
    assert exchange(HEAD, raw(ONE), OK_SSE, [streamed])[2] == streamed


def test_choices_are_bounded_and_ordered() -> None:
    many = [{"index": index, "finish_reason": "stop"} for index in range(1000)] + [{"finish_reason": "length"}]
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(COMPLETION | {"choices": many})])
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["stop"] * 128


def test_malformed_requests_are_sent_as_they_are() -> None:
    for body in (b"", b"{", b'{"stream":true', b"\xff{}", b'"stream"', b'{"model": 7, "stream": 1}'):
        facts, sent, _ = exchange(HEAD, body, OK, [raw(COMPLETION)])
        assert sent is body
        assert facts.name == "chat gpt-4o-2024-08-06"
        assert facts.attributes["gen_ai.usage.input_tokens"] == 1000


@pytest.mark.parametrize(
    ("host", "provider", "system"),
    [
        ("api.groq.com", "groq", "openai"),
        ("API.DeepSeek.com.", "deepseek", "openai"),
        ("mine.openai.azure.com", "azure.ai.openai", "azure_openai"),
        ("openai.azure.com", "openai", "openai"),
        ("localhost", "openai", "openai"),
    ],
)
def test_providers_by_host(host: str, provider: str, system: str) -> None:
    facts, _, _ = exchange(post(host, "/openai/v1/chat/completions"), raw(REQUEST), OK, [raw(COMPLETION)])
    assert (facts.attributes["gen_ai.provider.name"], facts.attributes["gen_ai.system"]) == (provider, system)


def test_no_price_is_guessed_for_unknown_hosts() -> None:
    facts, _, _ = exchange(post("llm.internal", "/v1/chat/completions"), raw(REQUEST), OK, [raw(COMPLETION)])
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1000
    assert "clrk.cost.usd" not in facts.attributes
