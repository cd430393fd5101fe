"""MCPRoutes and ToolPolicies: which rule fits a message, which tool it allows, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import MCPRoute
from clrk.gateway.mcp.strict import Message
from clrk.gateway.mcp.tool_policy import CallCounts, HostPolicy, McpPolicy

GATEWAY = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": {}})


def route(name: str = "r", namespace: str = "default", **spec: Any) -> MCPRoute:
    meta = {"name": name, "namespace": namespace}
    return MCPRoute.model_validate({"kind": "MCPRoute", "metadata": meta, "spec": {"hostnames": ["mcp.x"]} | spec})


def tools(**policy: Any) -> dict[str, Any]:
    return {"filters": [{"type": "ToolPolicy", "toolPolicy": policy}]}


def policy(*rules: dict[str, Any]) -> HostPolicy:
    found = McpPolicy.compile(GATEWAY, [route(rules=list(rules))]).of_host(["mcp.x"], is_mcp=False)
    assert found is not None
    return found


def call(tool: str) -> Message:
    return Message("tools/call", 1, tool)


def reasons(found: HostPolicy, *messages: Message, counts: CallCounts | None = None) -> list[str | None]:
    verdicts, _ = found.judge(messages, counts or CallCounts())
    return [verdict.reason if verdict else None for verdict in verdicts]


@pytest.mark.parametrize(
    ("wanted", "allowed", "denied"),
    [
        ({}, ["a", ""], []),
        (
            {"allowedTools": ["a", "b"]},
            ["a", "b"],
            ["A", "c", "a ", "ab", "", "a\u200b", "\u0430"],
        ),  # the last is Cyrillic
        ({"deniedTools": ["a"]}, ["b", "A", "aa"], ["a"]),
        ({"allowedTools": ["a", "b"], "deniedTools": ["b"]}, ["a"], ["b", "c"]),
        ({"allowedToolsRegex": "get_.*"}, ["get_x", "get_"], ["xget_x", "set_x", "get"]),
        ({"allowedToolsRegex": "a|b"}, ["a", "b"], ["ab", "ba", "a\n"]),
        ({"deniedToolsRegex": "del.*|rm"}, ["xdel", "rms"], ["del", "delete", "rm"]),
        ({"allowedTools": ["x"], "allowedToolsRegex": "get_.*"}, ["x", "get_y"], ["y"]),
        ({"allowedToolsRegex": ".*", "deniedToolsRegex": "(?i)DEL.*"}, ["get"], ["delete", "Delete"]),
    ],
)
def test_names(wanted: dict[str, Any], allowed: list[str], denied: list[str]) -> None:
    found = policy(tools(**wanted))
    assert [tool for tool in allowed if not found.shows(tool)] == []
    assert [tool for tool in denied if found.shows(tool)] == []
    assert reasons(found, *map(call, allowed)) == [None] * len(allowed)
    assert reasons(found, *map(call, denied)) == ["tool_denied"] * len(denied)


def test_a_denial_says_what_would_lift_it() -> None:
    found = policy(tools(allowedTools=["a", "b"], deniedTools=["b"], deniedToolsRegex="c+"))
    verdicts, _ = found.judge([call("b"), call("cc"), call("d")], CallCounts())
    assert [verdict.message if verdict else None for verdict in verdicts] == [
        "tool 'b' is denied by deniedTools of MCPRoute default/r rules[0]",
        "tool 'cc' is denied by deniedToolsRegex of MCPRoute default/r rules[0]",
        "tool 'd' is not allowed by MCPRoute default/r rules[0]; add it to allowedTools there",
    ]


def test_a_pattern_that_other_engines_never_finish_takes_no_time() -> None:
    found = policy(tools(allowedToolsRegex="(a*)*b"))
    assert not found.shows("a" * 50_000)


@pytest.mark.parametrize(
    ("match", "fits", "fits_not"),
    [
        ({"tools": ["a"]}, [call("a")], [call("b"), Message("ping", 1)]),
        ({"toolsRegex": "a+"}, [call("aa")], [call("ab"), Message("ping", 1)]),
        ({"methods": ["tools/*"]}, [call("z")], [Message("ping", 1)]),
        ({"methods": ["tools/call"], "tools": ["a"]}, [call("a")], [call("b")]),
        ({"resources": ["file://a/*"]}, [Message("resources/read", 1, uri="file://a/b")], [call("a")]),
    ],
)
def test_matches(match: dict[str, Any], fits: list[Message], fits_not: list[Message]) -> None:
    first, second = {"matches": [match]} | tools(maxCallsPerExecution=7), tools(maxCallsPerExecution=8)
    rules = McpPolicy.compile(GATEWAY, [route(rules=[first, second])]).routes[0]
    assert [rules.policies(message)[0].max_calls for message in fits] == [7] * len(fits)
    assert [rules.policies(message)[0].max_calls for message in fits_not] == [8] * len(fits_not)


def test_the_first_rule_that_fits_decides_alone() -> None:
    found = policy(
        {"matches": [{"tools": ["a"]}]},
        {"matches": [{"tools": ["b"]}, {"tools": ["c"]}]} | tools(),
        tools(deniedToolsRegex=".*"),
    )
    assert reasons(found, call("a"), call("b"), call("c"), call("d")) == [None, None, None, "tool_denied"]
    assert reasons(policy({"matches": [{"tools": ["a"]}]} | tools(deniedTools=["a"])), call("b"), call("a")) == [
        None,
        "tool_denied",
    ]


def test_a_list_of_no_tools_is_an_error() -> None:
    with pytest.raises(ValueError, match="allows every tool"):
        route(rules=[tools(allowedTools=[])])
    handed_over = route(rules=[tools()]).model_dump_json(by_alias=True)
    assert MCPRoute.model_validate_json(handed_over) == route(rules=[tools()])


def test_only_tools_are_restricted() -> None:
    others = [Message(method, 1) for method in ("initialize", "tools/list", "resources/read", "x/y", "")]
    assert reasons(policy(tools(allowedTools=["a"])), *others) == [None] * 5


def test_every_route_and_every_filter_has_its_say() -> None:
    one = route("one", rules=[tools(allowedTools=["a", "b"])])
    both = {"filters": tools(allowedTools=["b", "c"])["filters"] + tools(deniedTools=["c"])["filters"]}
    found = McpPolicy.compile(GATEWAY, [one, route("two", rules=[both])]).of_host(["mcp.x"], is_mcp=False)
    assert found is not None
    verdicts, _ = found.judge([call(tool) for tool in "abc"], CallCounts())
    assert [verdict.rule if verdict else None for verdict in verdicts] == [
        "MCPRoute default/two rules[0] filters[0]", None, "MCPRoute default/one rules[0]",
    ]  # fmt: skip
    assert [tool for tool in "abc" if found.shows(tool)] == ["b"]


def test_calls_are_counted_over_bodies_and_within_one() -> None:
    found, counts = policy(tools(maxCallsPerExecution=3)), CallCounts()
    assert reasons(found, call("a"), call("b"), Message("tools/list", 1), counts=counts) == [None] * 3
    assert reasons(found, call("a"), call("b"), counts=counts) == [None, "tool_calls_exceeded"]
    assert reasons(found, call("a"), counts=counts) == [None]  # of the body before none went out
    assert reasons(found, call("c"), counts=counts) == ["tool_calls_exceeded"]
    assert reasons(policy(tools(maxCallsPerExecution=0)), call("a")) == ["tool_calls_exceeded"]


def test_calls_that_never_went_out_are_given_back() -> None:
    found, counts = policy(tools(maxCallsPerExecution=1)), CallCounts()
    verdicts, taken = found.judge([call("a")], counts)
    assert verdicts == [None]
    assert reasons(found, call("a"), counts=counts) == ["tool_calls_exceeded"]
    counts.give_back(taken)
    assert reasons(found, call("a"), counts=counts) == [None]


def test_rules_count_by_themselves() -> None:
    first = {"matches": [{"tools": ["a"]}]} | tools(maxCallsPerExecution=1)
    found, counts = policy(first, tools(maxCallsPerExecution=1)), CallCounts()
    assert reasons(found, call("a"), call("b"), counts=counts) == [None, None]
    assert reasons(found, call("a"), counts=counts) == ["tool_calls_exceeded"]


def test_a_rule_that_is_moved_keeps_its_count_and_gives_it_to_no_other() -> None:
    counted = {"matches": [{"tools": ["a"]}]} | tools(maxCallsPerExecution=1)
    counts = CallCounts()
    assert reasons(policy(counted), call("a"), counts=counts) == [None]
    moved = policy({"matches": [{"tools": ["b"]}]} | tools(maxCallsPerExecution=1), counted)
    assert reasons(moved, call("a"), counts=counts) == ["tool_calls_exceeded"]
    assert reasons(moved, call("b"), counts=counts) == [None]


def test_two_limits_of_one_rule_count_a_call_once() -> None:
    both = tools(maxCallsPerExecution=2)["filters"] + tools(maxCallsPerExecution=3)["filters"]
    found, counts = policy({"filters": both}), CallCounts()
    assert reasons(found, call("a"), call("b"), counts=counts) == [None, None]
    verdicts, _ = found.judge([call("c")], counts)
    assert [verdict.rule if verdict else None for verdict in verdicts] == ["MCPRoute default/r rules[0] filters[0]"]


def test_hosts() -> None:
    routes = [
        route("exact", rules=[tools()]),
        route("star", hostnames=["*.y"], rules=[tools()]),
        route("any", hostnames=[], rules=[tools()]),
        route("address", hostnames=["10.0.0.7"], rules=[tools()]),
        route("other", namespace="else", rules=[tools()]),
        route("foreign", gatewayRef={"name": "another"}, rules=[tools()]),
    ]
    found = McpPolicy.compile(GATEWAY, routes)

    def labels(*names: str | None, is_mcp: bool = False) -> list[str]:
        host = found.of_host(names, is_mcp=is_mcp)
        return [one.label.rpartition("/")[2] for one in host.routes] if host else []

    assert labels("mcp.x") == labels("MCP.X.") == labels("10.0.0.1", "mcp.x") == ["exact"]
    assert labels("a.y") == ["star"]
    assert labels("10.0.0.7") == labels("10.0.0.7", "mcp.y.evil") == labels("::ffff:10.0.0.7") == ["address"]
    assert labels("y") == labels("a.b.y") == labels("mcp.x.evil") == labels(None) == labels("::1") == []
    assert labels("z", is_mcp=True) == ["any"]
    assert labels("mcp.x", is_mcp=True) == ["exact", "any"]
    assert McpPolicy.compile(None, routes).routes == ()
