"""The governor of LLM calls: what is reserved, refused, cut and settled (CONTRACT section 12)."""

import gzip
import json

import pytest
from budget_runs import JSON, LlmExchange, Office, ai_route, at, budget_rule, claude_call, openai_call, usage

from clrk.gateway.budget import NANO, Amount
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.govern import Cut
from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm.governor import DEFAULT_OUTPUT_TOKENS
from clrk.gateway.llm.spending import REFERENCE_TOKENS
from clrk.gateway.telemetry import attributes as attr


def _office(budget: dict, *matches: dict, **spec) -> Office:
    return Office(ai_route(budget_rule(budget, *matches)), **spec)


def _estimate(**more) -> int:
    """What a call's input is taken for."""
    probe = _office({"maxTokensPerDay": 10**9})
    call = openai_call(probe, probe.run(), **more)
    assert call.answer is None
    return probe.entry().reserved.tokens - more["max_tokens"]


# --- reserve and settle ---------------------------------------------------------------------------------------------


def test_the_estimate_is_reserved_and_becomes_what_was_reported():
    office = _office({"maxTokensPerDay": 10_000})
    call = openai_call(office, office.run(), max_tokens=500)
    assert office.entry().reserved.tokens == _estimate(max_tokens=500) + 500
    call.finish(**usage(17, 20))
    assert (office.entry().used.tokens, office.entry().reserved.tokens) == (37, 0)
    assert call.sent == json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}],
                                    "max_tokens": 500}).encode()  # fmt: skip


def test_a_hundred_calls_at_once_never_pass_the_limit_and_what_was_not_used_comes_back():
    each = _estimate(max_tokens=100) + 100
    office = _office({"maxTokensPerDay": 10 * each})
    run = office.run()
    calls = [openai_call(office, run, max_tokens=100) for _ in range(100)]
    going = [call for call in calls if call.answer is None]
    assert len(going) == 10
    assert office.entry().reserved.tokens == 10 * each
    for call in going:
        call.finish(**usage(10, 5))
    assert office.entry().taken.tokens == 150
    assert openai_call(office, run, max_tokens=100).answer is None


@pytest.mark.parametrize("more", [{"max_tokens": 100, "n": 8}, {"max_tokens": 1, "max_completion_tokens": 800}])
def test_choices_and_the_larger_limit_count(more):
    office = _office({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), **more)
    assert 800 < office.entry().reserved.tokens < 1_000


def test_without_a_limit_of_its_own_a_call_counts_for_the_default():
    office = _office({"maxTokensPerDay": 10_000})
    openai_call(office, office.run())
    assert office.entry().reserved.tokens >= DEFAULT_OUTPUT_TOKENS
    office = _office({"maxTokensPerDay": DEFAULT_OUTPUT_TOKENS})
    assert "output up to 4096" in openai_call(office, office.run()).error["message"]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
def test_a_call_that_the_provider_refused_costs_nothing(status):
    office = _office({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), max_tokens=500).finish(status, error={"message": "no", "type": "x"})
    assert office.entry().taken == Amount()


@pytest.mark.parametrize(
    "ends",
    [
        lambda call: call.end(complete=False),  # no answer
        lambda call: (call.head(), call.end(complete=False)),
        lambda call: (call.head(), call.data(b'{"id":"x","usa'), call.end(complete=False)),
        lambda call: (call.head(), call.data(b'{"id":"x","choices":[]}'), call.end()),  # whole, and says nothing
        lambda call: (call.head(), call.data(b"\x00 no json"), call.end()),
        lambda call: (call.head(504), call.data(b"{}"), call.end()),
        lambda call: (call.head(200, "text/event-stream"), call.data(b"data: {}\n\n"), call.end(complete=False)),
    ],
)
def test_without_a_report_the_estimate_stays_spent(ends):
    office = _office({"maxTokensPerDay": 10_000})
    call = openai_call(office, office.run(), max_tokens=500)
    reserved = office.entry().reserved
    ends(call)
    assert (office.entry().used.tokens, office.entry().reserved) == (reserved.tokens, Amount())
    assert office.entry().used.nano_usd >= 500 * 10_000  # counted, if not limited


