"""Bedrock's InvokeModel: every model's own request, response and stream behind one address."""

from __future__ import annotations

from typing import Any

import pytest
from bedrock_payloads import HAIKU, OK, STREAMED, call, chunk, facts_of, frame, raw
from llm_exchange import exchange

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.recognise import recognise

NOVA, LLAMA = "us.amazon.nova-lite-v1:0", "meta.llama3-8b-instruct-v1:0"
TITAN, TITAN_EMBED = "amazon.titan-text-express-v1", "amazon.titan-embed-text-v2:0"
MISTRAL, COHERE = "mistral.mistral-7b-instruct-v0:2", "cohere.command-r-v1:0"
OSS = "openai.gpt-oss-20b-1:0"
CLAUDE_REQUEST = {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 64, "messages": [], "temperature": 0.5}
CLAUDE = {
    "type": "message",
    "id": "msg_bdrk_1",
    "model": "claude-haiku-4-5-20251001",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 10, "cache_read_input_tokens": 40, "output_tokens": 5},
}
METRICS = {
    "amazon-bedrock-invocationMetrics": {
        "inputTokenCount": 11, "outputTokenCount": 7, "invocationLatency": 900, "firstByteLatency": 300,
    }
}  # fmt: skip


def with_counts(given: int, produced: int) -> ResponseHead:
    counts = (("X-Amzn-Bedrock-Input-Token-Count", f"{given}"), ("X-Amzn-Bedrock-Output-Token-Count", f"{produced}"))
    return ResponseHead(200, (*OK.headers, *counts))


def test_claude_with_all_there_is() -> None:
    head = call("invoke", HAIKU, ("X-Amzn-Bedrock-GuardrailIdentifier", "gr-7"))
    facts = facts_of(head, CLAUDE_REQUEST, with_counts(10, 5), CLAUDE)
    assert facts.name == f"chat {HAIKU}"
    cost = facts.attributes.pop("clrk.cost.usd")
    assert facts.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "aws.bedrock",
        "gen_ai.system": "aws_bedrock",
        "gen_ai.request.model": HAIKU,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": "msg_bdrk_1",
        "gen_ai.response.model": "claude-haiku-4-5-20251001",
        "gen_ai.response.finish_reasons": ["end_turn"],
        "gen_ai.usage.input_tokens": 50,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 40,
        "aws.bedrock.guardrail.id": "gr-7",
        "aws.request_id": "req-1",
    }
    assert cost == pytest.approx((10 * 1.1 + 40 * 0.11 + 5 * 5.5) / 1e6)


def test_claude_through_a_global_profile_has_the_profiles_price() -> None:
    answer = CLAUDE | {"usage": {"input_tokens": 1_000_000, "output_tokens": 0}}
    facts = facts_of(call("invoke", HAIKU.replace("us.", "global.")), CLAUDE_REQUEST, OK, answer)
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(1.0)


@pytest.mark.parametrize("header", ["X-Amzn-Bedrock-Service-Tier", "X-Amzn-Bedrock-PerformanceConfig-Latency"])
def test_a_tier_has_no_price(header: str) -> None:
    facts = facts_of(call("invoke", HAIKU, (header, "priority")), CLAUDE_REQUEST, OK, CLAUDE)
    assert "clrk.cost.usd" not in facts.attributes


def test_a_path_that_others_may_have_too_is_bedrocks_on_its_hosts_only() -> None:
    assert recognise(call("invoke", "m", host="models.internal")) is None
    assert recognise(call("invoke", "m")) is not None


