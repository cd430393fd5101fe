"""`clrk trace`: everything that one invocation caused, as a tree, with its trigger and caller above it."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from rich.text import Text

from clrk.gateway.cli import terminal
from clrk.gateway.cli.connection import Admin, CommandError
from clrk.gateway.cli.facts import SpanFacts, show_cost, show_duration, show_time
from clrk.gateway.telemetry import attributes as attr

_MAX_INDENT: Final = 4 * 48  # columns; deeper spans stand at this depth
_ROOT: Final = ""


def show_trace(admin: Admin, args: argparse.Namespace) -> int:
    """Print one invocation."""
    lines = admin.lines("traces", args.invocation)
    if args.json or args.output == "json":
        for line in lines:
            terminal.write_json_line(line)
        return 0
    documents = [json.loads(line) for line in lines]
    if args.output == "yaml":
        terminal.write_yaml(documents)
        return 0
    spans = [SpanFacts(document) for document in documents]
    if not spans:
        raise CommandError(f"no spans of {args.invocation}")
    console = terminal.console()
    for label, value in _summary(spans, _outcome(admin, spans)):
        console.print(Text.assemble((f"{label:<11}", "bold"), terminal.printable(value)), soft_wrap=True)
    console.print()
    for guide, span in _branches(spans):
        console.print(Text.assemble((guide, "dim"), _line(span)), soft_wrap=True)
    return 0


def _outcome(admin: Admin, spans: list[SpanFacts]) -> str:
    """Return how the invocation ended and why: its record knows what no span may say, spans alone do without."""
    phase = next((value for span in spans if (value := span.get(attr.CLRK_PHASE)) is not None), None)
    exit_code = next((value for span in spans if (value := span.get(attr.CLRK_EXIT_CODE)) is not None), None)
    message = ""
    try:
        record = admin.get("invocations", spans[0].invocation)
        phase, exit_code, message = record["phase"], record["exitCode"], record["message"]
    except CommandError:  # an older store has spans and no record
        phase = phase or "not finished"
    return f"{phase}{f' (exit code {exit_code})' if exit_code else ''}{f': {message}' if message else ''}"


def _summary(spans: list[SpanFacts], outcome: str) -> list[tuple[str, str]]:
    """Return the lines above the tree."""
    root = next((span for span in spans if span.name == attr.SPAN_INGRESS_DISPATCH), spans[0])
    took = max(span.end_ns for span in spans) - min(span.start_ns for span in spans)
    rows = [
        ("invocation", root.invocation),
        ("agent", f"{root.get(attr.AGENT_KIND)} {root.agent}, revision {root.get(attr.AGENT_REVISION)}"),
        ("trigger", _trigger(root)),
        ("caller", _caller(root)),
        ("identity", _identity(root)),
        ("started", f"{show_time(root.start_ns)}, took {show_duration(took)}"),
        ("outcome", outcome),
        ("usage", _usage(spans)),
        ("trace", str(root.raw["trace_id"])),
    ]
    return [(label, value) for label, value in rows if value]


def _trigger(root: SpanFacts) -> str:
    method, path = root.get(attr.HTTP_REQUEST_METHOD), root.get(attr.URL_PATH)
    request = f"{method} {path or ''}".rstrip() if method else ""
    return ", ".join(str(part) for part in (root.get(attr.CLRK_TRIGGER), request) if part)


def _identity(root: SpanFacts) -> str:
    """Return who the caller is by the agent's identity extractors: `tenant=acme, user=bob`."""
    prefix = attr.AGENT_IDENTITY_PREFIX
    attributes = root.raw["attributes"]
    found = {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}
    return ", ".join(f"{name}={value}" for name, value in sorted(found.items()))


def _caller(root: SpanFacts) -> str:
    address, port = root.get(attr.CLIENT_ADDRESS), root.get(attr.CLIENT_PORT)
    parts = [f"{address}:{port}" if port else str(address)] if address else []
    if (uid := root.get(attr.CLRK_CALLER_UID)) is not None:
        pid = root.get(attr.CLRK_CALLER_PID)
        parts.append(f"uid {uid}, process {pid} on this host" if pid else f"uid {uid} on this host")
    if agent := root.get(attr.USER_AGENT_ORIGINAL):
        parts.append(str(agent))
    if parent := root.raw["parent_span_id"]:
        parts.append(f"its span {parent}")
    return ", ".join(parts)


