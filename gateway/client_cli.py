"""`clrk`: the client of the admin socket. Imports what a command needs only when it runs: `clrk --help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clrk import __version__
from clrk.core.errors import ClrkError
from clrk.core.layout import HostLayout

if TYPE_CHECKING:
    from clrk.gateway.cli.connection import Admin

_FORMS = ("table", "json", "yaml")
_INTERRUPTED = 130  # as a shell shows SIGINT
_BROKEN_PIPE = 141  # as a shell shows SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: the exit code."""
    args = _parser().parse_args(argv)
    from clrk.gateway.cli import terminal
    from clrk.gateway.cli.connection import Admin, CommandError

    try:
        code: int = args.command(Admin(_socket(args)), args)
        sys.stdout.flush()
    except CommandError as exc:
        terminal.error(exc)
        return exc.exit_code
    except ClrkError as exc:
        terminal.error(exc)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # `clrk traces | head`: nobody reads any more; Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


def _socket(args: argparse.Namespace) -> Path:
    if args.socket is not None:
        return Path(args.socket)
    if named := os.environ.get("CLRK_ADMIN_SOCKET"):
        return Path(named)
    return HostLayout(os.environ.get("CLRK_INSTANCE") or "clrk").admin_socket


def _lazy(module: str, function: str) -> Callable[[Admin, argparse.Namespace], int]:
    def command(admin: Admin, args: argparse.Namespace) -> int:
        from importlib import import_module

        result: int = getattr(import_module(f"clrk.gateway.cli.{module}"), function)(admin, args)
        return result

    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clrk", description="Run agents, and see what they did.", epilog=_EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"clrk {__version__}")
    parser.add_argument(
        "--socket",
        type=_written,
        metavar="PATH",
        help="admin socket of the daemon (default: $CLRK_ADMIN_SOCKET, else /run/$CLRK_INSTANCE/admin.sock, "
        "else /run/clrk/admin.sock)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_agents(commands)
    _add_trace(commands)
    _add_traces(commands)
    _add_budgets(commands)
    _add_policy(commands)
    _add_daemon(commands)
    return parser


def _written(text: str) -> str:
    """Take what is not empty: most often a variable of a script that is not set, and never what was meant."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave it out, or write a value")
    return text


_EPILOG = """\
a debugging session:
  clrk traces --agent support --since 15m             what did it do about then?
  clrk traces --agent support --since 15m --denied    only what policy refused; or --errors, --model, …
  clrk trace 01a2041e-8f1b                            the whole chain of that invocation, trigger and caller on top
"""


def _add_agents(commands: Any) -> None:
    agents = commands.add_parser("agents", help="list, read and run agents")
    verbs = agents.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = verbs.add_parser("list", help="every agent")
    _add_output(listing)
    listing.set_defaults(command=_lazy("agents", "list_agents"))

    get = verbs.add_parser("get", help="one agent")
    get.add_argument("name", metavar="NAME", help="NAME or NAMESPACE/NAME")
    _add_output(get)
    get.set_defaults(command=_lazy("agents", "get_agent"))

    invocations = verbs.add_parser("invocations", help="what an agent was asked to do, and what came of it")
    invocations.add_argument("name", metavar="NAME", help="NAME or NAMESPACE/NAME")
    invocations.add_argument(
        "--phase", type=_written, metavar="PHASE", help="Pending, Running, Succeeded, Failed, Timeout, …"
    )
    invocations.add_argument(
        "--trigger", type=_written, metavar="NAME", help="http, cron, cli or what the caller named"
    )
    _add_span_filters(invocations)
    invocations.add_argument("--limit", type=int, metavar="N", help="only the newest N (default 50 in a table)")
    _add_output(invocations)
    invocations.set_defaults(command=_lazy("invocations", "list_invocations"))

    logs = verbs.add_parser("logs", help="what an agent wrote to stdout and stderr")
    logs.add_argument("name", metavar="NAME[/INVOCATION]", help="[NAMESPACE/]NAME, and the invocation or its beginning")
    logs.add_argument("--tail", type=int, default=1000, metavar="N", help="only the last N lines (default 1000)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what it writes from now on")
    logs.add_argument(
        "-o",
        "--output",
        choices=(*_FORMS, "text"),
        help="default: table (text is another word for it) on a terminal, NDJSON in a pipe",
    )
    logs.set_defaults(command=_lazy("agents", "show_logs"))

    traces = verbs.add_parser("traces", help="the calls of an agent, or one invocation as a tree")
    traces.add_argument("name", metavar="NAME[/INVOCATION]", help="as for logs")
    _add_span_filters(traces)
    traces.add_argument("--limit", type=int, metavar="N", help="only the newest N (default 200 in a table)")
    traces.add_argument("--json", action="store_true", help="one span a line, as JSON")
    _add_output(traces)
    traces.set_defaults(command=_lazy("traces", "list_agent_traces"))
    _add_run_task(verbs)


def _add_run_task(verbs: Any) -> None:
    run = verbs.add_parser(
        "run-task",
        help="invoke an agent and print its answer",
        description="Invoke an agent and stream its answer to stdout. Exit code: Succeeded 0, Failed 1, Timeout 124, "
        "Rejected 77.",
    )
    run.add_argument("name", metavar="NAME", help="NAME or NAMESPACE/NAME")
    run.add_argument("-i", "--input", metavar="TEXT|@FILE|-", help="the event's data: literal, from a file, from stdin")
    run.add_argument(
        "-H", "--header", action="append", default=[], metavar="K=V", help="event attribute; K becomes ce-K"
    )
    run.add_argument("--ce-type", type=_written, metavar="TYPE")
    run.add_argument("--ce-source", type=_written, metavar="SOURCE")
    run.add_argument("--ce-subject", type=_written, metavar="SUBJECT")
    run.add_argument(
        "--content-type", type=_written, metavar="TYPE", help="default: JSON if the input is JSON, else text or octets"
    )
    run.add_argument("--timeout", type=_written, metavar="DURATION", help="cancel after this time, for example 30s")
    run.add_argument("-q", "--quiet", action="store_true", help="do not write the invocation id to stderr")
    run.set_defaults(command=_lazy("run_task", "run_task"))


def _add_trace(commands: Any) -> None:
    trace = commands.add_parser("trace", help="everything that one invocation caused, as a tree")
    trace.add_argument("invocation", type=_written, metavar="INVOCATION", help="its id, or the beginning of it")
    trace.add_argument("--json", action="store_true", help="one span a line, as JSON")
    _add_output(trace)
    trace.set_defaults(command=_lazy("tree", "show_trace"))


def _add_traces(commands: Any) -> None:
    traces = commands.add_parser("traces", help="the calls that fit a filter")
    traces.add_argument("--agent", type=_written, metavar="[NAMESPACE/]NAME")
    _add_span_filters(traces)
    traces.add_argument("--limit", type=int, metavar="N", help="only the newest N (default 200 in a table)")
    traces.add_argument("--json", action="store_true", help="one span a line, as JSON")
    _add_output(traces)
    traces.set_defaults(command=_lazy("traces", "list_traces"))


def _add_policy(commands: Any) -> None:
    policy = commands.add_parser("policy", help="what an agent may reach, and the rules that it needs")
    verbs = policy.add_subparsers(title="commands", required=True, metavar="COMMAND")
    explain = verbs.add_parser(
        "explain",
        help="say allow or deny, and which rule",
        description="Say what would happen to a call of an agent, and which rule decides. Exit code: 0 it goes out, "
        "1 it is denied, 2 nobody can say: there is no such agent, or no such call.",
    )
    explain.add_argument("name", metavar="AGENT", help="NAME or NAMESPACE/NAME")
    explain.add_argument("method", metavar="METHOD", help="GET, POST, …; of no matter to tcp://host:port")
    explain.add_argument("url", metavar="URL", help="https://host[:port]/path, or tcp://host:port for any other TCP")
    _add_output(explain)
    explain.set_defaults(command=_lazy("policy", "explain_call"))
    suggest = verbs.add_parser(
        "suggest",
        help="write the smallest rule set for what was recorded",
        description="Print an EgressL4Route that allows what an agent did, or tried to do: calls that went out, that "
        "would have been denied, and that were. Run the gateway with mode Record, then apply it and enforce.",
    )
    suggest.add_argument("name", metavar="AGENT", help="NAME or NAMESPACE/NAME")
    suggest.add_argument(
        "--since", type=_written, metavar="TIME", help="15m, 2h, 1d or 2026-11-22T03:10:00Z (default: all there is)"
    )
    suggest.add_argument("--paths", action="store_true", help="narrow HTTP hosts to methods and paths; ids become *")
    suggest.set_defaults(command=_lazy("policy", "suggest_rules"))


def _add_budgets(commands: Any) -> None:
    budgets = commands.add_parser(
        "budgets",
        help="what may be spent on LLM calls, what was, and what is left",
        description="Accounts of token budgets: those of a UTC day, and of runs that go on. RESERVED is held by calls "
        "under way, and becomes USED or comes back when they end.",
    )
    budgets.add_argument("--agent", type=_written, metavar="[NAMESPACE/]NAME", help="only accounts of this agent's own")
    budgets.add_argument("--day", type=_written, metavar="YYYY-MM-DD", help="a UTC day (default: today)")
    _add_output(budgets)
    budgets.set_defaults(command=_lazy("budgets", "list_budgets"))


def _add_span_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", type=_written, metavar="TIME", help="15m, 2h, 1d or 2026-11-22T03:10:00Z")
    parser.add_argument("--until", type=_written, metavar="TIME", help="like --since")
    parser.add_argument("--system", type=_written, metavar="NAME", help="provider: anthropic, openai, …")
    parser.add_argument(
        "--model", type=_written, metavar="MODEL", help="requested or answering model; * and ? are wildcards"
    )
    parser.add_argument("--denied", action="store_true", help="only what policy or a budget refused")
    parser.add_argument("--would-deny", action="store_true", help="only what went out because the mode is no Enforce")
    parser.add_argument("--errors", action="store_true", help="only what failed")
    parser.add_argument("--min-input-tokens", type=int, metavar="N")


def _add_daemon(commands: Any) -> None:
    page = commands.add_parser("page", help="print the address of the page, with its token: open it in a browser")
    page.set_defaults(command=_lazy("page", "show_page"))
    status = commands.add_parser("status", help="how the daemon stands: store, exporters, drops, sandboxes")
    _add_output(status)
    status.set_defaults(command=_lazy("daemon", "show_status"))
    apply = commands.add_parser(
        "apply",
        help="have the daemon reload its resources (root)",
        description="Have the daemon reload the resources it was started with: all valid, or nothing changes and every "
        "problem is printed (exit code 2).",
    )
    apply.set_defaults(command=_lazy("daemon", "apply"))


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=_FORMS, default="table", help="default: table")


if __name__ == "__main__":
    sys.exit(main())
