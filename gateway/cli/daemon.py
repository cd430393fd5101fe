"""`clrk status` and `clrk apply`: the daemon itself."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

from clrk.gateway.cli import terminal
from clrk.gateway.cli.connection import Admin, CommandError
from clrk.gateway.cli.facts import show_duration

_LOCK_NAME: Final = "runtime.lock"  # beside the admin socket, made by clrk-runtime
_RELOAD_DEADLINE_S: Final = 60.0
_POLL_S: Final = 0.1
_EXIT_INVALID: Final = 2


def show_status(admin: Admin, args: argparse.Namespace) -> int:
    """Print how the daemon stands: store, exporters, drops, sandboxes."""
    status = admin.get("status")
    if args.output != "table":
        terminal.write_document(status, args.output)
        return 0
    store, configuration = status["store"], status["configuration"]
    sandboxes = ", ".join(f"{count} {state}" for state, count in sorted(status["sandboxes"].items()))
    facts: list[tuple[str, object]] = [
        ("version", status["version"]),
        ("ready", "yes" if status["ready"] else "no: draining"),
        ("agents", status["agents"]),
        ("sandboxes", sandboxes or "none"),
        ("configuration", f"generation {configuration['generation']}"),
        ("store", f"{store['path']}{'' if store['writable'] else ', NOT WRITABLE'}"),
        ("dropped", _drops(store["counters"]) or "nothing"),
    ]
    facts += [("reload refused", problem) for problem in configuration["problems"]]
    facts += [("note", note) for note in configuration["notes"]]
    facts += [(f"export {exporter['name']}", _exporter(exporter)) for exporter in status["exporters"]]
    facts += [(f"kernel {name}", count) for name, count in sorted(status["kernel"].items()) if count]
    terminal.write_table(("FACT", "VALUE"), facts)
    return 0


def _drops(counters: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counters.items()) if count and "dropped" in name)


def _exporter(exporter: dict[str, Any]) -> str:
    text = f"{exporter['behind']} behind"
    if exporter.get("failingSinceUnixNano"):
        since = show_duration(time.time_ns() - exporter["failingSinceUnixNano"])
        text += f", FAILING for {since}: {exporter.get('error') or 'no answer'}"
    return text + (f", {exporter['dropped']} refused for good" if exporter.get("dropped") else "")


def apply(admin: Admin, _args: argparse.Namespace) -> int:
    """Have the daemon reload its resources, and say what came of it: all valid, or nothing changes."""
    before = admin.get("status")["configuration"]
    _signal(admin.path.parent / _LOCK_NAME)
    deadline = time.monotonic() + _RELOAD_DEADLINE_S
    while time.monotonic() < deadline:
        now = admin.get("status")["configuration"]
        if now["refusals"] != before["refusals"]:
            for problem in now["problems"]:
                terminal.error(problem)
            terminal.error("nothing was changed")
            return _EXIT_INVALID
        if now["generation"] != before["generation"]:
            terminal.write_table(("APPLIED", "AGENTS"), [(f"generation {now['generation']}", now["agents"])])
            for note in now["notes"]:
                terminal.error(note)
            return 0
        time.sleep(_POLL_S)
    raise CommandError(f"no word of the reload within {_RELOAD_DEADLINE_S:.0f} s; the daemon's log says why")


def _signal(lock: Path) -> None:
    """Send SIGHUP to whoever holds the instance's lock. Raises: CommandError."""
    try:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(int(file.read(32)), signal.SIGHUP)
                return
    except PermissionError:
        raise CommandError("apply signals the daemon, which is root's: use sudo") from None
    except (OSError, ValueError) as exc:
        raise CommandError(f"find the daemon by {lock}: {exc}") from None
    raise CommandError(f"no daemon holds {lock}: start it with `sudo clrk-runtime`")
