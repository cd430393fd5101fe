"""`clrk agents run-task`: what reaches the agent, what comes back, and the exit code."""

import asyncio
import json
import os
import signal

import pytest
from aiohttp import web
from clrk_command import COMMAND, HOSTILE, answering
from span_samples import identity, invocation_record

from clrk.gateway.outcome import Phase


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
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--socket", daemon.path, "agents", "run-task", "support",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored below `make test &`
    )  # fmt: skip
    async with asyncio.timeout(30):
        await started.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        await cancelled.wait()


async def test_bad_timeouts_are_refused(daemon):
    for text in ("soon", "0s", "-1s"):
        done = await daemon.clrk("agents", "run-task", "support", f"--timeout={text}")
        assert (done.code, daemon.requests) == (2, [])