def _usage(spans: list[SpanFacts]) -> str:
    llm = [span for span in spans if span.is_llm_call and not span.denied]
    denied = sum(span.denied for span in spans)
    errors = sum(span.failed and not span.denied and not span.is_whole_run for span in spans)  # `outcome` tells that
    costs = [span.cost_usd for span in llm if span.cost_usd is not None]
    parts = [f"{len(llm)} LLM call{'' if len(llm) == 1 else 's'}"]
    if llm:
        parts.append(f"{sum(span.tokens_in or 0 for span in llm)} tokens in")
        parts.append(f"{sum(span.tokens_out or 0 for span in llm)} out")
    if costs:
        parts.append(show_cost(sum(costs)))
    if unpriced := sum(span.get(attr.CLRK_COST_UNKNOWN) is True for span in llm):
        parts.append(f"{unpriced} of unknown price")
    if denied:
        parts.append(f"{denied} denied")
    if errors:
        parts.append(f"{errors} failed")
    return ", ".join(parts)


def _branches(spans: list[SpanFacts]) -> Iterator[tuple[str, SpanFacts]]:
    """Yield every span exactly once, whatever the ids say, below its parent and in order of time, with its guide.

    Not recursive and not rich.tree: an agent decides how deep its spans go, a terminal how wide it is.
    """
    known = {span.raw["span_id"] for span in spans}
    children: defaultdict[str, list[SpanFacts]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        parent = span.raw["parent_span_id"]
        children[parent if parent in known and parent != span.raw["span_id"] else _ROOT].append(span)
    drawn: set[int] = set()
    # A cycle of parents is reachable from no root: what is left over after the roots becomes a root of its own.
    for roots in (children.pop(_ROOT, []), spans):
        stack = [(span, "", "") for span in reversed(roots)]
        while stack:
            span, guide, indent = stack.pop()
            if id(span) in drawn:
                continue
            drawn.add(id(span))
            yield guide, span
            below = children.pop(span.raw["span_id"], [])
            deeper = len(indent) < _MAX_INDENT
            for index, child in reversed(list(enumerate(below))):
                last = index == len(below) - 1
                stack.append(
                    (child, indent + ("└── " if last else "├── "), indent + ("    " if last else "│   ") * deeper)
                )


def _line(span: SpanFacts) -> Text:
    bad = span.failed or span.denied
    line = Text(terminal.printable(span.name), style="bold red" if bad else "bold")
    add = _Parts(line)
    if span.target and span.target not in span.name:
        if span.target.startswith(span.name):
            line.append(terminal.printable(span.target.removeprefix(span.name)))
        else:
            add(span.target)
    add(show_duration(span.end_ns - span.start_ns), "cyan")
    if span.is_llm_call and (span.tokens_in is not None or span.tokens_out is not None):
        add(f"{span.tokens_in or 0} in, {span.tokens_out or 0} out", "yellow")
    add("price unknown" if span.get(attr.CLRK_COST_UNKNOWN) is True else show_cost(span.cost_usd), "yellow")
    if span.denied:
        reason = str(span.get(attr.CLRK_EGRESS_DENY_REASON) or "")
        add(f"DENIED {span.message if reason in span.message else f'{reason}: {span.message}'}", "red")
        add(span.rule_to_add, "green")
    elif span.failed:
        add(f"ERROR {span.get(attr.ERROR_TYPE) or ''} {span.message}".strip(), "red")
    elif (code := span.get(attr.HTTP_RESPONSE_STATUS_CODE)) is not None:
        add(str(code), "green")
    if span.would_deny:
        add(f"WOULD DENY {span.would_deny}", "yellow")
        add(span.rule_to_add, "green")
    if span.get(attr.CLRK_SANDBOX_WARM):
        add("warm")
    add(span.process, "dim")
    return line


class _Parts:
    """Appends printable parts to a line."""

    def __init__(self, line: Text) -> None:
        self._line = line

    def __call__(self, part: str, style: str = "") -> None:
        if part:
            self._line.append("  ")
            self._line.append(terminal.printable(part), style=style)