def test_a_call_that_never_left_costs_nothing():
    office = _office({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), max_tokens=500).end(complete=False, sent=False)
    assert office.entry().taken == Amount()


def test_an_agent_that_leaves_after_the_answer_pays_what_was_reported_and_before_it_the_estimate():
    office = _office({"maxTokensPerDay": 100_000})
    run = office.run()
    stream = (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":30,'
        b'"output_tokens":1}}}\n\n'
    )
    early = claude_call(office, run, max_tokens=700, stream=True)
    early.head(200, "text/event-stream")
    early.data(stream)
    early.end(complete=False)
    assert office.entry().used.tokens == 30 + 700
    late = claude_call(office, run, max_tokens=700, stream=True)
    late.head(200, "text/event-stream")
    late.data(stream)
    late.data(
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"output_tokens":12}}\n\n'
    )
    late.end(complete=False)
    assert office.entry().used.tokens == 30 + 700 + 30 + 12


def test_what_was_used_beyond_the_reservation_counts():
    office = _office({"maxTokensPerDay": 10_000})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(5_000, 6_000))
    assert office.entry().used.tokens == 11_000
    assert openai_call(office, run, max_tokens=1).answer.status == 429


def test_an_absurd_report_is_taken_for_as_much_as_one_call_can_be():
    office = _office({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), max_tokens=10).finish(**usage(2**62, 2**62))
    assert office.entry().used.tokens == 2**41


def test_an_answer_that_is_read_again_counts_as_what_it_was():
    office = _office({"maxTokensPerDay": 10**7})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**{**usage(600, 400), "id": "resp_1"})
    used = office.entry().used.tokens
    openai_call(office, run, max_tokens=10, previous_response_id="resp_1")
    assert 1_000 <= office.entry().reserved.tokens < 1_200
    openai_call(office, run, max_tokens=10, previous_response_id="resp_of_another")
    assert office.entry().reserved.tokens > REFERENCE_TOKENS
    assert office.entry().used.tokens == used


# --- denials --------------------------------------------------------------------------------------------------------


def test_a_denial_says_what_which_limit_how_much_is_left_and_what_to_do():
    office = _office({"maxTokensPerDay": 1_200})
    run = office.run()
    openai_call(office, run, max_tokens=500).finish(**usage(600, 300))
    assert openai_call(office, run, max_tokens=10).answer is None  # under way
    office.now = at("2026-11-28T23:59:30.5")
    call = openai_call(office, run, max_tokens=500)
    answer = call.answer
    assert (answer.status, answer.content_type, answer.reason) == (429, "application/json", "budget_exceeded")
    assert dict(answer.headers) == {"Retry-After": "30"}  # that soon the SDK may try again
    held, asked = _estimate(max_tokens=10) + 10, _estimate(max_tokens=500) + 500
    for part in (
        "AIProviderRoute default/llm rules[0] for agent:default/support", "maxTokensPerDay is 1200", "900 used",
        f"{held} reserved by calls under way", f"{300 - held} left", f"may use up to {asked} tokens",
        "wait until 2026-11-29T00:00:00Z",
    ):  # fmt: skip
        assert part in answer.message
    assert call.error["message"] == answer.message
    assert dict(answer.attributes) == {
        attr.CLRK_BUDGET_DENIED: True,
        attr.CLRK_BUDGET_ROUTE: "default/llm",
        attr.CLRK_BUDGET_DAILY_USED: 900,
        attr.CLRK_BUDGET_DAILY_MAX: 1_200,
        attr.CLRK_BUDGET_LIMIT: "maxTokensPerDay",
        attr.CLRK_BUDGET_KEY: "agent:default/support",
    }
    assert answer.rule == "AIProviderRoute default/llm rules[0]"


