"""The official TypeScript MCP server (`@modelcontextprotocol/server-everything`) in both transports, behind TLS."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path

from instances import DEADLINE_S, DIES_WITH_US
from stack import ROOT, free_port
from tls_material import Authority

EVERYTHING = ROOT / "tests/node/node_modules/@modelcontextprotocol/server-everything/dist/index.js"


@contextlib.contextmanager
def everything(folder: Path, mode: str) -> Iterator[int]:
    """Run the server (`streamableHttp` or `sse`); yields its port."""
    port, node = free_port(), shutil.which("node")
    assert node is not None
    with (folder / f"everything-{mode}.log").open("wb") as log:
        process = subprocess.Popen(
            [*DIES_WITH_US, node, EVERYTHING, mode],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PORT": str(port), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + DEADLINE_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < deadline, f"{mode} does not listen"
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


@contextlib.contextmanager
def behind_tls(authority: Authority, name: str, target: int, folder: Path) -> Iterator[str]:
    """Put TLS in front of a loopback port; yields ip:port."""
    certificate, key = authority.issue(name, names=(name,))
    path = folder / f"{name}.pem"
    path.write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=_run, args=(loop, _serve(listener, context, target, stop)))
    thread.start()
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[None, None, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(work)


async def _serve(listener: socket.socket, context: ssl.SSLContext, target: int, stop: asyncio.Event) -> None:
    """Carry connections until told to stop; what is open then is aborted."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        out_reader, out_writer = await asyncio.open_connection("127.0.0.1", target)
        try:
            await asyncio.gather(_copy(reader, out_writer), _copy(out_reader, writer))
        finally:
            writer.transport.abort()
            out_writer.transport.abort()
            tasks.discard(task)

    server = await asyncio.start_server(carry, sock=listener, ssl=context)
    await stop.wait()
    server.close()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.1)  # transports close in the loop's next rounds


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()
