"""`clrk` as a user runs it: a process of its own, against the real admin API on a real unix socket."""

import asyncio
import json
import os
import pty
import re
import sys
import time
from dataclasses import dataclass, field, replace

import pytest
import yaml
from aiohttp import web
from page_samples import daemon_agent
from span_samples import (
    Running,
    admin_sources,
    agent,
    config,
    gateway,
    identity,
    invocation_record,
    record,
    record_invocation,
)

from clrk.core.messages import Counters
from clrk.gateway.admin.app import build_admin_app
from clrk.gateway.agents import AgentTable
from clrk.gateway.cli.terminal import printable
from clrk.gateway.health import RuntimeNews
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.pipeline import Telemetry

COMMAND = [sys.executable, "-P", "-m", "clrk.gateway.client_cli"]
HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/]\r\nfake\u202e\u009b31m"


@dataclass
class Done:
    code: int
    out: str
    err: str
    raw: bytes = b""


async def run(path, *arguments, stdin=b"", **environment):
    environment = {"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": str(path), "TZ": "UTC"} | environment
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate(stdin)
    return Done(process.returncode, out.decode(errors="replace"), err.decode(), out)


@dataclass
class Daemon:
    path: str
    telemetry: Telemetry
    requests: list
    answer: object = None
    news: RuntimeNews = field(default_factory=RuntimeNews)
    running: Running = field(default_factory=Running)

    async def clrk(self, *arguments, **more):
        return await run(self.path, *arguments, **more)


@pytest.fixture
async def daemon(tmp_path):
    telemetry = Telemetry.open(tmp_path / "state", config())
    this = Daemon(str(tmp_path / "admin.sock"), telemetry, [])

    async def run_task(request, namespace, name):
        body = await request.read()
        this.requests.append((namespace, name, request.headers, body))
        return await this.answer(request)

    resources = config([gateway()], [agent(), agent("orders", "team-b")])
    resources.daemons.append(daemon_agent())
    catalogue = AgentTable(resources)
    app = build_admin_app(
        store=telemetry.store, catalogue=catalogue, run_task=run_task,
        **admin_sources(telemetry, this.news, this.running),
    )  # fmt: skip
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, this.path).start()
    yield this
    await runner.cleanup()
    await telemetry.close()


def answering(daemon, body=b"", *, status=200, phase="Succeeded", exit_code=0, headers=None):
    """Make the agent answer with these bytes, and end its invocation in this phase."""
    who = identity()

    async def answer(request):
        response = web.StreamResponse(
            status=status, headers={"X-Clrk-Invocation-ID": who.invocation_id, **(headers or {})}
        )
        await response.prepare(request)
        await response.write(body)
        if phase:
            daemon.telemetry.record_invocation(invocation_record(who, phase=Phase(phase), exit_code=exit_code))
        await response.write_eof()
        return response

    daemon.answer = answer
    return who


# --- agents ---------------------------------------------------------------------------------------------------------


async def test_agents_list_and_get_in_every_form(daemon):
    table = await daemon.clrk("agents", "list")
    assert table.code == 0
    assert re.search(r"default +support +TaskAgent +[0-9a-f]{12} +100s +0 running\n", table.out)
    assert "\x1b" not in table.out
    assert max(map(len, table.out.splitlines())) <= 80
    listed = json.loads((await daemon.clrk("agents", "list", "-o", "json")).out)
    assert [item["name"] for item in listed] == ["support", "watcher", "orders"]
    assert yaml.safe_load((await daemon.clrk("agents", "list", "-o", "yaml")).out) == listed
    one = json.loads((await daemon.clrk("agents", "get", "team-b/orders", "-o", "json")).out)
    assert one["spec"]["template"]["spec"]["command"] == ["/bin/agent"]
    facts = (await daemon.clrk("agents", "get", "support")).out
    assert re.search(r"command +\[\"/bin/agent\"\]\n", facts)
    assert re.search(r"maxConcurrent +unlimited\n", facts)
    assert re.search(r"timeout +100s\n", facts)


async def test_agents_list_says_how_they_stand(daemon):
    daemon.running.counts["default", "support"] = 3
    assert re.search(r"support .* 100s +3 running\n", (await daemon.clrk("agents", "list")).out)
    assert json.loads((await daemon.clrk("agents", "get", "support", "-o", "json")).out)["running"] == 3


