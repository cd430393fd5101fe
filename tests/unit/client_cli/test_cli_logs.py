"""`clrk agents logs`: every form, and a log that is followed."""

import asyncio
import json
import os
import re
import time

import yaml
from clrk_command import COMMAND, on_terminal
from span_samples import identity, invocation_record, record

from clrk.gateway.outcome import Phase


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


async def test_logs_of_an_agent_without_lines_say_so_on_stderr(daemon):
    done = await daemon.clrk("agents", "logs", "nobody")
    assert (done.code, done.out) == (0, "")
    assert "no lines of nobody" in done.err
