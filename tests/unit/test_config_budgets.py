"""Budgets that could not be kept are mistakes in the configuration."""

from __future__ import annotations

import pytest
from resource_files import GATEWAY, HEAD, documents, problems_of

from clrk.runtime.config.load import load

_FILTERS = "filters: [{type: TokenBudget, tokenBudget: {maxTokensPerDay: 100k}}]"


def _route(rule: str) -> str:
    return HEAD + f"kind: AIProviderRoute\nmetadata: {{name: llm}}\nspec:\n  rules: [{{{rule}}}]\n"


def _problems(tmp_path, rule: str, tls: str = "{}") -> list[str]:
    return problems_of(tmp_path, documents(GATEWAY + f"spec: {{tls: {tls}}}\n", _route(rule)))


@pytest.mark.parametrize(
    "rule",
    [_FILTERS, f"matches: [{{hostnames: [llm.internal]}}], {_FILTERS}", "matches: [{hostnames: [passed.internal]}]"],
)
def test_a_budget_is_valid_as_it_stands(tmp_path, rule):
    text = documents(
        GATEWAY + "spec: {tls: {passthroughHosts: [x, '*.llm.internal', passed.internal]}}\n", _route(rule)
    )
    (tmp_path / "f.yaml").write_text(text)
    assert list(load([tmp_path / "f.yaml"], {}).ai_routes) == [("default", "llm")]


@pytest.mark.parametrize("pattern", ["llm.internal", "'*.internal'", "'**.internal'"])
def test_a_budget_on_a_host_that_is_passed_through_is_a_mistake(tmp_path, pattern):
    rule = f"matches: [{{provider: openai}}, {{hostnames: [x.y, llm.internal]}}], {_FILTERS}"
    (problem,) = _problems(tmp_path, rule, f"{{passthroughHosts: [{pattern}]}}")
    assert (
        "AIProviderRoute/llm: spec.rules[0].matches[1].hostnames[1]: llm.internal is in tls.passthroughHosts" in problem
    )


def test_a_budget_where_nothing_is_opened_is_a_mistake(tmp_path):
    (problem,) = _problems(tmp_path, _FILTERS, "{mode: Passthrough}")
    assert "spec.rules[0].filters: EgressGateway 'default' has tls.mode Passthrough" in problem


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        (
            "maxTokensPerDay: 2MB",
            "maxTokensPerDay: '2MB' is not a number of tokens; write for example 5000, 200k or 2M",
        ),
        ("maxTokensPerDay: 1, key: tenant", "key: not a key; valid: agent, route, identity.FIELD of an extractor"),
    ],
)
def test_a_budget_that_can_not_be_read(tmp_path, budget, problem):
    (found,) = _problems(tmp_path, f"filters: [{{type: TokenBudget, tokenBudget: {{{budget}}}}}]")
    assert found.endswith(f"spec.rules[0].filters[0].tokenBudget.{problem}")


def test_backend_refs_are_refused_by_name(tmp_path):
    (problem,) = _problems(tmp_path, "backendRefs: [{hostname: other.internal}]")
    assert "spec.rules[0].backendRefs: is part of the contract but not in this version; remove it" in problem


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ("{}", "give at least one limit, such as maxTokensPerDay"),
        ("{maxTokensPerDay: -1}", "maxTokensPerDay"),
        ("{maxTokensPerDay: 1.5}", "maxTokensPerDay"),
        ("{maxUsdPerDay: 1}", 'did you mean "maxUSDPerDay"?'),
        ("{maxTokensPerDay: 1, key: tenant}", "key"),
    ],
)
def test_what_is_no_budget(tmp_path, budget, problem):
    (found,) = _problems(tmp_path, f"filters: [{{type: TokenBudget, tokenBudget: {budget}}}]")
    assert problem in found
