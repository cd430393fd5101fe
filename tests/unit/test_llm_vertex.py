"""Other publishers' models on Vertex AI: their own API behind Google's address, with the model in the path."""

from __future__ import annotations

import json

import pytest
from llm_exchange import SSE, event, post, same_facts_however_cut

from clrk.gateway.interpret import RequestHead, ResponseHead

OK = ResponseHead(200, (("Content-Type", "application/json"),))
MESSAGE = {
    "type": "message",
    "id": "msg_vrtx_1",
    "model": "claude-sonnet-4-5-20250929",
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 10, "cache_read_input_tokens": 4, "output_tokens": 5},
}


def call(publisher: str, model: str, method: str, location: str = "global") -> RequestHead:
    path = f"/v1/projects/p/locations/{location}/publishers/{publisher}/models/{model}:{method}"
    return post("aiplatform.googleapis.com" if location == "global" else f"{location}-aiplatform.googleapis.com", path)


def test_claude_is_read_as_claude_and_priced_as_googles() -> None:
    request = b'{"anthropic_version":"vertex-2023-10-16","max_tokens":64,"messages":[]}'
    head = call("anthropic", "claude-sonnet-4-5@20250929", "rawPredict")
    facts, _ = same_facts_however_cut(head, request, OK, json.dumps(MESSAGE).encode())
    assert facts.name == "chat claude-sonnet-4-5@20250929"
    cost = facts.attributes.pop("clrk.cost.usd")
    assert facts.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gcp.vertex_ai",
        "gen_ai.system": "anthropic",
        "gen_ai.request.model": "claude-sonnet-4-5@20250929",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.response.id": "msg_vrtx_1",
        "gen_ai.response.model": "claude-sonnet-4-5-20250929",
        "gen_ai.response.finish_reasons": ["end_turn"],
        "gen_ai.usage.input_tokens": 14,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert cost == pytest.approx((10 * 3 + 4 * 0.3 + 5 * 15) / 1e6)


@pytest.mark.parametrize(
    ("model", "priced"), [("claude-sonnet-4-5@20250929", False), ("claude-sonnet-4@20250514", True)]
)
def test_what_costs_more_in_a_region_has_no_price_there(model: str, priced: bool) -> None:
    head = call("anthropic", model, "rawPredict", "us-east5")
    facts, _ = same_facts_however_cut(head, b"{}", OK, json.dumps(MESSAGE | {"model": model}).encode())
    assert ("clrk.cost.usd" in facts.attributes) == priced
    assert ("clrk.cost.unknown" in facts.attributes) != priced


def test_claude_streamed() -> None:
    body = event({"type": "message_start", "message": MESSAGE}, "message_start") + event(
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 9}},
        "message_delta",
    )
    head = call("anthropic", "claude-sonnet-4-5@20250929", "streamRawPredict")
    facts, _ = same_facts_however_cut(head, b'{"stream":true}', ResponseHead(200, SSE), body)
    assert facts.attributes["gen_ai.request.stream"] is True
    assert facts.attributes["gen_ai.usage.output_tokens"] == 9
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["max_tokens"]


def test_counting_tokens_has_the_model_in_the_body_and_spends_none() -> None:
    head = call("anthropic", "count-tokens", "rawPredict")
    facts, _ = same_facts_however_cut(head, b'{"model":"claude-sonnet-4-5@20250929"}', OK, b'{"input_tokens":8}')
    assert facts.name == "count_tokens claude-sonnet-4-5@20250929"
    assert not {key for key in facts.attributes if key.startswith(("gen_ai.usage.", "clrk."))}


def test_mistral_speaks_chat_completions_and_has_no_price() -> None:
    answer = {
        "id": "c1",
        "model": "mistral-small-2503",
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
    head = call("mistralai", "mistral-small-2503", "rawPredict")
    facts, _ = same_facts_however_cut(head, b"not json", OK, json.dumps(answer).encode())
    assert facts.name == "chat mistral-small-2503"
    assert facts.attributes["gen_ai.provider.name"] == "gcp.vertex_ai"
    assert facts.attributes["gen_ai.system"] == "openai"
    assert facts.attributes["gen_ai.usage.input_tokens"] == 7
    assert "clrk.cost.usd" not in facts.attributes


@pytest.mark.parametrize("publisher", ["anthropic", "mistralai"])
@pytest.mark.parametrize("as_array", [True, False])
def test_googles_own_errors(publisher: str, as_array: bool) -> None:
    error = {"error": {"code": 403, "message": "Permission denied.", "status": "PERMISSION_DENIED"}}
    body = json.dumps([error] if as_array else error).encode()
    refused = ResponseHead(403, (("Content-Type", "application/json"),))
    facts, _ = same_facts_however_cut(call(publisher, "m", "rawPredict"), b"{}", refused, body)
    assert (facts.error_type, facts.status_message) == ("PERMISSION_DENIED", "Permission denied.")


def test_the_publishers_own_error_stays() -> None:
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    refused = ResponseHead(529, (("Content-Type", "application/json"),))
    facts, _ = same_facts_however_cut(call("anthropic", "m", "rawPredict"), b"{}", refused, body)
    assert (facts.error_type, facts.status_message) == ("overloaded_error", "Overloaded")
