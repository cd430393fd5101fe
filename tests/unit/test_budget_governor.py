"""The governor of LLM calls: what is reserved, refused and settled (CONTRACT section 12)."""

import json

import pytest
from budget_runs import (
    Office,
    ai_route,
    at,
    claude_call,
    estimate_of,
    office_of,
    openai_call,
    usage,
)

from clrk.gateway.budget import NANO, Amount
from clrk.gateway.llm.output_plan import FIRST_PORTION_TOKENS, LONGEST_ANSWER_TOKENS
from clrk.gateway.llm.spending import REFERENCE_TOKENS
from clrk.gateway.telemetry import attributes as attr

# --- reserve and settle ---------------------------------------------------------------------------------------------


def test_the_estimate_is_reserved_and_becomes_what_was_reported():
    office = office_of({"maxTokensPerDay": 10_000})
    call = openai_call(office, office.run(), max_tokens=500)
    assert office.entry().reserved.tokens == estimate_of(max_tokens=500) + 500
    call.finish(**usage(17, 20))
    assert (office.entry().used.tokens, office.entry().reserved.tokens) == (37, 0)
    assert call.sent == json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}],
                                    "max_tokens": 500}).encode()  # fmt: skip


def test_a_hundred_calls_at_once_never_pass_the_limit_and_what_was_not_used_comes_back():
    each = estimate_of(max_tokens=100) + 100
    office = office_of({"maxTokensPerDay": 10 * each})
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
    office = office_of({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), **more)
    assert 800 < office.entry().reserved.tokens < 1_000


def test_without_a_limit_a_stream_gets_a_first_portion_and_a_document_as_much_as_any_model_generates():
    office = office_of({"maxTokensPerDay": 10**6})
    run = office.run()
    openai_call(office, run, stream=True)
    assert FIRST_PORTION_TOKENS < office.entry().reserved.tokens < FIRST_PORTION_TOKENS + 200
    openai_call(office, run, n=2)
    assert office.entry().reserved.tokens > FIRST_PORTION_TOKENS + 2 * LONGEST_ANSWER_TOKENS


def test_documents_without_a_limit_do_not_overshoot_together():
    office = office_of({"maxTokensPerDay": 5_000})
    run = office.run()
    calls = [openai_call(office, run) for _ in range(10)]
    assert [call.answer is None for call in calls] == [True] + [False] * 9
    assert office.entry().reserved.tokens == 5_000  # all that is left
    assert "0 used, 5000 reserved by calls under way, 0 left" in calls[1].error["message"]
    assert "Say in the request how much output it may have" in calls[1].error["message"]
    calls[0].finish(**usage(10, 20_000))
    assert openai_call(office, run, max_tokens=1).answer.status == 429
    office = office_of({"maxTokensPerDay": 5_000})
    openai_call(office, office.run()).finish(**usage(10, 20))
    assert openai_call(office, office.run()).answer is None  # what was not used came back


def test_a_whole_answer_without_a_report_counts_for_a_first_portion_and_one_that_breaks_off_for_all_that_was_held():
    office = office_of({"maxTokensPerDay": 10**6})
    openai_call(office, office.run()).finish(choices=[])
    assert FIRST_PORTION_TOKENS < office.entry().used.tokens < FIRST_PORTION_TOKENS + 200
    call = openai_call(office, office.run())
    call.head()
    call.data(b'{"id":"x"')
    call.end(complete=False)
    assert office.entry().used.tokens > LONGEST_ANSWER_TOKENS


def test_documents_without_a_limit_get_the_dollars_that_are_left():
    office = office_of({"maxUSDPerDay": 0.01})
    run = office.run()
    call = openai_call(office, run)
    assert 0.0099 * NANO < office.entry().reserved.nano_usd <= 0.01 * NANO
    assert openai_call(office, run).answer is not None
    call.finish(**usage(1_000, 100))
    assert openai_call(office, run).answer is None


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
def test_a_call_that_the_provider_refused_costs_nothing(status):
    office = office_of({"maxTokensPerDay": 10_000})
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
    office = office_of({"maxTokensPerDay": 10_000})
    call = openai_call(office, office.run(), max_tokens=500)
    reserved = office.entry().reserved
    ends(call)
    assert (office.entry().used.tokens, office.entry().reserved) == (reserved.tokens, Amount())
    assert office.entry().used.nano_usd >= 500 * 10_000  # counted, if not limited


def test_a_call_that_never_left_costs_nothing():
    office = office_of({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), max_tokens=500).end(complete=False, sent=False)
    assert office.entry().taken == Amount()


def test_an_agent_that_leaves_after_the_answer_pays_what_was_reported_and_before_it_the_estimate():
    office = office_of({"maxTokensPerDay": 100_000})
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
    office = office_of({"maxTokensPerDay": 10_000})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(5_000, 6_000))
    assert office.entry().used.tokens == 11_000
    assert openai_call(office, run, max_tokens=1).answer.status == 429


def test_an_absurd_report_is_taken_for_as_much_as_one_call_can_be():
    office = office_of({"maxTokensPerDay": 10_000})
    openai_call(office, office.run(), max_tokens=10).finish(**usage(2**62, 2**62))
    assert office.entry().used.tokens == 2**41


