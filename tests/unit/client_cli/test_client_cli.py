"""`clrk` as a process: no daemon, a wrong one, one that breaks off, a reader that leaves, status and help."""

import asyncio
import json
import os
import re
import sys

import pytest
from clrk_command import COMMAND, answering, run
from span_samples import identity, record

from clrk.core.messages import Counters
from clrk.gateway.cli.terminal import printable

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
        r"note +the Runtime resource changed",
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


# --- the command itself ---------------------------------------------------------------------------------------------


async def test_without_a_daemon_it_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing.sock", tmp_path / "file"):
        for arguments in (["agents", "list"], ["traces"], ["trace", "x"], ["agents", "run-task", "a"]):
            done = await run(path, *arguments)
            assert done.code == 1
            assert "clrk-runtime" in done.err
            assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        pytest.param(arguments, option, id=" ".join(arguments)[:60])
        for arguments, option in (
            (("traces", "--since", "never"), "--since"),
            (("traces", "--until", "2026-13-01"), "--until"),
            (("traces", "--agent", "A B"), "--agent"),
            (("traces", "--agent", ""), "--agent"),
            (("traces", "--model", ""), "--model"),
            (("traces", "--system", ""), "--system"),
            (("traces", "--limit", "-1"), "--limit"),
            (("traces", "--limit", "many"), "--limit"),
            (("traces", "--min-input-tokens", "-1"), "--min-input-tokens"),
            (("traces", "-o", "xml"), "--output"),
            (("agents", "traces", "support", "--since", ""), "--since"),
            (("agents", "invocations", "support", "--phase", "Done"), "--phase"),
            (("agents", "invocations", "support", "--trigger", ""), "--trigger"),
            (("agents", "invocations", "support", "--limit", "0"), "--limit"),
            (("agents", "invocations", "support", "--since", "soon"), "--since"),
            (("agents", "logs", "support", "--tail", "-5"), "--tail"),
            (("agents", "logs", "support", "--tail", "1e9"), "--tail"),
            (("agents", "get", "a/b/c"), "NAME"),
            (("agents", "run-task", "support", "--timeout", "soon"), "--timeout"),
            (("agents", "run-task", "support", "--content-type", "a\nb"), "--content-type"),
            (("agents", "run-task", "support", "--content-type", ""), "--content-type"),
            (("policy", "suggest", "support", "--since", "never"), "--since"),
            (("policy", "suggest", "support", "--since", ""), "--since"),
            (("policy", "explain", "support", "G T", "https://x.test"), "METHOD"),
            (("policy", "explain", "support", "GET", "ftp://x.test"), "URL"),
            (("budgets", "--day", "2026-02-30"), "--day"),
            (("budgets", "--day", ""), "--day"),
            (("budgets", "--agent", "a/b/c"), "--agent"),
            (("trace", "not an id"), "INVOCATION"),
            (("trace", ""), "INVOCATION"),
            (("traces", "--model", "m" * 70_000), "characters"),
            (("policy", "explain", "support", "GET", f"https://x.test/{'a' * 70_000}"), "characters"),
            (("--socket", "", "status"), "--socket"),
        )
    ],
)
async def test_a_value_that_no_option_takes_is_a_usage_error_that_names_it(daemon, arguments, option):
    """Exit code 2, as argparse has it; 1 is for what is asked in earnest and not there."""
    done = await daemon.clrk(*arguments)
    assert (done.code, done.out) == (2, "")
    assert option in done.err
    assert "Traceback" not in done.err
    assert daemon.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("agents", "get", "nobody"), ("agents", "invocations", "nobody"), ("trace", "ffffffff"),
        ("policy", "suggest", "nobody"), ("agents", "logs", "support/ffffffff"),
    ],
    ids=" ".join,
)  # fmt: skip
async def test_what_is_not_there_is_no_usage_error(daemon, arguments):
    assert (await daemon.clrk(*arguments)).code == 1


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", "\u202e\u2603".encode(), b"%2e%2e%2f", b"a" * 70_000, b"\x1b[2J"], ids=range(5)
)
@pytest.mark.parametrize(
    "command",
    [
        ("agents", "get"), ("agents", "invocations"), ("agents", "logs"), ("agents", "traces"), ("agents", "run-task"),
        ("trace",), ("traces", "--agent"), ("traces", "--model"), ("traces", "--since"), ("policy", "suggest"),
        ("budgets", "--agent"), ("budgets", "--day"),
    ],
    ids=" ".join,
)  # fmt: skip
async def test_hostile_words_end_in_one_line(daemon, command, name):
    answering(daemon)
    done = await daemon.clrk(*command, os.fsdecode(name))
    assert done.code in (0, 1, 2, 77)
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err + done.out


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