# --- invocations ----------------------------------------------------------------------------------------------------


async def test_invocations_in_every_form_the_newest_last(daemon):
    first, second = identity(), identity()
    daemon.telemetry.record_invocation(invocation_record(first, created_ns=time.time_ns() - 7_200 * 10**9))
    failed = invocation_record(second, phase=Phase.FAILED, exit_code=3, message="it exited with code 3", trigger="cron")
    daemon.telemetry.record_invocation(failed)
    record_invocation(daemon.telemetry, second)
    done = await daemon.clrk("agents", "invocations", "support")
    head, *lines = done.out.splitlines()
    assert head.split() == "TIME INVOCATION TRIGGER CALLER PHASE DURATION CALLS IN OUT COST DENIED WHY".split()
    assert re.search(
        rf"{second.invocation_id[:13]} +cron +203.0.113.7:40000 +Failed \(3\) +1.5 ?s +2 +320 +85 +", lines[1]
    )
    assert first.invocation_id[:13] in lines[0]
    printed = (await daemon.clrk("agents", "invocations", "default/support", "-o", "json")).out.splitlines()
    assert [json.loads(line)["invocation"] for line in printed] == [first.invocation_id, second.invocation_id]
    item = json.loads(printed[1])
    assert (item["phase"], item["exitCode"], item["inputTokens"], item["denials"]) == ("Failed", 3, 320, 1)
    assert item["costUsd"] == pytest.approx(0.0022)
    assert yaml.safe_load((await daemon.clrk("agents", "invocations", "support", "-o", "yaml")).out)[1] == item


async def test_who_asked_is_seen_where_one_looks(daemon):
    who = replace(identity(), caller_fields=(("user", "bob"), ("tenant", "acme")))
    daemon.telemetry.record_invocation(invocation_record(who, identity={"user": "bob", "tenant": "acme"}))
    record_invocation(daemon.telemetry, who)
    assert "tenant=acme, user=bob" in (await daemon.clrk("agents", "invocations", "support")).out
    assert re.search(r"^identity +tenant=acme, user=bob$", (await daemon.clrk("trace", who.invocation_id)).out, re.M)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--phase", "Failed"], 1),
        (["--phase", "Succeeded"], 1),
        (["--trigger", "cron"], 1),
        (["--denied"], 1),
        (["--model", "claude-*"], 1),
        (["--min-input-tokens", "321"], 0),
        (["--since", "1h"], 1),
        (["--until", "1h"], 1),
        (["--limit", "1"], 1),
        ([], 2),
    ],
)
async def test_filters_of_invocations(daemon, arguments, found):
    old, new = identity(), identity()
    daemon.telemetry.record_invocation(invocation_record(old, created_ns=time.time_ns() - 7_200 * 10**9))
    daemon.telemetry.record_invocation(invocation_record(new, phase=Phase.FAILED, trigger="cron"))
    record_invocation(daemon.telemetry, new)
    done = await daemon.clrk("agents", "invocations", "support", "-o", "json", *arguments)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == found


@pytest.mark.parametrize("form", ["table", "json"])
async def test_where_no_invocation_is_found_it_says_why(daemon, form):
    filtered = await daemon.clrk("agents", "invocations", "support", "-o", form)
    assert (filtered.code, filtered.out) == (0, "")
    assert "no invocation of support fits" in filtered.err
    missing = await daemon.clrk("agents", "invocations", "suport", "-o", form)
    assert (missing.code, missing.out) == (1, "")
    assert "no agent" in missing.err
    poller = await daemon.clrk("agents", "invocations", "watcher", "-o", form)
    assert (poller.code, poller.out) == (0, "")
    assert "is a DaemonAgent" in poller.err
    assert "clrk agents logs watcher" in poller.err


