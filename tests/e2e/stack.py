"""The real daemon and the stand-in providers, started and stopped for tests and benchmarks.

Everything belongs to one instance name and one temporary folder; nothing of another clrk on the host is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from instances import DEADLINE_S, DIES_WITH_US, OWNER

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOURCE = {"content-type": "text/plain"}
EVENT = {"content-type": "application/json"}
# Run the source that comes as the event's data: most tests want a line or two of hostile agent.
RUN_PYTHON = "import json,sys; event=json.load(sys.stdin); exec(event['data'])"
RUN_SHELL = "import json,os,sys; os.execv('/bin/bash', ['bash', '-c', json.load(sys.stdin)['data']])"
FETCH_AND_RUN = (
    "import os,sys,urllib.request as r; exec(r.urlopen(os.environ['CLRK_METADATA_URL'] + '/v1/event').read().decode())"
)


_candidates = itertools.count(OWNER * 64)


def free_port() -> int:
    """Return a loopback port for TCP that nobody else is given while this process lives.

    The kernel may give the same free port twice, or lend it to a connection meanwhile. These are below its ephemeral
    ports, and the UDP port of the same number, which stays bound, keeps each from other test processes.
    """
    for candidate in _candidates:
        port = 20_000 + candidate % 12_000
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as held, socket.socket() as probe:
            held.bind(("127.0.0.1", port))
            probe.bind(("127.0.0.1", port))
            held.detach()
            return port
    raise AssertionError("unreachable")


# --- stand-in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandIn:
    """Where the stand-in listens, and its log."""

    tls: str
    mcp: str
    plain: str
    ca_file: str
    requests: Path

    def seen(self) -> list[dict[str, Any]]:
        """Return every request so far."""
        return [json.loads(line) for line in self.requests.read_text().splitlines()]


@contextlib.contextmanager
def stand_in(folder: Path, keys: dict[str, str] | None = None) -> Iterator[StandIn]:
    """Run examples/standin on free ports. keys: the API key that a host demands; any will do elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "keys.json").write_text(json.dumps(keys or {}))
    with (folder / "standin.log").open("wb") as log:
        serve = ROOT / "examples/standin/serve.py"
        process = subprocess.Popen(
            [*DIES_WITH_US, sys.executable, serve, "--dir", folder, "--keys", folder / "keys.json"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline()
        try:
            assert line, (folder / "standin.log").read_text()
            said = json.loads(line)
            yield StandIn(said["tls"], said["mcp"], said["plain"], said["ca_file"], Path(said["requests"]))
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


# --- daemon -------------------------------------------------------------------------------------------------------


class Daemon:
    """One clrk-runtime of its own: instance, ports, state folder, resources."""

    def __init__(self, folder: Path, instance: str, documents: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.instance = instance
        self.ingress_port = free_port()
        self.admin_port = free_port()
        self.state_dir = folder / "state"
        self.log_path = folder / "runtime.log"
        self.process: subprocess.Popen[bytes] | None = None
        runtime = document(
            "Runtime", "test",
            ingress={"listen": f"127.0.0.1:{self.ingress_port}"},
            admin={"listen": f"127.0.0.1:{self.admin_port}"},
            stateDir=str(self.state_dir),
        )  # fmt: skip
        self.config = folder / "resources.yaml"
        self.config.write_text(yaml.safe_dump_all([runtime, *documents]))

    @property
    def url(self) -> str:
        """The ingress."""
        return f"http://127.0.0.1:{self.ingress_port}"

    def start(self) -> None:
        """Start, and return when the daemon says that it is ready, as it says it to systemd (sd_notify)."""
        path = self.folder / "notify.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log_path.open("ab") as log:
            notify.bind(str(path))
            notify.settimeout(0.1)
            self.process = subprocess.Popen(
                [
                    *DIES_WITH_US, BIN / "clrk-runtime", "serve", "--instance", self.instance, "-c", self.config,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
                env=os.environ | {"NOTIFY_SOCKET": str(path)},
            )  # fmt: skip
            deadline = time.monotonic() + DEADLINE_S
            while not _is_ready(notify):
                assert self.process.poll() is None, f"the daemon left:\n{self.log()}"
                assert time.monotonic() < deadline, f"not ready after {DEADLINE_S} s:\n{self.log()}"

    def stop(self) -> int:
        """Stop as systemd does; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not stop on SIGTERM:\n{self.log()}") from None

    def kill(self) -> None:
        """kill -9 of the runtime alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def gateway_pid(self) -> int | None:
        """Return the gateway that there is now, as the host numbers it; None between two of them."""
        mine = os.fsencode(self.state_dir)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # gone by now
                command = Path(f"/proc/{name}/cmdline").read_bytes()
                if b"clrk.gateway.main" in command and mine in command and not command.startswith(b"/usr/bin/bwrap"):
                    return int(name)
        return None

    def kill_gateway(self) -> bool:
        """kill -9 of the gateway; say whether there was one."""
        pid = self.gateway_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def log(self) -> str:
        """Return the end of the daemon's log."""
        return self.log_path.read_text(errors="replace")[-6000:]

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "clrk", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False,
            env=os.environ | {"CLRK_INSTANCE": self.instance, "NO_COLOR": "1", "COLUMNS": "200"},
        )  # fmt: skip

    def clrk(self, *arguments: str, code: int = 0) -> str:
        """Run the client; its exit code must be `code`."""
        done = self._ask(*arguments)
        assert done.returncode == code, f"clrk {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def spans(self, invocation_id: str) -> list[dict[str, Any]]:
        """Return every span of an invocation, as `clrk trace ID --json` prints them."""
        return [json.loads(line) for line in self.clrk("trace", invocation_id, "--json").splitlines()]

    def spans_when_complete(self, invocation_id: str) -> list[dict[str, Any]]:
        """Return the spans once the answer is out and the sandbox is gone, which is recorded after all its calls."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            spans = self.spans(invocation_id)
            if {"ingress.dispatch", "sandbox.teardown"} <= {span["name"] for span in spans}:
                return spans
            assert time.monotonic() < deadline, ([span["name"] for span in spans], self.log())

    def kept(self) -> dict[Path, bytes]:
        """Return every file of the state folder; what is rotated away meanwhile is none."""
        found = {}
        for path in self.state_dir.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[path] = path.read_bytes()
        return found

    def report(self, name: str, invocation_id: str) -> str:
        """Return all that is known of a run that went wrong: its log, its spans, the kernel's counters, our log."""
        with contextlib.suppress(AssertionError):
            self.spans_when_complete(invocation_id)  # by then all that it wrote is logged
        questions = (("agents", "logs", f"{name}/{invocation_id}"), ("trace", invocation_id), ("status",))
        answers = [self._ask(*question) for question in questions]
        return "\n".join([*(f"{one.stdout}{one.stderr}"[-6000:] for one in answers), self.log()])


async def invoke(
    caller: aiohttp.ClientSession, daemon: Daemon, name: str, source: str, headers: Mapping[str, str] = SOURCE
) -> tuple[str, str]:
    """Run an agent with a text as its event; return what it printed, and the invocation's id."""
    async with caller.post(f"{daemon.url}/agents/{name}", data=source, headers=headers) as answer:
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
        try:
            text = await answer.text()
        except aiohttp.ClientPayloadError as exc:  # it failed after its first byte
            text = repr(exc)
        else:
            if answer.status == 200:
                return text, invocation_id
    pytest.fail(f"{answer.status} {text}\n{await asyncio.to_thread(daemon.report, name, invocation_id)}")


def _is_ready(notify: socket.socket) -> bool:
    try:
        return b"READY=1" in notify.recv(4096).split(b"\n")
    except TimeoutError:
        return False


# --- resources ----------------------------------------------------------------------------------------------------


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    """Return one resource."""
    return {"apiVersion": "clrk/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def agent(
    name: str,
    command: list[str],
    *,
    mounts: dict[str, Path] | None = None,
    env: dict[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """Return a TaskAgent. mounts: path in the sandbox → path on the host."""
    template = {
        "command": command,
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "mounts": [{"path": path, "hostPath": str(host)} for path, host in (mounts or {}).items()],
    }
    return document("TaskAgent", name, template={"spec": template}, **({"timeout": "120s"} | spec))


MODEL_HOSTS = (
    "api.anthropic.com",
    "api.openai.com",
    "generativelanguage.googleapis.com",
    "aiplatform.googleapis.com",
    "us-central1-aiplatform.googleapis.com",
    "us-east5-aiplatform.googleapis.com",
    "bedrock-runtime.us-east-1.amazonaws.com",
)


def egress(stand_in: StandIn, rules: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return the gateway `default`, with the stand-in behind the real names, and its rules."""
    aliases = [
        {"hostnames": [*MODEL_HOSTS, "files.internal"], "address": stand_in.tls},
        {"hostnames": ["mcp.internal"], "address": stand_in.mcp},
        {"hostnames": ["tools.internal"], "address": stand_in.plain},
    ]
    allowed = rules or [
        {"hostnames": [*MODEL_HOSTS, "mcp.internal", "files.internal"], "ports": [443]},
        {"hostnames": ["tools.internal"], "ports": [80], "http": {"methods": ["GET", "POST", "PUT"]}},
    ]
    return [
        document("EgressGateway", "default", hostAliases=aliases, upstreamTLS={"caFile": stand_in.ca_file}),
        document("EgressL4Route", "stand-in", rules=allowed),
    ]
