"""OpenAI Responses: payloads as the API reference describes them, as documents and as typed events."""

from __future__ import annotations

from typing import Any

import pytest
from llm_exchange import JSON, SSE, event, exchange, post, same_facts_however_cut
from openai_payloads import raw

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

HEAD = post("api.openai.com", "/v1/responses", *JSON, ("Authorization", "Bearer sk-secret"))
OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)

REQUEST: dict[str, Any] = {
    "model": "gpt-5",
    "input": [{"role": "user", "content": "Is the build green?"}],
    "instructions": "One word.",
    "max_output_tokens": 512,
    "temperature": 1,
    "top_p": 0.5,
    "service_tier": "auto",
    "previous_response_id": "resp_0",
    "conversation": {"id": "conv_1"},
    "text": {"format": {"type": "json_schema", "name": "answer", "schema": {}}},
    "reasoning": {"effort": "low"},
}
USAGE: dict[str, Any] = {
    "input_tokens": 1000,
    "input_tokens_details": {"cached_tokens": 400},
    "output_tokens": 100,
    "output_tokens_details": {"reasoning_tokens": 64},
    "total_tokens": 1100,
}
MESSAGE_ITEM = {
    "id": "msg_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
}
RESPONSE: dict[str, Any] = {
    "id": "resp_67ccd2bed1ec8190b14f964abc054267",
    "object": "response",
    "created_at": 1741476542,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "model": "gpt-5-2025-08-07",
    "output": [
        {"id": "rs_1", "type": "reasoning", "summary": [], "content": None},
        MESSAGE_ITEM,
        {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}", "content": "odd"},
    ],
    "previous_response_id": "resp_0",
    "service_tier": "default",
    "usage": USAGE,
}
BASE: dict[str, AttributeValue] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.system": "openai",
    "openai.api.type": "responses",
    "gen_ai.request.model": "gpt-5",
    "gen_ai.request.max_tokens": 512,
    "gen_ai.request.temperature": 1.0,
    "gen_ai.request.top_p": 0.5,
    "gen_ai.request.previous_response.id": "resp_0",
    "gen_ai.conversation.id": "conv_1",
    "gen_ai.output.type": "json",
}
ANSWER: dict[str, AttributeValue] = {
    "gen_ai.response.id": "resp_67ccd2bed1ec8190b14f964abc054267",
    "gen_ai.response.model": "gpt-5-2025-08-07",
    "gen_ai.response.finish_reasons": ["completed"],
    "gen_ai.usage.input_tokens": 1000,
    "gen_ai.usage.output_tokens": 100,
    "gen_ai.usage.cache_read.input_tokens": 400,
    "gen_ai.usage.reasoning.output_tokens": 64,
    "openai.response.service_tier": "default",
}
COST = (600 * 1.25 + 400 * 0.125 + 100 * 10) / 1e6


def typed(kind: str, **more: Any) -> bytes:
    return event({"type": kind, "sequence_number": 1, **more}, kind)


BEGUN = RESPONSE | {"status": "in_progress", "usage": None, "output": [], "service_tier": "auto"}
BEFORE = (
    typed("response.created", response=BEGUN)
    + typed("response.in_progress", response=BEGUN)
    + typed("response.output_item.added", output_index=0, item={"type": "message"})
    + typed("response.output_text.delta", item_id="msg_1", delta="Yés")
    + typed("response.function_call_arguments.delta", item_id="fc_1", delta="{}")
    + typed("response.output_text.done", item_id="msg_1", text="Yés")
)
STREAM = BEFORE + typed("response.completed", response=RESPONSE)


def test_a_response_however_cut() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST), OK, raw(RESPONSE))
    assert facts.attributes.pop("clrk.cost.usd") == pytest.approx(COST)
    assert facts.attributes == BASE | ANSWER
    assert {key: type(value) for key, value in facts.attributes.items()} == {
        key: type(value) for key, value in (BASE | ANSWER).items()
    }
    assert (facts.name, facts.error_type, received) == ("chat gpt-5", None, raw(RESPONSE))


def test_a_stream_however_cut() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST | {"stream": True}), OK_SSE, STREAM)
    assert facts.attributes.pop("clrk.cost.usd") == pytest.approx(COST)
    assert facts.attributes == BASE | ANSWER | {"gen_ai.request.stream": True}
    assert received == STREAM


def test_requests_are_never_rewritten() -> None:
    facts, sent, _ = exchange(HEAD, raw(REQUEST | {"stream": True}), OK_SSE, [STREAM])
    assert sent == raw(REQUEST | {"stream": True})
    assert "clrk.body.request_rewritten" not in facts.attributes


