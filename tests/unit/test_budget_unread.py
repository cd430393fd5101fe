"""Streams under a budget that nobody can follow: they are charged by their size, and cut (CONTRACT section 12)."""

import gzip
import json
import zlib

import pytest
from budget_runs import JSON, LlmExchange, Office, office_of, openai_call, raw_call, usage

from clrk.gateway.egress.guarded import GuardedInterpreter
from clrk.gateway.govern import Cut
from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.telemetry import attributes as attr

SSE = ("Content-Type", "text/event-stream")
BLOCK = b"x" * 10_000


def _head(call: LlmExchange, status: int, *headers: tuple[str, str]) -> None:
    head = ResponseHead(status, headers)
    call.interpreter.response_head(head, 0.1)
    call.governor.response_head(head)


def _passes(call: LlmExchange, piece: bytes, most: int) -> tuple[int, Cut | None]:
    """Feed a piece again and again; return how many bytes got through, and how it was cut."""
    passed = 0
    for _ in range(most):
        found = call.data(piece)
        if isinstance(found, Cut):
            return passed, found
        passed += len(found)
    return passed, None


def _stream_of(office: Office) -> LlmExchange:
    call = openai_call(office, office.run(), stream=True)
    assert call.answer is None
    return call


@pytest.mark.parametrize(
    ("headers", "bytes_per_token"),
    [
        ((SSE, ("Content-Encoding", "snappy")), 1),  # a coding that nobody reads
        ((SSE, ("Content-Encoding", "gzip")), 1),  # and one that it is not
        ((("Content-Type", "text/plain"),), 4),  # no stream by its type
        (JSON, 4),
    ],
    ids=["unknown-coding", "broken-coding", "no-type", "document"],
)
def test_a_stream_that_nobody_can_follow_is_cut_by_its_size(headers, bytes_per_token):
    office = office_of({"maxTokensPerExecution": 20_000})
    call = _stream_of(office)
    _head(call, 200, *headers)
    passed, cut = _passes(call, BLOCK, 100)
    assert cut == Cut(b"", "budget_exceeded", cut.message)  # no end that looks like one
    assert "maxTokensPerExecution is reached" in cut.message
    assert 10_000 * bytes_per_token <= passed <= 20_000 * bytes_per_token
    call.end(complete=False)
    assert office.entry().used.tokens >= passed / bytes_per_token
    assert office.entry().reserved.tokens == 0


def test_an_event_stream_that_lost_its_frames_is_cut_by_its_size():
    office = office_of({"maxTokensPerExecution": 20_000})
    body = json.dumps({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}).encode()
    call = raw_call(office, body, host="bedrock-runtime.us-east-1.amazonaws.com",
                    path="/model/amazon.nova-lite-v1%3A0/converse-stream")  # fmt: skip
    _head(call, 200, ("Content-Type", "application/vnd.amazon.eventstream"))
    passed, cut = _passes(call, BLOCK, 100)
    assert cut is not None
    assert cut.last == b""
    assert passed <= 80_000


def test_a_stream_that_says_nothing_this_api_knows_is_not_endless():
    office = office_of({"maxTokensPerExecution": 20_000})
    call = _stream_of(office)
    _head(call, 200, SSE)
    event = b'data: {"text":"' + b"word " * 2_000 + b'"}\n\n'
    passed, cut = _passes(call, event, 1_000)
    assert 3_900_000 < passed <= 4_000_000
    assert (
        "maxTokensPerExecution" in json.loads(cut.last.removeprefix(event).partition(b"data: ")[2])["error"]["message"]
    )


def test_an_event_that_is_too_large_to_read_counts_as_pictures_do_and_is_no_way_around():
    office = office_of({"maxTokensPerDay": 50_000})
    call = _stream_of(office)
    _head(call, 200, SSE)
    assert _passes(call, BLOCK, 500) == (5_000_000, None)  # an event that goes on
    assert 25_000 <= office.entry().reserved.tokens < 30_000
    passed, cut = _passes(call, BLOCK, 1_000)
    assert cut == Cut(b"", "budget_exceeded", cut.message)
    assert passed < 50_000 * 200 - 5_000_000


