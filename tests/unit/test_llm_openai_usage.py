"""Usage that the gateway asks for, and its chunk, which agents that did not ask never see."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import JSON, SSE, cuts, exchange, post, same_facts_however_cut
from openai_payloads import BEFORE, COST, DONE, HEAD, OK_SSE, ONE, STREAM, USAGE, USAGE_CHUNK, chunk, part, raw

from clrk.gateway.interpret import ResponseHead
from clrk.gateway.llm.include_usage import MAX_HELD_BYTES, ask_for_usage
from clrk.gateway.recognise import recognise

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


@pytest.mark.parametrize(
    ("path", "query", "asked"),
    [
        ("/openai/deployments/dep/chat/completions", "api-version=2024-10-21", True),
        ("/openai/deployments/dep/chat/completions", "x=1&api-version=2025-04-01-preview", True),
        ("/openai/v1/chat/completions", "", True),
        ("/openai/v1/chat/completions", "api-version=preview", True),
        ("/openai/deployments/dep/chat/completions", "api-version=2024-06-01", False),
        ("/openai/deployments/dep/chat/completions", "", False),
        ("/openai/deployments/dep/completions", "api-version=2024-10-21", False),
        ("/models/chat/completions", "api-version=2024-05-01-preview", False),
    ],
)
def test_azure_is_asked_where_its_version_takes_it(path: str, query: str, asked: bool) -> None:
    head = replace(post("me.openai.azure.com", path), query=query)
    _, sent, received = exchange(head, raw(ONE), OK_SSE, [STREAM])
    assert (sent != raw(ONE)) is asked
    assert received == (BEFORE + DONE if asked else STREAM)


def test_azure_answers_out_of_the_operators_data_have_no_usage_to_ask_for() -> None:
    body = raw(ONE | {"data_sources": [{"type": "azure_search"}]})
    assert ask_for_usage(body) is body


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


def test_an_event_waits_only_while_it_may_be_the_usage_chunk() -> None:
    interpreter = recognise(HEAD)
    assert interpreter is not None
    interpreter.rewrite_request(raw(ONE))
    interpreter.request_data(raw(ONE))
    interpreter.request_end()
    interpreter.response_head(OK_SSE, 0.1)

    def shown(piece: bytes) -> bytes:
        return b"".join(interpreter.response_data(bytes([byte]), 0.2) for byte in piece)

    before, choice, after = chunk(part(0, "Yes"), usage=None).partition(b'"choices": [{')
    assert shown(before + choice[:-1]) == b""
    assert shown(choice[-1:]) == before + choice
    assert [shown(bytes([byte])) for byte in after] == [bytes([byte]) for byte in after]
    assert [shown(bytes([byte])) for byte in b": keep-alive"] == [bytes([byte]) for byte in b": keep-alive"]
    assert shown(b"\n\n") == b"\n\n"
    assert shown(USAGE_CHUNK) == b""
    assert shown(b"data: ") == b""
    assert shown(b"[") == b"data: ["
    assert shown(b"DONE]\n\n") == b"DONE]\n\n"
    assert interpreter.response_end(complete=True) == b""


@pytest.mark.parametrize(
    ("before", "request_body"),
    [
        (chunk(part(0, "x")), ONE),  # no reason why it ended
        (chunk(part(0, "x")) + chunk(part(0, None, "stop")), ONE | {"n": 2}),  # a server that knows no n
        (b"", ONE),
    ],
)
def test_the_usage_chunk_is_withheld_whatever_came_before_it(before: bytes, request_body: dict[str, Any]) -> None:
    facts, received = same_facts_however_cut(HEAD, raw(request_body), OK_SSE, before + USAGE_CHUNK + DONE)
    assert received == before + DONE
    assert facts.attributes["gen_ai.usage.output_tokens"] == 100


@pytest.mark.parametrize("fields", [b"id: 7\n", b"event: chunk\nretry: 5\n", b"\xef\xbb\xbf"])
def test_the_usage_chunk_may_have_other_fields(fields: bytes) -> None:
    stream = fields + USAGE_CHUNK + DONE
    assert same_facts_however_cut(HEAD, raw(ONE), OK_SSE, stream)[1] == DONE


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


def test_an_event_that_is_larger_than_the_usage_chunk_is_passed_on_however_cut() -> None:
    large = chunk(usage=USAGE | {"note": "x" * MAX_HELD_BYTES})
    facts, received = same_facts_however_cut(HEAD, raw(ONE), OK_SSE, BEFORE + large + DONE)
    assert received == BEFORE + large + DONE
    assert facts.attributes["gen_ai.usage.output_tokens"] == 100


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