def test_claude_streamed() -> None:
    body = (
        chunk({"type": "message_start", "message": CLAUDE | {"stop_reason": None}})
        + chunk({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Yé"}})
        + chunk({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}})
        + chunk({"type": "message_stop"} | METRICS)
    )
    head = call("invoke-with-response-stream")
    facts = facts_of(head, CLAUDE_REQUEST, STREAMED, body)
    assert facts.attributes["gen_ai.request.stream"] is True
    assert facts.attributes["gen_ai.usage.input_tokens"] == 50  # not the metrics', which do not know the cache
    assert facts.attributes["gen_ai.usage.output_tokens"] == 7
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["tool_use"]
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.response_head(STREAMED, 0.1)
    interpreter.response_data(body, 0.2)
    assert interpreter.dialect.completion.output_bytes == 3


def test_claude_behind_a_profile_without_a_telling_name() -> None:
    model = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc123"
    facts = facts_of(call("invoke", model), CLAUDE_REQUEST, OK, CLAUDE)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 50
    assert facts.attributes["gen_ai.response.model"] == "claude-haiku-4-5-20251001"


DOCUMENTS: dict[str, tuple[str, Any, Any, list[str], tuple[int, int]]] = {
    "nova": (
        NOVA,
        {"messages": [], "inferenceConfig": {"maxTokens": 32, "topK": 5, "topP": 0.5, "stopSequences": ["X"]}},
        {"output": {"message": {"content": [{"text": "Hi"}]}}, "stopReason": "end_turn",
         "usage": {"inputTokens": 4, "outputTokens": 6, "totalTokens": 12, "cacheReadInputTokenCount": 2}},
        ["end_turn"], (6, 6),
    ),
    "llama": (
        LLAMA,
        {"prompt": "Hi", "max_gen_len": 32, "temperature": 0.5, "top_p": 0.9},
        {"generation": "Hi", "prompt_token_count": 4, "generation_token_count": 6, "stop_reason": "length"},
        ["length"], (4, 6),
    ),
    "titan": (
        TITAN,
        {"inputText": "Hi", "textGenerationConfig": {"maxTokenCount": 32, "stopSequences": []}},
        {"inputTextTokenCount": 4, "results": [{"tokenCount": 6, "outputText": "Hi", "completionReason": "FINISH"}]},
        ["FINISH"], (4, 6),
    ),
    "gpt-oss": (
        OSS,
        {"messages": [], "max_completion_tokens": 32},
        {"id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Hi"}}],
         "usage": {"prompt_tokens": 4, "completion_tokens": 6}},
        ["stop"], (4, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "request_body", "answer", "reasons", "counts"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_models_that_count_in_the_body(
    model: str, request_body: Any, answer: Any, reasons: list[str], counts: tuple[int, int]
) -> None:
    facts = facts_of(call("invoke", model), request_body, OK, answer)
    assert facts.attributes["gen_ai.request.max_tokens"] == 32
    assert facts.attributes["gen_ai.response.finish_reasons"] == reasons
    usage = facts.attributes["gen_ai.usage.input_tokens"], facts.attributes["gen_ai.usage.output_tokens"]
    assert usage == counts
    assert facts.attributes["clrk.cost.usd"] > 0
    # The body is believed before the headers.
    assert facts_of(call("invoke", model), request_body, with_counts(99, 99), answer).attributes == facts.attributes


@pytest.mark.parametrize(
    ("model", "request_body", "answer", "reason"),
    [
        (MISTRAL, {"prompt": "x", "max_tokens": 9}, {"outputs": [{"text": "Hi", "stop_reason": "stop"}]}, "stop"),
        (COHERE, {"message": "x", "p": 0.5, "k": 3}, {"text": "Hi", "finish_reason": "COMPLETE"}, "COMPLETE"),
    ],
)  # fmt: skip
def test_models_that_count_in_the_headers(model: str, request_body: Any, answer: Any, reason: str) -> None:
    facts = facts_of(call("invoke", model), request_body, with_counts(3, 8), answer)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 3
    assert facts.attributes["gen_ai.usage.output_tokens"] == 8
    assert facts.attributes["gen_ai.response.finish_reasons"] == [reason]
    without = facts_of(call("invoke", model), request_body, OK, answer)
    assert without.attributes["clrk.body.usage_visible"] is False


STREAMS: dict[str, tuple[str, bytes, list[str], tuple[int, int], int]] = {
    "nova": (
        NOVA,
        chunk({"messageStart": {"role": "assistant"}})
        + chunk({"contentBlockDelta": {"delta": {"text": "Hi"}, "contentBlockIndex": 0}})
        + chunk({"messageStop": {"stopReason": "max_tokens"}})
        + chunk({"metadata": {"usage": {"inputTokens": 3, "outputTokens": 8, "cacheReadInputTokenCount": 1}}}
                | METRICS),
        ["max_tokens"], (4, 8), 2,
    ),
    "llama": (
        LLAMA,
        chunk({"generation": "Hi", "prompt_token_count": 4, "generation_token_count": 1, "stop_reason": None})
        + chunk({"generation": "", "generation_token_count": 6, "stop_reason": "stop"} | METRICS),
        ["stop"], (4, 6), 2,
    ),
    "titan": (
        TITAN,
        chunk({"outputText": "Hi", "index": 0, "totalOutputTextTokenCount": 5, "inputTextTokenCount": 4,
               "completionReason": "FINISH"} | METRICS),
        ["FINISH"], (4, 5), 2,
    ),
    "mistral": (
        MISTRAL,
        chunk({"outputs": [{"text": "Hi", "stop_reason": None}]})
        + chunk({"outputs": [{"text": "", "stop_reason": "stop"}]} | METRICS),
        ["stop"], (11, 7), 2,
    ),
    "gpt-oss": (
        OSS,
        chunk({"choices": [{"index": 0, "delta": {"content": "Hi", "reasoning_content": "Hm"}}]})
        + chunk({"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}]})
        + chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]} | METRICS),
        ["stop"], (11, 7), 7,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "body", "reasons", "counts", "size"), STREAMS.values(), ids=STREAMS)
