"""Which rule is a call's, and which accounts it charges."""

import pytest
from budget_runs import Office, ai_route, budget_rule, openai_call

from clrk.gateway.llm.budget_rules import LlmCall, account_key, compile_rules, run_window
from clrk.gateway.llm.completion import Provider

OPENAI = Provider("openai", "openai", "openai")
DEEPSEEK = Provider("deepseek", "openai", "deepseek")
CLAUDE = Provider("anthropic", "anthropic", "anthropic")
BUDGET = {"maxTokensPerDay": 1000}


def _rules(*matches: dict, **more):
    office = Office()
    return compile_rules(office.gateway, [ai_route(budget_rule(BUDGET, *matches), **more)])


def _call(host="api.openai.com", path="/v1/chat/completions", provider=OPENAI, recognised=True):
    return LlmCall.of(host, path, provider, recognised=recognised)


@pytest.mark.parametrize(
    ("match", "model", "fits"),
    [
        ({}, "gpt-4o", True),
        ({"provider": "openai"}, "gpt-4o", True),
        ({"provider": "anthropic"}, "gpt-4o", False),
        ({"provider": "openai_compatible"}, "gpt-4o", False),
        ({"models": ["gpt-4o*"]}, "gpt-4o-mini", True),
        ({"models": ["GPT-4O*"]}, "gpt-4o", True),
        ({"models": ["gpt-4o*"]}, "GPT-4o", True),
        ({"models": ["gpt-4o*"]}, "gpt-4.1", False),
        ({"models": ["gpt-4o*"]}, None, True),
        ({"hostnames": ["api.openai.com"]}, "gpt-4o", True),
        ({"hostnames": ["*.openai.com"]}, "gpt-4o", True),
        ({"hostnames": ["llm.internal"]}, "gpt-4o", False),
        ({"hostnames": ["api.openai.com"], "provider": "anthropic"}, "gpt-4o", True),  # the operator's word
        ({"endpoints": ["/v1/chat/*"]}, "gpt-4o", True),
        ({"endpoints": ["*/completions"], "models": ["gpt-*"], "provider": "openai"}, "gpt-4o", True),
        ({"endpoints": ["/v1/embeddings"]}, "gpt-4o", False),
    ],
)
def test_everything_that_a_match_gives_has_to_fit(match, model, fits):
    (rule,) = _rules(match)
    assert rule.fits(_call(), model) is fits


def test_one_of_several_matches_is_enough():
    (rule,) = _rules({"provider": "anthropic"}, {"models": ["gpt-*"]})
    assert rule.fits(_call(), "gpt-4o")
    assert not rule.fits(_call(), "o3")


def test_a_server_that_speaks_openai_is_compatible_and_openai():
    assert _rules({"provider": "openai_compatible"})[0].fits(_call("api.deepseek.com", provider=DEEPSEEK), "x")
    assert _rules({"provider": "openai"})[0].fits(_call("api.deepseek.com", provider=DEEPSEEK), "x")


@pytest.mark.parametrize(
    "path",
    ["/v1//chat/completions", "/v1/./chat/completions", "/v1/%63hat/completions", "/x/../v1/chat/completions",
     "/v1/chat%2Fcompletions", "/v1/chat/completions;x", "/v1/%2563hat/completions"],
)  # fmt: skip
def test_no_spelling_of_a_path_escapes_an_endpoint(path):
    (rule,) = _rules({"endpoints": ["/v1/chat/completions"]})
    assert rule.may_fit(_call(path=path))


def test_a_call_to_nobody_that_is_known_fits_only_by_host():
    call = _call("tools.internal", "/search", None, recognised=False)
    assert not _rules({})[0].may_fit(call)
    assert not _rules({"provider": "openai"})[0].may_fit(call)
    assert _rules({"hostnames": ["tools.internal"]})[0].may_fit(call)


def test_routes_of_another_gateway_or_namespace_do_not_count():
    assert _rules(gateway="other") == ()
    assert _rules(namespace="team") == ()


def test_the_first_rule_of_the_first_route_is_tried_first():
    office = Office()
    routes = [ai_route(budget_rule(BUDGET), budget_rule(BUDGET), name="b"), ai_route(budget_rule(BUDGET), name="a")]
    labels = [rule.label for rule in compile_rules(office.gateway, routes)]
    assert labels == [f"AIProviderRoute default/{text}" for text in ("a rules[0]", "b rules[0]", "b rules[1]")]


def test_moving_a_rule_or_its_limits_keeps_its_accounts_and_other_matches_begin_anew():
    office = Office()
    mini, any_ = {"models": ["*mini*"]}, {"provider": "openai"}

    def digests(*rules):
        return [rule.digest for rule in compile_rules(office.gateway, [ai_route(*rules)])]

    before = digests(budget_rule(BUDGET, mini), budget_rule(BUDGET, any_))
    moved = digests(budget_rule({"maxTokensPerDay": 9}, any_), budget_rule(BUDGET, mini))
    assert moved == before[::-1]
    assert digests(budget_rule(BUDGET, any_, mini))[0] not in before


def test_who_shares_an_account():
    office = Office(ai_route(budget_rule(BUDGET)))
    identity = office._run("support", False, {"tenant": "acme"}).identity
    assert account_key("agent", identity) == "agent:default/support"
    assert account_key("route", identity) == "route"
    assert account_key("identity.tenant", identity) == "identity.tenant:acme"
    assert account_key("identity.user", identity) == "identity.user:"
    assert run_window(identity) == f"run:{identity.invocation_id}"
    daemon = office._run("support", True, {}).identity
    assert run_window(daemon) == f"run:{daemon.sandbox_id}"


def test_a_budget_charges_the_day_and_the_run_and_what_is_the_same_once():
    filters = [
        {"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 100, "maxTokensPerExecution": 10}},
        {"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 50, "maxUSDPerExecution": 0.5, "key": "agent"}},
        {"type": "TokenBudget", "tokenBudget": {"maxUSDPerDay": 2, "key": "route"}},
    ]
    office = Office()
    (rule,) = compile_rules(office.gateway, [ai_route({"filters": filters})])
    identity = office._run("support", False, {}).identity
    found = {
        (charge.account.key, charge.account.window.split(":")[0]): (charge.max_tokens, charge.max_nano_usd)
        for charge in rule.charges(identity, "2026-11-28")
    }
    assert found == {
        ("agent:default/support", "2026-11-28"): (50, None),
        ("agent:default/support", "run"): (10, 500_000_000),
        ("route", "2026-11-28"): (None, 2_000_000_000),
    }


def test_a_run_without_a_budget_has_no_governor():
    office = Office(ai_route({"matches": [{"provider": "openai"}]}))
    assert office.budgets.of_run(office._run("support", False, {}), office.routes, office.hosts.provider) is None


def test_a_first_rule_without_a_budget_lets_its_calls_go():
    office = Office(ai_route({"matches": [{"models": ["*mini*"]}]}, budget_rule({"maxTokensPerDay": 0})))
    run = office.run()
    assert openai_call(office, run, model="gpt-4o-mini").answer is None
    assert openai_call(office, run, model="gpt-4o").answer is not None
