"""Kinds of tokens that providers bill apart: cache writes, thoughts, work beside the answer, pictures and video."""

from __future__ import annotations

from typing import Any

import pytest
from budget_runs import Office, ai_route, budget_rule, openai_call, raw_call
from genai_prices import extract_usage
from llm_exchange import JSON, SSE, event, exchange, post, same_facts_however_cut
from openai_payloads import COMPLETION, HEAD, OK, raw

from clrk.gateway.budget import NANO
from clrk.gateway.interpret import ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

CLAUDE = post("api.anthropic.com", "/v1/messages")
OK_SSE = ResponseHead(200, SSE)
RESPONSES = post("api.openai.com", "/v1/responses")
WRITTEN = (100 * 4 + 400 * 0.4 + 500 * 5 + 10 * 20) / 1e6  # GPT-5.6 Sol: input, read, written, output


def _gemini(model: str, method: str = "generateContent"):
    return post("generativelanguage.googleapis.com", f"/v1beta/models/{model}:{method}", *JSON)


# --- OpenAI: what is written to the cache, from GPT-5.6 on ----------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "answer", "flavor"),
    [
        (
            HEAD,
            COMPLETION | {"usage": {"prompt_tokens": 1_000, "completion_tokens": 10,
                                    "prompt_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 500}}},
            "chat",
        ),
        (
            RESPONSES,
            {"object": "response", "status": "completed", "output": [],
             "usage": {"input_tokens": 1_000, "output_tokens": 10,
                       "input_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 500}}},
            "responses",
        ),
    ],
    ids=["chat", "responses"],
)  # fmt: skip
def test_what_openai_writes_to_its_cache_is_counted_and_priced(head: Any, answer: dict[str, Any], flavor: str) -> None:
    answer = {**answer, "model": "gpt-5.6-sol"}
    facts, _ = same_facts_however_cut(head, raw({"model": "gpt-5.6-sol"}), OK, raw(answer))
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1_000
    assert facts.attributes["gen_ai.usage.cache_read.input_tokens"] == 400
    assert facts.attributes["gen_ai.usage.cache_creation.input_tokens"] == 500
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(WRITTEN)
    theirs = extract_usage(answer, provider_id="openai", api_flavor=flavor).usage
    assert (theirs.input_tokens, theirs.cache_read_tokens, theirs.cache_write_tokens) == (1_000, 400, 500)


def test_openai_caches_unasked_so_a_prompt_is_reserved_at_what_writing_it_costs() -> None:
    def reserved(model: str) -> tuple[int, int]:
        office = Office(ai_route(budget_rule({"maxUSDPerDay": 10})))
        assert openai_call(office, office.run(), model=model, max_tokens=0).answer is None
        entry = office.entry().reserved
        return entry.tokens, entry.nano_usd

    tokens, nano_usd = reserved("gpt-5.6-sol")
    assert nano_usd == tokens * 5 * NANO // 10**6
    tokens, nano_usd = reserved("gpt-4o")  # writes cost nothing there
    assert nano_usd == tokens * 2.5 * NANO // 10**6


# --- Anthropic: thoughts, compactions, advisors, fallbacks ----------------------------------------------------------


def _claude(usage: dict[str, Any], *, stream: bool) -> dict[str, AttributeValue]:
    message = {"type": "message", "id": "m", "model": "claude-sonnet-4-5-20250929", "stop_reason": "end_turn"}
    if not stream:
        return exchange(CLAUDE, raw({"model": "claude-sonnet-4-5"}), OK, [raw(message | {"usage": usage})])[
            0
        ].attributes
    begun = message | {"stop_reason": None, "usage": {"input_tokens": usage["input_tokens"], "output_tokens": 1}}
    body = event({"type": "message_start", "message": begun}) + event(
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    )
    return same_facts_however_cut(CLAUDE, raw({"model": "claude-sonnet-4-5"}), OK_SSE, body)[0].attributes


@pytest.mark.parametrize("stream", [False, True])
def test_claudes_thoughts_are_reasoning_and_part_of_the_output(stream: bool) -> None:
    usage = {"input_tokens": 50, "output_tokens": 300, "output_tokens_details": {"thinking_tokens": 250}}
    found = _claude(usage, stream=stream)
    assert found["gen_ai.usage.output_tokens"] == 300
    assert found["gen_ai.usage.reasoning.output_tokens"] == 250
    assert found["clrk.cost.usd"] == pytest.approx((50 * 3 + 300 * 15) / 1e6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_compaction_is_billed_beside_the_counts_of_its_call(stream: bool) -> None:
    turn = {"type": "message", "input_tokens": 50, "output_tokens": 30}
    compaction = {"type": "compaction", "input_tokens": 9_000, "output_tokens": 700,
                  "cache_read_input_tokens": 1_000, "cache_creation_input_tokens": 0}  # fmt: skip
    usage = {"input_tokens": 50, "output_tokens": 30, "iterations": [compaction, turn, 7]}
    found = _claude(usage, stream=stream)
    assert found["gen_ai.usage.input_tokens"] == 50 + 9_000 + 1_000
    assert found["gen_ai.usage.output_tokens"] == 730
    assert found["clrk.cost.usd"] == pytest.approx((9_050 * 3 + 1_000 * 0.3 + 730 * 15) / 1e6)


@pytest.mark.parametrize("stream", [False, True])
def test_what_another_model_did_in_a_call_is_counted_and_its_price_is_not_guessed(stream: bool) -> None:
    advice = {"type": "advisor_message", "model": "claude-opus-4-8", "input_tokens": 800, "output_tokens": 1_500}
    usage = {"input_tokens": 50, "output_tokens": 30, "iterations": [advice]}
    found = _claude(usage, stream=stream)
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (850, 1_530)
    assert "clrk.cost.usd" not in found
    assert found["clrk.cost.unknown"] is True
    own = {"type": "message", "model": "claude-sonnet-4-5", "input_tokens": 50, "output_tokens": 30}
    assert "clrk.cost.usd" in _claude(usage | {"iterations": [own]}, stream=stream)


# --- Google: pictures and video -------------------------------------------------------------------------------------


def _google(model: str, usage: dict[str, Any], method: str = "generateContent") -> tuple[float, dict[str, Any]]:
    answer = {"candidates": [{"finishReason": "STOP"}], "usageMetadata": usage, "modelVersion": model}
    facts, _ = same_facts_however_cut(_gemini(model, method), b"{}", OK, raw(answer))
    cost = facts.attributes["clrk.cost.usd"]
    assert isinstance(cost, float)
    return cost, answer


def test_a_picture_costs_what_pictures_cost() -> None:
    usage = {
        "promptTokenCount": 100, "candidatesTokenCount": 1_300,
        "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1_290}, {"modality": "TEXT", "tokenCount": 10}],
    }  # fmt: skip
    cost, answer = _google("gemini-2.5-flash-image", usage)
    assert cost == pytest.approx((100 * 0.3 + 10 * 2.5 + 1_290 * 30) / 1e6)
    theirs = extract_usage(answer, provider_id="google").usage
    assert (theirs.output_tokens, theirs.output_image_tokens) == (1_300, 1_290)


def test_what_is_embedded_costs_by_its_kind() -> None:
    text, _ = _google("gemini-embedding-2", {"promptTokenCount": 1_000}, "embedContent")
    usage = {"promptTokenCount": 1_000, "promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 1_000}]}
    picture, _ = _google("gemini-embedding-2", usage, "embedContent")
    assert picture > 2 * text


def test_a_call_that_may_answer_with_a_picture_is_reserved_as_one() -> None:
    def reserved(model: str) -> int:
        office = Office(ai_route(budget_rule({"maxUSDPerDay": 10})))
        body = raw({"contents": [], "generationConfig": {"maxOutputTokens": 2_000}})
        host, path = "generativelanguage.googleapis.com", f"/v1beta/models/{model}:generateContent"
        assert raw_call(office, body, host=host, path=path).answer is None
        return office.entry().reserved.nano_usd

    assert reserved("gemini-2.5-flash-image") >= 2_000 * 30 * NANO // 10**6 > 5 * reserved("gemini-2.5-flash")
