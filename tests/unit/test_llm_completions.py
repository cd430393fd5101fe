"""Completions, Embeddings, Azure OpenAI, what imitates OpenAI, and Ollama's own API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llm_exchange import JSON, SSE, cuts, event, exchange, post, same_facts_however_cut
from openai_payloads import COMPLETION, USAGE, chunk, part, raw

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import AIProviderRoute
from clrk.gateway.interpret import ResponseHead
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.recognise import KnownHosts, recognise

OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)
COMPLETIONS = post("api.openai.com", "/v1/completions")
EMBEDDINGS = post("api.openai.com", "/v1/embeddings")


# --- Completions ----------------------------------------------------------------------------------------------------

TEXT_COMPLETION: dict[str, Any] = {
    "id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7",
    "object": "text_completion",
    "created": 1589478378,
    "model": "gpt-3.5-turbo-instruct",
    "choices": [{"text": "\n\nYes.", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
}
ASKED = {"model": "gpt-3.5-turbo-instruct", "prompt": "Green?", "max_tokens": 7, "stop": ["\n"]}


def test_a_completion_however_cut() -> None:
    facts, _ = same_facts_however_cut(COMPLETIONS, raw(ASKED), OK, raw(TEXT_COMPLETION))
    cost = facts.attributes.pop("clrk.cost.usd")
    assert cost == pytest.approx((5 * 1.5 + 7 * 2) / 1e6)
    assert facts.name == "text_completion gpt-3.5-turbo-instruct"
    assert facts.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "openai",
        "gen_ai.system": "openai",
        "gen_ai.request.model": "gpt-3.5-turbo-instruct",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.response.id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7",
        "gen_ai.response.model": "gpt-3.5-turbo-instruct",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
    }


def test_a_streamed_completion_is_asked_for_its_usage() -> None:
    def text(**more: Any) -> bytes:
        return event({"id": "cmpl-1", "model": "gpt-3.5-turbo-instruct", "choices": [], **more})

    words = text(choices=[{"text": "Y", "index": 0, "finish_reason": None}])
    words += text(choices=[{"text": "és", "index": 0, "finish_reason": "stop"}])
    done = b"data: [DONE]\n\n"
    stream = words + text(usage=TEXT_COMPLETION["usage"]) + done
    for chunks in cuts(stream):
        facts, sent, received = exchange(COMPLETIONS, raw(ASKED | {"stream": True}), OK_SSE, chunks)
        assert json.loads(sent)["stream_options"] == {"include_usage": True}
        assert received == words + done
        assert facts.attributes["gen_ai.usage.output_tokens"] == 7


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({}, 1),
        ({"n": 2, "best_of": 5}, 5),
        ({"n": 3, "prompt": ["a", "b"]}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": []}, 1),
        ({"prompt": {"a": 1}}, 1),
        ({"prompt": None, "best_of": -1}, 1),
    ],
)
def test_how_many_answers_are_generated(fields: dict[str, Any], choices: int) -> None:
    interpreter = recognise(COMPLETIONS)
    assert isinstance(interpreter, LlmInterpreter)
    interpreter.dialect.request(raw(ASKED | fields))
    assert interpreter.dialect.choices == choices
    assert interpreter.dialect.max_output_tokens == 7


# --- Embeddings -----------------------------------------------------------------------------------------------------


def test_embeddings_however_cut() -> None:
    request = {"model": "text-embedding-3-small", "input": ["a", "b"], "dimensions": 256, "encoding_format": "base64"}
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1] * 20}],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 1000, "total_tokens": 1000},
    }
    facts, received = same_facts_however_cut(EMBEDDINGS, raw(request), OK, raw(answer))
    assert received == raw(answer)
    assert facts.name == "embeddings text-embedding-3-small"
    assert facts.attributes.pop("clrk.cost.usd") == pytest.approx(1000 * 0.02 / 1e6)
    assert facts.attributes == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "openai",
        "gen_ai.system": "openai",
        "gen_ai.request.model": "text-embedding-3-small",
        "gen_ai.embeddings.dimension.count": 256,
        "gen_ai.request.encoding_formats": ["base64"],
        "gen_ai.response.model": "text-embedding-3-small",
        "gen_ai.usage.input_tokens": 1000,
    }


def test_embeddings_that_fail() -> None:
    error = raw({"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}})
    facts, _, _ = exchange(EMBEDDINGS, raw({"model": "m"}), ResponseHead(400, JSON), [error])
    assert (facts.error_type, facts.status_message) == ("context_length_exceeded", "too long")
    for body in (b"", b"{", b"[]", raw({"usage": 7}), raw({"usage": {"prompt_tokens": -1}})):
        assert exchange(EMBEDDINGS, raw({"model": "m"}), OK, [body])[0].attributes["clrk.body.usage_visible"] is False
    assert exchange(EMBEDDINGS, b"{", OK, [b"{}"])[0].name == "embeddings"


# --- Azure OpenAI ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/openai/deployments/my-gpt%204o/chat/completions", {}, "chat my-gpt 4o"),
        ("/openai/deployments/dep/chat/completions", {"model": "gpt-4o"}, "chat dep"),
        ("/openai/deployments/dep/completions", {}, "text_completion dep"),
        ("/openai/deployments/dep/embeddings", {}, "embeddings dep"),
        ("/openai/deployments/dep/embeddings", {"model": "gpt-4o"}, "embeddings dep"),
        ("/openai/v1/chat/completions", {"model": "gpt-4o"}, "chat gpt-4o"),
        ("/openai/v1/responses", {"model": "gpt-4o"}, "chat gpt-4o"),
        ("/openai/responses", {"model": "gpt-4o"}, "chat gpt-4o"),
    ],
)
def test_azure_names_the_model_in_path_or_body(path: str, body: dict[str, Any], name: str) -> None:
    facts, _, _ = exchange(post("me.openai.azure.com", path), raw(body), OK, [raw(COMPLETION)])
    assert facts.name == name
    assert facts.attributes["gen_ai.provider.name"] == "azure.ai.openai"
    assert facts.attributes["gen_ai.system"] == "azure_openai"
    assert facts.attributes["gen_ai.request.model"] == name.split(" ", 1)[1]


def test_azure_streams_begin_with_an_empty_chunk_of_its_filters() -> None:
    head = post("me.openai.azure.com", "/openai/deployments/dep/chat/completions")
    filters = event(
        {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": "", "created": 0}
    )
    body = filters + chunk(part(0, "Yes", "stop")) + chunk(usage=USAGE) + b"data: [DONE]\n\n"
    facts, received = same_facts_however_cut(head, raw({"messages": [], "stream": True}), OK_SSE, body)
    assert received == body
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1000
    assert facts.attributes["clrk.cost.usd"] > 0


def test_azure_content_filter() -> None:
    error = {"error": {"message": "filtered", "type": None, "param": "prompt", "code": "content_filter", "status": 400}}
    head = post("me.openai.azure.com", "/openai/deployments/dep/chat/completions")
    facts, _, _ = exchange(head, b"{}", ResponseHead(400, JSON), [raw(error)])
    assert (facts.error_type, facts.status_message) == ("content_filter", "filtered")


# --- what imitates OpenAI -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "usage", "output", "cached"),
    [
        # xAI counts reasoning beside the completion; everybody else in it.
        (
            "api.x.ai",
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 35,
                "completion_tokens_details": {"reasoning_tokens": 20},
            },
            25,
            None,
        ),
        (
            "api.openai.com",
            {
                "prompt_tokens": 10,
                "completion_tokens": 25,
                "total_tokens": 35,
                "completion_tokens_details": {"reasoning_tokens": 20},
            },
            25,
            None,
        ),
        ("api.deepseek.com", {"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 4}, 5, 4),
    ],
)
def test_usage_of_those_who_differ(host: str, usage: dict[str, Any], output: int, cached: int | None) -> None:
    answer = COMPLETION | {"usage": usage}
    facts, _, _ = exchange(post(host, "/v1/chat/completions"), raw({"model": "m"}), OK, [raw(answer)])
    assert facts.attributes["gen_ai.usage.output_tokens"] == output
    assert facts.attributes.get("gen_ai.usage.cache_read.input_tokens") == cached


def test_groq_says_a_streams_usage_in_a_place_of_its_own() -> None:
    last = chunk(part(0, None, "stop"), x_groq={"id": "req_1", "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    head = post("api.groq.com", "/openai/v1/chat/completions")
    facts, _ = same_facts_however_cut(head, raw({"model": "llama", "stream": True}), OK_SSE, last)
    assert facts.attributes["gen_ai.usage.output_tokens"] == 4


def test_perplexity_bills_citations_that_its_list_does_not_price() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "citation_tokens": 100}
    answer = COMPLETION | {"model": "sonar", "usage": usage, "service_tier": "default"}
    head = post("api.perplexity.ai", "/chat/completions")
    assert exchange(head, raw({"model": "sonar"}), OK, [raw(answer)])[0].attributes["clrk.cost.unknown"] is True
    del usage["citation_tokens"]
    assert exchange(head, raw({"model": "sonar"}), OK, [raw(answer)])[0].attributes["clrk.cost.usd"] > 0.012


def test_a_refusal_is_said() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, "refusal": "No."}, "finish_reason": "stop"}
    head = post("api.openai.com", "/v1/chat/completions")
    plain, _, _ = exchange(head, raw({"model": "m"}), OK, [raw(COMPLETION | {"choices": [choice]})])
    streamed, _, _ = exchange(head, raw({"model": "m"}), OK_SSE, [chunk({"index": 0, "delta": {"refusal": "No."}})])
    assert plain.attributes["clrk.gen_ai.refused"] is streamed.attributes["clrk.gen_ai.refused"] is True
    assert "clrk.gen_ai.refused" not in exchange(head, b"{}", OK, [raw(COMPLETION)])[0].attributes


# --- Ollama ---------------------------------------------------------------------------------------------------------

NDJSON = ResponseHead(200, (("Content-Type", "application/x-ndjson"),))
OLLAMA_END = {
    "model": "llama3.2",
    "created_at": "2026-08-04T19:22:45.499127Z",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "done_reason": "stop",
    "total_duration": 4883583458,
    "prompt_eval_count": 26,
    "eval_count": 298,
}


def ollama(path: str, request: dict[str, Any], response: ResponseHead, chunks: list[bytes]) -> LlmInterpreter:
    rule = {"matches": [{"provider": "openai_compatible", "hostnames": ["ollama.internal"]}]}
    route = AIProviderRoute.model_validate(
        {
            "apiVersion": "clrk/v1alpha1",
            "kind": "AIProviderRoute",
            "metadata": {"name": "r"},
            "spec": {"rules": [rule]},
        }
    )
    gateway = EgressGateway.model_validate(
        {"apiVersion": "clrk/v1alpha1", "kind": "EgressGateway", "metadata": {"name": "default"}}
    )
    found = recognise(post("ollama.internal", path), hosts=KnownHosts(gateway, [route]))
    assert isinstance(found, LlmInterpreter)
    found.request_data(raw(request))
    found.request_end()
    found.response_head(response, 0.1)
    for piece in chunks:
        assert found.response_data(piece, 0.2) is piece
    found.response_end(complete=True)
    return found


def test_ollama_streams_lines_however_cut() -> None:
    lines = [{"model": "llama3.2", "message": {"role": "assistant", "content": word}, "done": False} for word in "Yé!"]
    body = b"".join(raw(line) + b"\n" for line in [*lines, OLLAMA_END])
    request = {"model": "llama3.2", "messages": [], "format": "json", "options": {"num_predict": 9, "temperature": 0}}
    tool = {"model": "llama3.2", "message": {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]}}
    called = ollama("/api/chat", request, NDJSON, [raw(tool) + b"\n"])
    assert called.dialect.completion.output_bytes >= len('f{"a":"b"}')
    want = None
    for chunks in cuts(body):
        found = ollama("/api/chat", request, NDJSON, chunks)
        facts = found.facts()
        facts.attributes.pop("gen_ai.response.time_to_first_chunk")
        assert found.dialect.completion.output_bytes == 4
        want = want or facts
        assert facts == want
    assert want is not None
    assert want.name == "chat llama3.2"
    assert want.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai_compatible",
        "gen_ai.system": "ollama",
        "gen_ai.request.model": "llama3.2",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.stream": True,
        "gen_ai.output.type": "json",
        "gen_ai.response.model": "llama3.2",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 26,
        "gen_ai.usage.output_tokens": 298,
        "clrk.cost.unknown": True,
    }


def test_ollama_generates_and_fails() -> None:
    answer = OLLAMA_END | {"response": "Yes.", "done_reason": "length"}
    facts = ollama("/api/generate", {"model": "m", "stream": False}, OK, [raw(answer)]).facts()
    assert facts.name == "text_completion m"
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["length"]
    broken = ollama("/api/chat", {"model": "m"}, NDJSON, [raw({"error": "model crashed"}) + b"\n"])
    assert (broken.facts().error_type, broken.facts().status_message) == ("_OTHER", "model crashed")
    last = broken.dialect.error_event("budget_exceeded", "no more")
    assert ollama("/api/chat", {"model": "m"}, NDJSON, [last]).facts().status_message == "no more"
    assert json.loads(broken.dialect.error_body(429, "budget_exceeded", "no more")[1]) == {"error": "no more"}
    for body in (b"", b"{\n", b"7\n", b'{"done":true,"eval_count":-1}\n'):
        assert (
            ollama("/api/chat", {"model": "m"}, NDJSON, [body]).facts().attributes["clrk.body.usage_visible"] is False
        )
