"""What a request may use: bounds that hold, and bodies that have no one reading."""

import base64
import json
import os
import random

import pytest
from cost import as_objects, assert_cheap
from hypothesis import given
from hypothesis import strategies as st

from clrk.core.errors import ProtocolError
from clrk.gateway.llm.media_parts import MAX_NODES, find_media
from clrk.gateway.llm.spending import (
    BASE_TOKENS,
    IMAGE_TOKENS,
    MAX_BRACKETS,
    MAX_COMMAS,
    REFERENCE_TOKENS,
    SERVER_TOOL_TOKENS,
    TOOLS_TOKENS,
    read_demand,
    write_limit,
)

PICTURE = base64.b64encode(os.urandom(90_000)).decode()


def _ask(*content: object, **more: object) -> bytes:
    return json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": list(content)}], **more}).encode()


def _tokens(*content: object, **more: object) -> int:
    return read_demand(_ask(*content, **more)).input_tokens


# --- the estimate ---------------------------------------------------------------------------------------------------


LETTERS = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz", k=9000))


@pytest.mark.parametrize(
    ("text", "tokens"),  # the larger of o200k_base and cl100k_base, counted with npm gpt-tokenizer 4.0.0
    [
        ("The quick brown fox jumps over the lazy dog. " * 100, 1001),
        ("def f(x):\n    return {k: v for k, v in x.items() if v > 10}\n" * 50, 1200),
        ("0123456789" * 100, 334),
        ("東京都は日本の首都です。" * 50, 600),
        ("🙂🚀" * 100, 500),
        ("a b c d e " * 100, 501),
        (LETTERS, 4865),
        ("AqAqAqAqAq" * 100, 1000),
    ],
)
def test_text_of_people_and_programs_is_bounded_from_above_and_not_absurdly(text, tokens):
    body = _ask({"type": "text", "text": text})
    assert tokens <= read_demand(body).input_tokens <= len(body) + BASE_TOKENS


def test_digits_and_signs_count_one_each():
    assert _tokens({"type": "text", "text": "7" * 10_000}) >= 10_000
    assert _tokens({"type": "text", "text": "}{" * 5_000}) >= 10_000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"},
        {"inlineData": {"mimeType": "image/png", "data": PICTURE}},
        {"inline_data": {"mime_type": "image/png", "data": PICTURE}},
        {"image": {"format": "png", "source": {"bytes": PICTURE}}},
        {"role": "user", "images": [PICTURE]},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": PICTURE}}]},
    ],
    ids=["anthropic", "openai-chat", "openai-responses", "gemini", "gemini-snake", "bedrock", "ollama", "tool-result"],
)
def test_a_picture_counts_as_a_picture_and_not_as_its_base64(part):
    assert IMAGE_TOKENS <= _tokens(part) < IMAGE_TOKENS + 500


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": PICTURE},
        {"type": "tool_use", "id": "1", "name": "n", "input": {"type": "image_url", "image_url": {"url": PICTURE}}},
        {"functionCall": {"name": "f", "args": {"inlineData": {"mimeType": "image/png", "data": PICTURE}}}},
        {"functionResponse": {"name": "f", "response": {"inlineData": {"data": PICTURE}}}},
        {"toolUse": {"input": {"image": {"source": {"bytes": PICTURE}}}}},
        {"type": "image", "source": {"type": "text", "text": PICTURE}},
        {"data": PICTURE},
    ],
)
def test_text_that_looks_like_a_picture_counts_as_text(part):
    assert _tokens(part) > len(PICTURE) / 2


def test_media_in_tools_is_text():
    tool = {"name": "n", "input_schema": {"x": {"type": "image", "source": {"type": "base64", "data": PICTURE}}}}
    assert _tokens("hi", tools=[tool]) > len(PICTURE) / 2


