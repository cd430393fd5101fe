"""generateContent and its kin: the Gemini API and Vertex AI, documents, both kinds of stream, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from genai_prices import extract_usage
from llm_exchange import SSE, event, exchange, post, same_facts_however_cut

from clrk.gateway.interpret import Facts, RequestHead, ResponseHead
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.recognise import recognise

HOST = "generativelanguage.googleapis.com"
VERTEX = "/v1/projects/p/locations/us-central1/publishers/google/models"
OK = ResponseHead(200, (("Content-Type", "application/json; charset=UTF-8"),))
STREAMED = ResponseHead(200, SSE)
REQUEST = {
    "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
    "generationConfig": {
        "temperature": 1,
        "topP": 0.5,
        "topK": 40,
        "maxOutputTokens": 256,
        "candidateCount": 2,
        "stopSequences": ["END"],
        "seed": 7,
        "presencePenalty": 0.25,
        "frequencyPenalty": -0.5,
        "responseMimeType": "application/json",
    },
}
USAGE = {
    "promptTokenCount": 100,
    "candidatesTokenCount": 20,
    "totalTokenCount": 165,
    "cachedContentTokenCount": 40,
    "thoughtsTokenCount": 30,
    "toolUsePromptTokenCount": 15,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 90}, {"modality": "AUDIO", "tokenCount": 10}],
    "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 40}],
}
ANSWER = {
    "candidates": [
        {"content": {"role": "model", "parts": [{"text": "One"}]}, "finishReason": "STOP"},
        {"content": {"role": "model", "parts": [{"text": "Two"}]}, "finishReason": "MAX_TOKENS", "index": 1},
    ],
    "usageMetadata": USAGE,
    "modelVersion": "gemini-2.5-flash",
    "responseId": "abc-123",
}


def call(method: str = "generateContent", model: str = "gemini-2.5-flash", query: str = "") -> RequestHead:
    return replace(post(HOST, f"/v1beta/models/{model}:{method}"), query=query)


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def facts_of(
    answer: Any,
    head: RequestHead | None = None,
    request: Any = REQUEST,
    response: ResponseHead = OK,
) -> Facts:
    body = answer if isinstance(answer, bytes) else raw(answer)
    facts, received = same_facts_however_cut(head or call(), raw(request), response, body)
    assert received == body
    return facts


def test_a_document_with_all_there_is() -> None:
    facts = facts_of(ANSWER)
    assert facts.name == "generate_content gemini-2.5-flash"
    assert facts.error_type is None
    cost = facts.attributes.pop("clrk.cost.usd")
    assert facts.attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "gcp.gemini",
        "gen_ai.system": "google_genai",
        "gen_ai.request.model": "gemini-2.5-flash",
        "gen_ai.request.max_tokens": 256,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 40.0,
        "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": -0.5,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.request.choice.count": 2,
        "gen_ai.output.type": "json",
        "gen_ai.response.id": "abc-123",
        "gen_ai.response.model": "gemini-2.5-flash",
        "gen_ai.response.finish_reasons": ["STOP", "MAX_TOKENS"],
        "gen_ai.usage.input_tokens": 115,
        "gen_ai.usage.output_tokens": 50,
        "gen_ai.usage.cache_read.input_tokens": 40,
        "gen_ai.usage.reasoning.output_tokens": 30,
    }
    # USD per million: text 0.30, audio 1.00, cached 0.03, output 2.50 (ai.google.dev/gemini-api/docs/pricing)
    assert cost == pytest.approx((65 * 0.3 + 10 * 1 + 40 * 0.03 + 50 * 2.5) / 1e6)


def test_counts_are_added_up_as_the_price_list_does() -> None:
    theirs = extract_usage({"model": "gemini-2.5-flash", **ANSWER}, provider_id="google").usage
    ours = facts_of(ANSWER).attributes
    assert ours["gen_ai.usage.input_tokens"] == theirs.input_tokens
    assert ours["gen_ai.usage.output_tokens"] == theirs.output_tokens
    assert ours["gen_ai.usage.cache_read.input_tokens"] == theirs.cache_read_tokens


@pytest.mark.parametrize(
    ("request_more", "answer_more"),
    [
        ({"serviceTier": "flex"}, {}),
        ({"service_tier": "SERVICE_TIER_PRIORITY"}, {}),
        ({}, {"usageMetadata": USAGE | {"trafficType": "PROVISIONED_THROUGHPUT"}}),
        ({}, {"candidates": [{"finishReason": "STOP", "groundingMetadata": {"webSearchQueries": ["x"]}}]}),
    ],
)
def test_what_the_list_has_no_price_for_has_none(request_more: dict[str, Any], answer_more: dict[str, Any]) -> None:
    usual = {"serviceTier": "standard"}, {"usageMetadata": USAGE | {"trafficType": "ON_DEMAND"}}
    assert "clrk.cost.usd" in facts_of(ANSWER | usual[1], request=REQUEST | usual[0]).attributes
    facts = facts_of(ANSWER | answer_more, request=REQUEST | request_more)
    assert "clrk.cost.usd" not in facts.attributes
    assert facts.attributes["clrk.cost.unknown"] is True


def test_settings_in_snake_case_limit_as_well() -> None:
    head = call()
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    given = {"generation_config": {"max_output_tokens": 9, "candidate_count": 3, "response_mime_type": "text/plain"}}
    found = interpreter.dialect.request(raw(given))
    assert (interpreter.dialect.max_output_tokens, interpreter.dialect.choices) == (9, 3)
    assert found["gen_ai.output.type"] == "text"


def test_streamed_events() -> None:
    chunks = [
        {"candidates": [{"content": {"parts": [{"text": "On"}]}}], "usageMetadata": {"promptTokenCount": 9}},
        {
            "candidates": [{"content": {"parts": [{"text": "e"}]}, "finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 4, "totalTokenCount": 13},
            "modelVersion": "gemini-2.5-flash",
            "responseId": "r",
        },
    ]
    body = b"".join(event(chunk, eol="\r\n") for chunk in chunks)
    facts = facts_of(body, call("streamGenerateContent", query="alt=sse&key=x"), response=STREAMED)
    assert facts.attributes["gen_ai.request.stream"] is True
    assert facts.attributes["gen_ai.usage.input_tokens"] == 9
    assert facts.attributes["gen_ai.usage.output_tokens"] == 4
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["STOP"]
    assert facts.attributes["clrk.cost.usd"] == pytest.approx((9 * 0.3 + 4 * 2.5) / 1e6)


def test_streamed_array() -> None:
    body = b"[" + b",\r\n".join(raw(ANSWER) for _ in range(2)) + b"\n]\n"
    head = call("streamGenerateContent")
    facts = facts_of(body, head, response=OK)
    assert facts.attributes["gen_ai.usage.output_tokens"] == 50
    facts, _, _ = exchange(head, raw(REQUEST), OK, [body[:300], body[300:]])
    assert facts.attributes["gen_ai.response.time_to_first_chunk"] == 1.25  # the first element ends in the second piece


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent"])
def test_errors(method: str, as_array: bool) -> None:
    error = {"error": {"code": 429, "message": "Quota exceeded.", "status": "RESOURCE_EXHAUSTED", "details": []}}
    refused = ResponseHead(429, (("Content-Type", "application/json; charset=UTF-8"),))
    facts = facts_of([error] if as_array else error, call(method), response=refused)
    assert (facts.error_type, facts.status_message) == ("RESOURCE_EXHAUSTED", "Quota exceeded.")
    assert "clrk.cost.usd" not in facts.attributes
    assert "clrk.body.usage_visible" not in facts.attributes


def test_an_error_in_mid_stream() -> None:
    error = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
    body = event({"candidates": [{"content": {"parts": [{"text": "x"}]}}]}) + event(error)
    facts = facts_of(body, call("streamGenerateContent", query="alt=sse"), response=STREAMED)
    assert (facts.error_type, facts.status_message) == ("UNAVAILABLE", "The model is overloaded.")


def test_a_refused_prompt() -> None:
    answer = {
        "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
        "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 8},
        "modelVersion": "gemini-2.5-flash",
    }
    facts = facts_of(answer)
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["PROHIBITED_CONTENT"]
    assert facts.attributes["clrk.gen_ai.refused"] is True
    assert facts.attributes["gen_ai.usage.input_tokens"] == 8
    assert facts.attributes["gen_ai.usage.output_tokens"] == 0  # JSON from protocol buffers leaves zeros out


def test_an_aborted_stream_claims_no_whole_usage() -> None:
    body = event({"candidates": [{"content": {"parts": [{"text": "x"}]}}], "usageMetadata": {"promptTokenCount": 9}})
    head = call("streamGenerateContent", query="alt=sse")
    facts, _, _ = exchange(head, raw(REQUEST), STREAMED, [body], complete=False)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 9
    assert "gen_ai.usage.output_tokens" not in facts.attributes
    assert facts.attributes["clrk.body.usage_visible"] is False
    assert "clrk.cost.usd" not in facts.attributes


def test_tokens_that_are_only_counted_are_not_spent() -> None:
    facts = facts_of({"totalTokens": 31, "cachedContentTokenCount": 3}, call("countTokens"), {"contents": []})
    assert facts.name == "count_tokens gemini-2.5-flash"
    assert not {key for key in facts.attributes if key.startswith(("gen_ai.usage.", "clrk."))}


@pytest.mark.parametrize(
    ("head", "answer", "tokens"),
    [
        (
            call("embedContent", "gemini-embedding-001"),
            {"embedding": {"values": [0.1] * 9}, "usageMetadata": {"promptTokenCount": 6}},
            6,
        ),
        (call("batchEmbedContents", "gemini-embedding-001"), {"embeddings": [{"values": [0.1]}]}, None),
        (
            post("us-central1-aiplatform.googleapis.com", f"{VERTEX}/gemini-embedding-001:predict"),
            {
                "predictions": [
                    {"embeddings": {"statistics": {"token_count": count}, "values": [1]}} for count in (7.0, 4)
                ]
            },
            11,
        ),
    ],
)
def test_embeddings(head: RequestHead, answer: Any, tokens: int | None) -> None:
    facts = facts_of(answer, head, {})
    assert facts.name == "embeddings gemini-embedding-001"
    assert facts.attributes.get("gen_ai.usage.input_tokens") == tokens
    assert ("clrk.body.usage_visible" in facts.attributes) == (tokens is None)
    assert "gen_ai.usage.output_tokens" not in facts.attributes
    if tokens is not None:
        assert facts.attributes["clrk.cost.usd"] == pytest.approx(tokens * 0.15 / 1e6)


@pytest.mark.parametrize(
    ("host", "path", "provider", "model"),
    [
        (HOST, "/v1beta/models/gemini-2.5-pro:generateContent", "gcp.gemini", "gemini-2.5-pro"),
        (HOST, "/v1/models/gemini-2.5-pro%3AgenerateContent", "gcp.gemini", "gemini-2.5-pro"),
        (HOST, "/v1/models/gemini-2.5-flash%40001:generateContent", "gcp.gemini", "gemini-2.5-flash@001"),
        (HOST, "/v1beta/tunedModels/mine-1:generateContent", "gcp.gemini", "tunedModels/mine-1"),
        ("aiplatform.googleapis.com", "/v1beta1/publishers/google/models/g:generateContent", "gcp.vertex_ai", "g"),
        ("europe-west1-aiplatform.googleapis.com", f"{VERTEX}/g:streamGenerateContent", "gcp.vertex_ai", "g"),
        ("aiplatform.eu.rep.googleapis.com", f"{VERTEX}/g:generateContent", "gcp.vertex_ai", "g"),
        ("us-central1-aiplatform.mtls.googleapis.com", f"{VERTEX}/g:countTokens", "gcp.vertex_ai", "g"),
        ("AIPLATFORM.googleapis.com.", "/v1/projects/p/locations/l/endpoints/42:generateContent", "gcp.vertex_ai",
         "endpoints/42"),
        ("llm.internal", "/gemini/v1beta/models/g:generateContent", "gcp.gen_ai", "g"),
        ("x-aiplatform.googleapis.com.evil.example", f"{VERTEX}/g:generateContent", "gcp.gen_ai", "g"),
        ("evilaiplatform.googleapis.com.example", f"{VERTEX}/g:generateContent", "gcp.gen_ai", "g"),
    ],
)  # fmt: skip
def test_who_is_asked_and_for_which_model(host: str, path: str, provider: str, model: str) -> None:
    facts, _, _ = exchange(post(host, path), b"{}", OK, [raw(ANSWER)])
    assert facts.attributes["gen_ai.provider.name"] == provider
    assert facts.attributes["gen_ai.system"] == "google_genai"
    assert facts.attributes["gen_ai.request.model"] == model
    # Who a host is not known to be has no price.
    assert ("clrk.cost.usd" in facts.attributes) == (provider != "gcp.gen_ai")


@pytest.mark.parametrize(
    "path", ["/v1beta/models/g", "/v1beta/models/g:generateContentX", "/v1beta/models/:predict", "/v1beta/files"]
)
def test_other_paths_are_plain_http(path: str) -> None:
    assert recognise(post(HOST, path)) is None


def test_a_path_that_others_have_too_is_googles_on_its_hosts_only() -> None:
    path = "/v1/models/half_plus_two:predict"  # TensorFlow Serving
    assert recognise(post("tensorflow.internal", path)) is None
    assert recognise(post(HOST, path)) is not None


def test_googles_openai_api_is_read_as_openais() -> None:
    answer = {"model": "gemini-2.5-flash", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    head = post(HOST, "/v1beta/openai/chat/completions")
    facts, _, _ = exchange(head, b'{"model":"gemini-2.5-flash"}', OK, [raw(answer)])
    assert facts.name == "chat gemini-2.5-flash"
    assert facts.attributes["gen_ai.provider.name"] == "gcp.gemini"
    assert facts.attributes["gen_ai.system"] == "openai"
    assert facts.attributes["clrk.cost.usd"] == pytest.approx((5 * 0.3 + 2 * 2.5) / 1e6)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"7", b"[[]]", b'{"candidates":7,"usageMetadata":[],"error":7}',
        b'{"candidates":[7,{"content":{"parts":{"text":1}}},{"finishReason":[],"index":-1}]}',
        b'{"usageMetadata":{"promptTokenCount":"9","candidatesTokenCount":1e99,"promptTokensDetails":{"a":1}}}',
        b'{"promptFeedback":"no","modelVersion":7,"responseId":{}}', b"[" * 5000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent", "predict", "embedContent"])
def test_nonsense_is_survived(method: str, body: bytes) -> None:
    facts, _, received = exchange(call(method), body, OK, [body])
    assert received == body
    assert facts.attributes["gen_ai.request.model"] == "gemini-2.5-flash"
    assert "clrk.cost.usd" not in facts.attributes


@pytest.mark.parametrize(
    ("query", "response", "first", "rest"),
    [
        ("alt=sse", STREAMED, event({"candidates": []}, eol="\r\n"), b""),
        ("$alt=sse", STREAMED, event({"candidates": []}, eol="\r\n"), b""),
        ("", OK, b"[" + raw({"candidates": []}), b",\r\n"),
    ],
)
def test_a_stream_can_be_cut_with_googles_error(query: str, response: ResponseHead, first: bytes, rest: bytes) -> None:
    interpreter = recognise(call("streamGenerateContent", query=query))
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.response_head(response, 0.1)
    interpreter.response_data(first, 0.2)
    assert interpreter.boundary == len(first)
    last = interpreter.dialect.error_event("budget_exceeded", 'No "more".')
    facts = facts_of(first + last, call("streamGenerateContent", query=query), response=response)
    assert (facts.error_type, facts.status_message) == ("RESOURCE_EXHAUSTED", 'No "more".')
    if response is OK:
        assert json.loads(first + last)[1]["error"]["code"] == 429
    kind, body = interpreter.dialect.error_body(429, "budget_exceeded", "No.")
    assert kind == "application/json; charset=UTF-8"
    assert json.loads(body) == {"error": {"code": 429, "message": "No.", "status": "RESOURCE_EXHAUSTED"}}


def test_generated_text_and_arguments_are_counted() -> None:
    interpreter = recognise(call("streamGenerateContent", query="alt=sse"))
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.response_head(STREAMED, 0.1)
    code = {"language": "PYTHON", "code": "print(1)"}
    parts = [
        {"text": "Yé"}, {"functionCall": {"name": "f", "args": {}}}, {"inlineData": {"data": "A" * 180}},
        {"executableCode": code}, {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1"}},
    ]  # fmt: skip
    interpreter.response_data(event({"candidates": [{"content": {"parts": parts}}]}), 0.2)
    assert interpreter.dialect.completion.output_bytes == 3 + 3 + len(
        json.dumps(parts[1]["functionCall"]) + json.dumps(code)
    )
