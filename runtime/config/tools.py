"""What an MCPRoute says that has no effect."""

from __future__ import annotations

import re
from collections.abc import Iterator

from clrk.core.route_resources import MCPMatch
from clrk.runtime.config.declared import Resources


def idle_tool_policies(resources: Resources) -> Iterator[str]:
    """Yield the rules with a ToolPolicy that no call of a tool can fit: a ToolPolicy judges nothing else."""
    for (namespace, name), route in sorted(resources.mcp_routes.items()):
        for index, rule in enumerate(route.spec.rules):
            if rule.filters and rule.matches and not any(map(_may_be_tools_call, rule.matches)):
                where = f"MCPRoute {namespace}/{name} rules[{index}]"
                what = "no tools/call fits its matches (it has no resource), so its ToolPolicy judges nothing"
                yield f"{where}: {what}"


def _may_be_tools_call(match: MCPMatch) -> bool:
    return _fits(match.methods, "tools/call") and _fits(match.resources, "")


def _fits(globs: list[str], text: str) -> bool:
    """Say whether one of the globs, in which `*` is any text, fits; none given fits everything."""
    return not globs or any(re.fullmatch(re.escape(glob).replace(r"\*", ".*"), text) for glob in globs)
