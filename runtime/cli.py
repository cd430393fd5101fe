"""The `clrk-runtime` command. Imports what a command needs only when it runs: `clrk-runtime --help` is instant."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from clrk import __version__
from clrk.core.errors import ClrkError, ConfigError
from clrk.core.layout import HostLayout
from clrk.core.loading import loading

DEFAULT_PATH: Final = Path("/etc/clrk")
EXIT_FAILED: Final = 1
EXIT_INVALID: Final = 2
_LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_EXAMPLES: Final = """\
examples:
  sudo clrk-runtime                       serve the resources of /etc/clrk
  sudo clrk-runtime serve -c my-agents/   serve those of a folder; -c may be given several times
  clrk-runtime check -c agent.yaml        validate: every problem with file, line and field
  sudo clrk-runtime doctor                prove what this host can do; says how to mend what is missing
  sudo clrk-runtime ca rotate             make a new CA for sandboxes, while those that run keep theirs
  sudo clrk apply                         reload, also by SIGHUP: all valid, or nothing changes

`clrk --help` is the client: run agents, list invocations, read traces.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 the host refused, 2 invalid resources or usage."""
    options = _parse(sys.argv[1:] if argv is None else list(argv))
    paths = options.config or [DEFAULT_PATH]
    try:
        if options.command == "check":
            return _check(paths)
        if options.command == "doctor":
            return _doctor(options)
        if options.command == "ca":
            return _ca(options.action, HostLayout(options.instance), paths)
        # A reload's problems are read in another folder than the one that the daemon was started in.
        return _serve(HostLayout(options.instance), [path.absolute() for path in paths])
    except ConfigError as exc:
        for problem in exc.problems:
            print(problem, file=sys.stderr)
        number = len(exc.problems)
        print("1 problem" if number == 1 else f"{number} problems", file=sys.stderr)
        return EXIT_INVALID
    except ClrkError as exc:
        print(f"clrk-runtime: {exc}", file=sys.stderr)
        return EXIT_FAILED
    except ExceptionGroup as group:
        errors, bugs = group.split(ClrkError)
        if bugs is not None:
            raise
        for line in _flatten(errors or group):
            print(f"clrk-runtime: {line}", file=sys.stderr)
        return EXIT_FAILED


def _path(text: str) -> Path:
    """Take what is not empty: Path("") is the folder that one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or a folder")
    return Path(text)


def _parse(argv: list[str]) -> argparse.Namespace:
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "-c", "--config", metavar="PATH", type=_path, action="append",
        help="file or folder (*.yaml, *.yml) of resources; repeatable; default /etc/clrk",
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        prog="clrk-runtime",
        description="The host daemon of clrk: runs agents in sandboxes and traces everything they cause.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clrk-runtime {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{serve,check,doctor,ca}")
    instance = argparse.ArgumentParser(add_help=False)
    instance.add_argument(
        "--instance", metavar="NAME", default="clrk",
        help="prefix of everything made on the host, for a second runtime beside the first; default clrk. "
        "Its client is `CLRK_INSTANCE=NAME clrk ...`",
    )  # fmt: skip
    both = [config, instance]
    commands.add_parser("serve", parents=both, help="run the daemon in the foreground (the default; root)")
    authority = commands.add_parser(
        "ca", parents=both, help="the CA that sandboxes trust: show it, or rotate it (root)"
    )
    authority.add_argument("action", choices=("show", "rotate"))
    commands.add_parser("check", parents=[config], help="validate resources; exit code 2 when they are invalid")
    doctor = commands.add_parser(
        "doctor", parents=[config], help="prove what this host can do, and say how to mend what is missing (root)"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["serve", *argv]  # plain `clrk-runtime [-c PATH]` serves
    return parser.parse_args(argv)


def _check(paths: Sequence[Path]) -> int:
    from clrk.runtime.config.load import load
    from clrk.runtime.summary import summarise

    for line in summarise(load(paths)):
        print(line)
    return 0


def _ca(action: str, layout: HostLayout, paths: Sequence[Path]) -> int:
    """Show the CA, or put a new one on the disk and have the runtime take it up."""
    from clrk.runtime import ca
    from clrk.runtime.config.load import load
    from clrk.runtime.reconcile import find_runtime

    state_dir = Path(load(paths).runtime.state_dir)
    if os.geteuid() != 0:
        print("clrk-runtime: the CA is root's: use sudo", file=sys.stderr)
        return EXIT_FAILED
    if action == "show":
        print(ca.load(state_dir).describe())
        return 0
    print(ca.rotate(state_dir).describe())
    if (pid := find_runtime(layout)) is None:
        print("no runtime is running: it is used from the next start on")
        return 0
    os.kill(pid, signal.SIGHUP)
    print(f"runtime {pid} was told: new sandboxes trust it, those that run keep the former one; `clrk status` shows it")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from clrk.core.resources import RuntimeSpec
    from clrk.runtime.config.load import load
    from clrk.runtime.doctor import examine, report

    given = options.config or ([DEFAULT_PATH] if DEFAULT_PATH.exists() else [])
    spec = load(given).runtime if given else RuntimeSpec()
    return report(examine(spec, f"doctor{os.getpid() % 10**7}"), as_json=options.json)


def _serve(layout: HostLayout, paths: Sequence[Path]) -> int:
    if os.geteuid() != 0:
        print("clrk-runtime: serve needs root (namespaces, cgroups, BPF): use sudo", file=sys.stderr)
        return EXIT_FAILED
    level = os.environ.get("CLRK_LOG_LEVEL", "INFO").upper()
    if level not in _LOG_LEVELS:
        raise ConfigError((f"CLRK_LOG_LEVEL: write one of {', '.join(_LOG_LEVELS)}, not {level.lower()!r}",))
    with loading():
        from clrk.runtime.daemon import serve  # imports BPF and netlink: `check` works without them

    # Under systemd the journal has the time and the name.
    form = "%(levelname)s %(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level, format=form)
    return serve(layout, paths)


def _flatten(group: BaseExceptionGroup[BaseException]) -> list[str]:
    lines: list[str] = []
    for exc in group.exceptions:
        lines += _flatten(exc) if isinstance(exc, BaseExceptionGroup) else [str(exc)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