async def test_all_invocations_are_fetched_page_by_page(daemon):
    start_ns = time.time_ns()
    for number in range(2100):
        daemon.telemetry.record_invocation(invocation_record(identity(), created_ns=start_ns + number // 2))
    done = await daemon.clrk("agents", "invocations", "support", "-o", "json")
    ids = [json.loads(line)["invocation"] for line in done.out.splitlines()]
    assert len(ids) == len(set(ids)) == 2100
    table = await daemon.clrk("agents", "invocations", "support")
    assert len(table.out.splitlines()) == 51
    assert "only the newest 50 are shown" in table.err


@pytest.mark.parametrize("arguments", [["--phase", "Fine"], ["--limit", "0"], ["--since", "soon"]])
async def test_a_filter_that_can_not_be_used(daemon, arguments):
    done = await daemon.clrk("agents", "invocations", "support", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"clrk: {arguments[0][2:]}") or arguments[1] in done.err


async def test_a_hostile_caller_does_not_speak_to_the_terminal(daemon):
    daemon.telemetry.record_invocation(invocation_record(identity(), caller=HOSTILE, trigger=HOSTILE))
    done = await daemon.clrk("agents", "invocations", "support")
    assert len(done.out.splitlines()) == 2
    assert "\x1b" not in done.out
    assert "\u202e" not in done.out


async def test_traces_of_an_agent_and_of_one_invocation(daemon):
    who = identity()
    record_invocation(daemon.telemetry, who)
    record_invocation(daemon.telemetry, identity("orders", "team-b"))
    listed = await daemon.clrk("agents", "traces", "support", "--json", "--denied")
    assert [json.loads(line)["attributes"]["invocation.id"] for line in listed.out.splitlines()] == [who.invocation_id]
    tree = (await daemon.clrk("agents", "traces", f"support/{who.invocation_id}")).out
    assert tree == (await daemon.clrk("trace", who.invocation_id)).out


# --- the daemon -----------------------------------------------------------------------------------------------------


async def test_status_says_what_was_dropped_and_what_was_refused(daemon):
    daemon.news.counters = Counters({"stamp_push_failed": 2, "fine": 0}, {"running": 3, "warm": 1})
    daemon.news.take(7, ["the Runtime resource changed; that takes effect at the next start"])
    daemon.news.refuse(["a.yaml:3: TaskAgent/a: spec.timeot: unknown field"])
    daemon.telemetry.store.counters["dropped_log_lines"] += 4
    out = (await daemon.clrk("status")).out
    for line in (
        r"sandboxes +3 running, 1 warm", r"configuration +generation 7", r"dropped +dropped_log_lines 4",
        r"reload refused +a\.yaml:3: TaskAgent/a", r"kernel stamp_push_failed +2",
        r"not yet +the Runtime resource changed",
    ):  # fmt: skip
        assert re.search(line, out), line
    assert "kernel fine" not in out
    told = json.loads((await daemon.clrk("status", "-o", "json")).out)
    assert (told["ready"], told["configuration"]["refusals"]) == (True, 1)


async def test_apply_without_a_daemon_that_holds_the_lock(daemon, tmp_path):
    done = await daemon.clrk("apply")
    assert done.code == 1
    assert "runtime.lock" in done.err
    (tmp_path / "runtime.lock").write_text("1\n")
    done = await daemon.clrk("apply")
    assert done.code == 1
    assert "no daemon holds" in done.err


@pytest.mark.parametrize("name", ["nobody", "a/b/c", "/", "", "default/../support", HOSTILE])
async def test_an_agent_that_does_not_exist(daemon, name):
    done = await daemon.clrk("agents", "get", name)
    assert done.code != 0
    assert done.out == ""
    assert done.err.startswith("clrk: ")
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err


# --- traces ---------------------------------------------------------------------------------------------------------


async def test_the_five_steps_of_the_debugging_session(daemon):
    who = identity(trace_id="4bf92f3577b34da6a3ce929d0e0e4736")
    record_invocation(daemon.telemetry, who, remote_parent="00f067aa0ba902b7")
    record_invocation(daemon.telemetry, identity("orders", "team-b"))

    table = (await daemon.clrk("traces", "--agent", "support", "--since", "15m")).out
    assert table.count(who.invocation_id) == 5
    assert re.search(
        r"support\s+chat claude-sonnet-5\s+320\s+85\s+\$0\.0022\s+200\s+900ms\s+" + who.invocation_id, table
    )
    assert re.search(r"egress\.dial\.denied\s+DELETE tools\.internal/orders/1042\s+denied", table)
    assert "hidden" not in table, "query strings may hold secrets"

    only_denied = (await daemon.clrk("traces", "--agent", "default/support", "--denied", "--json")).out
    (denied,) = [json.loads(line) for line in only_denied.splitlines()]
    invocation = denied["attributes"]["invocation.id"]
    assert invocation == who.invocation_id

    tree = (await daemon.clrk("trace", invocation)).out
    assert re.search(r"trigger\s+http, POST /agents/support", tree)
    assert re.search(r"caller\s+203\.0\.113\.7:40000, its span 00f067aa0ba902b7", tree)
    assert re.search(r"usage\s+1 LLM call, 320 tokens in, 85 out, \$0\.0022, 1 denied", tree)
    assert re.search(r"trace\s+4bf92f3577b34da6a3ce929d0e0e4736", tree)
    assert {name: depth for depth, name in drawn(tree)} == {
        "ingress.dispatch": 0,
        "invoke_agent support": 1,
        "chat claude-sonnet-5": 2,
        "tools/call refund_policy": 2,
        "egress.dial.denied": 2,
    }
    assert "DENIED no_rule: no rule allows it" in tree
    assert "python3[4711]" in tree
    assert "320 in, 85 out" in tree

    as_json = (await daemon.clrk("trace", invocation[:20], "--json")).out
    assert len([json.loads(line) for line in as_json.splitlines()]) == 5


async def test_filters_reach_the_daemon(daemon):
    record_invocation(daemon.telemetry, identity())
    for arguments, expected in (
        (["--model", "claude-*"], 1),
        (["--model", "gpt"], 0),
        (["--system", "anthropic", "--min-input-tokens", "320"], 1),
        (["--min-input-tokens", "321"], 0),
        (["--errors"], 1),
        (["--until", "1h"], 0),
        (["--limit", "2"], 2),
        ([], 5),
    ):
        done = await daemon.clrk("traces", "--json", *arguments)
        assert (done.code, len(done.out.splitlines())) == (0, expected), arguments
    bad = await daemon.clrk("traces", "--since", "yesterday")
    assert bad.code == 1
    assert "15m" in bad.err


async def test_nothing_found_is_said_on_stderr_only(daemon):
    for arguments in (["traces"], ["traces", "--json"], ["agents", "logs", "support"]):
        done = await daemon.clrk(*arguments)
        assert (done.code, done.out) == (0, "")
    missing = await daemon.clrk("trace", "ffffffff")
    assert (missing.code, missing.out) == (1, "")
    assert "no invocation ffffffff" in missing.err


async def test_a_table_says_when_it_is_cut(daemon):
    who = identity()
    for index in range(250):
        record(daemon.telemetry, who, f"s{index}")
    done = await daemon.clrk("traces")
    assert "s249" in done.out
    assert not re.search(r"\bs49\b", done.out)
    assert "newest 200" in done.err
    assert len((await daemon.clrk("traces", "--json")).out.splitlines()) == 250


async def test_names_and_values_of_an_agent_do_not_reach_the_terminal(daemon):
    who = identity()
    start = time.time_ns()
    record(
        daemon.telemetry, who, f"chat {HOSTILE}", start_ns=start, error=HOSTILE, error__type=HOSTILE,
        gen_ai__request__model=HOSTILE, process__pid=1, process__executable__name=HOSTILE,
    )  # fmt: skip
    record(
        daemon.telemetry, who, "ingress.dispatch", start_ns=start, parent="", clrk__trigger=HOSTILE,
        user_agent__original=HOSTILE, client__address=HOSTILE, url__path=HOSTILE, http__request__method="GET",
    )  # fmt: skip
    record(daemon.telemetry, who, "x", http__request__method=HOSTILE, url__full="http://[broken" + HOSTILE)
    daemon.telemetry.record_log(who, "stdout", HOSTILE.encode(), start)
    for arguments in (
        ["traces", "--limit", "50"],
        ["traces", "-o", "yaml"],
        ["traces", "--json"],
        ["trace", who.invocation_id],
        ["trace", who.invocation_id, "-o", "yaml"],
    ):
        done = await daemon.clrk(*arguments)
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) < 6 or arguments[0] == "trace" or "yaml" in arguments
        assert not set(done.out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e"}, arguments
        if "--json" in arguments:
            assert any(
                HOSTILE in str(json.loads(line)) or HOSTILE in json.loads(line)["name"]
                for line in done.out.splitlines()
            )
        if arguments[-1] == who.invocation_id:
            assert "[bold red]x[/]" in done.out, "markup is text"
            assert "\\x1b[2J" in done.out
            assert "\nfake" not in done.out
    out = await on_terminal(daemon.path, "agents", "logs", "support", "-o", "json")
    assert not set(out.decode()) & {"\x1b", "\x07", "\x9b", "\u202e"}
    out = await on_terminal(daemon.path, "agents", "logs", "support")
    assert b"\\x1b[2J" in out
    assert b"\x1b]0" not in out
    assert b"\nfake" not in out


def drawn(output):
    """Return depth and name of every line of the tree, which stands below an empty line."""
    tree = output.split("\n\n", 1)[1].splitlines()
    plain = [re.sub(r"^[│├└─\s]+", "", line) for line in tree]
    return [((len(line) - len(rest)) // 4, rest.split("  ")[0]) for line, rest in zip(tree, plain, strict=True)]


async def test_broken_parents_and_cycles_are_drawn_once(daemon):
    who = identity()
    record(daemon.telemetry, who, "a", span_id="a" * 16, parent="b" * 16)
    record(daemon.telemetry, who, "b", span_id="b" * 16, parent="a" * 16)
    record(daemon.telemetry, who, "self", span_id="c" * 16, parent="c" * 16)
    record(daemon.telemetry, who, "orphan", parent="d" * 16)
    parent = "e" * 16
    for index in range(1500):
        record(daemon.telemetry, who, f"deep{index}", span_id=f"{index + 1:016x}", parent=parent)
        parent = f"{index + 1:016x}"
    done = await daemon.clrk("trace", who.invocation_id)
    assert done.code == 0, done.err
    assert sorted(name for _, name in drawn(done.out)) == sorted(
        ["a", "b", "self", "orphan", *(f"deep{index}" for index in range(1500))]
    )


async def on_terminal(path, *arguments, **environment):
    """Run with stdout on a pseudo terminal; return what it received."""
    ours, theirs = pty.openpty()
    environment = {
        "PATH": os.environ["PATH"],
        "CLRK_ADMIN_SOCKET": path,
        "TERM": "xterm",
        "COLUMNS": "160",
    } | environment
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, env=environment, stdout=theirs)
    os.close(theirs)
    received = bytearray()

    def drain():
        while True:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # EIO: the other side is closed
                return
            received.extend(chunk)

    async with asyncio.timeout(30):
        await asyncio.to_thread(drain)
        await process.wait()
    os.close(ours)
    return bytes(received)


async def test_colour_on_a_terminal_only_and_never_with_no_color(daemon):
    record_invocation(daemon.telemetry, identity())
    assert b"\x1b[" in await on_terminal(daemon.path, "traces")
    # NO_COLOR (no-color.org) forbids colours; bold and dim are none.
    plain = await on_terminal(daemon.path, "traces", NO_COLOR="1")
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]", plain)
    assert "\x1b" not in (await daemon.clrk("traces")).out


# --- logs -----------------------------------------------------------------------------------------------------------


async def test_logs_are_ndjson_in_a_pipe_and_text_on_a_terminal(daemon):
    first, second = identity(), identity()
    for who, line in ((first, b"hello"), (second, b"world")):
        record(daemon.telemetry, who)
        daemon.telemetry.record_log(who, "stderr", line, time.time_ns())
    found = [json.loads(line) for line in (await daemon.clrk("agents", "logs", "support")).out.splitlines()]
    assert [line["line"] for line in found] == ["hello", "world"]
    one = (await daemon.clrk("agents", "logs", f"default/support/{first.invocation_id}", "-o", "text")).out
    assert re.fullmatch(rf"\S+ {first.invocation_id[:13]} stderr hello\n", one)
    assert b"world" in await on_terminal(daemon.path, "agents", "logs", f"support/{second.invocation_id}")


# --- run-task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "code"), [("Succeeded", 0), ("Failed", 1), ("Timeout", 124), ("Rejected", 77), ("Cancelled", 1)]
)
async def test_the_exit_code_is_the_phase_even_when_bytes_were_sent(daemon, phase, code):
    who = answering(daemon, b"partial \xff\x00 answer", phase=phase)
    done = await daemon.clrk("agents", "run-task", "support")
    assert (done.code, done.raw) == (code, b"partial \xff\x00 answer")
    assert f"invocation {who.invocation_id}" in done.err


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 77), (404, 77), (405, 77), (413, 77), (429, 77), (503, 77), (500, 1), (502, 1), (507, 1), (504, 124)],
)
async def test_an_error_answer_goes_to_stderr(daemon, status, code):
    answering(
        daemon, json.dumps({"detail": f"because {HOSTILE}"}).encode(), status=status, phase="",
        headers={"X-Clrk-Exit-Code": "3"} if status == 500 else {},
    )  # fmt: skip
    done = await daemon.clrk("agents", "run-task", "support")
    assert (done.code, done.out) == (code, "")
    assert "because" in done.err
    assert "\x1b" not in done.err
    assert ("exited with code 3" in done.err) == (status == 500)