def test_an_answer_that_is_read_again_counts_as_what_it_was():
    office = office_of({"maxTokensPerDay": 10**7})
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
    office = office_of({"maxTokensPerDay": 1_200})
    run = office.run()
    openai_call(office, run, max_tokens=500).finish(**usage(600, 300))
    assert openai_call(office, run, max_tokens=10).answer is None  # under way
    office.now = at("2026-11-28T23:59:30.5")
    call = openai_call(office, run, max_tokens=500)
    answer = call.answer
    assert (answer.status, answer.content_type, answer.reason) == (429, "application/json", "budget_exceeded")
    assert dict(answer.headers) == {"Retry-After": "30"}  # that soon the SDK may try again
    held, asked = estimate_of(max_tokens=10) + 10, estimate_of(max_tokens=500) + 500
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
    office = office_of({"maxTokensPerDay": 0})
    run = office.run()
    assert json.loads(claude_call(office, run).answer.body)["type"] == "error"
    assert claude_call(office, run).error["type"] == "rate_limit_error"
    assert {"message", "type", "param", "code"} <= set(openai_call(office, run).error)


def test_a_client_is_not_told_to_retry_for_hours():
    office = office_of({"maxTokensPerDay": 0})
    answer = openai_call(office, office.run()).answer
    assert dict(answer.headers) == {"Retry-After": str(12 * 3600), "x-should-retry": "false"}


def test_a_limit_of_the_run_does_not_end_by_waiting():
    office = office_of({"maxTokensPerExecution": 1_000, "maxTokensPerDay": 50_000})
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(900, 50))
    answer = openai_call(office, run, max_tokens=100).answer
    assert dict(answer.headers) == {"x-should-retry": "false"}
    assert "maxTokensPerExecution is 1000, 950 used" in answer.message
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_USED] == 950
    assert answer.attributes[attr.CLRK_BUDGET_DAILY_MAX] == 50_000
    assert openai_call(office, office.run(), max_tokens=100).answer is None  # another run has its own


def test_a_daemons_run_is_an_execution():
    office = office_of({"maxTokensPerExecution": 1_000})
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
    office = office_of({"maxTokensPerDay": 1_000})
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("a"), max_tokens=100).answer is not None
    assert openai_call(office, office.run("b"), max_tokens=100).answer is None


def test_a_route_is_shared_by_all_its_agents():
    office = office_of({"maxTokensPerDay": 1_000, "key": "route"})
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b"), max_tokens=100).answer is not None


def test_an_identity_shares_and_those_without_one_share_theirs():
    office = office_of({"maxTokensPerDay": 1_000, "key": "identity.tenant"})
    openai_call(office, office.run("a", tenant="acme"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b", tenant="acme"), max_tokens=100).answer is not None
    assert openai_call(office, office.run("a", tenant="other"), max_tokens=100).answer is None
    openai_call(office, office.run("a"), max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, office.run("b", user="x"), max_tokens=100).answer is not None


# --- days -----------------------------------------------------------------------------------------------------------


def test_the_day_ends_at_midnight_utc():
    office = office_of({"maxTokensPerDay": 1_000})
    run = office.run()
    office.now = at("2026-11-28T23:59:59")
    openai_call(office, run, max_tokens=10).finish(**usage(900, 90))
    assert openai_call(office, run, max_tokens=100).answer is not None
    office.now += 1
    assert openai_call(office, run, max_tokens=100).answer is None


def test_a_call_over_midnight_counts_on_the_day_on_which_it_began():
    office = office_of({"maxTokensPerDay": 1_000})
    run = office.run()
    office.now = at("2026-11-28T23:59:59")
    call = openai_call(office, run, max_tokens=100)
    office.now += 10
    call.finish(**usage(500, 50))
    assert office.entry().used.tokens == 550
    assert office.ledger.entries("2026-11-29", 10) == []


def test_a_clock_that_goes_back_gives_nothing_back():
    office = office_of({"maxTokensPerDay": 1_000})
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
    office = office_of({"maxUSDPerDay": 0.01})
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
    office = office_of({"maxUSDPerDay": 1})
    answer = openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).answer
    assert (answer.status, answer.reason) == (403, "budget_unknown_price")
    assert "gpt-of-tomorrow" in answer.message
    assert "prices of the EgressGateway" in answer.message
    office = office_of({"maxTokensPerDay": 10_000})
    assert openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).answer is None


def test_the_operators_price_goes_before_the_bundled_one():
    prices = [{"model": "gpt-*", "input": 1_000_000, "output": 0}]  # a dollar for each token of input
    office = office_of({"maxUSDPerDay": 1_000}, prices=prices)
    openai_call(office, office.run(), model="gpt-of-tomorrow", max_tokens=1).finish(**usage(7, 9))
    assert office.entry().used.nano_usd == 7 * NANO


def test_a_prompt_that_may_be_written_to_a_cache_is_reserved_at_what_that_costs():
    office = office_of({"maxUSDPerDay": 10})
    run = office.run()
    claude_call(office, run, max_tokens=1)
    plain = office.entry().reserved.nano_usd
    claude_call(
        office, run, max_tokens=1, system=[{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}]
    )
    assert office.entry().reserved.nano_usd - plain > 2 * plain
