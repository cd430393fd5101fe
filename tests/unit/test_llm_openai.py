"""OpenAI Chat Completions: payloads as the API reference describes them, and the usage chunk that agents never see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import JSON, SSE, cuts, event, exchange, post, same_facts_however_cut

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.llm.include_usage import ask_for_usage
from clrk.gateway.recognise import recognise
from clrk.gateway.telemetry.spans import AttributeValue

HEAD = post("api.openai.com", "/v1/chat/completions", *JSON, ("Authorization", "Bearer sk-secret"))
OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)

REQUEST: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Is the build green?"}],
    "max_completion_tokens": 256,
    "temperature": 0,
    "top_p": 1,
    "stop": "END",
    "seed": 42,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "n": 2,
    "service_tier": "flex",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x"}},
}
USAGE = {
    "prompt_tokens": 1000,
    "completion_tokens": 100,
    "total_tokens": 1100,
    "prompt_tokens_details": {"cached_tokens": 400, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 64, "audio_tokens": 0, "accepted_prediction_tokens": 0},
}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
    "object": "chat.completion",
    "created": 1741569952,
    "model": "gpt-4o-2024-08-06",
    "choices": [
        {"index": 1, "message": {"role": "assistant", "content": "No."}, "logprobs": None, "finish_reason": "length"},
        {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "logprobs": None, "finish_reason": "stop"},
    ],
    "usage": USAGE,
    "service_tier": "default",
    "system_fingerprint": "fp_44709d6fcb",
}
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
COST = (600 * 2.5 + 400 * 1.25 + 100 * 10) / 1e6


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    head = {key: COMPLETION[key] for key in ("id", "created", "model", "service_tier", "system_fingerprint")}
    return event(head | {"object": "chat.completion.chunk", "choices": list(choices)} | more)


def part(index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}


ONE = {"model": "gpt-4o", "messages": [], "stream": True}
BEFORE = (
    chunk(part(0, "Y\u00e9s \U0001f600"), usage=None) + b": keep-alive\n\n" + chunk(part(0, None, "stop"), usage=None)
)
USAGE_CHUNK = chunk(usage=USAGE)
DONE = b"data: [DONE]\n\n"
STREAM = BEFORE + USAGE_CHUNK + DONE


# --- Documents ------------------------------------------------------------------------------------------------------


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
        raw({"choices": [7], "usage": USAGE}), raw({"choices": [], "usage": 7}),
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


# --- Asking for usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"m","stream":true}', b'{"stream_options":{"include_usage":true},"model":"m","stream":true}'),
        (b' {\n "stream" : true } \n', b' {"stream_options":{"include_usage":true},\n "stream" : true } \n'),
        (
            b'{"stream":true,"stream_options":null,"n":1.10}',
            b'{"stream":true,"stream_options":{"include_usage":true},"n":1.10}',
        ),
        (b'{"stream_options" : {} ,"stream":true}', b'{"stream_options" : {"include_usage":true} ,"stream":true}'),
        (
            b'{"stream":true,"stream_options":{"include_usage":false,"include_obfuscation":false}}',
            b'{"stream":true,"stream_options":{"include_usage":true,"include_obfuscation":false}}',
        ),
        (
            '{"x":"\u00e9\\"}","stream":true}'.encode(),
            '{"stream_options":{"include_usage":true},"x":"\u00e9\\"}","stream":true}'.encode(),
        ),
    ],
)
def test_usage_is_asked_for_and_nothing_else_changes(body: bytes, sent: bytes) -> None:
    assert ask_for_usage(body) == sent


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b'"stream"', b'{"stream":false}', b'{"stream":"true"}', b'{"stream":1}', b'{"stream":true',
        b'{"stream":true}x', b'{"stream":true,}', b'{"stream":true,"stream":false}', b'{"stream":false,"stream":true}',
        b'{"stream":true,"stream_options":{"include_usage":true}}', b'{"stream":true,"stream_options":7}',
        b'{"messages":[{"stream":true}]}', b'{"stream" true}', b'{7:"stream","stream":true}', b"{'stream':true}",
        b'\xff{"stream":true}', b'{"stream":true,"x":"\xff"}', b'{"stream":true,"x":' + b"[" * 100_000 + b"}",
        b'{"stream":true} {"stream":true}', b'{"stream"', b'{"stream":',
    ],
)  # fmt: skip
def test_what_is_sent_as_it_is(body: bytes) -> None:
    assert ask_for_usage(body) is body


def test_requests_over_the_bound_are_sent_as_they_are() -> None:
    body = raw(ONE | {"messages": "x" * (16 << 20)})
    assert ask_for_usage(body) is body


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "stream", "stream_options", "n", '\u00e9"\\', "temperature"]),
        st.one_of(
            st.booleans(), st.none(), st.text(), st.floats(allow_nan=False), st.dictionaries(st.text(), st.integers())
        ),
    ),
    st.sampled_from([None, 1]),
)
def test_the_rewritten_request_differs_in_stream_options_only(request_body: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(request_body, indent=indent).encode()
    sent = json.loads(ask_for_usage(body))
    options = sent.get("stream_options")
    if request_body.get("stream") is True and isinstance(options, dict):
        assert options.pop("include_usage") is True
        assert options == {key: value for key, value in (request_body.get("stream_options") or {}).items()}
        sent.pop("stream_options")
        request_body.pop("stream_options", None)
    assert sent == request_body


@pytest.mark.parametrize(
    "head",
    [
        post("llm.internal", "/v1/chat/completions"),
        post("api.mistral.ai", "/v1/chat/completions"),
        post("api.openai.com", "/v1/chat/completions", *JSON, ("Content-Encoding", "gzip")),
    ],
)
def test_only_servers_that_are_known_to_take_it_are_asked(head: Any) -> None:
    interpreter = recognise(head)
    assert interpreter is not None
    assert not interpreter.wants_whole_request
    assert interpreter.rewrite_request(raw(ONE)) == raw(ONE)
    facts, sent, received = exchange(head, raw(ONE), OK_SSE, [STREAM])
    assert (sent, received) == (raw(ONE), STREAM)
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1000


# --- The usage chunk ------------------------------------------------------------------------------------------------


def test_the_usage_chunk_is_withheld_however_cut() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(ONE), OK_SSE, STREAM)
    assert received == BEFORE + DONE
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1000
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert facts.attributes["clrk.body.request_rewritten"] is True
    assert facts.attributes["clrk.cost.usd"] == pytest.approx(COST)


@pytest.mark.parametrize("eol", [b"\r\n", b"\r"])
def test_with_other_line_ends(eol: bytes) -> None:
    stream = STREAM.replace(b"\n", eol)
    _, received = same_facts_however_cut(HEAD, raw(ONE), OK_SSE, stream)
    assert received == (BEFORE + DONE).replace(b"\n", eol)


def test_an_agent_that_asks_gets_it() -> None:
    request = raw(ONE | {"stream_options": {"include_usage": True}})
    facts, received = same_facts_however_cut(HEAD, request, OK_SSE, STREAM)
    assert received == STREAM
    assert "clrk.body.request_rewritten" not in facts.attributes
    assert facts.attributes["gen_ai.usage.output_tokens"] == 100


def test_bytes_of_other_events_are_never_delayed() -> None:
    interpreter = recognise(HEAD)
    assert interpreter is not None
    interpreter.rewrite_request(raw(ONE))
    interpreter.request_data(raw(ONE))
    interpreter.request_end()
    interpreter.response_head(OK_SSE, 0.1)
    for at in range(len(BEFORE)):
        assert interpreter.response_data(BEFORE[at : at + 1], 0.2) == BEFORE[at : at + 1]
    assert b"".join(interpreter.response_data(bytes([byte]), 0.3) for byte in USAGE_CHUNK) == b""
    # `[DONE]` waits until it can no longer be a chunk: for six bytes.
    passed = [interpreter.response_data(bytes([byte]), 0.4) for byte in DONE]
    assert passed[:6] == [b""] * 6
    assert passed[6] == DONE[:7]
    assert b"".join(passed) == DONE
    assert interpreter.response_end(complete=True) == b""


def test_the_same_object_comes_back_when_nothing_is_withheld() -> None:
    interpreter = recognise(HEAD)
    assert interpreter is not None
    interpreter.rewrite_request(raw(ONE))
    interpreter.request_end()
    interpreter.response_head(OK_SSE, 0.1)
    assert interpreter.response_data(BEFORE, 0.2) is BEFORE
    assert interpreter.response_data(DONE, 0.2) is DONE


def test_all_choices_have_to_finish_first() -> None:
    request = raw(ONE | {"n": 2})
    stream = chunk(part(0, None, "stop")) + chunk(part(1, "x")) + chunk(part(1, None, "length")) + USAGE_CHUNK + DONE
    facts, received = same_facts_however_cut(HEAD, request, OK_SSE, stream)
    assert received == stream.replace(USAGE_CHUNK, b"")
    assert facts.attributes["gen_ai.response.finish_reasons"] == ["stop", "length"]


def test_usage_in_the_last_content_chunk_is_not_the_extra_chunk() -> None:
    stream = chunk(part(0, "x")) + chunk(part(0, None, "stop"), usage=USAGE) + DONE
    facts, received = same_facts_however_cut(HEAD, raw(ONE), OK_SSE, stream)
    assert received == stream
    assert facts.attributes["gen_ai.usage.output_tokens"] == 100


def test_an_empty_chunk_without_usage_is_passed_on() -> None:
    filtered = chunk(usage=None, prompt_filter_results=[])  # Azure begins its streams so
    stream = filtered + BEFORE + filtered + USAGE_CHUNK + DONE
    assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, stream)[1] == filtered + BEFORE + filtered + DONE


def test_a_stream_that_ends_without_a_blank_line() -> None:
    assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, (BEFORE + USAGE_CHUNK).rstrip(b"\n"))[1] == BEFORE
    assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, STREAM.rstrip(b"\n"))[1] == (BEFORE + DONE).rstrip(b"\n")
    cut = BEFORE + USAGE_CHUNK[:-20]
    assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, cut)[1] == cut


@pytest.mark.parametrize("length", [0, 1, 5, 6, 40, len(USAGE_CHUNK) - 1])
def test_an_aborted_stream_gives_back_what_was_held(length: int) -> None:
    cut = BEFORE + USAGE_CHUNK[:length]
    for chunks in cuts(cut):
        facts, _, received = exchange(HEAD, raw(ONE), OK_SSE, chunks, complete=False)
        assert received == cut
        assert facts.attributes["clrk.body.usage_visible"] is False


def test_what_follows_the_usage_chunk_is_passed_on() -> None:
    for after in (b": bye\n\n", b"\n\n", b"id: 7\n" + DONE, chunk(part(0, "more")), b"event: x\ndata: {}\n\n", b"dat"):
        assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, BEFORE + USAGE_CHUNK + after)[1] == BEFORE + after


def test_an_endless_event_is_not_held() -> None:
    stream = BEFORE + b"data: {" + b"x" * (2 << 20)
    parts = [stream[at : at + 100_000] for at in range(0, len(stream), 100_000)]
    interpreter = recognise(HEAD)
    assert interpreter is not None
    interpreter.rewrite_request(raw(ONE))
    interpreter.response_head(OK_SSE, 0.1)
    assert b"".join(interpreter.response_data(piece, 0.2) for piece in parts) == stream
    facts, _, received = exchange(HEAD, raw(ONE), OK_SSE, [*parts, b"\n\n", USAGE_CHUNK, DONE])
    assert received == stream + b"\n\n" + DONE
    assert facts.attributes["gen_ai.usage.input_tokens"] == 1000


@pytest.mark.parametrize(
    "head",
    [
        ResponseHead(200, (*SSE[:1], ("Content-Length", str(len(STREAM))))),
        ResponseHead(200, (*SSE[:1], ("Content-Encoding", "br"))),
    ],
)
def test_nothing_is_withheld_where_that_would_break_the_body(head: ResponseHead) -> None:
    assert exchange(HEAD, raw(ONE), head, [STREAM])[2] == STREAM


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