def test_a_document_counts_by_its_size_and_sound_by_less():
    document = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PICTURE}}
    assert len(PICTURE) // 2 <= _tokens(document) <= len(PICTURE) // 2 + 200
    sound = {"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}}
    assert len(PICTURE) // 16 <= _tokens(sound) <= len(PICTURE) // 16 + 200


@pytest.mark.parametrize(
    ("part", "at_least"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}, IMAGE_TOKENS),
        ({"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}, IMAGE_TOKENS),
        ({"type": "document", "source": {"type": "url", "url": "https://example.com/x.pdf"}}, REFERENCE_TOKENS),
        ({"type": "input_file", "file_id": "file-1"}, REFERENCE_TOKENS),
        ({"type": "file", "file": {"file_id": "file-1"}}, REFERENCE_TOKENS),
        ({"fileData": {"mimeType": "video/mp4", "fileUri": "gs://x/y.mp4"}}, REFERENCE_TOKENS),
    ],
)
def test_what_is_only_named_counts_as_much_as_it_may_be(part, at_least):
    assert at_least <= _tokens(part) < at_least + 500


def test_stored_context_and_tools_of_the_provider_count():
    plain = _tokens("hi")
    assert _tokens("hi", conversation="conv_1") >= plain + REFERENCE_TOKENS
    assert _tokens("hi", cachedContent="cachedContents/1") >= plain + REFERENCE_TOKENS
    assert _tokens("hi", prompt={"id": "pmpt_1"}) >= plain + REFERENCE_TOKENS
    assert _tokens("hi", tools=[{"type": "function", "function": {}}]) in range(plain + TOOLS_TOKENS, plain + 1100)
    assert _tokens("hi", tools=[{"type": "web_search_20250305"}]) >= plain + TOOLS_TOKENS + SERVER_TOOL_TOKENS
    assert _tokens("hi", tools=[{"googleSearch": {}}]) >= plain + TOOLS_TOKENS + SERVER_TOOL_TOKENS
    assert read_demand(b'{"previous_response_id": "resp_1"}').previous == "resp_1"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["type", "source", "data", "image", "images", "inlineData", "image_url", "url", "bytes", "file"]), x
)))  # fmt: skip
def test_any_document_has_an_estimate(value):
    body = json.dumps({"x": value}).encode()
    assert read_demand(body).input_tokens >= BASE_TOKENS


@pytest.mark.parametrize("body", [b"[]," * MAX_BRACKETS, b"{}," * MAX_BRACKETS, b"1," * MAX_COMMAS, b"[" * 10**7])
def test_a_body_that_takes_long_to_read_is_refused_at_once(body):
    def refused() -> None:
        with pytest.raises(ProtocolError, match="too long to read"):
            read_demand(b'{"x":[' + body + b"[],1]}")

    assert_cheap(refused, as_objects, at_most=1)


def test_the_largest_body_that_is_read_takes_a_bounded_time():
    body = b'{"x":[' + b"[]," * (MAX_BRACKETS - 2) + b"1]}"
    assert read_demand(body).input_tokens > MAX_BRACKETS
    assert_cheap(lambda: read_demand(body), lambda: json.loads(body), at_most=10)


def test_media_are_looked_for_in_a_bounded_number_of_places():
    parts = [{"type": "image_url", "image_url": {"url": "x"}}] * (MAX_NODES + 10)
    assert sum(1 for _ in find_media(parts)) < MAX_NODES


# --- bodies without one reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"model=gpt-4o", b'{"model":"a"', b'{"model":"a"} {"model":"b"}', b"\xff\xfe{\x00}\x00",
        b'\xef\xbb\xbf{"model":"a"}', b'{"model":"a"}\x00', b"{" + b'"a":{' * 100_000,
        b'{"model":"a","model":"b"}', b'{"max_tokens":1,"max_tokens":100000}',
        b'{"mod\\u0065l":"a","model":"b"}',
        b'{"generationConfig":{"maxOutputTokens":1,"maxOutputTokens":9000}}',
        b'{"generationConfig":7}',
    ],
)  # fmt: skip
def test_what_is_not_one_json_object_with_distinct_names_is_refused(body):
    with pytest.raises(ProtocolError) as caught:
        read_demand(body)
    assert caught.value.code == "json"