async def test_a_failure_is_said_once_and_points_to_its_cause(daemon):
    body = json.dumps({"detail": "the agent exited with code 3"}).encode()
    who = answering(daemon, body, status=500, phase="", headers={"X-Clrk-Exit-Code": "3"})
    done = await daemon.clrk("agents", "run-task", "support")
    assert done.err.count("exited with code 3") == 1
    assert f"clrk agents logs support/{who.invocation_id[:13]}`" in done.err
    assert (await daemon.clrk("agents", "run-task", "support", "-q")).err == "clrk: the agent exited with code 3\n"


async def test_logs_follow_both_streams_until_the_invocation_has_ended(daemon):
    who = identity()
    daemon.telemetry.record_invocation(invocation_record(who, phase=Phase.RUNNING, ended_ns=0))
    daemon.telemetry.record_log(who, "stderr", b"before", time.time_ns())
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "agents", "logs", "-f", f"support/{who.invocation_id}",
        env={"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": daemon.path}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        assert json.loads(await process.stdout.readline())["line"] == "before"
        daemon.telemetry.record_log(identity(), "stdout", b"of another invocation", time.time_ns())
        daemon.telemetry.record_log(who, "stdout", b"after", time.time_ns())
        entry = json.loads(await process.stdout.readline())
        assert (entry["stream"], entry["line"]) == ("stdout", "after")
        daemon.telemetry.record_log(who, "stderr", b"last words", time.time_ns())
        daemon.telemetry.record_invocation(invocation_record(who))
        assert json.loads(await process.stdout.readline())["line"] == "last words"
        assert await process.stdout.read() == b""
        assert await process.wait() == 0


