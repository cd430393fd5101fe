"""maxOutputTokensPerRequest: a request that asks for more is refused, one that says nothing is given the limit."""

import gzip
import json

from budget_runs import (
    JSON,
    LlmExchange,
    office_of,
    openai_call,
)

from clrk.gateway.interpret import RequestHead


def test_a_request_that_asks_for_more_than_it_may_have_is_refused():
    office = office_of({"maxOutputTokensPerRequest": 100})
    run = office.run()
    answer = openai_call(office, run, max_tokens=101).answer
    assert (answer.status, answer.reason, dict(answer.headers)) == (
        429,
        "budget_output_limit",
        {"x-should-retry": "false"},
    )
    assert "maxOutputTokensPerRequest is 100, and this request asks for up to 101" in answer.message
    assert openai_call(office, run, max_tokens=60, n=2).answer.reason == "budget_output_limit"
    assert openai_call(office, run, max_tokens=100).answer is None
    assert openai_call(office, run, max_tokens=50, n=2).answer is None


def test_a_request_that_names_no_limit_is_given_it():
    office = office_of({"maxOutputTokensPerRequest": 100}, hostAliases=[])
    run = office.run()
    call = openai_call(office, run, n=2)
    assert json.loads(call.sent)["max_completion_tokens"] == 50
    call = openai_call(office, run, host="llm.example", max_tokens=None)
    assert json.loads(call.sent)["max_tokens"] == 100
    assert office.entry().reserved.tokens < 1_000


def test_a_coded_request_without_a_limit_can_not_be_given_it():
    office = office_of({"maxOutputTokensPerRequest": 100})
    head = RequestHead("POST", "https", "api.openai.com", 443, "/v1/chat/completions", "",
                       (*JSON, ("Content-Encoding", "gzip")))  # fmt: skip
    body = gzip.compress(b'{"model":"gpt-4o","messages":[]}')
    assert LlmExchange(office, office.run(), body, head).answer.reason == "budget_output_limit"
    body = gzip.compress(b'{"model":"gpt-4o","messages":[],"max_tokens":10}')
    call = LlmExchange(office, office.run(), body, head)
    assert (call.answer, call.sent) == (None, body)
