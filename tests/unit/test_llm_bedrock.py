"""Bedrock's Converse, ConverseStream, CountTokens; model ids, hosts, headers and errors of the whole runtime."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bedrock_payloads import HAIKU, HOST, OK, STREAMED, call, facts_of, frame, raw
from cost import assert_proportional
from genai_prices import extract_usage
from llm_exchange import exchange, post

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.recognise import recognise

REQUEST = {
    "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
    "inferenceConfig": {"maxTokens": 128, "temperature": 0.5, "topP": 1, "stopSequences": ["END"]},
    "additionalModelRequestFields": {"top_k": 20},
    "guardrailConfig": {"guardrailIdentifier": "gr-7", "guardrailVersion": "1"},
}
USAGE = {
    "inputTokens": 10,
    "outputTokens": 20,
    "totalTokens": 75,
    "cacheReadInputTokens": 40,
    "cacheWriteInputTokens": 5,
    "cacheDetails": [{"ttl": "1h", "inputTokens": 2}, {"ttl": "5m", "inputTokens": 3}],
}
ANSWER = {
    "output": {"message": {"role": "assistant", "content": [{"text": "Hello"}]}},
    "stopReason": "end_turn",
    "usage": USAGE,
    "metrics": {"latencyMs": 551},
}
STREAM = (
    frame("messageStart", {"p": "abc", "role": "assistant"})
    + frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Yé"}, "p": "abcdefghijk"})
    + frame("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"reasoningContent": {"text": "hm"}}})
    + frame("contentBlockDelta", {"contentBlockIndex": 2, "delta": {"toolUse": {"input": '{"a":1}'}}})
    + frame("contentBlockStop", {"contentBlockIndex": 2})
    + frame("messageStop", {"stopReason": "tool_use"})
    + frame("metadata", {"metrics": {"latencyMs": 1}, "usage": USAGE})
)


def test_converse_with_all_there_is() -> None:
    facts = facts_of(call("converse"), REQUEST, OK, ANSWER)
    assert facts.name == f"chat {HAIKU}"
    cost = facts.attributes.pop("clrk.cost.usd")
    assert facts.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "aws.bedrock",
        "gen_ai.system": "aws_bedrock",
        "gen_ai.request.model": HAIKU,
        "gen_ai.request.max_tokens": 128,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 20.0,
        "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.response.finish_reasons": ["end_turn"],
        "gen_ai.usage.input_tokens": 55,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 40,
        "gen_ai.usage.cache_creation.input_tokens": 5,
        "aws.bedrock.guardrail.id": "gr-7",
        "aws.request_id": "req-1",
    }
    # USD per million in a region: 1.10, cached 0.11, written 1.375 and for an hour 2.20, output 5.50
    assert cost == pytest.approx((10 * 1.1 + 40 * 0.11 + 3 * 1.375 + 2 * 2.2 + 20 * 5.5) / 1e6)


def test_counts_are_added_up_as_the_price_list_does() -> None:
    theirs = extract_usage(ANSWER, provider_id="aws", api_flavor="default").usage
    ours = facts_of(call("converse"), REQUEST, OK, ANSWER).attributes
    assert ours["gen_ai.usage.input_tokens"] == theirs.input_tokens
    assert ours["gen_ai.usage.output_tokens"] == theirs.output_tokens
    assert ours["gen_ai.usage.cache_creation.input_tokens"] == theirs.cache_write_tokens


def test_converse_stream() -> None:
    head = call("converse-stream")
    facts = facts_of(head, REQUEST, STREAMED, STREAM)
    assert facts.attributes["gen_ai.request.stream"] is True
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert facts.attributes["gen_ai.usage.input_tokens"] == 55
    assert facts.attributes["gen_ai.usage.output_tokens"] == 20
    assert facts.attributes["clrk.cost.usd"] > 0
    facts, _, _ = exchange(head, raw(REQUEST), STREAMED, [STREAM])
    assert facts.attributes["gen_ai.response.time_to_first_chunk"] == 0.25


def test_generated_bytes_are_counted_as_they_pass() -> None:
    interpreter = recognise(call("converse-stream"))
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.response_head(STREAMED, 0.1)
    interpreter.response_data(STREAM, 0.2)
    assert interpreter.dialect.completion.output_bytes == 3 + 2 + 7


@pytest.mark.parametrize("kind", ["event", "exception"])
def test_an_exception_in_mid_stream(kind: str) -> None:
    body = STREAM[:400] if kind == "event" else frame("messageStart", {"role": "assistant"})
    body += frame("modelStreamErrorException", {"message": "Broke.", "originalStatusCode": 500}, "exception")
    facts = facts_of(call("converse-stream"), REQUEST, STREAMED, body)
    if kind == "exception":
        assert (facts.error_type, facts.status_message) == ("ModelStreamErrorException", "Broke.")
    else:  # a frame that is cut in its middle: what follows it can not be trusted
        assert facts.error_type is None
        assert facts.attributes["clrk.body.usage_visible"] is False


@pytest.mark.parametrize(
    ("headers", "body", "error_type", "message"),
    [
        ([("x-amzn-ErrorType", "ThrottlingException")], {"message": "Slow down."}, "ThrottlingException", "Slow down."),
        (
            [("x-amzn-ErrorType", "ValidationException:http://internal.amazon.com/coral/com.amazon.bedrock/")],
            {"message": "Bad."}, "ValidationException", "Bad.",
        ),
        ([], {"__type": "com.amazon#AccessDeniedException", "Message": "No."}, "AccessDeniedException", "No."),
        ([], {"Message": "No."}, None, "No."),
        ([("x-amzn-ErrorType", "")], b"<html>", None, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["converse", "converse-stream", "invoke", "invoke-with-response-stream"])
def test_errors(method: str, headers: list[tuple[str, str]], body: Any, error_type: str | None, message: str) -> None:
    refused = ResponseHead(429, (("Content-Type", "application/json"), *headers))
    facts = facts_of(call(method), REQUEST, refused, body)
    assert (facts.error_type, facts.status_message) == (error_type, message)
    assert "clrk.body.usage_visible" not in facts.attributes


def test_tokens_that_are_only_counted_are_not_spent() -> None:
    counted = ResponseHead(200, (*OK.headers, ("x-amzn-bedrock-input-token-count", "9")))
    facts = facts_of(call("count-tokens"), {"input": {"converse": {}}}, counted, {"inputTokens": 9})
    assert facts.name == f"count_tokens {HAIKU}"
    assert not {key for key in facts.attributes if key.startswith(("gen_ai.usage.", "clrk."))}


@pytest.mark.parametrize(
    "host",
    [
        HOST,
        "bedrock-runtime-fips.us-gov-west-1.amazonaws.com",
        "bedrock-runtime.eu-central-1.api.aws",
        "bedrock-runtime-fips.us-east-1.api.aws",
        "bedrock-runtime.cn-north-1.amazonaws.com.cn",
        "vpce-0123456789abcdef0-abcdefgh.bedrock-runtime.us-east-1.vpce.amazonaws.com",
        "us-east-1a.vpce-0123456789abcdef0-abcdefgh.bedrock-runtime.us-east-1.vpce.amazonaws.com",
        "BEDROCK-RUNTIME.us-east-1.AMAZONAWS.com.",
    ],
)
def test_hosts_of_the_runtime(host: str) -> None:
    facts, _, _ = exchange(call("converse", host=host), raw(REQUEST), OK, [raw(ANSWER)])
    assert facts.attributes["gen_ai.provider.name"] == "aws.bedrock"
    assert facts.attributes["clrk.cost.usd"] > 0


@pytest.mark.parametrize(
    "host",
    [
        "bedrock-runtime.us-east-1.amazonaws.com.evil.example",
        "x.bedrock-runtime.us-east-1.amazonaws.com",
        "llm.internal",
    ],
)
def test_other_hosts_have_no_price(host: str) -> None:
    facts, _, _ = exchange(call("converse", host=host), raw(REQUEST), OK, [raw(ANSWER)])
    assert facts.attributes["gen_ai.system"] == "aws_bedrock"
    assert "clrk.cost.usd" not in facts.attributes


@pytest.mark.parametrize(
    ("path", "system"), [("/anthropic/v1/messages", "anthropic"), ("/v1/chat/completions", "openai")]
)
def test_others_apis_on_bedrock_are_bedrocks(path: str, system: str) -> None:
    head = post("bedrock-mantle.us-east-1.api.aws", path)
    answer = {"type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 1, "output_tokens": 1}}
    facts, _, _ = exchange(head, b'{"model":"claude-haiku-4-5"}', OK, [raw(answer)])
    assert facts.attributes["gen_ai.provider.name"] == "aws.bedrock"
    assert facts.attributes["gen_ai.system"] == system
    assert "clrk.cost.usd" not in facts.attributes


@pytest.mark.parametrize(("authorization", "asks"), [("Bearer key", True), ("AWS4-HMAC-SHA256 Credential=x", False)])
def test_a_signed_body_is_not_asked_for_usage(authorization: str, asks: bool) -> None:
    head = post(
        HOST, "/openai/v1/chat/completions", ("Content-Type", "application/json"), ("Authorization", authorization)
    )
    request = b'{"model":"openai.gpt-oss-20b-1:0","stream":true}'
    facts, sent, _ = exchange(head, request, OK, [b"{}"])
    assert (sent is request) != asks
    assert ("clrk.body.request_rewritten" in facts.attributes) == asks


ARN = "arn:aws:bedrock:us-east-1:123456789012"
REGIONAL, GLOBAL = 1.1, 1.0  # USD per million input tokens of Haiku 4.5


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("anthropic.claude-haiku-4-5-20251001-v1:0", REGIONAL),
        ("eu.anthropic.claude-haiku-4-5-20251001-v1:0", REGIONAL),
        ("global.anthropic.claude-haiku-4-5-20251001-v1:0", GLOBAL),
        (f"{ARN}:inference-profile/global.anthropic.claude-haiku-4-5-20251001-v1:0", GLOBAL),
        (f"{ARN}:inference-profile/us.anthropic.claude-haiku-4-5-20251001-v1:0", REGIONAL),
        ("arn:aws:bedrock:us-east-1::foundation-model/anthropic.claude-haiku-4-5-20251001-v1:0", REGIONAL),
        (f"{ARN}:application-inference-profile/abc123def456", None),
        (f"{ARN}:custom-model/amazon.nova-lite-v1:0:300k/abc123def456", None),
        (f"{ARN}:provisioned-model/abc123", None),
        ("meta.nobody-knows-it", None),
    ],
)
def test_a_price_is_the_right_models_or_unknown(model: str, price: float | None) -> None:
    answer = ANSWER | {"usage": {"inputTokens": 1_000_000, "outputTokens": 0, "totalTokens": 1_000_000}}
    facts, _, _ = exchange(call("converse", model), raw(REQUEST), OK, [raw(answer)])
    assert facts.attributes["gen_ai.request.model"] == model
    assert facts.attributes.get("clrk.cost.usd") == (None if price is None else pytest.approx(price))


@pytest.mark.parametrize("more", [{"serviceTier": {"type": "flex"}}, {"performanceConfig": {"latency": "optimized"}}])
def test_a_tier_has_no_price(more: dict[str, Any]) -> None:
    usual = {"serviceTier": {"type": "default"}, "performanceConfig": {"latency": "standard"}}
    assert "clrk.cost.usd" in facts_of(call("converse"), REQUEST | usual, OK, ANSWER).attributes
    assert "clrk.cost.usd" not in facts_of(call("converse"), REQUEST | more, OK, ANSWER).attributes


def test_an_arn_whose_slashes_are_not_encoded() -> None:
    model = f"{ARN}:inference-profile/us.anthropic.claude-haiku-4-5-20251001-v1:0"
    facts, _, _ = exchange(post(HOST, f"/model/{model}/converse"), raw(REQUEST), OK, [raw(ANSWER)])
    assert facts.attributes["gen_ai.request.model"] == model
    assert facts.attributes["clrk.cost.usd"] > 0


def test_a_prompt_router_says_which_model_it_chose() -> None:
    chosen = "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-lite-v1:0"
    answer = ANSWER | {"trace": {"promptRouter": {"invokedModelId": chosen}}, "usage": {"inputTokens": 1e6}}
    answer["usage"] = {"inputTokens": 1_000_000, "outputTokens": 0}
    facts = facts_of(call("converse", f"{ARN}:default-prompt-router/amazon.nova:1"), REQUEST, OK, answer)
    assert facts.attributes["gen_ai.response.model"] == "amazon.nova-lite-v1:0"
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(0.06)


@pytest.mark.parametrize(
    "path", ["/model/m", "/model/converse", "/guardrail/g/version/1/apply", "/model/m/conversex", "/m/converse"]
)
def test_other_paths_are_plain_http(path: str) -> None:
    assert recognise(post(HOST, path)) is None


def test_a_hostile_path_takes_time_in_proportion() -> None:
    def tried(times: int) -> None:
        for path in (
            "/model/" * times,
            "/model/x/" * times + "conversE",
            "/model/x" + "/converse" * times + "x",
            "/models/" * times + "a:generateContent-",
        ):
            assert recognise(post(HOST, path)) is None

    assert_proportional(tried, 1_000, 8_000)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"usage":7,"stopReason":[],"output":7}',
        b'{"usage":{"inputTokens":-1,"cacheDetails":7}}',
    ],
)
@pytest.mark.parametrize(
    "method", ["converse", "converse-stream", "invoke", "invoke-with-response-stream", "count-tokens"]
)
@pytest.mark.parametrize("model", [HAIKU, "amazon.nova-lite-v1:0"])
def test_nonsense_is_survived(model: str, method: str, body: bytes) -> None:
    for response, answer in (
        (OK, body),
        (STREAMED, body),
        (STREAMED, frame("chunk", body)),
        (STREAMED, frame("metadata", body)),
    ):
        facts, _, received = exchange(call(method, model), body, response, [answer])
        assert received == answer
        assert facts.attributes["gen_ai.request.model"] == model
        assert "clrk.cost.usd" not in facts.attributes


def test_denials_are_aws_shaped() -> None:
    interpreter = recognise(call("converse-stream"))
    assert isinstance(interpreter, LlmInterpreter)
    dialect = interpreter.dialect
    assert dialect.error_headers(429) == (("x-amzn-ErrorType", "ThrottlingException"),)
    kind, body = dialect.error_body(429, "budget_exceeded", "No.")
    assert kind == "application/json"
    assert json.loads(body) == {"message": "No.", "__type": "ThrottlingException"}
    interpreter.response_head(STREAMED, 0.1)
    interpreter.response_data(STREAM, 0.2)
    assert interpreter.boundary == len(STREAM)
    facts = facts_of(call("converse-stream"), REQUEST, STREAMED, STREAM + dialect.error_event("budget_exceeded", "No."))
    assert (facts.error_type, facts.status_message) == ("ThrottlingException", "No.")
