"""The spans of an invocation as rows of a waterfall: tree order, and where each bar begins and ends. Pure.

Ids and times may be an agent's own word: parents that are not there, cycles, doubles, depth without end and spans
that end before they begin must still give every span exactly one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from clrk.gateway.cli.facts import SpanFacts, show_cost, show_duration
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import Component, SpanKind

WIDTH: Final = 1000  # units of the time axis
_MIN_BAR: Final = 3  # units: the shortest span is still seen
_MAX_DEPTH: Final = 24  # deeper rows stand at this depth
_ROOT: Final = ""
_TICKS: Final = 4


class SpanLink(msgspec.Struct, frozen=True):
    """What the order of the rows needs of a span's JSON."""

    span_id: str
    parent_span_id: str
    start_time_unix_nano: int
    end_time_unix_nano: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a span stands: index into the spans, depth, and how many rows below belong to it."""

    index: int
    depth: int
    below: int


@dataclass(frozen=True, slots=True)
class Axis:
    """The time that a waterfall shows. Units: CLOCK_REALTIME nanoseconds."""

    start_ns: int
    end_ns: int

    @classmethod
    def of(cls, links: Sequence[SpanLink], start_ns: int = 0, end_ns: int = 0) -> Axis:
        """Return the axis that holds all spans, and the given times where they are not 0."""
        starts = [link.start_time_unix_nano for link in links] + ([start_ns] if start_ns else [])
        ends = [link.end_time_unix_nano for link in links] + ([end_ns] if end_ns else [])
        first = min(starts, default=0)
        return cls(first, max(max(ends, default=0), first + 1))

    def bar(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        """Return x and width of a span, in units of WIDTH."""
        length = self.end_ns - self.start_ns
        x = (max(self.start_ns, start_ns) - self.start_ns) * WIDTH // length
        width = max(_MIN_BAR, (end_ns - max(self.start_ns, start_ns)) * WIDTH // length)
        x = min(x, WIDTH - _MIN_BAR)
        return x, min(width, WIDTH - x)

    def ticks(self) -> list[str]:
        """Return the labels of the axis, from 0 to the end."""
        length = self.end_ns - self.start_ns
        return ["0"] + [show_duration(length * step // _TICKS) for step in range(1, _TICKS + 1)]


def tree_order(links: Sequence[SpanLink]) -> list[Place]:
    """Return every span once, below its parent, children by time. Not recursive: an agent decides how deep it goes.

    Cost: O(n log n).
    """
    known = {link.span_id for link in links}
    children: defaultdict[str, list[int]] = defaultdict(list)
    by_time = sorted(range(len(links)), key=lambda i: (links[i].start_time_unix_nano, -links[i].end_time_unix_nano, i))
    for index in by_time:
        parent, own = links[index].parent_span_id, links[index].span_id
        children[parent if parent in known and parent != own else _ROOT].append(index)
    order: list[tuple[int, int]] = []
    drawn: set[int] = set()
    # A cycle of parents is reachable from no root: what is left over after the roots becomes a root of its own.
    for roots in (children.pop(_ROOT, []), by_time):
        stack = [(index, 0) for index in reversed(roots)]
        while stack:
            index, depth = stack.pop()
            if index in drawn:
                continue
            drawn.add(index)
            order.append((index, depth))
            stack.extend((child, depth + 1) for child in reversed(children.pop(links[index].span_id, [])))
    return _with_sizes(order)


def _with_sizes(order: list[tuple[int, int]]) -> list[Place]:
    """Add to each row how many rows below it belong to it."""
    below = [0] * len(order)
    open_rows: list[int] = []
    for row, (_, depth) in enumerate(order):
        while open_rows and order[open_rows[-1]][1] >= depth:
            done = open_rows.pop()
            below[done] = row - done - 1
        open_rows.append(row)
    for row in open_rows:
        below[row] = len(order) - row - 1
    return [Place(index, depth, below[row]) for row, (index, depth) in enumerate(order)]


class Row:
    """One line of the waterfall, for the template."""

    def __init__(self, span: dict[str, Any], place: Place, axis: Axis, position: int) -> None:
        self.facts = SpanFacts(span)
        self.span_id = str(span["span_id"])
        self.position = position
        self.depth = min(place.depth, _MAX_DEPTH)
        self.level = place.depth + 1
        self.below = place.below
        self.x, self.width = axis.bar(self.facts.start_ns, self.facts.end_ns)
        self.offset = show_duration(max(0, self.facts.start_ns - axis.start_ns))
        self.duration = show_duration(max(0, self.facts.end_ns - self.facts.start_ns))
        self.cost = show_cost(self.facts.cost_usd)
        self.is_agents_own = span["resource"].get(attr.CLRK_COMPONENT) == Component.AGENT
        self.kind = _kind(self.facts, self.is_agents_own)

    @property
    def detail(self) -> str:
        """What the span's name does not say of its target."""
        title = self.facts.title
        return title.removeprefix(self.facts.name).strip() if title.startswith(self.facts.name) else title

    @property
    def label_first(self) -> bool:
        """The label goes to the left of a bar that begins too far to the right for it."""
        return self.x + self.width > WIDTH * 3 // 4


def _kind(facts: SpanFacts, is_agents_own: bool) -> str:
    """Return the class of the bar: what the span stands for."""
    if is_agents_own:
        return "own"
    if facts.name == attr.SPAN_INGRESS_DISPATCH:
        return "ingress"
    if facts.raw["kind"] == SpanKind.INTERNAL:
        return "run"
    if facts.is_llm_call:
        return "llm"
    if facts.get(attr.MCP_METHOD_NAME) is not None:
        return "mcp"
    return "net"
