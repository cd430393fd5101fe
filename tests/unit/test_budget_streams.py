"""Streams under a budget, a gateway that only watches, and one without its ledger (CONTRACT section 12)."""

import json

import pytest
from budget_runs import Office, ai_route, budget_rule, claude_call, office_of, openai_call, raw_call, usage
from llm_exchange import cuts

from clrk.gateway.budget import Amount
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.govern import Cut
from clrk.gateway.telemetry import attributes as attr

# --- streams that go on ---------------------------------------------------------------------------------------------


def _delta(text: str) -> bytes:
    chunk = {"id": "c", "model": "gpt-4o", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def test_a_stream_without_a_limit_asks_for_more_as_it_goes():
    office = office_of({"maxTokensPerExecution": 50_000, "maxTokensPerDay": 50_000})
    call = openai_call(office, office.run(), stream=True)
    call.head(200, "text/event-stream")
    for _ in range(10):
        piece = _delta("word " * 800)  # about 1,000 tokens
        assert call.data(piece) == piece
    assert office.entry().reserved.tokens >= 10_000
    call.end(complete=False)
    assert office.entry().used.tokens >= 10_000
    assert office.entry().reserved == Amount()


def test_a_stream_that_overruns_what_a_run_may_have_is_cut_in_the_providers_words():
    office = office_of({"maxTokensPerExecution": 3_000})
    run = office.run()
    call = openai_call(office, run, stream=True)
    assert call.answer is None  # what is left is less than the default, and it is told when that is gone
    assert call.governor.wants_plain_response
    call.head(200, "text/event-stream")
    passed, found = b"", b""
    for _ in range(10):
        found = call.data(_delta("word " * 800) + b"data: {")
        if isinstance(found, Cut):
            break
        passed += found
        assert call.data(b'"choices":[]}\n\n') == b'"choices":[]}\n\n'
    assert isinstance(found, Cut)
    assert found.reason == "budget_exceeded"
    assert "maxTokensPerExecution is reached" in found.message
    whole = _delta("word " * 800)
    assert found.last.startswith(whole)
    event = found.last.removeprefix(whole)
    assert event.endswith(b"\n\n")
    assert "maxTokensPerExecution" in json.loads(event.partition(b"data: ")[2])["error"]["message"]
    call.end(complete=False)
    total = next(one for one in office.ledger.entries("2026-11-28", 10) if one.account.window.startswith("run:"))
    assert total.balance.used.tokens >= 3_000
    assert openai_call(office, run, stream=True).answer.status == 429


def test_a_stream_is_not_cut_for_tokens_that_it_said_it_may_have():
    office = office_of({"maxTokensPerExecution": 3_000})
    call = openai_call(office, office.run(), stream=True, max_tokens=2_000)
    call.head(200, "text/event-stream")
    piece = _delta("word " * 1_600)
    assert call.data(piece) == piece
    call.data(b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n')
    call.data(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1700}}\n\ndata: [DONE]\n\n')
    call.end()
    assert office.entry().used.tokens == 1_709


def test_a_stream_that_is_encoded_all_the_same_ends_where_it_is_visibly_no_end():
    office = office_of({"maxTokensPerExecution": 3_000})
    call = openai_call(office, office.run(), stream=True)
    call.head(200, "text/event-stream")
    call.data(_delta("hi"))
    call.interpreter.boundary = None
    call.governor._at_boundary = False
    call.interpreter.dialect.completion.output_bytes = 100_000
    assert call.governor.response_data(b"\x8b\x00") == Cut(
        b"", "budget_exceeded", call.governor.response_data(b"").message
    )


# --- a gateway that watches, and one without its ledger -------------------------------------------------------------


@pytest.mark.parametrize("mode", ["Shadow", "Record"])
def test_a_gateway_that_watches_counts_and_changes_nothing(mode):
    office = office_of({"maxTokensPerDay": 10, "maxOutputTokensPerRequest": 5_000, "maxUSDPerDay": 1}, mode=mode)
    run = office.run()
    call = openai_call(office, run, stream=True)
    assert call.answer.reason == "budget_exceeded"  # for the span; the relay lets it go
    assert b"max_completion_tokens" not in call.sent
    call.head(200, "text/event-stream")
    for _ in range(30):
        assert isinstance(call.data(_delta("word " * 800)), bytes)
    assert call.end(complete=False) == {attr.CLRK_EGRESS_WOULD_DENY: "budget_exceeded"}
    assert office.entry().used.tokens > 20_000
    unpriced = openai_call(office, run, model="gpt-of-tomorrow", max_tokens=1)
    unpriced.finish(**{**usage(5, 5), "model": "gpt-of-tomorrow"})
    assert not run.refuses_tunnel("api.openai.com")


def test_without_its_ledger_a_budgeted_call_is_refused_and_others_go(tmp_path):
    (tmp_path / "file").write_text("")
    ledger = BudgetLedger(tmp_path / "file" / "budgets.db")
    office = Office(ai_route(budget_rule({"maxTokensPerDay": 10**6}, {"provider": "openai"})), ledger=ledger)
    run = office.run()
    answer = openai_call(office, run).answer
    assert (answer.status, answer.reason) == (503, "budget_unavailable")
    assert claude_call(office, run).governor is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/responses", "max_output_tokens"),
        ("/v1/completions", "max_tokens"),
        ("/v1/chat/completions", "max_completion_tokens"),
    ],
)
def test_each_api_of_openai_is_given_the_limit_by_its_own_name(path, name):
    office = office_of({"maxOutputTokensPerRequest": 100})
    call = raw_call(office, b'{"model":"gpt-4o","input":"hi","prompt":"hi"}', path=path)
    assert json.loads(call.sent)[name] == 100


