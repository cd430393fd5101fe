"""`clrk` as a process of its own, and the daemon that it speaks to."""

import asyncio
import os
import pty
import sys
from dataclasses import dataclass, field

from aiohttp import web
from span_samples import Running, identity, invocation_record

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
