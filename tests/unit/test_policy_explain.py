"""`clrk policy explain`: what it says is what the relay does, since it asks the same code."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

from typing import Any

import pytest
import yaml
from policy_samples import gateway, route
from span_samples import config

from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.policy import EgressPolicy
from clrk.gateway.policy_explain import PlannedCall, UnreadableCallError, explain

RULES = [
    {"hostnames": ["api.example.com"], "ports": [443]},
    {"hostnames": ["tools.example.com"], "http": {"methods": ["GET"], "paths": ["/open"]}},
    {"cidrs": ["10.0.0.0/8"], "ports": [5432]},
]


def told(
    method: str, url: str, *rules: dict[str, Any], more: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    declared = gateway(**spec)
    made = config([declared]).model_copy(update={"routes": [route(*(rules or RULES))], **(more or {})})
    guard = AddressGuard(["10.0.0.5"], lambda _: False)
    return explain(made, declared, PlannedCall.parse(method, url), guard.refusal)


@pytest.mark.parametrize(
    ("method", "url", "allowed", "reason", "rule"),
    [
        ("GET", "https://api.example.com/x?y=1", True, "rule", "EgressL4Route default/web rules[0]"),
        ("GET", "https://API.example.com./x", True, "rule", "EgressL4Route default/web rules[0]"),
        ("GET", "https://api.example.com:8443/x", False, "port_not_allowed", "EgressL4Route default/web rules[0]"),
        ("GET", "http://tools.example.com/open/x", True, "rule", "EgressL4Route default/web rules[1]"),
        ("POST", "http://tools.example.com/open/x", False, "http_not_allowed", "EgressL4Route default/web rules[1]"),
        ("GET", "http://tools.example.com/open/..%2fx", False, "http_not_allowed", "EgressL4Route default/web rules[1]"),
        ("GET", "https://evil.test/", False, "name_not_allowed", "EgressGateway default/default defaultPolicy"),
        ("GET", "tcp://tools.example.com:80", False, "http_only", "EgressL4Route default/web rules[1]"),
        ("GET", "tcp://10.1.2.3:5432", True, "rule", "EgressL4Route default/web rules[2]"),
        ("GET", "tcp://10.1.2.3:22", False, "port_not_allowed", "EgressL4Route default/web rules[2]"),
        ("GET", "http://169.254.169.254/latest/meta-data", False, "no_rule", "EgressGateway default/default defaultPolicy"),
    ],
)  # fmt: skip
def test_verdicts_name_their_rule(method: str, url: str, allowed: bool, reason: str, rule: str) -> None:
    found = told(method, url)
    assert (found["allowed"], found["reason"], found["rule"]) == (allowed, reason, rule)
    assert found["wouldDeny"] is None
    if not allowed and "..%2f" not in url:
        mended = told(method, url, *RULES, *yaml.safe_load(found["addRule"]))
        assert mended["allowed"], mended


def test_an_address_of_the_host_is_refused_whatever_the_mode() -> None:
    everything = {"defaultPolicy": "allow-all", "mode": "Shadow"}
    found = told("GET", "http://127.0.0.1/", {"hostnames": ["x.test"]}, **everything)
    assert (found["allowed"], found["reason"]) == (False, "address_loopback")
    assert yaml.safe_load(found["addRule"]) == [{"cidrs": ["127.0.0.1/32"], "ports": [80]}]


def test_a_mode_that_watches() -> None:
    found = told("GET", "https://evil.test/", mode="Shadow")
    assert (found["allowed"], found["wouldDeny"], found["mode"]) == (True, "name_not_allowed", "Shadow")
    assert yaml.safe_load(found["addRule"]) == [{"hostnames": ["evil.test"], "ports": [443]}]
    assert told("GET", "https://api.example.com/", mode="Record")["wouldDeny"] is None


def test_tls_and_what_else_applies() -> None:
    def made(kind: Any, name: str, spec: dict[str, Any]) -> Any:
        return kind.model_validate({"kind": kind.__name__, "metadata": {"name": name}, "spec": spec})

    more = {
        "ai_routes": [
            made(
                AIProviderRoute, "models",
                {"rules": [{"matches": [{"hostnames": ["other.test"]}]}, {"matches": [{"hostnames": ["api.example.com"]}]}]},
            )
        ],
        "mcp_routes": [made(MCPRoute, "tools", {"hostnames": ["*.example.com"], "rules": [{"matches": [{"tools": ["x"]}]}]})],
        "credential_policies": [
            made(
                CredentialInjectionPolicy, "key",
                {"hostnames": ["api.example.com"], "secretRef": {"name": "s"},
                 "target": {"type": "Header", "headerName": "Authorization"}},
            )
        ],
    }  # fmt: skip
    found = told("GET", "https://api.example.com/", more=more)
    assert (found["tls"], found["aiProviderRoutes"], found["mcpRoutes"]) == (
        "intercept",
        ["default/models rules[1]"],
        ["tools"],
    )
    assert found["credentials"] == ["default/key"]
    plain = told("GET", "http://api.example.com:443/", more=more)
    assert (plain["tls"], plain["credentials"]) == ("none", [])  # never over plain HTTP
    tunnelled = told("GET", "https://api.example.com/", more=more, tls={"passthroughHosts": ["api.example.com"]})
    assert (tunnelled["tls"], tunnelled["credentials"]) == ("passthrough", [])
    assert (tunnelled["aiProviderRoutes"], tunnelled["mcpRoutes"]) == ([], [])  # nobody reads what is in it
    assert [step["step"] for step in tunnelled["steps"]] == ["name", "tunnel"]


@pytest.mark.parametrize(
    ("method", "url", "rules"),
    [
        ("POST", "https://api.anthropic.com/v1/messages", [0, 2]),
        ("POST", "https://api.openai.com/v1/chat/completions", [1, 2]),
        ("POST", "https://llm.internal/v1/chat/completions", [1, 2]),  # the path says whose API it is
        ("POST", "https://api.example.com/orders", []),
        ("GET", "tcp://api.openai.com:443", []),
    ],
)
def test_rules_for_models_are_those_that_may_be_the_calls(method: str, url: str, rules: list[int]) -> None:
    declared = [
        {"matches": [{"provider": "anthropic"}]},
        {"matches": [{"provider": "openai", "models": ["gpt-*"]}]},
        {},
    ]
    document = {"kind": "AIProviderRoute", "metadata": {"name": "llm"}, "spec": {"rules": declared}}
    found = told(method, url, more={"ai_routes": [AIProviderRoute.model_validate(document)]}, defaultPolicy="allow-all")
    assert found["aiProviderRoutes"] == [f"default/llm rules[{index}]" for index in rules]


@pytest.mark.parametrize("query", ["?_method=delete", "?a=1&X-HTTP-Method-Override=DELETE", "?%5fmethod=PATCH"])
def test_a_query_that_may_replace_the_method_is_judged_as_it_is_on_its_way(query: str) -> None:
    assert told("GET", f"http://tools.example.com/open{query}")["reason"] == "http_not_allowed"
    assert told("GET", "http://tools.example.com/open?method=of+payment")["allowed"]


def test_a_method_of_two_words_can_be_allowed() -> None:
    search = {"hostnames": ["media.example.com"], "http": {"methods": ["M-SEARCH"]}}
    assert told("M-SEARCH", "http://media.example.com/", search)["allowed"]
    hint = told("VERSION-CONTROL", "http://media.example.com/", search)["addRule"]
    assert told("VERSION-CONTROL", "http://media.example.com/", search, *yaml.safe_load(hint))["allowed"]


BUDGET = {"filters": [{"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 10}}]}
JUDGED = {
    "mcp_routes": [MCPRoute.model_validate({"kind": "MCPRoute", "metadata": {"name": "m"}, "spec": {"hostnames": ["mcp.test"], "rules": [{"filters": [{"type": "ToolPolicy", "toolPolicy": {"deniedTools": ["rm"]}}]}]}})],
    "ai_routes": [AIProviderRoute.model_validate({"kind": "AIProviderRoute", "metadata": {"name": "a"}, "spec": {"rules": [{"matches": [{"hostnames": ["llm.test"]}], **BUDGET}]}})],
}  # fmt: skip


@pytest.mark.parametrize("url", ["tcp://mcp.test:443", "tcp://llm.test:443", "https://mcp.test/", "https://llm.test/"])
def test_no_tunnel_goes_to_a_host_whose_every_call_is_judged(url: str) -> None:
    """As admission denies it: tests/unit/egress/test_egress_mcp.py and test_egress_budgets.py."""
    spec = {"defaultPolicy": "allow-all", "tls": {"passthroughHosts": ["mcp.test", "llm.test"]}}
    found = told("GET", url, more=JUDGED, **spec)
    assert (found["allowed"], found["reason"], found["steps"][-1]["step"]) == (False, "http_only", "tunnel")
    assert told("GET", url, more=JUDGED, mode="Shadow", **spec)["allowed"]
    assert told("GET", "tcp://other.test:443", more=JUDGED, **spec)["allowed"]


def test_the_rule_to_add_is_the_smallest_and_never_one_that_is_refused() -> None:
    found = told("GET", "https://evil.test/x")
    assert yaml.safe_load(found["addRule"]) == [
        {"hostnames": ["evil.test"], "ports": [443]}
    ]  # the name alone knows no port
    odd = told("get", "http://tools.example.com/open")
    assert (odd["allowed"], yaml.safe_load(odd["addRule"])) == (False, None)
    assert "capitals" in odd["addRule"]


def test_without_a_gateway() -> None:
    found = explain(config([]), None, PlannedCall.parse("GET", "https://a.test"), lambda _: None)
    assert (found["allowed"], found["reason"], found["gateway"]) == (False, "no_gateway", None)


def test_what_goes_nowhere_is_not_explained_away() -> None:
    with pytest.raises(UnreadableCallError, match="is no proxy"):
        PlannedCall.parse("CONNECT", "https://api.example.com/")


@pytest.mark.parametrize("url", ["https://", "//a.test/x", "https://a.test:0/", "https://a.test/a b", "https://a.test/\x01", "https://a..b/", "https://me:pw@a.test/", "ftp://a.test/", "tcp://a.test", "https://a:99999/", "", "http://0x7f.1/"])  # fmt: skip
def test_what_can_not_be_read_is_said(url: str) -> None:
    with pytest.raises(UnreadableCallError):
        PlannedCall.parse("GET", url)


@pytest.mark.parametrize("mode", ["Enforce", "Shadow"])
def test_it_says_what_the_policy_says(mode: str) -> None:
    compiled = EgressPolicy.compile(gateway(mode=mode), [route(*RULES)])
    for host in ("api.example.com", "tools.example.com", "evil.test"):
        for port in (443, 80, 8443):
            for path in ("/open", "/shut", "/open/../shut"):
                verdict = compiled.request(host, None, port, "GET", path)
                found = told("GET", f"http://{host}:{port}{path}", mode=mode)
                assert found["allowed"] is not compiled.holds(verdict), (host, port, path)