@pytest.mark.parametrize(
    ("change", "reasons", "error"),
    [
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, ["max_output_tokens"], None),
        ({"status": "incomplete", "incomplete_details": None}, ["incomplete"], None),
        ({"status": "failed", "error": {"code": "server_error", "message": "sk-abcdefgh"}}, ["failed"], "server_error"),
        ({"status": "queued", "usage": None}, None, None),
        ({"status": "cancelled"}, ["cancelled"], None),
    ],
)
def test_how_a_response_ends(change: dict[str, Any], reasons: list[str] | None, error: str | None) -> None:
    ended = RESPONSE | change
    plain, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(ended)])
    streamed, _, _ = exchange(
        HEAD, raw(REQUEST), OK_SSE, [BEFORE + typed(f"response.{ended['status']}", response=ended)]
    )
    for facts in (plain, streamed):
        assert facts.attributes.get("gen_ai.response.finish_reasons") == reasons
        assert facts.error_type == error
        assert "sk-abcdefgh" not in repr(facts)
        assert ("clrk.body.usage_visible" in facts.attributes) is (ended["usage"] is None)


@pytest.mark.parametrize(
    "last",
    [
        typed("error", code="rate_limit_exceeded", message="slow down", param=None),
        typed("error", error={"type": "requests", "code": "rate_limit_exceeded", "message": "slow down"}),
        typed("response.failed", response=BEGUN | {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}),
    ],
)
def test_errors_in_mid_stream(last: bytes) -> None:
    facts, received = same_facts_however_cut(HEAD, raw(REQUEST), OK_SSE, BEFORE + last)
    assert (facts.error_type, facts.status_message) == ("rate_limit_exceeded", "slow down")
    assert received == BEFORE + last


def test_a_refusal_is_said() -> None:
    item = MESSAGE_ITEM | {"content": [{"type": "refusal", "refusal": "I can't help with that."}]}
    for body, head in (
        (raw(RESPONSE | {"output": [item]}), OK),
        (typed("response.refusal.delta", delta="I can't"), OK_SSE),
    ):
        facts, _, _ = exchange(HEAD, raw(REQUEST), head, [body])
        assert facts.attributes["clrk.gen_ai.refused"] is True
        assert "can't" not in repr(facts)
    assert "clrk.gen_ai.refused" not in exchange(HEAD, raw(REQUEST), OK, [raw(RESPONSE)])[0].attributes


def test_searches_are_billed() -> None:
    output = [
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "web_search_call", "status": "completed", "action": {"type": "open_page", "url": "x"}},
        {"type": "web_search_call", "status": "completed"},
        {"type": "file_search_call", "status": "completed"},
    ]
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(RESPONSE | {"output": output})])
    assert facts.attributes["clrk.gen_ai.usage.web_searches"] == 2
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(COST + 2 * 0.01 + 0.0025)


@pytest.mark.parametrize("tier", ["flex", "priority"])
def test_other_service_tiers_have_prices_of_their_own(tier: str) -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST | {"service_tier": tier}), OK, [raw(RESPONSE | {"service_tier": tier})])
    assert facts.attributes["openai.request.service_tier"] == facts.attributes["openai.response.service_tier"] == tier
    assert "clrk.cost.usd" not in facts.attributes
    assert facts.attributes["clrk.cost.unknown"] is True


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"7", b"\xff", b"[" * 100_000, raw(RESPONSE)[:-1], raw({"usage": 7, "status": []}),
        raw({"output": 7, "usage": {"input_tokens": -1, "output_tokens": "1"}, "incomplete_details": 3}),
    ],
)  # fmt: skip
def test_malformed_answers_cost_facts_not_calls(body: bytes) -> None:
    facts, _, received = exchange(HEAD, raw(REQUEST), OK, [body])
    assert (facts.name, received, facts.error_type) == ("chat gpt-5", body, None)
    assert facts.attributes["clrk.body.usage_visible"] is False
    for wrapped in (b"data: " + body + b"\n\n", b'data: {"type":"response.completed","response":' + body + b"}\n\n"):
        streamed, _, passed = exchange(HEAD, raw(REQUEST), OK_SSE, [wrapped])
        assert streamed.attributes["clrk.body.usage_visible"] is False
        assert passed == wrapped


def test_an_output_that_is_none_costs_no_usage() -> None:
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK, [raw(RESPONSE | {"output": "x"})])
    assert facts.attributes["gen_ai.usage.output_tokens"] == 100


@pytest.mark.parametrize("body", [b"", b"{", b"[]", raw({"model": 7, "stream": "yes", "text": 7, "conversation": 7})])
def test_malformed_requests(body: bytes) -> None:
    facts, _, _ = exchange(HEAD, body, OK, [raw(RESPONSE)])
    assert facts.name == "chat gpt-5-2025-08-07"
    assert [key for key in facts.attributes if key.startswith("gen_ai.request")] == []


def test_generated_bytes_and_the_end_that_is_put_in() -> None:
    from clrk.gateway.llm.openai_responses import OpenAiResponses
    from clrk.gateway.llm.sse import SseSplitter

    sound = typed("response.audio.delta", delta="A" * 150)
    picture = typed("response.image_generation_call.partial_image", partial_image_b64="A" * 250)
    dialect = OpenAiResponses(HEAD)
    for found in SseSplitter().feed(BEFORE + sound + picture):
        dialect.event(found)
    assert dialect.completion.output_bytes == 4 + 2 + 3 + 5
    last = dialect.error_event("budget_exceeded", "no more")
    facts, _, _ = exchange(HEAD, raw(REQUEST), OK_SSE, [BEFORE + last])
    assert (facts.error_type, facts.status_message) == ("budget_exceeded", "no more")