def test_a_denial_speaks_the_language_of_the_provider():
    office = _office({"maxTokensPerDay": 0})
    run = office.run()
    assert json.loads(claude_call(office, run).answer.body)["type"] == "error"
    assert claude_call(office, run).error["type"] == "rate_limit_error"
    assert {"message", "type", "param", "code"} <= set(openai_call(office, run).error)


def test_a_client_is_not_told_to_retry_for_hours():
    office = _office({"maxTokensPerDay": 0})
    answer = openai_call(office, office.run()).answer
    assert dict(answer.headers) == {"Retry-After": str(12 * 3600), "x-should-retry": "false"}


def test_a_limit_of_the_run_does_not_end_by_waiting():
    office = _office({"maxTokensPerExecution": 1_000, "maxTokensPerDay": 50_000})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(900, 50))
    answer = openai_call(office, run, max_tokens=100).answer
    assert dict(answer.headers) == {"x-should-retry": "false"}
    assert "maxTokensPerExecution is 1000, 950 used" in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_USED] == 950
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_MAX] == 50_000
    assert openai_call(office, office.run(), max_tokens=100).answer is None  # another run has its own


def test_a_daemons_run_is_an_execution():
    office = _office({"maxTokensPerExecution": 1_000})
    run = office.run(daemon=True)
    openai_call(office, run, max_tokens=10).finish(**usage(900, 50))
    assert openai_call(office, run, max_tokens=100).answer is not None
    assert openai_call(office, office.run(daemon=True), max_tokens=100).answer is None


def test_all_budgets_of_a_rule_have_to_hold_and_one_that_does_not_reserves_nothing():
    filters = [
        {"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 100_000, "key": "route"}},
        {"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 10, "key": "agent"}},
    ]
    office = Office(ai_route({"filters": filters}))
    assert "for agent:default/support" in openai_call(office, office.run(), max_tokens=100).answer.message
    assert office.ledger.entries("2026-11-28", 10) == []


# --- keys -----------------------------------------------------------------------------------------------------------


def test_an_agent_can_not_spend_what_is_anothers():
    office = _office({"maxTokensPerDay": 1_000})
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("a"), max_tokens=100).answer is not None
    assert openai_call(office, office.run("b"), max_tokens=100).answer is None


def test_a_route_is_shared_by_all_its_agents():
    office = _office({"maxTokensPerDay": 1_000, "key": "route"})
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b"), max_tokens=100).answer is not None


def test_an_identity_shares_and_those_without_one_share_theirs():
    office = _office({"maxTokensPerDay": 1_000, "key": "identity.tenant"})
    openai_call(office, office.run("a", tenant="acme"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b", tenant="acme"), max_tokens=100).answer is not None
    assert openai_call(office, office.run("a", tenant="other"), max_tokens=100).answer is None
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b", user="x"), max_tokens=100).answer is not None


# --- days -----------------------------------------------------------------------------------------------------------


def test_the_day_ends_at_midnight_utc():
    office = _office({"maxTokensPerDay": 1_000})
    run = office.run()
    office.now = at("2026-11-28T23:59:59")
    openai_call(office, run, max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, run, max_tokens=100).answer is not None
    office.now += 1
    assert openai_call(office, run, max_tokens=100).answer is None


def test_a_call_over_midnight_counts_on_the_day_on_which_it_began():
    office = _office({"maxTokensPerDay": 1_000})
    run = office.run()
    office.now = at("2026-11-28T23:59:59")
    call = openai_call(office, run, max_tokens=100)
    office.now += 10
    call.finish(**usage(500, 50))
    assert office.entry().used.tokens == 550
    assert office.ledger.entries("2026-11-29", 10) == []


def test_a_clock_that_goes_back_gives_nothing_back():
    office = _office({"maxTokensPerDay": 1_000})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(900, 90))
    office.now += 86_400
    openai_call(office, run, max_tokens=10).finish(**usage(900, 90))
    office.now -= 86_400
    assert openai_call(office, run, max_tokens=100).answer is not None
    office.now -= 3_600
    assert openai_call(office, run, max_tokens=100).answer is not None


# --- money ----------------------------------------------------------------------------------------------------------


def test_dollars_are_reserved_and_settled_by_price():
    office = _office({"maxUSDPerDay": 0.01})
    run = office.run()
    call = openai_call(office, run, max_tokens=100)
    assert 100 * 10 / 1e6 * NANO <= office.entry().reserved.nano_usd < 0.01 * NANO
    call.finish(**usage(1_000, 100))
    assert office.entry().used.nano_usd == round((1_000 * 2.5 + 100 * 10) / 1e6 * NANO)
    answer = openai_call(office, run, max_tokens=1_000).answer
    assert "maxUSDPerDay is $0.01, $0.0035 used" in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_USED] == pytest.approx(0.0035)
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_MAX] == 0.01


