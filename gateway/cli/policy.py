"""`clrk policy`: explain one call, and suggest the rules for what was recorded."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from clrk.core.printable import printable
from clrk.gateway.cli import terminal
from clrk.gateway.cli.agents import agent_key
from clrk.gateway.cli.connection import USAGE, Admin, CommandError
from clrk.gateway.policy_suggest import gather, render


def explain_call(admin: Admin, args: argparse.Namespace) -> int:
    """Print what would happen to a call; the exit code is 0 when it goes out, 1 when it is denied.

    Raises: CommandError of code 2: there is no such agent, or no such call.
    """
    namespace, name = agent_key(args.name)
    query = {"method": args.method, "url": args.url}
    try:
        found = admin.get("agents", namespace, name, "explain", query=query)
    except CommandError as exc:
        raise CommandError(str(exc), USAGE) from None
    if args.output != "table":
        terminal.write_document(found, args.output)
    else:
        _write(found)
    return 0 if found["allowed"] else 1


def _write(found: dict[str, Any]) -> None:
    verdict = "allow" if found["allowed"] else "deny"
    if found["wouldDeny"]:
        verdict += f", since the mode is {found['mode']}; Enforce would deny it: {found['wouldDeny']}"
    else:
        verdict += f" ({found['reason']})"
    host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
    call = " ".join(part for part in (found["method"], f"{host}:{found['port']}{found['path']}") if part)
    facts = [
        ("call", call),
        ("verdict", verdict),
        ("rule", found["rule"] or "-"),
        ("gateway", f"{found['gateway'] or 'none: everything is denied'}, mode {found['mode']}"),
        ("tls", found["tls"]),
    ]
    facts += [(f"step {step['step']}", _step(step)) for step in found["steps"]]
    for key, title in (
        ("aiProviderRoutes", "AIProviderRoute"),
        ("mcpRoutes", "MCPRoute"),
        ("credentials", "credentials"),
    ):
        facts += [(title, ", ".join(found[key]))] if found[key] else []
    terminal.write_table(("FACT", "VALUE"), facts)
    rule = found["addRule"].splitlines()
    if rule:
        only_says = all(line.startswith("#") for line in rule)
        sys.stdout.write("\n" if only_says else "\nto allow it, add to an EgressL4Route's spec.rules:\n")
        for line in rule:
            sys.stdout.write(f"{printable(line.removeprefix('# '))}\n" if only_says else f"  {printable(line)}\n")


def _step(step: dict[str, Any]) -> str:
    said = "allow" if step["allowed"] else "deny"
    return f"{said}: {step['reason']}" + (f", {step['rule']}" if step["rule"] else "")


def suggest_rules(admin: Admin, args: argparse.Namespace) -> int:
    """Print an EgressL4Route for what was recorded; exit code 1 when nothing was."""
    namespace, name = agent_key(args.name)
    agent = admin.get("agents", namespace, name)
    query = {"agent": f"{namespace}/{name}"} | ({"since": args.since} if args.since else {})
    recorded = gather(json.loads(line) for line in admin.lines("traces", query=query))
    text = render(recorded, agent=name, namespace=namespace, gateway=agent["egressGateway"], paths=args.paths)
    sys.stdout.write(text)
    return 0 if recorded.hosts or recorded.names else 1
