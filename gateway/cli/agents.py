"""`clrk agents list|get|logs`."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any, Final

from clrk.gateway.cli import terminal
from clrk.gateway.cli.connection import USAGE, Admin, CommandError

_SPENDING: Final = ("DAY (UTC)", "LLM CALLS", "IN", "OUT", "COST", "OF UNKNOWN PRICE")
SHORT_ID: Final = 13  # characters of an invocation id that name its millisecond


def agent_key(text: str, argument: str = "NAME") -> tuple[str, str]:
    """Return namespace and name of NAME or NAMESPACE/NAME.

    Raises: CommandError that names the argument.
    """
    namespace, slash, name = text.rpartition("/")
    namespace = namespace if slash else "default"
    if not name or not namespace or "/" in namespace:
        raise CommandError(f"{argument}: write NAME or NAMESPACE/NAME, not {text!r}", USAGE)
    return namespace, name


def list_agents(admin: Admin, args: argparse.Namespace) -> int:
    """Print every agent."""
    items = admin.get("agents")["items"]
    if args.output != "table":
        terminal.write_document(items, args.output)
        return 0
    if not items:
        terminal.error("no agents; declare one in /etc/clrk and run `sudo clrk apply`")
        return 0
    columns = ["NAMESPACE", "NAME", "KIND", "REVISION", "TIMEOUT", "STATE"]
    keys = ("namespace", "name", "kind", "revision")
    rows = [[*(item[key] for key in keys), _timeout(item), show_state(item)] for item in items]
    terminal.write_table(columns, rows)
    return 0


def _spent(day: dict[str, Any]) -> tuple[object, ...]:
    unpriced = f"{day['unpricedCalls']} calls" if day["unpricedCalls"] else ""
    return day["day"], day["llmCalls"], day["inputTokens"], day["outputTokens"], f"${day['costUsd']:.6f}", unpriced


def _timeout(agent: dict[str, Any]) -> str:
    return f"{agent['timeoutSeconds']:g}s" if "timeoutSeconds" in agent else ""


def show_state(agent: dict[str, Any]) -> str:
    """Return how an agent stands, in a few words."""
    if agent["kind"] != "TaskAgent":
        restarts = agent.get("restarts")
        last = agent.get("lastExit")
        return str(agent.get("state", "")) + (f", {restarts} restarts, last: {last}" if restarts else "")
    limit = f"/{agent['maxConcurrent']}" if agent["maxConcurrent"] else ""
    words = [f"{agent['running']}{limit} running"]
    if agent["warmPoolSize"]:
        words.append(f"{agent['warm']}/{agent['warmPoolSize']} warm")
    if agent["nextFireTimeUnixNano"] is not None:
        words.append(f"next {_moment(agent['nextFireTimeUnixNano'])}")
    if agent["skippedFires"]:
        words.append(f"{agent['skippedFires']} skipped")
    return ", ".join(words)


def _moment(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%dT%H:%MZ}"


def get_agent(admin: Admin, args: argparse.Namespace) -> int:
    """Print one agent, without the values of its environment."""
    agent = admin.get("agents", *agent_key(args.name))
    if args.output == "table":
        facts = {
            key.removesuffix("TimeUnixNano"): _moment(value) if key.endswith("TimeUnixNano") and value else value
            for key, value in agent.items()
            if key not in ("spec", "labels", "timeoutSeconds", "spending") and value not in (None, "")
        }
        if agent["kind"] == "TaskAgent":
            facts |= {"timeout": _timeout(agent), "maxConcurrent": agent["maxConcurrent"] or "unlimited"}
        template = agent["spec"]["template"]["spec"]
        facts["command"] = json.dumps(template["command"] + template["args"])
        limits = agent["spec"]["resources"]
        facts["resources"] = f"cpu {limits['cpu']:g}, memory {limits['memory'] / 2**20:g}Mi, pids {limits['pids']}"
        terminal.write_table(("FIELD", "VALUE"), list(facts.items()))
        if agent["spending"]:
            terminal.write_table(_SPENDING, [_spent(day) for day in agent["spending"]])
    else:
        terminal.write_document(agent, args.output)
    return 0


def show_logs(admin: Admin, args: argparse.Namespace) -> int:
    """Print what an agent wrote: text on a terminal, NDJSON into a pipe."""
    target, invocation = split_target(args.name)
    query = {"tail": str(args.tail)} | ({"invocation": invocation} if invocation else {})
    if args.follow:
        query["follow"] = "true"
    found = False
    form = args.output or ("table" if sys.stdout.isatty() else "json")
    for raw in admin.lines("agents", *agent_key(target), "logs", query=query, has_end=not args.follow):
        found = True
        if form == "json":
            terminal.write_json_line(raw)
        elif form == "yaml":
            terminal.write_yaml([json.loads(raw)])  # items of one list
        else:
            sys.stdout.write(_log_text(json.loads(raw)) + "\n")
        if args.follow:
            sys.stdout.flush()
    if not found:
        terminal.error(f"no lines of {args.name}: it wrote none, or there is no such agent (`clrk agents list`)")
    return 0


def _log_text(entry: dict[str, Any]) -> str:
    moment = datetime.fromtimestamp(entry["time_unix_nano"] / 1e9).astimezone()
    return (
        f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d} {entry['invocation_id'][:SHORT_ID]}"
        f" {entry['stream']:6} {terminal.printable(entry['line'])}"
    )


def split_target(text: str) -> tuple[str, str]:
    """Split NAME, NS/NAME, NAME/INVOCATION or NS/NAME/INVOCATION. An invocation id, or 8 digits of it, is hex and -."""
    head, slash, last = text.rpartition("/")
    if slash and len(last) >= 8 and set(last) <= set("0123456789abcdef-"):
        return head, last
    return text, ""
