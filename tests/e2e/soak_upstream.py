"""The upstream of the soak: it fails in every way that one can, and knows who called."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from aiohttp import web
from stack import ROOT

sys.path.insert(0, str(ROOT / "examples/standin"))
from certificates import make_server_context

USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


@dataclass
class Upstream:
    """Answers well or badly, and keeps every request it saw: call id -> invocation id."""

    seen: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        query = parse_qs(urlsplit(request.raw_path).query)
        call, invocation = query["call"][0], query["inv"][0]
        if call in self.seen:
            self.twice.append(call)
        self.seen[call] = invocation
        await request.read()
        match request.path:
            case "/error":
                return web.Response(status=500, text="no")
            case "/reset":
                assert request.transport is not None
                request.transport.abort()
            case "/cut":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b"x" * 10)
                assert request.transport is not None
                request.transport.abort()
                return response
            case "/slow":
                await asyncio.sleep(0.3)
            case "/big":
                return web.Response(body=b"x" * 400_000)
            case "/v1/chat/completions":
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
                answer = {"id": f"c-{call}", "object": "chat.completion", "model": "gpt-4o-mini", "choices": [choice]}
                return web.json_response(answer | {"usage": USAGE})
        return web.Response(text="ok")


@contextlib.asynccontextmanager
async def upstream(folder: Path) -> AsyncIterator[tuple[Upstream, str, str, Path]]:
    this = Upstream()
    context, ca_file = make_server_context(folder, ("tls.soak",))
    runner = web.ServerRunner(web.Server(this.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    plain, tls = (f"127.0.0.1:{address[1]}" for address in runner.addresses)
    try:
        yield this, plain, tls, ca_file
    finally:
        await runner.cleanup()
