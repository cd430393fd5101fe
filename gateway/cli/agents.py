"""`clrk agents list|get|logs`."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import Any, Final

from clrk.gateway.cli import terminal
from clrk.gateway.cli.connection import Admin, CommandError

SHORT_ID: Final = 13  # characters of an invocation id that name its millisecond


def agent_key(text: str) -> tuple[str, str]:
    """Return namespace and name of NAME or NAMESPACE/NAME.

    Raises: CommandError.
    """
    namespace, slash, name = text.rpartition("/")
    namespace = namespace if slash else "default"
    if not name or not namespace or "/" in namespace:
        raise CommandError(f"{text!r} is no agent: write NAME or NAMESPACE/NAME", 2)
    return namespace, name


def list_agents(admin: Admin, args: argparse.Namespace) -> int:
    """Print every agent."""
    items = admin.get("agents")["items"]
    if args.output != "table":
        terminal.write_document(items, args.output)
        return 0
    if not items:
        terminal.error("no agents; declare one in /etc/clrk and reload with SIGHUP")
        return 0
    columns = ["NAMESPACE", "NAME", "KIND", "REVISION", "GATEWAY", "DELIVERY", "TIMEOUT"]
    keys = ("namespace", "name", "kind", "revision", "egressGateway", "delivery")
    rows = [[*(item[key] for key in keys), _timeout(item)] for item in items]
    if any(item["maxConcurrent"] for item in items):  # else the column would only push the lines past 80
        columns.append("CONCURRENT")
        for row, item in zip(rows, items, strict=True):
            row.append(_max_concurrent(item))
    terminal.write_table(columns, rows)
    return 0


def _timeout(agent: dict[str, Any]) -> str:
    return f"{agent['timeoutSeconds']:g}s"


def _max_concurrent(agent: dict[str, Any]) -> str:
    return str(agent["maxConcurrent"] or "unlimited")


def get_agent(admin: Admin, args: argparse.Namespace) -> int:
    """Print one agent, without the values of its environment."""
    agent = admin.get("agents", *agent_key(args.name))
    if args.output == "table":
        facts = {key: value for key, value in agent.items() if key not in ("spec", "labels", "timeoutSeconds")}
        facts |= {"timeout": _timeout(agent), "maxConcurrent": _max_concurrent(agent)}
        template = agent["spec"]["template"]["spec"]
        facts["command"] = json.dumps(template["command"] + template["args"])
        limits = agent["spec"]["resources"]
        facts["resources"] = f"cpu {limits['cpu']:g}, memory {limits['memory'] / 2**20:g}Mi, pids {limits['pids']}"
        terminal.write_table(("FIELD", "VALUE"), list(facts.items()))
    else:
        terminal.write_document(agent, args.output)
    return 0


def show_logs(admin: Admin, args: argparse.Namespace) -> int:
    """Print what an agent wrote: text on a terminal, NDJSON into a pipe."""
    target, invocation = _log_target(args.name)
    query = {"tail": str(args.tail)} | ({"invocation": invocation} if invocation else {})
    found = False
    as_json = args.output == "json" or (args.output is None and not sys.stdout.isatty())
    for raw in admin.lines("agents", *agent_key(target), "logs", query=query):
        found = True
        if as_json:
            sys.stdout.write(raw.decode() + "\n")
            continue
        entry = json.loads(raw)
        moment = datetime.fromtimestamp(entry["time_unix_nano"] / 1e9).astimezone()
        sys.stdout.write(
            f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d} {entry['invocation_id'][:SHORT_ID]}"
            f" {entry['stream']:6} {terminal.printable(entry['line'])}\n"
        )
    if not found:
        terminal.error(f"no lines of {args.name}: it wrote none, or there is no such agent (`clrk agents list`)")
    return 0


def _log_target(text: str) -> tuple[str, str]:
    """Split NAME, NS/NAME, NAME/INVOCATION or NS/NAME/INVOCATION. An invocation id, or 8 digits of it, is hex and -."""
    head, slash, last = text.rpartition("/")
    if slash and len(last) >= 8 and set(last) <= set("0123456789abcdef-"):
        return head, last
    return text, ""