async def test_follow_without_a_tail_tells_what_is_new_and_all_of_a_burst(daemon):
    who = identity()
    daemon.telemetry.record_invocation(invocation_record(who, phase=Phase.RUNNING, ended_ns=0))
    daemon.telemetry.record_log(who, "stderr", b"before", time.time_ns())
    assert await daemon.telemetry.flush()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "agents", "logs", "-f", "--tail", "0", f"support/{who.invocation_id}",
        env={"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": daemon.path}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        number = 0
        while True:  # until it listens
            daemon.telemetry.record_log(who, "stdout", f"{number}".encode(), time.time_ns())
            try:
                async with asyncio.timeout(0.2):
                    first = json.loads(await process.stdout.readline())["line"]
                break
            except TimeoutError:
                number += 1
        assert first.isdecimal()
        for burst in range(2500):
            daemon.telemetry.record_log(who, "stdout", f"burst {burst}".encode(), time.time_ns())
        daemon.telemetry.record_invocation(invocation_record(who))
        rest = [json.loads(line)["line"] for line in (await process.stdout.read()).splitlines()]
    assert [line for line in rest if line.startswith("burst")] == [f"burst {burst}" for burst in range(2500)]


async def test_a_stream_that_was_cut_is_no_end(tmp_path):
    """kill -9 of the gateway in the middle of `clrk traces --json`: what came is printed, and the exit code tells."""

    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        line = b'{"trace_id":"1"}\n'
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(line), line))
        await writer.drain()
        writer.close()

    path = tmp_path / "cut.sock"
    async with await asyncio.start_unix_server(cut, path):
        done = await run(path, "traces", "--json")
    assert (done.code, done.out) == (1, '{"trace_id":"1"}\n')
    assert "the daemon broke off" in done.err


