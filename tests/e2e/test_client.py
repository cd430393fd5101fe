"""`clrk` against the real daemon: exit codes, listings, filters, and the shape of what it prints as JSON."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from instances import DEADLINE_S
from stack import BIN, Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

SPAN = {
    "trace_id": str, "span_id": str, "parent_span_id": str, "name": str, "kind": str, "start_time_unix_nano": int,
    "end_time_unix_nano": int, "status": dict, "attributes": dict, "events": list, "resource": dict,
}  # fmt: skip
PYTHON = ("agents", "run-task", "python", "--content-type", "text/plain", "-i")


def last_invocation(daemon: Daemon, agent: str) -> str:
    lines = daemon.clrk("traces", "--agent", agent, "--json").splitlines()
    invocation_id: str = json.loads(lines[-1])["attributes"]["invocation.id"]
    return invocation_id


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        ((*PYTHON, "print('well')"), 0, "well\n"),
        ((*PYTHON, "print('half'); sys.exit(3)"), 1, "half\n"),
        ((*PYTHON, "sys.exit(3)"), 1, ""),
        (("agents", "run-task", "sleepy"), 124, ""),
        ((*PYTHON, "import time; time.sleep(3600)", "--timeout", "1s"), 124, ""),
        (("agents", "run-task", "python", "--content-type", "application/json", "-i", "{"), 77, ""),
    ],
    ids=["succeeded", "failed-after-output", "failed", "timeout", "own-timeout", "rejected"],
)
def test_exit_codes_of_run_task(daemon: Daemon, arguments: tuple[str, ...], code: int, printed: str) -> None:
    assert daemon.clrk(*arguments, code=code) == printed


def test_run_task_says_who_asked(daemon: Daemon) -> None:
    event = json.loads(
        daemon.clrk(
            *PYTHON, "print(json.dumps(event))", "-H", "x-tenant-id=acme", "--ce-type", "com.example.asked",
            "--ce-source", "urn:me", "--ce-subject", "a/b",
        )
    )  # fmt: skip
    assert event["x-tenant-id"] == "acme"
    assert (event["type"], event["source"], event["subject"]) == ("com.example.asked", "urn:me", "a/b")


def test_run_task_takes_its_input_from_stdin_and_from_a_file(daemon: Daemon, tmp_path: Any) -> None:
    source = tmp_path / "source.py"
    source.write_text("print('from a file')")
    assert daemon.clrk(*PYTHON, f"@{source}") == "from a file\n"


def test_agents_are_listed(daemon: Daemon) -> None:
    listed = json.loads(daemon.clrk("agents", "list", "-o", "json"))
    assert {"sdk", "curl", "node", "python", "shell"} <= {agent["name"] for agent in listed}
    assert "curl" in daemon.clrk("agents", "get", "curl", "-o", "yaml")
    daemon.clrk("agents", "get", "nobody", code=1)


def test_a_span_has_exactly_the_fields_of_the_contract(daemon: Daemon) -> None:
    daemon.clrk("agents", "run-task", "curl")
    invocation_id = last_invocation(daemon, "curl")
    spans = daemon.spans_when_complete(invocation_id)
    names = [span["name"] for span in spans]
    for wanted in ("ingress.dispatch", "invoke_agent curl", "sandbox.acquire", "sandbox.spawn", "GET tools.internal"):
        assert names.count(wanted) == 1
    ids = {span["span_id"] for span in spans}
    for span in spans:
        assert {key: type(value) for key, value in span.items()} == SPAN
        assert len(bytes.fromhex(span["trace_id"])) == 16
        assert len(bytes.fromhex(span["span_id"])) == 8
        assert span["trace_id"] == span["trace_id"].lower()
        assert span["parent_span_id"] in ids | {""}
        assert span["kind"] in ("SPAN_KIND_SERVER", "SPAN_KIND_INTERNAL", "SPAN_KIND_CLIENT")
        assert set(span["status"]) == {"code", "message"}
        assert span["status"]["code"] in ("STATUS_CODE_UNSET", "STATUS_CODE_OK", "STATUS_CODE_ERROR")
        assert 0 < span["start_time_unix_nano"] <= span["end_time_unix_nano"]
        assert span["resource"]["service.name"] == "clrk"
        assert span["resource"]["clrk.component"] in ("ingress", "gateway", "runtime")
        assert {"service.version", "host.name"} <= set(span["resource"])
    (root,) = [span for span in spans if span["parent_span_id"] == ""]
    assert root["name"] == "ingress.dispatch"
    assert root["attributes"]["clrk.trigger"] == "cli"


def test_traces_filter(daemon: Daemon) -> None:
    daemon.clrk("agents", "run-task", "sdk", "-i", "{}", "--content-type", "application/json")

    def names(*arguments: str) -> list[str]:
        return [json.loads(line)["name"] for line in daemon.clrk("traces", "--json", *arguments).splitlines()]

    assert set(names("--agent", "sdk", "--model", "gpt-5.4-mini")) == {"chat gpt-5.4-mini"}
    assert set(names("--agent", "sdk", "--system", "anthropic")) == {"chat claude-sonnet-5"}
    assert "chat claude-sonnet-5" in names("--agent", "sdk", "--min-input-tokens", "10")
    assert names("--agent", "sdk", "--min-input-tokens", "1000000") == []
    assert set(names("--agent", "sdk", "--denied")) == {"egress.dial.denied"}
    assert names("--agent", "sdk", "--until", "100h") == []
    assert "ingress.dispatch" in names("--agent", "sdk", "--since", "100h")


def test_the_tree_shows_the_chain(daemon: Daemon) -> None:
    daemon.clrk("agents", "run-task", "sdk", "-i", "{}", "--content-type", "application/json")
    tree = daemon.clrk("trace", last_invocation(daemon, "sdk"))
    for part in (
        "ingress.dispatch",
        "invoke_agent sdk",
        "chat gpt-5.4-mini",
        "tools/call refund_policy",
        "DENIED",
        "$",
    ):
        assert part in tree
    daemon.clrk("trace", "ffffffff-ffff-7fff-bfff-ffffffffffff", code=1)


def test_without_a_daemon_it_says_so() -> None:
    done = subprocess.run(
        [BIN / "clrk", "--socket", "/nonexistent/admin.sock", "traces"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "/nonexistent/admin.sock" in done.stderr
    assert "Traceback" not in done.stderr