@pytest.mark.parametrize("splits", [False, True])
def test_a_first_chunk_that_is_coded_is_not_answered_with_a_plain_event(splits):
    office = office_of({"maxTokensPerExecution": 5_000})
    call = _stream_of(office)
    _head(call, 200, SSE, ("Content-Encoding", "gzip"))
    chunk = {"choices": [{"index": 0, "delta": {"content": "word " * 10_000}}]}
    coded = gzip.compress(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    found = [call.data(coded[:20]), call.data(coded[20:])] if splits else [call.data(coded)]
    assert found[-1] == Cut(b"", "budget_exceeded", found[-1].message)


def test_an_interpreter_that_fails_blinds_no_budget():
    office = office_of({"maxTokensPerExecution": 20_000})
    call = _stream_of(office)
    inner = call.interpreter
    call.interpreter = GuardedInterpreter(inner)
    call.head(200, "text/event-stream")
    assert isinstance(call.data(b": hello\n\n"), bytes)
    inner.dialect.event = lambda _: 1 / 0
    passed, cut = _passes(call, b"data: {}\n\n" + BLOCK, 100)
    assert cut == Cut(b"", "budget_exceeded", cut.message)
    assert passed <= 80_000


def test_an_error_page_for_a_stream_costs_nothing_and_is_not_cut():
    office = office_of({"maxTokensPerDay": 5_000})
    call = _stream_of(office)
    call.head(403, "text/html")
    assert _passes(call, BLOCK, 100) == (1_000_000, None)
    call.end()
    assert office.entry().taken.tokens == 0


def test_a_document_in_place_of_a_stream_is_settled_by_what_it_reports():
    office = office_of({"maxTokensPerDay": 10_000})
    _stream_of(office).finish(**usage(10, 700))
    assert office.entry().taken.tokens == 710


def test_embeddings_are_large_and_generate_nothing():
    office = office_of({"maxTokensPerDay": 5_000})
    head = RequestHead("POST", "https", "api.openai.com", 443, "/v1/embeddings", "", JSON)
    call = LlmExchange(office, office.run(), b'{"model":"text-embedding-3-small","input":"hi"}', head)
    call.head()
    assert _passes(call, BLOCK, 2_000) == (20_000_000, None)
    call.end()
    assert office.entry().used.tokens < 200


def test_a_count_is_not_final_when_what_followed_it_was_not_understood():
    office = office_of({"maxTokensPerDay": 10**6})
    path, host = "/v1beta/models/gemini-2.5-flash:streamGenerateContent", "generativelanguage.googleapis.com"
    call = raw_call(office, b'{"contents":[]}', host=host, path=path, query="alt=sse")
    _head(call, 200, SSE, ("Content-Encoding", "gzip"))
    so_far = b'data: {"usageMetadata":{"promptTokenCount":5,"candidatesTokenCount":1}}\n\n'
    coder = zlib.compressobj(wbits=31)
    call.data(coder.compress(so_far) + coder.flush(zlib.Z_SYNC_FLUSH))
    assert _passes(call, BLOCK, 3) == (30_000, None)
    call.end()
    assert office.entry().used.tokens >= 30_000


def test_a_stream_that_ends_in_the_midst_of_an_event_is_settled_by_its_counts():
    office = office_of({"maxTokensPerDay": 10_000})
    call = _stream_of(office)
    call.interpreter.rewrite_request(call.sent)
    call.head(200, "text/event-stream")
    call.data(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":700}}\n\ndata: {"id"')
    call.end()
    assert office.entry().used.tokens == 709


def test_a_body_that_was_given_a_limit_says_so():
    office = office_of({"maxOutputTokensPerRequest": 100})
    call = openai_call(office, office.run())
    call.head()
    assert call.end() == {attr.CLRK_BODY_REQUEST_REWRITTEN: True}
    call = openai_call(office, office.run(), max_tokens=100)
    call.head()
    assert call.end() == {}


def test_a_stream_of_sound_is_heard_and_not_taken_for_text():
    office = office_of({"maxTokensPerDay": 50_000})
    call = _stream_of(office)
    _head(call, 200, SSE)
    chunk = {"choices": [{"index": 0, "delta": {"audio": {"data": "A" * 64_000}}}]}
    event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    assert _passes(call, event, 60) == (60 * len(event), None)  # a minute
    assert office.entry().reserved.tokens >= 60 * 64_000 // 200


def test_a_picture_and_the_count_behind_it_are_read():
    office = office_of({"maxTokensPerDay": 50_000})
    call = raw_call(office, b'{"model":"gpt-5.4","input":"draw","stream":true}', path="/v1/responses")
    _head(call, 200, SSE)
    picture = {"type": "image_generation_call", "result": "A" * 3_000_000}
    done = {"type": "response.output_item.done", "item": picture}
    response = {"status": "completed", "output": [picture], "usage": {"input_tokens": 9, "output_tokens": 700}}
    for event in (done, {"type": "response.completed", "response": response}):
        raw = b"data: " + json.dumps(event).encode() + b"\n\n"
        for at in range(0, len(raw), 65_536):
            assert isinstance(call.data(raw[at : at + 65_536]), bytes)
    call.end()
    assert office.entry().used.tokens == 709


def test_a_large_document_is_never_cut():
    office = office_of({"maxTokensPerDay": 500})
    call = openai_call(office, office.run(), max_tokens=10)
    call.head()
    assert _passes(call, BLOCK, 100) == (1_000_000, None)


def test_an_answer_with_a_limit_may_have_long_tokens_and_a_long_head():
    office = office_of({"maxTokensPerDay": 500})
    call = openai_call(office, office.run(), max_tokens=300, stream=True)
    call.head(200, "text/event-stream")
    assert office.entry().taken.tokens > 400
    assert isinstance(call.data(b"data: {" + b" " * 200_000 + b"}\n\n"), bytes)
    text = {"choices": [{"index": 0, "delta": {"content": "internationalization " * 100}}]}  # 300 tokens in 2,100 bytes
    assert isinstance(call.data(b"data: " + json.dumps(text).encode() + b"\n\n"), bytes)
    text = {"choices": [{"index": 0, "delta": {"content": "word " * 2_000}}]}  # a server that knows no limit
    assert isinstance(call.data(b"data: " + json.dumps(text).encode() + b"\n\n"), Cut)