def test_a_model_without_a_price_is_refused_under_a_limit_in_dollars_and_only_there():
    office = _office({"maxUSDPerDay": 1})
    answer = openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).answer
    assert (answer.status, answer.reason) == (403, "budget_unknown_price")
    assert "gpt-of-tomorrow" in answer.message
    assert "prices of the EgressGateway" in answer.message
    office = _office({"maxTokensPerDay": 10_000})
    assert openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).answer is None


def test_the_operators_price_goes_before_the_bundled_one():
    prices = [{"model": "gpt-*", "input": 1_000_000, "output": 0}]  # a dollar for each token of input
    office = _office({"maxUSDPerDay": 1_000}, prices=prices)
    openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).finish(**usage(7, 9))
    assert office.entry().used.nano_usd == 7 * NANO


def test_a_prompt_that_may_be_written_to_a_cache_is_reserved_at_what_that_costs():
    office = _office({"maxUSDPerDay": 10})
    run = office.run()
    claude_call(office, run, max_tokens=1)
    plain = office.entry().reserved.nano_usd
    claude_call(
        office, run, max_tokens=1, system=[{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}]
    )
    assert office.entry().reserved.nano_usd - plain > 2 * plain


# --- the output of one request --------------------------------------------------------------------------------------


def test_a_request_that_asks_for_more_than_it_may_have_is_refused():
    office = _office({"maxOutputTokensPerRequest": 100})
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
    office = _office({"maxOutputTokensPerRequest": 100}, hostAliases=[])
    run = office.run()
    call = openai_call(office, run, n=2)
    assert json.loads(call.sent)["max_completion_tokens"] == 50
    call = openai_call(office, run, host="llm.example", max_tokens=None)
    assert json.loads(call.sent)["max_tokens"] == 100
    assert office.entry().reserved.tokens < 1_000


def test_a_coded_request_without_a_limit_can_not_be_given_it():
    office = _office({"maxOutputTokensPerRequest": 100})
    head = RequestHead("POST", "https", "api.openai.com", 443, "/v1/chat/completions", "",
                       (*JSON, ("Content-Encoding", "gzip")))  # fmt: skip
    body = gzip.compress(b'{"model":"gpt-4o","messages":[]}')
    assert LlmExchange(office, office.run(), body, head).answer.reason == "budget_output_limit"
    body = gzip.compress(b'{"model":"gpt-4o","messages":[],"max_tokens":10}')
    call = LlmExchange(office, office.run(), body, head)
    assert (call.answer, call.sent) == (None, body)


# --- requests that can not be metered -------------------------------------------------------------------------------