def test_streams(model: str, body: bytes, reasons: list[str], counts: tuple[int, int], size: int) -> None:
    head = call("invoke-with-response-stream", model)
    facts = facts_of(head, {}, STREAMED, body)
    assert facts.attributes["gen_ai.response.finish_reasons"] == reasons
    usage = facts.attributes["gen_ai.usage.input_tokens"], facts.attributes["gen_ai.usage.output_tokens"]
    assert usage == counts
    assert facts.attributes["clrk.cost.usd"] > 0
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.response_head(STREAMED, 0.1)
    interpreter.response_data(body, 0.2)
    assert interpreter.dialect.completion.output_bytes == size


def test_embeddings() -> None:
    answer = {"embedding": [0.5] * 8, "inputTextTokenCount": 1_000_000}
    facts = facts_of(call("invoke", TITAN_EMBED), {"inputText": "Hi"}, OK, answer)
    assert facts.name == f"embeddings {TITAN_EMBED}"
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1_000_000
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(0.02)


def test_a_guardrail_that_intervened() -> None:
    answer = {"amazon-bedrock-guardrailAction": "INTERVENED"}
    facts = facts_of(call("invoke", LLAMA), {}, OK, answer)
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["guardrail_intervened"]
    assert facts.attributes["clrk.gen_ai.refused"] is True


@pytest.mark.parametrize(
    "payload",
    [{"bytes": "!!!"}, {"bytes": "eyJ"}, {"bytes": 7}, {"bytes": "\u00e9"}, {}, b"[]", b"", b"{"],
)
def test_chunks_that_hold_nothing_are_passed_over(payload: Any) -> None:
    body = frame("chunk", payload) + chunk({"generation": "Hi", "stop_reason": "stop"} | METRICS)
    facts = facts_of(call("invoke-with-response-stream", LLAMA), {}, STREAMED, body)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 11


def test_an_aborted_stream_has_no_cost() -> None:
    body = chunk({"type": "message_start", "message": CLAUDE | {"stop_reason": None}})
    head = call("invoke-with-response-stream")
    facts, _, _ = exchange(head, raw(CLAUDE_REQUEST), STREAMED, [body], complete=False)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 50
    assert facts.attributes["clrk.body.usage_visible"] is False
    assert "clrk.cost.usd" not in facts.attributes
