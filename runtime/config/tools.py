"""What an MCPRoute says that has no effect."""

from __future__ import annotations

from collections.abc import Iterator

import re2

from clrk.core.globs import fits_glob
from clrk.core.route_resources import MCPMatch
from clrk.runtime.config.declared import Resources


def idle_tool_policies(resources: Resources) -> Iterator[str]:
    """Yield the rules with a ToolPolicy that no call of a tool can fit: a ToolPolicy judges nothing else."""
    for (namespace, name), route in sorted(resources.mcp_routes.items()):
        for index, rule in enumerate(route.spec.rules):
            if rule.filters and rule.matches and not any(map(_may_be_tools_call, rule.matches)):
                where = f"MCPRoute {namespace}/{name} rules[{index}]"
                what = "no tools/call fits its matches (it has one tool, no resource), so its ToolPolicy judges nothing"
                yield f"{where}: {what}"


def _may_be_tools_call(match: MCPMatch) -> bool:
    if match.tools_regex is not None and match.tools and not _names_some(match.tools_regex, match.tools):
        return False
    return _fits(match.methods, "tools/call") and _fits(match.resources, "")


def _names_some(regex: str, tools: list[str]) -> bool:
    pattern = re2.compile(regex)
    return any(pattern.fullmatch(tool) for tool in tools)


def _fits(globs: list[str], text: str) -> bool:
    """Say whether one of the globs fits; none given fits everything."""
    return not globs or any(fits_glob(glob, text) for glob in globs)