@pytest.mark.parametrize(
    ("timeout", "says"), [("0s", "more than 0"), ("3h", "at most 1h"), ("soon", "for example 100s")]
)
async def test_a_timeout_that_can_not_be_is_refused_in_the_words_of_the_flag(daemon, timeout, says):
    done = await daemon.clrk("agents", "run-task", "support", "--timeout", timeout)
    assert (done.code, done.out, daemon.requests) == (2, "", [])
    assert done.err.startswith("clrk: --timeout: ")
    assert says in done.err


async def test_run_task_into_a_pipe_that_nobody_reads_ends_quietly(daemon):
    answering(daemon, b"x" * 1_000_000)
    ours, theirs = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "agents", "run-task", "support", "-q", stdout=theirs, stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "CLRK_ADMIN_SOCKET": daemon.path},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    assert (process.returncode, err) == (141, b"")


async def test_the_reason_of_an_end_is_shown(daemon):
    """A refused request leaves one span, which may not say why; the record does."""
    who = identity()
    record(daemon.telemetry, who, "ingress.dispatch", http__response__status_code=400)
    daemon.telemetry.record_invocation(
        invocation_record(who, phase=Phase.REJECTED, exit_code=None, message=f"ce-type: must not be empty{HOSTILE}")
    )
    for command in (["trace", who.invocation_id], ["agents", "invocations", "support"]):
        shown = (await daemon.clrk(*command)).out
        assert "Rejected" in shown
        assert "ce-type: must not be empty" in shown
        assert "\x1b" not in shown