def _raw(office: Office, body: bytes, *headers: tuple[str, str], path: str = "/v1/chat/completions",
         host: str = "api.openai.com", method: str = "POST", query: str = "") -> LlmExchange:  # fmt: skip
    head = RequestHead(method, "https", host, 443, path, query, headers or JSON)
    return LlmExchange(office, office.run(), body, head)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"not json", ()),
        (b'{"model":"gpt-4o","max_tokens":1,"max_tokens":100000}', ()),
        (b'{"model":"gpt-4o-mini","Model":"gpt-4o"}', ()),
        (b'{"model":"gpt-4o","n":"50"}', ()),
        (gzip.compress(b'{"model":"gpt-4o","max_tokens":5}')[:30], (("Content-Encoding", "gzip"),)),
        (b"{}", (("Content-Encoding", "snappy"),)),
    ],
)
def test_a_request_that_nobody_can_read_for_sure_is_refused(body, headers):
    office = _office({"maxTokensPerDay": 1_000_000})
    answer = _raw(office, body, *JSON, *headers).answer
    assert (answer.status, answer.reason) == (400, "budget_unreadable")
    assert "can not be metered" in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DENIED] is True
    assert office.ledger.entries("2026-11-28", 10) == []


def test_an_ambiguous_model_does_not_choose_a_rule_without_a_budget():
    office = Office(ai_route({"matches": [{"models": ["free"]}]}, budget_rule({"maxTokensPerDay": 10})))
    assert _raw(office, b'{"model":"gpt-4o","model":"free"}').answer.reason == "budget_unreadable"
    assert _raw(office, b'{"model":"free"}').answer is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"), ("POST", "/v1/audio/speech"), ("POST", "/v1/batches"),
        ("POST", "/v1/files"),
        ("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/chat//completions/x"), ("PUT", "/v1/chat/completions"),
        ("PATCH", "/v1/x"), ("post", "/v1/chat/completions"), ("POST", "/v1/messages/count_tokens/../batches"),
        ("POST", "/v1/chat/completions%2f"), ("POST", "/v1/x/../messages/count_tokens"),
        ("POST", "//v1/messages/count_tokens"), ("POST", "/v1/CHAT/COMPLETIONS"),
    ],
)  # fmt: skip
def test_what_a_budgeted_host_may_charge_for_and_nobody_can_count_is_refused(method, path):
    office = _office({"maxTokensPerDay": 1_000_000})
    answer = _raw(office, b'{"model":"gpt-4o"}', *JSON, ("Content-Length", "18"), method=method, path=path).answer
    assert (answer.status, answer.reason) == (403, "budget_unmetered")
    assert path in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DENIED] is True


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ((("Upgrade", "websocket"), ("Connection", "Upgrade")), ""),
        ((("X-HTTP-Method-Override", "POST"),), ""),
        ((("Transfer-Encoding", "chunked"),), ""),
        ((), "$httpMethod=POST"),
    ],
)
def test_a_get_that_may_be_more_than_reading_is_refused(headers, query):
    office = _office({"maxTokensPerDay": 1_000_000})
    body = b"{}" if any(name == "Transfer-Encoding" for name, _ in headers) else b""
    call = _raw(office, body, ("Accept", "*/*"), *headers, method="GET", path="/v1/realtime", query=query)
    assert call.answer.reason == "budget_unmetered"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("HEAD", "/v1/models"), ("DELETE", "/v1/files/file-1"), ("OPTIONS", "/")],
)
def test_reading_costs_nothing_and_passes(method, path):
    office = _office({"maxTokensPerDay": 0})
    assert _raw(office, b"", ("Accept", "*/*"), method=method, path=path).governor is None


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("api.anthropic.com", "/v1/messages/count_tokens"), ("api.openai.com", "/v1/moderations"),
        ("api.openai.com", "/v1/responses/input_tokens"), ("api.openai.com", "/v1/responses/resp_1/cancel"),
    ],
)  # fmt: skip
def test_counting_and_calling_off_cost_nothing_and_pass(host, path):
    office = _office({"maxTokensPerDay": 0})
    call = _raw(office, b"{}", *JSON, ("Content-Length", "2"), host=host, path=path)
    assert call.answer is None


