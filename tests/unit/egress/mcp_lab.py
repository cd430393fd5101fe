"""An MCP server over Streamable HTTP behind an MCPRoute, and how to ask it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

from egress_lab import Lab, aliased, answer, laboratory, read_request, upstream

NAME = "mcp.example.com"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}]
JSON = "Content-Type: application/json\r\n"
BOTH = JSON + "Accept: application/json, text/event-stream\r\n"
RULE = "MCPRoute default/mcp-0 rules[0]"


def call(tool: str, id_: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": {"name": tool, "arguments": {}}}


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def post(body: bytes, headers: str = BOTH, target: str = "/mcp", method: str = "POST") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: {NAME}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def routes(hostnames: Sequence[str] = (NAME,), **policy: Any) -> dict[str, Any]:
    spec = {"hostnames": list(hostnames), "rules": [{"filters": [{"type": "ToolPolicy", "toolPolicy": policy}]}]}
    return {"mcp_routes": [{"kind": "MCPRoute", "metadata": {"name": "mcp-0"}, "spec": spec}]}


LIST = raw({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}})
PAGE = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "get"}, {"name": "rm"}], "nextCursor": "n"}}


class Server:
    """Writes down what reaches it; answers with reply."""

    def __init__(self, reply: bytes = answer(b'{"jsonrpc":"2.0","id":1,"result":{}}', headers=JSON)) -> None:
        self.reply = reply
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            self.heads.append(head)
            self.bodies.append(body)
            writer.write(self.reply)


@asynccontextmanager
async def lab(
    server,
    policy: dict[str, Any] | None = None,
    mode: str = "Enforce",
    hostnames: Sequence[str] = (NAME,),
    **gateway: Any,
):
    """A sandbox and a server at NAME; without a policy, no route governs it."""
    async with (
        upstream(server) as port,
        laboratory(
            gateway=aliased(port, NAME, "other.example.com") | {"mode": mode} | gateway,
            rules=ALLOW,
            recognise="real",
            config=routes(hostnames, **policy) if policy else {},
        ) as one,
    ):
        yield one


async def ask(one: Lab, request: bytes, destination: str = NAME) -> tuple[bytes, bytes]:
    wire = await one.dial(destination, 80)
    wire.writer.write(request)
    return await wire.response()