async def test_logs_in_every_form(daemon):
    who = identity()
    for line in (b"- a: [", b"two"):
        daemon.telemetry.record_log(who, "stdout", line, time.time_ns())
    forms = {
        form: (await daemon.clrk("agents", "logs", "support", "-o", form)).out for form in ("table", "yaml", "json")
    }
    assert [entry["line"] for entry in yaml.safe_load(forms["yaml"])] == ["- a: [", "two"]
    assert yaml.safe_load(forms["yaml"]) == [json.loads(line) for line in forms["json"].splitlines()]
    assert forms["table"] == (await daemon.clrk("agents", "logs", "support", "-o", "text")).out


async def test_a_daemons_call_is_of_no_invocation(daemon):
    record(daemon.telemetry, replace(identity(), agent_kind="DaemonAgent", invocation_id=""))
    (_, row) = (await daemon.clrk("traces")).out.splitlines()
    assert "None" not in row


async def test_logs_of_an_agent_without_lines_say_so_on_stderr(daemon):
    done = await daemon.clrk("agents", "logs", "nobody")
    assert (done.code, done.out) == (0, "")
    assert "no lines of nobody" in done.err


async def test_headers_and_attributes_reach_the_agent(daemon):
    answering(daemon)
    done = await daemon.clrk(
        "agents", "run-task", "team-b/orders", "-q", "-i", '{"a": 1}', "-H", "x-tenant-id=acme", "-H", "ce-foo=b=c",
        "-H", 'note=caf\u00e9 "%" \r\nX-Evil: 1', "--ce-type", "t", "--ce-source", "s", "--ce-subject", "u",
        "--timeout", "30s",
    )  # fmt: skip
    assert done.code == 0
    assert done.err == ""
    namespace, name, headers, body = daemon.requests[0]
    assert (namespace, name, body) == ("team-b", "orders", b'{"a": 1}')
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Clrk-Trigger"] == "cli"
    assert float(headers["X-Clrk-Timeout"]) == 30
    assert headers["ce-x-tenant-id"] == "acme"
    assert headers["ce-foo"] == "b=c"
    assert headers["ce-note"] == "caf%C3%A9%20%22%25%22%20%0D%0AX-Evil:%201"
    assert "X-Evil" not in headers
    assert (headers["ce-type"], headers["ce-source"], headers["ce-subject"]) == ("t", "s", "u")


async def test_input_from_a_file_stdin_text_bytes_and_nothing(daemon, tmp_path):
    answering(daemon)
    (tmp_path / "in").write_bytes(b"\xff\xfe")
    for arguments, stdin, body, content_type in (
        (["-i", f"@{tmp_path / 'in'}"], b"", b"\xff\xfe", "application/octet-stream"),
        (["-i", "-"], b"from stdin", b"from stdin", "text/plain; charset=utf-8"),
        (["-i", "-", "--content-type", "a/b"], b"[1]", b"[1]", "a/b"),
        ([], b"not read", b"", None),
    ):
        daemon.requests.clear()
        assert (await daemon.clrk("agents", "run-task", "support", *arguments, stdin=stdin)).code == 0
        _, _, headers, sent = daemon.requests[0]
        assert (sent, headers.get("Content-Type")) == (body, content_type)
    missing = await daemon.clrk("agents", "run-task", "support", "-i", "@/nowhere")
    assert missing.code == 2
    assert "No such file" in missing.err


