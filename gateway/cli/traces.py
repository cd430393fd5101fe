"""`clrk traces`: the calls that fit a filter, one a line."""

from __future__ import annotations

import argparse
import json
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from clrk.gateway.cli import terminal
from clrk.gateway.cli.agents import SHORT_ID, agent_key, split_target
from clrk.gateway.cli.connection import Admin
from clrk.gateway.cli.facts import SpanFacts, show_cost, show_duration, show_time
from clrk.gateway.cli.tree import show_trace

_WIDE_ENOUGH: Final = 120
_MIN_TITLE: Final = 20
_MAX_COLUMN: Final = 100
_GAP: Final = "  "


def list_traces(admin: Admin, args: argparse.Namespace) -> int:
    """Print spans, oldest first. A table holds the newest `--limit`; JSON streams all unless a limit is given."""
    form = "json" if args.json else args.output
    limit = args.limit
    if form == "table" and limit is None:
        limit = 200
    query = _query(args) | ({"limit": str(limit)} if limit is not None else {})
    lines = admin.lines("traces", query=query)
    if form == "json":
        for line in lines:
            terminal.write_json_line(line)
        return 0
    spans = [json.loads(line) for line in lines]
    if form == "yaml":
        terminal.write_yaml(spans)
        return 0
    if not spans:
        terminal.error("no spans fit; widen the filter, or see `clrk agents list`")
        return 0
    _write_table([SpanFacts(span) for span in spans])
    if len(spans) == limit:
        terminal.error(f"only the newest {limit} are shown; see more with --limit, or all with --json")
    return 0


def list_agent_traces(admin: Admin, args: argparse.Namespace) -> int:
    """Print the calls of one agent, or, when an invocation is named, its tree."""
    target, args.invocation = split_target(args.name)
    if args.invocation:
        return show_trace(admin, args)
    agent_key(target)  # says what is wrong with it
    args.agent = target
    return list_traces(admin, args)


def _query(args: argparse.Namespace) -> dict[str, str]:
    query = {
        name: str(value)
        for name in ("agent", "since", "until", "system", "model", "min_input_tokens")
        if (value := getattr(args, name)) is not None
    }
    return query | {name: "true" for name in ("denied", "would_deny", "errors") if getattr(args, name)}


def _write_table(spans: list[SpanFacts]) -> None:
    """Write one line a span. What a span is and where it went takes the room that the other columns leave."""
    console = terminal.console()
    wide = console.width >= _WIDE_ENOUGH
    columns = [
        _Column("TIME", [show_time(span.start_ns)[0 if wide else 6 :] for span in spans], "dim"),
        _Column("AGENT", [terminal.printable(span.agent) for span in spans]),
        _Column("SPAN", [terminal.printable(span.title) for span in spans]),
        _Column("IN", [_number(span.tokens_in) for span in spans], right=True),
        _Column("OUT", [_number(span.tokens_out) for span in spans], right=True),
        _Column("COST", [show_cost(span.cost_usd) for span in spans], right=True),
        _Column("STATUS", [terminal.printable(span.status) for span in spans]),
        _Column("DURATION", [show_duration(span.end_ns - span.start_ns) for span in spans], right=True),
        _Column("INVOCATION", [span.invocation[: 36 if wide else SHORT_ID] for span in spans], "cyan"),
    ]
    columns = [column for column in columns if any(column.cells)]
    title = next(column for column in columns if column.name == "SPAN")
    others = sum(column.width for column in columns if column is not title)
    title.width = min(title.width, max(_MIN_TITLE, console.width - others - len(_GAP) * (len(columns) - 1)))
    header = _GAP.join(column.fit(column.name) for column in columns)
    console.print(Text(header.rstrip(), "bold"), soft_wrap=True)
    for row, span in enumerate(spans):
        bad = "red" if span.failed or span.denied else ""
        line = Text(_GAP).join(
            Text(column.fit(column.cells[row]), (bad if column.name in ("SPAN", "STATUS") else "") or column.style)
            for column in columns
        )
        line.rstrip()
        console.print(line, soft_wrap=True)


class _Column:
    """Cells of one column, all printable, and how wide it is on a terminal."""

    def __init__(self, name: str, cells: list[str], style: str = "", *, right: bool = False) -> None:
        self.name = name
        self.cells = cells
        self.style = style
        self.width = min(_MAX_COLUMN, max(cell_len(text) for text in (name, *cells)))
        self._right = right

    def fit(self, text: str) -> str:
        """Return text cut or padded to the column's width."""
        if (size := cell_len(text)) > self.width:
            return set_cell_size(text, self.width - 1) + "…"
        return " " * (self.width - size) + text if self._right else text + " " * (self.width - size)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
