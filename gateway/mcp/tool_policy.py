"""Which MCP messages may go out: MCPRoutes and their ToolPolicies, compiled (CONTRACT sections 3 and 12). Pure.

Names are compared exactly. Every route that names the host has its say; in each, the first rule that fits a message
decides. A message that no rule fits is not restricted by that route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import re2

from clrk.core.egress_resources import EgressGateway
from clrk.core.globs import fits_glob
from clrk.core.route_resources import MCPMatch, MCPRoute, MCPRule, ToolPolicy
from clrk.gateway.llm.values import clip
from clrk.gateway.mcp.strict import TOOLS_CALL, Message
from clrk.gateway.policy_names import HostPattern, plain_host

TOOL_DENIED: Final = "tool_denied"
TOOL_CALLS_EXCEEDED: Final = "tool_calls_exceeded"


class Pattern(Protocol):
    """A compiled RE2 pattern."""

    def fullmatch(self, text: str) -> object | None:
        """Return a match of the whole text."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a message does not go out. Shape: reason is a constant of this module; rule names what decided."""

    reason: str
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class _Match:
    tools: frozenset[str]
    tools_regex: Pattern | None
    methods: tuple[str, ...]
    resources: tuple[str, ...]

    @classmethod
    def compile(cls, match: MCPMatch) -> _Match:
        return cls(frozenset(match.tools), _regex(match.tools_regex), tuple(match.methods), tuple(match.resources))

    def fits(self, message: Message) -> bool:
        return (
            (not self.tools or message.tool in self.tools)
            and (self.tools_regex is None or (message.tool is not None and _fits(self.tools_regex, message.tool)))
            and (not self.methods or any(fits_glob(glob, message.method) for glob in self.methods))
            and (not self.resources or any(fits_glob(glob, message.uri or "") for glob in self.resources))
        )


@dataclass(frozen=True, slots=True)
class _Tools:
    """One ToolPolicy.

    Shape: label names it to people; account is what its rule's calls are counted under: the route and the rule's
        matches, so that a rule that a reload moves keeps its count.
    """

    label: str
    account: str
    allowed: frozenset[str]
    allowed_regex: Pattern | None
    denied: frozenset[str]
    denied_regex: Pattern | None
    max_calls: int | None

    @classmethod
    def compile(cls, label: str, account: str, policy: ToolPolicy) -> _Tools:
        return cls(
            label,
            account,
            frozenset(policy.allowed_tools or ()),
            _regex(policy.allowed_tools_regex),
            frozenset(policy.denied_tools),
            _regex(policy.denied_tools_regex),
            policy.max_calls_per_execution,
        )

    @property
    def restricts_names(self) -> bool:
        patterns = self.allowed_regex is not None or self.denied_regex is not None
        return patterns or bool(self.allowed or self.denied)

    def denies(self, tool: str) -> str | None:
        """Return why a tool is denied, and what would lift it; None for one that may be called."""
        if tool in self.denied:
            return f"denied by deniedTools of {self.label}"
        if _fits(self.denied_regex, tool):
            return f"denied by deniedToolsRegex of {self.label}"
        restricts = self.allowed or self.allowed_regex is not None
        if not restricts or tool in self.allowed or _fits(self.allowed_regex, tool):
            return None
        return f"not allowed by {self.label}; add it to allowedTools there"


@dataclass(frozen=True, slots=True)
class _Rule:
    matches: tuple[_Match, ...]
    policies: tuple[_Tools, ...]

    @classmethod
    def compile(cls, route: str, index: int, rule: MCPRule) -> _Rule:
        label = f"{route} rules[{index}]"
        account = "\n".join((route, *(match.model_dump_json() for match in rule.matches)))
        policies = tuple(
            _Tools.compile(label if len(rule.filters) == 1 else f"{label} filters[{at}]", account, one.tool_policy)
            for at, one in enumerate(rule.filters)
        )
        return cls(tuple(map(_Match.compile, rule.matches)), policies)

    def fits(self, message: Message) -> bool:
        return not self.matches or any(match.fits(message) for match in self.matches)


@dataclass(frozen=True, slots=True)
class _Route:
    label: str
    hosts: tuple[HostPattern, ...]
    rules: tuple[_Rule, ...]

    def policies(self, message: Message) -> tuple[_Tools, ...]:
        return next((rule.policies for rule in self.rules if rule.fits(message)), ())


