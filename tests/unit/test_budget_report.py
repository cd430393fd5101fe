"""What `clrk budgets`, the admin API and the page say of the ledger."""

from __future__ import annotations

import json

import pytest
from budget_runs import Office, ai_route, at, budget_rule, openai_call, usage

from clrk.gateway.admin.budgets import parse_day
from clrk.gateway.admin.page.rendering import render
from clrk.gateway.admin.parameters import ParameterError
from clrk.gateway.cli.budgets import _rows

DAY = "2026-11-28"


def _report(office: Office, day: str | None = None) -> list[dict]:
    return office.budgets.report([office.gateway], office.routes, day)["items"]


def test_an_account_says_what_was_used_is_held_is_left_and_when_it_begins_anew():
    office = Office(ai_route(budget_rule({"maxTokensPerDay": 1_000, "maxUSDPerDay": 2, "maxTokensPerExecution": 400})))
    run = office.run(tenant="acme")
    openai_call(office, run, max_tokens=10).finish(**usage(100, 20))
    openai_call(office, run, max_tokens=10)
    day, execution = _report(office)
    held = day["tokens"]["reserved"]
    assert day["tokens"] == {"used": 120, "reserved": held, "limit": 1_000, "left": 880 - held}
    assert day["usd"]["used"] == pytest.approx(100 * 2.5e-6 + 20 * 10e-6)
    assert day["usd"]["limit"] == 2
    assert day["usd"]["left"] == pytest.approx(2 - day["usd"]["used"] - day["usd"]["reserved"])
    assert (day["gateway"], day["route"], day["rule"]) == ("default/default", "default/llm", 0)
    assert (day["key"], day["agent"], day["day"], day["execution"]) == (
        "agent:default/support", "default/support", DAY, None,
    )  # fmt: skip
    assert day["resetTimeUnixNano"] == int(at("2026-11-29T00:00:00") * 1e9)
    assert execution["tokens"]["limit"] == 400
    assert execution["usd"]["limit"] is None
    assert (execution["resetTimeUnixNano"], execution["day"]) == (None, None)
    assert run._spender.identity.invocation_id == execution["execution"]
    json.dumps([day, execution])


def test_a_run_that_ended_is_not_shown_and_yesterday_is_where_it_was():
    office = Office(ai_route(budget_rule({"maxTokensPerExecution": 400})))
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(1, 1))
    assert [item["execution"] is None for item in _report(office)] == [True, False]
    office.budgets.end_run(run._spender.identity)
    assert [item["execution"] is None for item in _report(office)] == [True]
    office.now += 86_400
    assert [(item["key"], item["tokens"]["used"]) for item in _report(office)] == [("agent", 0)]
    assert [(item["day"], item["tokens"]["used"]) for item in _report(office, DAY)] == [(DAY, 2)]


def test_a_budget_that_nobody_touched_is_shown_whole():
    office = Office(
        ai_route(
            budget_rule({"maxTokensPerDay": 7, "key": "route"}, {"models": ["o3"]}), budget_rule({"maxUSDPerDay": 0.5})
        )
    )
    first, second = _report(office)
    assert (first["key"], first["tokens"]["left"], first["rule"]) == ("route", 7, 0)
    assert (second["key"], second["usd"]["left"], second["rule"]) == ("agent", 0.5, 1)


def test_an_account_whose_rule_is_gone_keeps_its_numbers_and_has_no_limit():
    office = Office(ai_route(budget_rule({"maxTokensPerDay": 700}, {"models": ["gpt-*"]})))
    openai_call(office, office.run(), max_tokens=10).finish(**usage(1, 1))
    office.routes = (ai_route(budget_rule({"maxTokensPerDay": 9}, {"models": ["o3"]})),)
    gone, fresh = _report(office)
    assert (gone["rule"], gone["tokens"]["used"], gone["tokens"]["limit"]) == (None, 2, None)
    assert fresh["tokens"]["limit"] == 9


def test_keys_of_callers_do_not_reach_the_terminal_or_the_page_as_more_than_text():
    office = Office(ai_route(budget_rule({"maxTokensPerDay": 7_000, "key": "identity.tenant"})))
    openai_call(office, office.run(tenant="<script>alert(1)</script>"), max_tokens=10).finish(**usage(1, 1))
    html = render("budgets.html", view="Budgets", live=True, report={"day": DAY, "items": _report(office)})
    assert "&lt;script&gt;alert(1)" in html
    assert "<script>alert" not in html


def test_the_table_has_a_line_for_each_unit_that_matters():
    office = Office(
        ai_route(budget_rule({"maxTokensPerDay": 1_000}, {"models": ["o3"]}), budget_rule({"maxUSDPerDay": 0.25}))
    )
    tokens, money = (_rows(item) for item in _report(office))
    assert tokens == [
        ("default/llm rules[0]", "agent", DAY, "tokens", "0", "0", "1000", "1000", "2026-11-29T00:00Z"),
    ]
    assert money[1] == (
        "default/llm rules[1]",
        "agent",
        DAY,
        "USD",
        "0.00",
        "0.00",
        "0.25",
        "0.25",
        "2026-11-29T00:00Z",
    )


@pytest.mark.parametrize(("query", "day"), [({}, None), ({"day": ""}, None), ({"day": DAY}, DAY)])
def test_days_that_can_be_asked_for(query, day):
    assert parse_day(query) == day


@pytest.mark.parametrize("query", [{"day": "yesterday"}, {"day": "20261128"}, {"day": "2026-02-30"}, {"days": DAY},
                                   {"day": "\uff12\uff10\uff12\uff16-11-28"}])  # fmt: skip
def test_what_is_no_day_is_said(query):
    with pytest.raises(ParameterError):
        parse_day(query)


def test_of_two_rules_with_the_same_matches_the_first_is_every_calls_and_shown():
    office = Office(ai_route(budget_rule({"maxTokensPerDay": 900}), budget_rule({"maxTokensPerDay": 20})))
    run = office.run()
    openai_call(office, run, max_tokens=10).finish(**usage(100, 20))
    (day,) = _report(office)
    assert (day["rule"], day["tokens"]["limit"], day["tokens"]["left"]) == (0, 900, 780)
    assert openai_call(office, run, max_tokens=10).answer is None
