"""Rules that are valid and that no call can get to: what `clrk-runtime check` and `clrk apply` note."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from budget_runs import ai_route
from hypothesis import given
from hypothesis import strategies as st
from policy_samples import gateway as sample_gateway
from resource_files import HEAD, documents

from clrk.core.resources import RuntimeSpec
from clrk.gateway.llm.budget_rules import LlmCall, compile_rules
from clrk.gateway.recognise import KnownHosts
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.load import load
from clrk.runtime.config.notes import notes_of

BUDGET = "filters: [{type: TokenBudget, tokenBudget: {maxTokensPerDay: 1k}}]"
TOOLS = "filters: [{type: ToolPolicy, toolPolicy: {maxCallsPerExecution: 1}}]"


def declared(kind: str, name: str, spec: str) -> str:
    return f"{HEAD}kind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def noted(tmp_path: Path, *texts: str, gateway: str = "{}") -> list[str]:
    (tmp_path / "all.yaml").write_text(documents(declared("EgressGateway", "default", gateway), *texts))
    return notes_of(load([tmp_path]))


def rules(kind: str, filters: str, *matches: str) -> str:
    return declared(kind, "r", "{rules: [" + ", ".join(f"{{matches: {one}, {filters}}}" for one in matches) + "]}")


@pytest.mark.parametrize(
    ("earlier", "later", "shadows"),
    [
        ("[]", "[{models: ['*opus*']}]", True),
        ("[{}]", "[]", True),
        ("[{models: ['*opus*']}]", "[]", False),
        ("[{models: ['*OPUS*']}]", "[{models: [claude-opus-4, 'x-opus-*']}]", True),
        ("[{models: ['*opus*']}]", "[{models: [claude-opus-4, '*']}]", False),
        ("[{provider: openai}]", "[{provider: openai, models: [gpt-5]}]", True),
        ("[{provider: openai}]", "[{provider: anthropic}]", False),
        ("[{provider: openai}]", "[{}]", False),
        ("[{endpoints: ['/v1/*']}]", "[{endpoints: [/v1/messages]}]", True),
        ("[{endpoints: [/v1/messages]}]", "[{endpoints: ['/v1/*']}]", False),
        ("[{hostnames: ['*.test']}]", "[{hostnames: [llm.test], provider: openai}]", True),
        ("[{hostnames: ['*.test']}]", "[{hostnames: [a.llm.test]}]", False),
        ("[]", "[{hostnames: [llm.test]}]", False),  # whose calls need not be of a known provider
        ("[{hostnames: [llm.test]}]", "[{provider: openai}]", False),
        ("[{models: [a]}, {models: [b]}]", "[{models: [a]}, {models: [b]}]", True),
        ("[{models: [a]}, {models: [b]}]", "[{models: [a]}, {models: [c]}]", False),
    ],
)
def test_a_budget_that_an_earlier_rule_keeps_every_call_from(tmp_path, earlier, later, shadows):
    note = "AIProviderRoute default/r rules[1]: no call gets to it, since AIProviderRoute default/r rules[0] fits each of its calls before"
    assert noted(tmp_path, rules("AIProviderRoute", BUDGET, earlier, later)) == [note] * shadows


def test_a_route_shadows_those_behind_it_of_the_same_gateway_only(tmp_path):
    routes = [
        declared("AIProviderRoute", name, f"{{gatewayRef: {{name: {to}}}, rules: [{{{BUDGET}}}]}}")
        for name, to in (("a", "default"), ("b", "other"), ("c", "default"))
    ]
    assert noted(tmp_path, declared("EgressGateway", "other", "{}"), *routes) == [
        "AIProviderRoute default/c rules[0]: no call gets to it, since AIProviderRoute default/a rules[0] fits each of its calls before"
    ]


_GLOBS = st.lists(st.sampled_from(["*", "a", "b", "a*", "*b", "ab"]), max_size=2)
_MATCH = st.fixed_dictionaries(
    {"endpoints": st.lists(st.sampled_from(["*", "/a", "/b", "/a*"]), max_size=2), "models": _GLOBS,
     "hostnames": st.lists(st.sampled_from(["x.test", "*.test", "**.test"]), max_size=1)},
    optional={"provider": st.sampled_from(["openai", "anthropic"])},
)  # fmt: skip


@given(rules=st.lists(st.lists(_MATCH, max_size=2), min_size=2, max_size=3))
def test_no_call_is_of_a_rule_that_is_noted(rules):
    """The note says "no call": one that gets there all the same would be a lie about a budget."""
    route, gateway = ai_route(*({"matches": matches} for matches in rules)), sample_gateway()
    ours = {("default", "default"): gateway}
    found = notes_of(
        Resources(RuntimeSpec(), {}, {}, ours, {}, {}, {}, {}, ai_routes={("default", route.metadata.name): route})
    )
    provider, compiled = KnownHosts(gateway, [route]).provider, compile_rules(gateway, [route])
    used = set()
    for host, path in product(("x.test", "y.x.test", "api.openai.com", "api.anthropic.com"), ("/a", "/b", "/ab", "/")):
        call = LlmCall.of(host, path, provider(host), recognised=True)
        for model in ("a", "b", "ab", "c", None):
            used.add(next((one.label for one in compiled if one.fits(call, model)), ""))
    assert not {label for label in used if any(note.startswith(f"{label}: no call") for note in found)}


@pytest.mark.parametrize(
    ("path", "meant"), [("/a/../b", "/b"), ("/%2e/b/", "/b/"), ("/.well-known/x", ""), ("/a//b", "")]
)
def test_dot_segments_that_no_client_sends(tmp_path, path, meant):
    note = f"EgressL4Route default/r rules[0]: clients resolve the dot segments of '{path}' before they send: write '{meant}'"
    route = declared("EgressL4Route", "r", f"{{rules: [{{hostnames: [a.test], http: {{paths: ['{path}']}}}}]}}")
    assert noted(tmp_path, route) == [note] * bool(meant)


@pytest.mark.parametrize(
    ("earlier", "later", "shadows"),
    [
        ("[]", "[{tools: [x]}]", True),
        ("[{tools: [x, y]}]", "[{tools: [x]}]", True),
        ("[{tools: [x]}]", "[{tools: [x, y]}]", False),
        ("[{tools: [x]}]", "[{methods: [tools/call]}]", False),
        ("[{methods: ['tools/*']}]", "[{methods: [tools/call], tools: [x]}]", True),
        ("[{toolsRegex: a+}]", "[{toolsRegex: a+, tools: [a]}]", True),
        ("[{toolsRegex: a+}]", "[{tools: [a]}]", False),
    ],
)
def test_a_tool_policy_that_an_earlier_rule_keeps_every_call_from(tmp_path, earlier, later, shadows):
    note = "MCPRoute default/r rules[1]: no call gets to it, since MCPRoute default/r rules[0] fits each of its calls before"
    assert noted(tmp_path, rules("MCPRoute", TOOLS, earlier, later)) == [note] * shadows


@pytest.mark.parametrize("match", ["[{tools: [x], toolsRegex: y+}]", "[{tools: [x], resources: ['file://*']}]"])
def test_a_match_that_asks_for_two_tools_at_once(tmp_path, match):
    (note,) = noted(tmp_path, rules("MCPRoute", TOOLS, match))
    assert note.startswith("MCPRoute default/r rules[0]: no tools/call fits its matches")


@pytest.mark.parametrize(
    ("rule", "tls", "unread"),
    [
        ("{hostnames: [a.test], http: {methods: [GET]}}", "{passthroughHosts: ['*.test']}", True),
        ("{hostnames: [a.test], http: {paths: [/x]}}", "{mode: Passthrough}", True),
        ("{cidrs: [10.0.0.0/8], http: {paths: [/x]}}", "{mode: Passthrough}", True),
        ("{hostnames: [a.test], http: {}}", "{mode: Passthrough}", False),
        ("{hostnames: [a.test], ports: [80], http: {methods: [GET]}}", "{mode: Passthrough}", False),
        ("{hostnames: [a.test, b.other], http: {methods: [GET]}}", "{passthroughHosts: ['*.test']}", False),
        ("{hostnames: [a.test], cidrs: [10.0.0.0/8], http: {methods: [GET]}}", "{passthroughHosts: ['*.test']}", False),
        ("{hostnames: [a.test]}", "{passthroughHosts: ['*.test']}", False),
    ],
)
def test_a_narrowed_rule_for_hosts_that_nobody_reads(tmp_path, rule, tls, unread):
    note = "EgressL4Route default/r rules[0]: EgressGateway 'default' does not open TLS to them, so only plain HTTP fits it"
    route = declared("EgressL4Route", "r", f"{{rules: [{rule}]}}")
    assert noted(tmp_path, route, gateway=f"{{tls: {tls}}}") == [note] * unread


def test_an_alias_that_another_one_has_already(tmp_path):
    aliases = (
        "[{hostnames: ['*.test'], address: '127.0.0.1:1'}, {hostnames: [a.test, b.other], address: '127.0.0.1:2'}]"
    )
    assert noted(tmp_path, gateway=f"{{hostAliases: {aliases}}}") == [
        "EgressGateway default/default hostAliases[1]: a.test is not looked for here, since hostAliases[0] has it"
    ]


@pytest.mark.parametrize(
    ("kind", "spec", "hostless"),
    [
        ("AIProviderRoute", f"{{rules: [{{{BUDGET}}}]}}", True),
        ("AIProviderRoute", "{rules: [{matches: [{models: [x]}, {provider: openai_compatible}]}]}", True),
        ("AIProviderRoute", "{rules: [{matches: [{models: [x]}, {provider: openai}]}]}", False),
        ("AIProviderRoute", "{rules: [{matches: [{hostnames: [a.test]}]}]}", False),
        ("MCPRoute", f"{{rules: [{{{TOOLS}}}]}}", True),
        ("MCPRoute", f"{{hostnames: [a.test], rules: [{{{TOOLS}}}]}}", False),
        ("EgressL4Route", "{rules: [{cidrs: [10.0.0.0/8]}]}", True),
        ("EgressL4Route", "{rules: [{hostnames: [a.test]}]}", False),
    ],
)
@pytest.mark.parametrize("hostnames", ["", "hostnames: [a.test], "], ids=["targets", "both"])
def test_a_credential_that_no_host_gets(tmp_path, kind, spec, hostless, hostnames):
    policy = f"{{{hostnames}targetRefs: [{{kind: {kind}, name: r}}], secretRef: {{name: s}}, target: {{type: Header}}}}"
    secret = HEAD + "kind: Secret\nmetadata: {name: s}\ndata: {token: x}\n"
    note = "CredentialInjectionPolicy default/c: its targetRefs are for no host in particular, so no call gets its credential; add hostnames"
    found = noted(tmp_path, declared(kind, "r", spec), declared("CredentialInjectionPolicy", "c", policy), secret)
    assert found == [note] * (hostless and not hostnames)


def test_one_file_with_nothing_to_note(tmp_path):
    assert (
        noted(tmp_path, declared("EgressL4Route", "r", "{rules: [{hostnames: [a.test]}, {hostnames: [a.test]}]}")) == []
    )
