"""What an MCP server sends to cost time ends its answer; the event loop that all sandboxes share goes on."""

from __future__ import annotations

import gzip

import pytest
from cost import as_objects, assert_cheap

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import MCPRoute
from clrk.gateway.govern import Cut
from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.mcp.governor import UNFILTERABLE, McpGovernor, McpRunState
from clrk.gateway.mcp.tool_policy import McpPolicy

READ_SIZE = 256 * 1024  # what one read from a socket returns at most
FLOODS = [b"\n", b":\n\n", b"data:\n\n", b"data: {}\n\n", b'data: {"tools":1}\n\n']


def read(chunk: bytes, coding: str) -> Cut | bytes:
    gateway = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": {}})
    rule = {"filters": [{"type": "ToolPolicy", "toolPolicy": {"deniedTools": ["rm"]}}]}
    spec = {"hostnames": ["m"], "rules": [rule]}
    route = MCPRoute.model_validate({"kind": "MCPRoute", "metadata": {"name": "r"}, "spec": spec})
    policy = McpPolicy.compile(gateway, [route]).of_host(["m"], is_mcp=False)
    assert policy is not None
    governor = McpGovernor(policy, McpRunState(), RequestHead("GET", "https", "m", 443, "/", "", ()), enforces=True)
    governor.response_head(ResponseHead(200, (("Content-Type", "text/event-stream"), ("Content-Encoding", coding))))
    return governor.response_data(chunk)


@pytest.mark.parametrize("event", FLOODS)
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_flood_of_events_ends_the_answer(event: bytes, coding: str) -> None:
    plain = event * ((64 << 20 if coding == "gzip" else READ_SIZE) // len(event))
    chunk = gzip.compress(plain)[:READ_SIZE] if coding == "gzip" else plain

    def refused() -> None:
        found = read(chunk, coding)
        assert isinstance(found, Cut)
        assert found.reason == UNFILTERABLE

    assert_cheap(refused, as_objects, at_most=2)


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_as_many_events_as_one_read_may_hold_pass(coding: str) -> None:
    plain = b"data: {}\n\n" * 8192
    assert read(gzip.compress(plain) if coding == "gzip" else plain, coding) == plain