@dataclass(slots=True)
class CallCounts:
    """How many calls each account has: one for each run, over all of its connections, whatever its rules are."""

    taken: Counter[str] = field(default_factory=Counter)

    def give_back(self, accounts: Sequence[str]) -> None:
        """Take back calls that never went out."""
        self.taken.subtract(accounts)


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """What the routes that name one host say."""

    routes: tuple[_Route, ...]

    @property
    def label(self) -> str:
        """Name the first of them."""
        return self.routes[0].label

    @property
    def restricts_names(self) -> bool:
        """Say whether some tool may be hidden."""
        return any(one.restricts_names for route in self.routes for rule in route.rules for one in rule.policies)

    def shows(self, tool: str) -> bool:
        """Say whether a tool is one that may be called, as far as its name decides."""
        message = Message(TOOLS_CALL, 0, tool)
        return not any(one.denies(tool) is not None for route in self.routes for one in route.policies(message))

    def judge(self, messages: Sequence[Message], counts: CallCounts) -> tuple[list[Verdict | None], list[str]]:
        """Judge the messages of one body, None for those that may go; and return what was counted.

        Side effects: when all may go, their calls are counted, at once: of calls under way none is forgotten.
        """
        wanted: Counter[str] = Counter()
        verdicts = [self._judge(message, counts, wanted) for message in messages]
        if any(verdict is not None for verdict in verdicts):
            return verdicts, []
        counts.taken.update(wanted)
        return verdicts, list(wanted.elements())

    def _judge(self, message: Message, counts: CallCounts, wanted: Counter[str]) -> Verdict | None:
        if message.tool is None:
            return None
        policies = [one for route in self.routes for one in route.policies(message)]
        for one in policies:
            if (why := one.denies(message.tool)) is not None:
                return Verdict(TOOL_DENIED, one.label, f"tool {clip(message.tool, 128)!r} is {why}")
        counting = [one for one in policies if one.max_calls is not None]
        for one in counting:
            if counts.taken[one.account] + wanted[one.account] >= (one.max_calls or 0):
                text = f"{one.label} allows {one.max_calls} tool calls in one execution (maxCallsPerExecution)"
                return Verdict(TOOL_CALLS_EXCEEDED, one.label, text)
        wanted.update({one.account for one in counting})
        return None


@dataclass(frozen=True, slots=True)
class McpPolicy:
    """The MCPRoutes of one EgressGateway. Immutable: a reload compiles a new one."""

    routes: tuple[_Route, ...] = ()

    @classmethod
    def compile(cls, gateway: EgressGateway | None, routes: Sequence[MCPRoute]) -> McpPolicy:
        """Compile the routes of a namespace that name the gateway."""
        return cls(tuple(_compile_route(route) for route in routes if gateway is not None and _is_of(route, gateway)))

    def of_host(self, names: Sequence[str | None], *, is_mcp: bool) -> HostPolicy | None:
        """Return what governs a host by any of its names, None when no route does.

        Shape: is_mcp says whether the exchange looks like MCP: only such are governed by a route without hostnames.
        """
        plain = [normal for name in names if name is not None and (normal := plain_host(name)) is not None]
        routes = tuple(route for route in self.routes if _names_host(route, plain) or (is_mcp and not route.hosts))
        return HostPolicy(routes) if routes else None


def _compile_route(route: MCPRoute) -> _Route:
    label = f"MCPRoute {route.metadata.namespace}/{route.metadata.name}"
    return _Route(
        label,
        tuple(map(HostPattern.compile, route.spec.hostnames)),
        tuple(_Rule.compile(label, index, rule) for index, rule in enumerate(route.spec.rules)),
    )


def _is_of(route: MCPRoute, gateway: EgressGateway) -> bool:
    where, meta = route.metadata.namespace, gateway.metadata
    return (where, route.spec.gateway_ref.name) == (meta.namespace, meta.name)


def _names_host(route: _Route, names: Sequence[str]) -> bool:
    return any(pattern.matches(name) for pattern in route.hosts for name in names)


def _regex(pattern: str | None) -> Pattern | None:
    return None if pattern is None else _compile(pattern)


def _compile(pattern: str) -> Pattern:
    found: Pattern = re2.compile(pattern)
    return found


def _fits(pattern: Pattern | None, text: str) -> bool:
    return pattern is not None and pattern.fullmatch(text) is not None
