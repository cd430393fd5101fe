"""MCP: what goes out is no denied call to any reader, what comes in shows no hidden tool, however it arrives.

The oracles are JSON readers as they are found in servers: the first or the last of two members counts, case does not
matter, other encodings are guessed, what is behind the end is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

from splits import ways_to_arrive

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import MCPRoute
from clrk.gateway.interpret import Allowance, RequestHead
from clrk.gateway.mcp.governor import McpGovernor, McpRunState
from clrk.gateway.mcp.list_filter import DocumentFilter, EventFilter, UnfilterableError
from clrk.gateway.mcp.messages import parse
from clrk.gateway.mcp.tool_policy import HostPolicy, McpPolicy

HIDDEN = "rm"
HEAD = RequestHead("POST", "https", "m", 443, "/", "", ())


def _policy() -> HostPolicy:
    gateway = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": {}})
    rule = {"filters": [{"type": "ToolPolicy", "toolPolicy": {"deniedTools": [HIDDEN]}}]}
    spec = {"hostnames": ["m"], "rules": [rule]}
    route = MCPRoute.model_validate({"kind": "MCPRoute", "metadata": {"name": "r"}, "spec": spec})
    found = McpPolicy.compile(gateway, [route]).of_host(["m"], is_mcp=False)
    assert found is not None
    return found


POLICY = _policy()
Pairs = list[tuple[str, Any]]
HOOKS: list[Callable[[Pairs], dict[str, Any]]] = [
    dict,
    lambda pairs: dict(reversed(pairs)),
    lambda pairs: {key.casefold(): value for key, value in pairs},
    lambda pairs: {key.casefold(): value for key, value in reversed(pairs)},
]


def mcp_judge(data: bytes) -> None:
    """What may go out calls no denied tool, whoever reads it; what may not is answered in JSON."""
    answer = McpGovernor(POLICY, McpRunState(), HEAD, enforces=True).judge(data)
    if answer is None:
        assert not any(_calls_hidden(value) for value in _readings(data)), data
    elif answer.body:
        json.loads(answer.body)


def _readings(data: bytes) -> Iterator[Any]:
    texts = [data.decode(encoding, "replace") for encoding in ("utf-8", "utf-16", "utf-16-be", "latin-1", "utf-7")]
    for text in texts:
        for hook in HOOKS:
            try:
                yield json.JSONDecoder(object_pairs_hook=hook, strict=False).raw_decode(text.lstrip("\ufeff \t\r\n"))[0]
            except (ValueError, RecursionError):
                continue


def _calls_hidden(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_calls_hidden, value))
    params = value.get("params") if isinstance(value, dict) else None
    return (
        isinstance(params, dict)
        and isinstance(value.get("method"), str)
        and value["method"].strip().casefold() == "tools/call"
        and params.get("name") == HIDDEN
    )


def mcp_list_filter(data: bytes) -> None:
    """A document and a stream show the same however cut, nothing hidden, and JSON where there was JSON."""
    documents = {_run(DocumentFilter(POLICY.shows, Allowance()), pieces) for pieces in ways_to_arrive(data)}
    streams = {_run(EventFilter(POLICY.shows, Allowance()), pieces) for pieces in ways_to_arrive(data)}
    assert len(documents) == len(streams) == 1, (documents, streams)
    if (shown := documents.pop()) is not None:
        assert not any(_shows_hidden(value) for value in _plain_readings(shown)), shown
        if shown != data:
            json.loads(shown, parse_constant=lambda text: 1 / 0, parse_int=float)


def _run(one: DocumentFilter | EventFilter, pieces: list[bytes]) -> bytes | None:
    try:
        return b"".join(map(one.feed, pieces)) + one.finish()
    except UnfilterableError:
        return None


def _plain_readings(data: bytes) -> Iterator[Any]:
    for hook in HOOKS[:2]:
        try:
            yield json.loads(data.decode("utf-8", "replace").lstrip("\ufeff"), object_pairs_hook=hook, strict=False)
        except (ValueError, RecursionError):
            continue


def _shows_hidden(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(one, dict) and _shows_hidden(one) for one in value)
    result = value.get("result") if isinstance(value, dict) else None
    tools = result.get("tools") if isinstance(result, dict) else None
    return isinstance(tools, list) and any(isinstance(tool, dict) and tool.get("name") == HIDDEN for tool in tools)


def mcp_messages(data: bytes) -> None:
    """Whatever comes, reading it for a span does not raise, and what is kept of it is bounded."""
    for message in parse(data):
        assert all(not isinstance(value, str) or len(value) <= 256 for value in astuple(message))


TARGETS = {"mcp_judge": mcp_judge, "mcp_list_filter": mcp_list_filter, "mcp_messages": mcp_messages}