def test_a_host_without_a_budget_is_not_concerned():
    office = _office({"maxTokensPerDay": 0}, {"provider": "anthropic"})
    assert _raw(office, b"{}", path="/v1/images/generations").governor is None
    assert openai_call(office, office.run()).governor is None
    office = _office({"maxTokensPerDay": 0})
    assert _raw(office, b"{}", host="tools.internal", path="/search").governor is None


def test_a_self_hosted_server_is_metered_where_its_host_is_listed():
    office = _office({"maxTokensPerDay": 0}, {"provider": "openai_compatible", "hostnames": ["llm.internal"]})
    assert openai_call(office, office.run(), host="llm.internal").answer.status == 429
    answer = _raw(office, b"{}", ("Content-Type", "text/plain"), host="llm.internal", path="/generate").answer
    assert answer.reason == "budget_unmetered"


def test_what_only_looks_like_an_api_of_llms_stays_plain_http():
    office = _office({"maxTokensPerDay": 0})
    assert _raw(office, b'{"text":"hello"}', host="chat.internal", path="/v1/messages").answer is None
    assert _raw(office, b'{"model":"gpt-4o"}', host="chat.internal", path="/v1/messages").answer.status == 429


def test_a_tunnel_to_a_budgeted_host_is_refused():
    office = _office({"maxTokensPerDay": 0}, {"provider": "openai"}, {"hostnames": ["llm.internal"]})
    run = office.run()
    assert run.refuses_tunnel("api.openai.com")
    assert run.refuses_tunnel("LLM.internal.")
    assert not run.refuses_tunnel("db.internal")
    assert not run.refuses_tunnel("api.anthropic.com")


# --- streams that go on ---------------------------------------------------------------------------------------------


def _delta(text: str) -> bytes:
    chunk = {"id": "c", "model": "gpt-4o", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def test_a_stream_without_a_limit_asks_for_more_as_it_goes():
    office = _office({"maxTokensPerExecution": 50_000, "maxTokensPerDay": 50_000})
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
    office = _office({"maxTokensPerExecution": 3_000})
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
    office = _office({"maxTokensPerExecution": 3_000})
    call = openai_call(office, office.run(), stream=True, max_tokens=2_000)
    call.head(200, "text/event-stream")
    piece = _delta("word " * 1_600)
    assert call.data(piece) == piece
    call.data(b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n')
    call.data(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1700}}\n\ndata: [DONE]\n\n')
    call.end()
    assert office.entry().used.tokens == 1_709


def test_a_stream_that_is_encoded_all_the_same_ends_where_it_is_visibly_no_end():
    office = _office({"maxTokensPerExecution": 3_000})
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
    office = _office({"maxTokensPerDay": 10, "maxOutputTokensPerRequest": 5_000, "maxUSDPerDay": 1}, mode=mode)
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
    office = _office({"maxOutputTokensPerRequest": 100})
    call = _raw(office, b'{"model":"gpt-4o","input":"hi","prompt":"hi"}', path=path)
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
    office = _office({"maxOutputTokensPerRequest": 100}, {}, own)
    call = _raw(office, json.dumps(body).encode(), host=host, path=path)
    assert call.answer is None
    assert json.loads(call.sent) == sent


def test_embeddings_generate_nothing():
    office = _office({"maxTokensPerDay": 1_000, "maxOutputTokensPerRequest": 1})
    call = _raw(office, b'{"model":"text-embedding-3-small","input":"hi"}', path="/v1/embeddings")
    assert office.entry().reserved.tokens < 200
    call.finish(object="list", data=[], model="text-embedding-3-small", usage={"prompt_tokens": 2, "total_tokens": 2})
    assert office.entry().used.tokens == 2