@pytest.mark.parametrize(
    ("host", "path", "body", "sent"),
    [
        ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-flash:generateContent",
         {"contents": []}, {"contents": [], "generationConfig": {"maxOutputTokens": 100}}),
        ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-flash:generateContent",
         {"generation_config": {"top_p": 1}}, {"generation_config": {"top_p": 1, "maxOutputTokens": 100}}),
        ("bedrock-runtime.us-east-1.amazonaws.com", "/model/us.amazon.nova-lite-v1%3A0/converse",
         {"messages": [], "inferenceConfig": {}}, {"messages": [], "inferenceConfig": {"maxTokens": 100}}),
        ("ollama.internal", "/api/chat", {"model": "llama3", "messages": []},
         {"model": "llama3", "messages": [], "options": {"num_predict": 100}}),
    ],
)  # fmt: skip
def test_apis_that_keep_their_limits_deeper_inside_are_given_it_there(host, path, body, sent):
    own = {"provider": "openai_compatible", "hostnames": ["ollama.internal"]}
    office = office_of({"maxOutputTokensPerRequest": 100}, {}, own)
    call = raw_call(office, json.dumps(body).encode(), host=host, path=path)
    assert call.answer is None
    assert json.loads(call.sent) == sent


def test_embeddings_generate_nothing():
    office = office_of({"maxTokensPerDay": 1_000, "maxOutputTokensPerRequest": 1})
    call = raw_call(office, b'{"model":"text-embedding-3-small","input":"hi"}', path="/v1/embeddings")
    assert office.entry().reserved.tokens < 200
    call.finish(object="list", data=[], model="text-embedding-3-small", usage={"prompt_tokens": 2, "total_tokens": 2})
    assert office.entry().used.tokens == 2


@pytest.mark.parametrize("asks", [{"max_tokens": 500}, {}], ids=["limited", "open"])
def test_what_a_stream_cost_and_what_it_shows_do_not_depend_on_how_it_came(asks):
    usage_chunk = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":40}}\n\n'
    before = _delta("Hello ") + b": still here\n\n" + _delta("world")
    found = set()
    for chunks in cuts(before + usage_chunk + b"data: [DONE]\n\n"):
        office = office_of({"maxTokensPerDay": 20_000})
        call = openai_call(office, office.run(), stream=True, **asks)
        call.interpreter.rewrite_request(call.sent)
        call.head(200, "text/event-stream")
        shown = b"".join(call.data(piece) for piece in chunks)
        call.end()
        found.add((shown, office.entry().used.tokens, office.entry().reserved.tokens))
    assert found == {(before + b"data: [DONE]\n\n", 49, 0)}
