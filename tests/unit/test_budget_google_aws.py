"""Budgets of calls to Google and AWS: reserved, settled, denied and cut in their own words and framings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bedrock_payloads import HAIKU, STREAMED, call, frame
from botocore.eventstream import EventStreamBuffer
from budget_runs import JSON, LlmExchange, Office, ai_route, budget_rule

from clrk.gateway.budget import NANO
from clrk.gateway.govern import Cut
from clrk.gateway.interpret import RequestHead, ResponseHead

GEMINI = "generativelanguage.googleapis.com"
SSE = (("Content-Type", "text/event-stream"),)


def gemini(office: Office, method: str, query: str = "", model: str = "gemini-2.5-flash", **more: Any) -> LlmExchange:
    body = {"contents": [{"parts": [{"text": "hi"}]}], **more}
    head = RequestHead("POST", "https", GEMINI, 443, f"/v1beta/models/{model}:{method}", query, JSON)
    return LlmExchange(office, office.run(), json.dumps(body).encode(), head)


def bedrock(office: Office, method: str, model: str = HAIKU, **more: Any) -> LlmExchange:
    body = {"messages": [{"role": "user", "content": [{"text": "hi"}]}], **more}
    return LlmExchange(office, office.run(), json.dumps(body).encode(), call(method, model))


def office_of(**budget: Any) -> Office:
    return Office(ai_route(budget_rule(budget)))


@pytest.mark.parametrize("spelling", ["generationConfig", "generation_config"])
def test_gemini_is_reserved_by_its_limit_and_settled_by_its_counts(spelling: str) -> None:
    office = office_of(maxTokensPerDay=10_000)
    names = {"generationConfig": "maxOutputTokens", "generation_config": "max_output_tokens"}
    asked = gemini(office, "generateContent", **{spelling: {names[spelling]: 500}})
    assert asked.answer is None
    assert 500 < office.entry().reserved.tokens < 800
    asked.finish(usageMetadata={"promptTokenCount": 7, "candidatesTokenCount": 5, "thoughtsTokenCount": 3})
    assert (office.entry().used.tokens, office.entry().reserved.tokens) == (15, 0)


def test_gemini_is_denied_in_googles_words() -> None:
    asked = gemini(office_of(maxTokensPerDay=50), "generateContent")
    assert asked.answer is not None
    assert (asked.answer.status, asked.answer.content_type) == (429, "application/json; charset=UTF-8")
    assert asked.error["code"] == 429
    assert asked.error["status"] == "RESOURCE_EXHAUSTED"
    assert "maxTokensPerDay is 50" in asked.error["message"]


def test_gemini_embeddings_generate_nothing_and_counting_costs_nothing() -> None:
    office = office_of(maxTokensPerDay=10_000)
    asked = gemini(office, "embedContent", model="gemini-embedding-001")
    assert office.entry().reserved.tokens < 300
    asked.finish(usageMetadata={"promptTokenCount": 4})
    assert office.entry().used.tokens == 4
    gemini(office, "countTokens").finish(totalTokens=900)
    assert office.entry().taken.tokens == 4


@pytest.mark.parametrize("query", ["alt=sse", ""])
def test_a_stream_of_gemini_is_cut_at_an_element(query: str) -> None:
    office = office_of(maxTokensPerExecution=600)
    asked = gemini(office, "streamGenerateContent", query)
    assert asked.answer is None
    asked.interpreter.response_head(ResponseHead(200, SSE if query else JSON), 0.1)
    asked.governor.response_head(ResponseHead(200, SSE if query else JSON))
    element = json.dumps({"candidates": [{"content": {"parts": [{"text": "word " * 80}]}}]}).encode()
    received = b""
    for number in range(40):
        piece = b"data: " + element + b"\r\n\r\n" if query else (b"," if number else b"[") + element
        passed = asked.data(piece)
        if isinstance(passed, Cut):
            received += passed.last
            break
        received += passed
    else:
        pytest.fail("never cut")
    if query:
        last = json.loads(received.rpartition(b"data: ")[2])
    else:
        *elements, last = json.loads(received)
        assert len(elements) == number + 1
    assert last["error"]["status"] == "RESOURCE_EXHAUSTED"


def test_bedrock_is_denied_in_awss_words() -> None:
    asked = bedrock(office_of(maxTokensPerDay=50), "converse")
    assert asked.answer is not None
    assert asked.answer.status == 429
    assert ("x-amzn-ErrorType", "ThrottlingException") in asked.answer.headers
    assert "maxTokensPerDay is 50" in json.loads(asked.answer.body)["message"]


def test_what_bedrock_can_not_meter_is_denied_in_awss_words() -> None:
    asked = LlmExchange(
        (office := office_of(maxTokensPerDay=50)),
        office.run(),
        b"{}",
        RequestHead("POST", "https", "bedrock-runtime.us-east-1.amazonaws.com", 443, "/async-invoke", "", JSON),
    )
    assert asked.answer is not None
    assert asked.answer.status == 403
    assert ("x-amzn-ErrorType", "AccessDeniedException") in asked.answer.headers


def test_bedrock_is_reserved_by_its_limit_and_paid_by_its_profile() -> None:
    office = office_of(maxUSDPerDay=10)
    model = HAIKU.replace("us.", "global.")
    asked = bedrock(office, "converse", model, inferenceConfig={"maxTokens": 1_000_000})
    assert 5 * NANO < office.entry().reserved.nano_usd < 5.1 * NANO
    asked.finish(usage={"inputTokens": 1_000_000, "outputTokens": 0})
    assert office.entry().used.nano_usd == pytest.approx(NANO)


def test_claude_on_bedrock_is_paid_by_the_profile_not_by_its_own_name() -> None:
    office = office_of(maxUSDPerDay=10)
    asked = bedrock(office, "invoke", HAIKU.replace("us.", "global."), anthropic_version="x", max_tokens=10)
    usage = {"input_tokens": 1_000_000, "output_tokens": 0}
    asked.finish(type="message", model="claude-haiku-4-5-20251001", stop_reason="end_turn", usage=usage)
    assert office.entry().used.nano_usd == pytest.approx(NANO)


def test_a_stream_of_bedrock_is_cut_with_an_exception_between_two_frames() -> None:
    office = office_of(maxTokensPerExecution=600)
    asked = bedrock(office, "converse-stream")
    assert asked.answer is None
    asked.interpreter.response_head(STREAMED, 0.1)
    asked.governor.response_head(STREAMED)
    delta = frame("contentBlockDelta", {"delta": {"text": "word " * 80}, "contentBlockIndex": 0})
    received = b""
    for _ in range(40):
        passed = asked.data(delta)
        if isinstance(passed, Cut):
            received += passed.last
            break
        received += passed
    else:
        pytest.fail("never cut")
    buffer = EventStreamBuffer()
    buffer.add_data(received)
    *events, last = list(buffer)
    assert {event.headers[":event-type"] for event in events} == {"contentBlockDelta"}
    assert last.headers[":exception-type"] == "throttlingException"
    assert "maxTokensPerExecution" in json.loads(last.payload)["message"]
    asked.end(complete=False)
    assert office.entry().reserved.tokens == 0


def test_what_converse_passes_on_to_its_model_is_reserved() -> None:
    office = office_of(maxTokensPerDay=50_000)
    own = {"max_tokens": 30_000}
    bedrock(office, "converse", inferenceConfig={"maxTokens": 1}, additionalModelRequestFields=own)
    assert office.entry().reserved.tokens > 30_000


def test_a_stream_that_names_its_limit_in_the_models_own_words_is_refused_and_not_cut() -> None:
    office = office_of(maxTokensPerDay=1_000)
    head = call("invoke-with-response-stream", "meta.llama3-8b-instruct-v1:0")
    asked = LlmExchange(office, office.run(), b'{"prompt":"hi","max_gen_len":2000}', head)
    assert asked.answer is not None
    assert asked.answer.status == 429
