"""One request through real sandboxes, and then the debugging session that clrk is for, command by command.

Starts the stand-in providers and a clrk of its own (instance `clrkdemo`, loopback ports 18080 to 18445), and stops
both. Everything it starts dies with it, so that a killed demo leaves nothing that the next one could trip over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".output" / "demo"
BIN = ROOT / ".venv" / "bin"
INSTANCE = "clrkdemo"
INGRESS = "http://127.0.0.1:18080"
TENANT = "acme"
QUESTION = {"question": "My lamp arrived with a cracked shade. Can I get my money back?", "order": "1042"}
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0


def main() -> None:
    """Run the whole session; exit 0 only if every step showed what it should."""
    OUT.mkdir(parents=True, exist_ok=True)
    with stand_in(), daemon():
        title("Before: other work on the same host, so that there is something to search in")
        for _ in range(3):
            shell(f"curl -sS -o /dev/null -w '%{{http_code}}\\n' {INGRESS}/agents/orders")
        caller = send_the_request()
        walk_the_trace(caller)
    print("\nEverything that the demo started is stopped. The daemon's log is .output/demo/clrk-runtime.log")


def send_the_request() -> str:
    """Send one request as the caller's own traced service would; return its trace id."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    title("03:14: a customer of tenant `acme` asks something; the caller's own service is traced already")
    answer = shell(
        f"curl -sS -D - {INGRESS}/agents/support -H 'content-type: application/json'"
        f" -H 'traceparent: 00-{trace_id}-{span_id}-01' -H 'ce-x-tenant-id: {TENANT}'"
        f" -d {shlex.quote(json.dumps(QUESTION))}"
    )
    if " 200 " not in answer.splitlines()[0]:
        clrk("agents logs support")
    expect(" 200 " in answer.splitlines()[0], "the agent answers with 200")
    return trace_id


def walk_the_trace(caller_trace_id: str) -> None:
    """The five steps from `about then` to `this caller`."""
    title("Step 1: which calls did this agent make about then?")
    expect("gpt-5.4-mini" in clrk("traces --agent support --since 5m"), "both models are listed")

    title("Step 2: the interesting ones: by model and tokens, or those that were denied")
    clrk("traces --agent support --since 5m --model gpt-5.4-mini --min-input-tokens 20")
    expect("egress.dial.denied" in clrk("traces --agent support --since 5m --denied"), "the denied call is listed")

    title("Step 3: the invocation that caused it")
    denied = spans_of(clrk("traces --agent support --since 5m --denied --json"))
    invocation_id = denied[-1]["attributes"]["invocation.id"]
    print(f"\n  invocation.id = {invocation_id}")

    title("Step 4: the whole chain of that invocation")
    tree = clrk(f"trace {invocation_id}")
    for part in ("ingress.dispatch", "invoke_agent support", "chat claude-sonnet-5", "chat gpt-5.4-mini",
                 "tools/call refund_policy", "GET tools.internal", "sandbox.spawn"):  # fmt: skip
        expect(part in tree, f"the tree shows {part!r}")

    title("Step 5: back to the trigger and the caller")
    spans = spans_of(clrk(f"trace {invocation_id} --json", show=False))
    root = next(span for span in spans if span["name"] == "ingress.dispatch")
    print(f"$ clrk trace {invocation_id} --json | grep ingress.dispatch | python3 -m json.tool")
    print(json.dumps(root, indent=2))
    expect(root["trace_id"] == caller_trace_id, "the root belongs to the caller's own trace")
    expect(all(span["trace_id"] == caller_trace_id for span in spans), "and so does every span of the chain")

    title("And also: what the agent was asked, and the same for the browser (while the daemon runs)")
    expect(invocation_id[:13] in clrk("agents invocations support --since 5m"), "the invocation is listed")
    expect("?token=" in clrk("page"), "the page has an address")


# --- what it starts -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """The providers and tools, on loopback."""
    folder = OUT / "standin"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.jsonl").unlink(missing_ok=True)
    keys = {host: f"demo-{secrets.token_hex(16)}" for host in ("api.anthropic.com", "api.openai.com")}
    for host, key in keys.items():  # what credentials.yaml names: the agents' own keys are placeholders
        write_private(OUT / f"{host}.key", key)
    write_private(folder / "keys.json", json.dumps(keys))
    command = [
        str(BIN / "python"), str(ROOT / "examples" / "standin" / "serve.py"), "--dir", str(folder),
        "--tls", "127.0.0.1:18443", "--mcp", "127.0.0.1:18444", "--plain", "127.0.0.1:18445",
        "--keys", str(folder / "keys.json"),
    ]  # fmt: skip
    with child("standin", command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            give_up("the stand-in did not start", OUT / "standin.log")
        yield


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


@contextlib.contextmanager
def daemon() -> Iterator[None]:
    """The real clrk-runtime, with the resources of this folder; it says when it is ready, as it does to systemd."""
    notify_path = OUT / "notify.sock"
    notify_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notify_path))
        notify.settimeout(0.2)
        command = [str(BIN / "clrk-runtime"), "serve", "--instance", INSTANCE, "-c", str(ROOT / "examples" / "demo")]
        with child("clrk-runtime", command, NOTIFY_SOCKET=str(notify_path)) as process:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not is_ready(notify):
                if process.poll() is not None or time.monotonic() > deadline:
                    give_up("clrk-runtime did not get ready", OUT / "clrk-runtime.log")
            yield


def is_ready(notify: socket.socket) -> bool:
    """Wait a moment for READY=1 (sd_notify(3))."""
    try:
        return b"READY=1" in notify.recv(4096).split(b"\n")
    except TimeoutError:
        return False


@contextlib.contextmanager
def child(
    name: str, command: list[str], stdout: int | None = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one program, its output in a log, for as long as we live: stopped at the end, killed if we are."""
    with (OUT / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL, stdout=stdout or log, stderr=log, env=os.environ | environment, cwd="/",
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                print(f"{name} had to be killed; see {log.name}", file=sys.stderr)


# --- what a user would type ---------------------------------------------------------------------------------------


def clrk(arguments: str, *, show: bool = True) -> str:
    """Run the client against the demo's daemon, shown as a user of the default instance would type it."""
    return shell(f"clrk {arguments}", show=show)


def shell(command: str, *, show: bool = True) -> str:
    """Run one command line, print it and what it printed, and return that."""
    if show:
        print(f"\n$ {command}", flush=True)
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "CLRK_INSTANCE": INSTANCE, "COLUMNS": "150"}
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if show:
        print(done.stdout.rstrip(), flush=True)
    if done.returncode:
        give_up(f"{command!r} failed with {done.returncode}: {done.stderr}", OUT / "clrk-runtime.log")
    return done.stdout


def spans_of(lines: str) -> list[dict[str, Any]]:
    """Parse `--json`: one span a line."""
    return [json.loads(line) for line in lines.splitlines()]


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n\n### {text}", flush=True)


def expect(condition: bool, what: str) -> None:
    """Stop the demo when it does not show what it should."""
    if not condition:
        give_up(f"not as it should be: {what}", OUT / "clrk-runtime.log")


def give_up(message: str, log: Path) -> NoReturn:
    """Say what happened, with the end of the log, and leave with 1."""
    print(f"\ndemo: {message}\n--- end of {log}:", file=sys.stderr)
    with contextlib.suppress(OSError):
        print(re.sub(r"(?s)^.*?((?:[^\n]*\n){0,25})\Z", r"\1", log.read_text(errors="replace")), file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
