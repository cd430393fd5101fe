"""`clrk traces`: the calls that fit a filter, one a line."""

from __future__ import annotations

import argparse
import json
import sys

from rich.text import Text

from clrk.gateway.cli import terminal
from clrk.gateway.cli.connection import Admin
from clrk.gateway.cli.facts import SpanFacts, show_cost, show_duration, show_time

_SHORT_ID = 18  # of a UUID version 7: the millisecond and 12 random bits
_WIDE_ENOUGH = 140


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
            sys.stdout.write(line.decode() + "\n")
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


def _query(args: argparse.Namespace) -> dict[str, str]:
    query = {
        name: str(value)
        for name in ("agent", "since", "until", "system", "model", "min_input_tokens")
        if (value := getattr(args, name)) is not None
    }
    return query | {name: "true" for name in ("denied", "errors") if getattr(args, name)}


def _write_table(spans: list[SpanFacts]) -> None:
    from rich import box
    from rich.table import Table

    console = terminal.console()
    id_width = 36 if console.width >= _WIDE_ENOUGH else _SHORT_ID
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in ("TIME", "AGENT", "SPAN", "MODEL / TARGET", "IN", "OUT", "COST", "STATUS", "DURATION", "INVOCATION"):
        table.add_column(
            name,
            justify="right" if name in ("IN", "OUT", "COST", "DURATION") else "left",
            no_wrap=name not in ("AGENT", "SPAN", "MODEL / TARGET"),  # these three give way on a narrow terminal
            overflow="ellipsis",
        )
    for span in spans:
        target = span.target if span.target not in span.name else ""
        style = "red" if span.failed or span.denied else ""
        table.add_row(
            _cell(show_time(span.start_ns), "dim"),
            _cell(span.agent),
            _cell(span.name, style),
            _cell(target),
            _cell("" if span.tokens_in is None else span.tokens_in),
            _cell("" if span.tokens_out is None else span.tokens_out),
            _cell(show_cost(span.cost_usd)),
            _cell(span.status, style or "green"),
            _cell(show_duration(span.end_ns - span.start_ns)),
            _cell(span.invocation[:id_width], "cyan"),
        )
    console.print(table)


def _cell(value: object, style: str = "") -> Text:
    return Text(terminal.printable(value), style=style, no_wrap=True, overflow="ellipsis")
