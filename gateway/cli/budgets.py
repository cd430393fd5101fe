"""`clrk budgets`: what may be spent, what was, and what is left."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from typing import Any, Final

from clrk.gateway.cli import terminal
from clrk.gateway.cli.agents import agent_key
from clrk.gateway.cli.connection import USAGE, Admin, CommandError

_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_COLUMNS: Final = ("ROUTE", "KEY", "PERIOD", "UNIT", "USED", "RESERVED", "LIMIT", "LEFT", "RESETS")


def list_budgets(admin: Admin, args: argparse.Namespace) -> int:
    """Print every account: a line for tokens, and one for USD where that is limited or spent."""
    if args.day is not None and not _DAY.fullmatch(args.day):
        raise CommandError(f"--day: write a UTC day such as 2026-11-28, not {args.day!r}", USAGE)
    wanted = "/".join(agent_key(args.agent, "--agent")) if args.agent is not None else ""
    items = admin.get("budgets", query={"day": args.day} if args.day is not None else None)["items"]
    none = "no budgets; declare an AIProviderRoute with a TokenBudget filter"
    if wanted and items:
        items = [item for item in items if item["agent"] == wanted]
        none = f"no account of {wanted}'s own so far; without --agent all accounts are listed"
    if args.output != "table":
        terminal.write_document(items, args.output)
        return 0
    if not items:
        terminal.error(none)
        return 0
    terminal.write_table(_COLUMNS, [row for item in items for row in _rows(item)])
    return 0


def _rows(item: dict[str, Any]) -> list[tuple[object, ...]]:
    rule = "rule gone" if item["rule"] is None else f"rules[{item['rule']}]"
    period = item["day"] or f"run {item['execution']}"
    reset = item["resetTimeUnixNano"]
    resets = "with the run" if reset is None else f"{datetime.fromtimestamp(reset / 1e9, UTC):%Y-%m-%dT%H:%MZ}"
    rows: list[tuple[object, ...]] = []
    for unit, show in (("tokens", str), ("usd", _dollars)):
        counted = item[unit]
        if unit == "usd" and counted["limit"] is None and not counted["used"] and not counted["reserved"]:
            continue
        limit = "-" if counted["limit"] is None else show(counted["limit"])
        left = "-" if counted["left"] is None else show(counted["left"])
        rows.append(
            (f"{item['route']} {rule}", item["key"], period, unit.upper() if unit == "usd" else unit,
             show(counted["used"]), show(counted["reserved"]), limit, left, resets)
        )  # fmt: skip
    return rows


def _dollars(usd: float) -> str:
    text = f"{usd:.6f}".rstrip("0")
    whole, _, cents = text.partition(".")
    return f"{whole}.{cents:0<2}"
