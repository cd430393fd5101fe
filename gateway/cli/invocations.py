"""`clrk agents invocations`: what an agent was asked to do, and what came of it."""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

import msgspec

from clrk.gateway.cli import terminal
from clrk.gateway.cli.agents import SHORT_ID, agent_key
from clrk.gateway.cli.connection import Admin
from clrk.gateway.cli.facts import show_cost, show_duration, show_time

_TABLE_ROWS: Final = 50
_PAGE: Final = 1000
_FILTERS: Final = ("phase", "trigger", "since", "until", "system", "model", "min_input_tokens")


def list_invocations(admin: Admin, args: argparse.Namespace) -> int:
    """Print invocations of an agent, the newest last; JSON is one a line, and all of them without --limit."""
    limit = args.limit if args.limit is not None else _TABLE_ROWS if args.output == "table" else None
    key = agent_key(args.name)
    found, more = _fetch(admin, key, _query(args), limit)
    found.reverse()
    if not found:
        terminal.error(_why_none(admin, key, args.name))
    if args.output == "json":
        for item in found:
            terminal.write_json_line(msgspec.json.encode(item))
    elif args.output == "yaml":
        terminal.write_yaml(found)
    elif found:
        _write_table(found)
        if more:
            terminal.error(f"only the newest {len(found)} are shown; see more with --limit")
    return 0


def _why_none(admin: Admin, key: tuple[str, str], name: str) -> str:
    """Return what to tell who finds no invocation. Raises: CommandError where there is no such agent either."""
    if admin.get("agents", *key)["kind"] == "DaemonAgent":
        return (
            f"{name} is a DaemonAgent: it runs by itself and has no invocations; "
            f"see `clrk traces --agent {name}` and `clrk agents logs {name}`"
        )
    return f"no invocation of {name} fits; widen the filter, or see `clrk agents list`"


def _query(args: argparse.Namespace) -> dict[str, str]:
    query = {name: str(value) for name in _FILTERS if (value := getattr(args, name)) is not None}
    return query | {name: "true" for name in ("denied", "would_deny", "errors") if getattr(args, name)}


def _fetch(
    admin: Admin, key: tuple[str, str], query: dict[str, str], limit: int | None
) -> tuple[list[dict[str, Any]], bool]:
    """Return invocations, the newest first, and whether there are more."""
    found: list[dict[str, Any]] = []
    before: dict[str, str] = {}
    while True:
        size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = admin.get("agents", *key, "invocations", query=query | before | {"limit": str(size)})
        found += page["items"]
        if page["before"] is None or (limit is not None and len(found) >= limit):
            return found, page["before"] is not None
        before = {"before": page["before"]}


def _write_table(found: list[dict[str, Any]]) -> None:
    columns = [
        "TIME",
        "INVOCATION",
        "TRIGGER",
        "CALLER",
        "IDENTITY",
        "PHASE",
        "DURATION",
        "CALLS",
        "IN",
        "OUT",
        "COST",
        "DENIED",
    ]
    columns.append("WHY")
    rows = [
        [
            show_time(item["createdTimeUnixNano"]), item["invocation"][:SHORT_ID], item["trigger"], item["caller"],
            ", ".join(f"{name}={value}" for name, value in sorted(item["identity"].items())),
            _phase(item), _duration(item), item["calls"], item["inputTokens"] or "", item["outputTokens"] or "",
            show_cost(item["costUsd"]), item["denials"] or "",
            item["message"],
        ]
        for item in found
    ]  # fmt: skip
    kept = [index for index, name in enumerate(columns) if name == "PHASE" or any(str(row[index]) for row in rows)]
    terminal.write_table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _phase(item: dict[str, Any]) -> str:
    code = item["exitCode"]
    return f"{item['phase']} ({code})" if code else str(item["phase"])


def _duration(item: dict[str, Any]) -> str:
    return show_duration((item["endTimeUnixNano"] or time.time_ns()) - item["createdTimeUnixNano"])
