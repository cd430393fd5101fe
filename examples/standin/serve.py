"""Run the stand-in on loopback: one process, three listeners (TLS for the models and files, TLS for MCP, plain)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic_api
import bedrock_api
import gemini_api
import internal_api
import mcp_tools
import openai_api
import uvicorn
import vertex_api
from aiohttp import web
from api_keys import ApiKeys
from certificates import make_server_context
from request_log import BodyFacts, RequestLog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

APPLICATIONS: dict[str, Callable[[], web.Application]] = {
    anthropic_api.HOSTNAME: anthropic_api.application,
    openai_api.HOSTNAME: openai_api.application,
    openai_api.AZURE_HOSTNAME: openai_api.azure_application,
    openai_api.SELF_HOSTED_HOSTNAME: openai_api.application,
    gemini_api.HOSTNAME: gemini_api.application,
    bedrock_api.HOSTNAME: bedrock_api.application,
    **dict.fromkeys(vertex_api.HOSTNAMES, vertex_api.application),
    **dict.fromkeys(internal_api.HOSTNAMES, internal_api.application),
}
HOSTNAMES = (*APPLICATIONS, mcp_tools.HOSTNAME)


def main() -> None:
    """Parse arguments and serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="certificates, CA and requests.jsonl go here")
    for name in ("tls", "mcp", "plain"):
        parser.add_argument(f"--{name}", default="127.0.0.1:0", metavar="IP:PORT", help="port 0: any free one")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="JSON: host name → the API key it demands; else any")
    asyncio.run(_serve(parser.parse_args()))


async def _serve(arguments: argparse.Namespace) -> None:
    arguments.dir.mkdir(parents=True, exist_ok=True)
    context, ca_file = make_server_context(arguments.dir, HOSTNAMES)
    log = RequestLog(arguments.dir / "requests.jsonl")
    sockets = {name: _listen(getattr(arguments, name)) for name in ("tls", "mcp", "plain")}
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    runner = web.AppRunner(_by_hostname(log, ApiKeys.read(arguments.keys)), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, sockets["tls"], ssl_context=context).start()
    await web.SockSite(runner, sockets["plain"]).start()
    mcp_server = _McpServer(_mcp_config(log, context))
    serving = asyncio.create_task(mcp_server.serve(sockets=[sockets["mcp"]]), name="mcp")
    while not mcp_server.started and not serving.done():
        await asyncio.sleep(0.01)

    ready: dict[str, Any] = {name: "{}:{}".format(*sock.getsockname()) for name, sock in sockets.items()}
    print(json.dumps(ready | {"ca_file": str(ca_file), "requests": str(arguments.dir / "requests.jsonl")}), flush=True)
    await stop.wait()
    mcp_server.should_exit = True
    await serving
    await runner.cleanup()
    log.close()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, int(port)))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def _by_hostname(log: RequestLog, keys: ApiKeys) -> web.Application:
    @web.middleware
    async def record(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # The body of /digest may be large: its handler counts and hashes it. read() keeps what it read for the handler.
        body = BodyFacts() if request.path == "/digest" else BodyFacts(await request.read())
        log.write(
            listener="tls" if request.secure else "plain",
            method=request.method,
            target=request.raw_path,
            headers=[(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers],
            body=body,
        )
        return await keys.refusal(request) or await handler(request)

    app = web.Application(middlewares=[record], client_max_size=32 * 2**20)
    for hostname, application in APPLICATIONS.items():
        app.add_domain(hostname, application())
    return app


class _McpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: this process has one shutdown for all three listeners."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


def _mcp_config(log: RequestLog, context: ssl.SSLContext) -> uvicorn.Config:
    return uvicorn.Config(
        _recorded(mcp_tools.application(), log),
        ssl_context_factory=lambda _config, _default: context,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )


def _recorded(app: ASGIApp, log: RequestLog) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        body = BodyFacts()

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.feed(message.get("body", b""))
                if not message.get("more_body"):
                    write()
            return message

        def write() -> None:
            log.write(
                listener="mcp",
                method=scope["method"],
                target=scope["raw_path"].decode(),
                headers=[(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]],
                body=body,
            )

        await app(scope, watched, send)

    return wrapped


if __name__ == "__main__":
    main()