@pytest.mark.parametrize(
    "document",
    [
        {"Model": "gpt-4o"}, {"model": "a", "MODEL": "b"}, {"max_tokens": 1, "maxTokens": 90_000},
        {"max-tokens": 5}, {"MaxTokens": 5}, {"max_tokens": "5"}, {"max_tokens": 5.0}, {"max_tokens": -1},
        {"max_tokens": True}, {"n": "50"}, {"n": [1]}, {"best_of": 2.5}, {"model": ["a"]}, {"stream": "true"},
        {"stream": 1}, {"Stream": True}, {"generationConfig": {"max_output_tokens": "7"}},
        {"generationConfig": {"maxOutputTokens": 1, "max_output_tokens": 9}},
        {"generationConfig": {}, "generation_config": {"maxOutputTokens": 9000}},
    ],
)  # fmt: skip
def test_what_servers_read_differently_is_refused(document):
    with pytest.raises(ProtocolError) as caught:
        read_demand(json.dumps(document).encode())
    assert caught.value.code == "ambiguous"


def test_of_several_limits_the_largest_counts_and_choices_multiply_elsewhere():
    found = read_demand(b'{"max_tokens":5,"max_completion_tokens":70,"n":3,"best_of":8}')
    assert (found.output_limit, found.choices) == (70, 8)
    assert read_demand(b'{"max_tokens":null,"n":null}').output_limit is None
    assert read_demand(b'{"n":0}').choices == 1
    assert read_demand(b'{"options":{"num_predict":-1}}').output_limit is None
    assert read_demand(b'{"options":{"num_predict":12}}').output_limit == 12
    gemini = read_demand(b'{"generationConfig":{"maxOutputTokens":11,"candidateCount":2}}')
    assert (gemini.output_limit, gemini.choices) == (11, 2)


# --- writing a limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"max_tokens":9,"model":"a"}'),
        (b' { "model" : "a" } ', b' {"max_tokens":9, "model" : "a" } '),
        (b"{}", b'{"max_tokens":9}'),
        (b'{"max_tokens": null ,"model":"a"}', b'{"max_tokens": 9 ,"model":"a"}'),
    ],
)
def test_a_limit_is_written_and_nothing_else_changes(body, expected):
    assert write_limit(read_demand(body), "max_tokens", 9) == expected


@given(st.dictionaries(st.sampled_from(["model", "x", "é"]), st.text() | st.none()))
def test_a_written_limit_is_read_back(document):
    if document.get("model") is not None and not isinstance(document["model"], str):
        return
    body = json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        demand = read_demand(body)
    except ProtocolError:
        return
    written = json.loads(write_limit(demand, "max_tokens", 77))
    assert written == {**document, "max_tokens": 77}


@pytest.mark.parametrize(
    "own",
    [{"max_tokens": 9_000}, {"inferenceConfig": {"maxTokens": 9_000}}, {"inferenceConfig": {}, "max_tokens": 9_000}],
)
def test_what_converse_passes_on_to_its_model_is_a_limit_too(own):
    document = {"inferenceConfig": {"maxTokens": 5}, "additionalModelRequestFields": own}
    assert read_demand(json.dumps(document).encode()).output_limit == 9_000
    assert read_demand(b'{"additionalModelRequestFields":null}').output_limit is None
    with pytest.raises(ProtocolError):
        read_demand(json.dumps({**document, "AdditionalModelRequestFields": {}}).encode())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"cache_control":1}', True), ('{"cach\\u0065_control":1}', True), ('{"\\u0063ache\\u005Fcontrol":1}', True),
        ('{"cache":"control \\u00e9 \\u003c"}', False),
    ],
)  # fmt: skip
def test_a_word_is_found_however_it_is_spelled(text, said):
    assert read_demand(text.encode()).mentions("cache_control") is said