@pytest.mark.parametrize("header", ["novalue", "=x", "a b=c", "a\r\nb=c", "\u00e9=x"])
async def test_a_header_that_is_none_is_refused_before_anything_runs(daemon, header):
    done = await daemon.clrk("agents", "run-task", "support", "-H", header)
    assert done.code == 2
    assert daemon.requests == []


async def test_the_answer_is_shown_as_it_comes(daemon):
    who, go_on = identity(), asyncio.Event()

    async def answer(request):
        response = web.StreamResponse(headers={"X-Clrk-Invocation-ID": who.invocation_id})
        await response.prepare(request)
        await response.write(b"first")
        await go_on.wait()  # set only after the client has shown the first bytes
        await response.write(b"second")
        daemon.telemetry.record_invocation(invocation_record(who))
        return response

    daemon.answer = answer
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--socket", daemon.path, "agents", "run-task", "support", "-q", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        assert await process.stdout.readexactly(5) == b"first"
        go_on.set()
        assert await process.stdout.read() == b"second"
        assert await process.wait() == 0


async def test_a_cut_answer_is_a_failure(daemon):
    who = identity()

    async def answer(request):
        response = web.StreamResponse(headers={"X-Clrk-Invocation-ID": who.invocation_id})
        await response.prepare(request)
        await response.write(b"half")
        daemon.telemetry.record_invocation(invocation_record(who, phase=Phase.FAILED, exit_code=9))
        request.transport.abort()
        return response

    daemon.answer = answer
    done = await daemon.clrk("agents", "run-task", "support")
    assert (done.code, done.out) == (1, "half")
    assert "cut off" in done.err


async def test_interrupt_cancels_the_invocation(daemon):
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(request):
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    daemon.answer = answer
    process = await asyncio.create_subprocess_exec(*COMMAND, "--socket", daemon.path, "agents", "run-task", "support")
    async with asyncio.timeout(30):
        await started.wait()
        process.send_signal(2)
        assert await process.wait() == 130
        await cancelled.wait()


async def test_bad_timeouts_are_refused(daemon):
    for text in ("soon", "0s", "-1s"):
        done = await daemon.clrk("agents", "run-task", "support", f"--timeout={text}")
        assert (done.code, daemon.requests) == (2, [])


# --- the command itself ---------------------------------------------------------------------------------------------


async def test_without_a_daemon_it_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing.sock", tmp_path / "file"):
        for arguments in (["agents", "list"], ["traces"], ["trace", "x"], ["agents", "run-task", "a"]):
            done = await run(path, *arguments)
            assert done.code == 1
            assert "clrk-runtime" in done.err
            assert "Traceback" not in done.err


async def test_a_server_that_is_no_daemon_is_named(tmp_path):
    async def garbage(reader, writer):
        writer.write(b"SSH-2.0-nonsense\r\n")
        writer.close()

    async with await asyncio.start_unix_server(garbage, str(tmp_path / "s")):
        for arguments in (["agents", "list"], ["agents", "run-task", "a"]):
            done = await run(tmp_path / "s", *arguments)
            assert done.code == 1
            assert done.err.startswith("clrk: ")


async def test_a_reader_that_goes_away_is_no_error(daemon):
    who = identity()
    for index in range(3000):
        record(daemon.telemetry, who, f"s{index}", filler="x" * 200)
    await daemon.telemetry.flush()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--socket", daemon.path, "traces", "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        await process.stdout.readline()
        process.stdout._transport.close()
        err = await process.stderr.read()
        assert await process.wait() == 141
    assert err == b""


async def test_help_is_instant_and_imports_nothing_heavy():
    heavy = ("aiohttp", "rich", "pydantic", "opentelemetry", "asyncio", "yaml", "msgspec")
    code = (
        "import sys\nfrom clrk.gateway.client_cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(','.join(m for m in {heavy!r} if m in sys.modules))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert b"debugging session" in out
    assert err == b""


async def test_the_socket_of_another_instance_is_found_by_its_name():
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "agents", "list", env={"CLRK_INSTANCE": "nosuch"}, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert b"/run/nosuch/admin.sock" in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain caf\u00e9 \u6f22", "plain caf\u00e9 \u6f22"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc\x00", "a\\nb\\tc\\x00"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\u2028\u200b\ufeff", "\\u2028\\u200b\\ufeff"),
        ("\x9b1m", "\\x9b1m"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
