"""An agent with the official MCP client for Python: does what `data` asks, and prints what came of it."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from mcp import Client
from mcp.client.sse import sse_client
from mcp.shared.exceptions import MCPError
from mcp_types import CreateMessageResult, ElicitResult, ListRootsResult, Root, TextContent


async def sample(context: Any, params: Any) -> CreateMessageResult:
    """Be the model that the server asks for."""
    return CreateMessageResult(role="assistant", model="m-1", content=TextContent(type="text", text="short"))


async def elicit(context: Any, params: Any) -> ElicitResult:
    """Be the user that the server asks for."""
    return ElicitResult(action="accept", content={"approved": True, "name": "Ada"})


async def roots(context: Any) -> ListRootsResult:
    """Have one root."""
    return ListRootsResult(roots=[Root(uri="file:///work", name="work")])


async def use(asked: dict[str, Any]) -> dict[str, Any]:
    """Connect, list, read, and make the calls."""
    found: dict[str, Any] = {"progress": 0, "calls": {}}

    async def progress(done: float, total: float | None, message: str | None) -> None:
        found["progress"] += 1

    url = asked["url"]
    server = sse_client(url) if asked["sse"] else url
    async with Client(
        server,
        mode=asked.get("mode", "legacy"),
        sampling_callback=sample,
        elicitation_callback=elicit,
        list_roots_callback=roots,
    ) as client:
        found["version"] = client.protocol_version
        found["tools"] = sorted(tool.name for tool in (await client.list_tools()).tools)
        for tool, arguments in asked["calls"]:
            try:
                result = await client.call_tool(tool, arguments, progress_callback=progress)
            except MCPError as error:
                found["calls"][tool] = {
                    "code": error.error.code,
                    "message": error.error.message,
                    "data": error.error.data,
                }
            else:
                texts = [block.text for block in result.content if block.type == "text"]
                found["calls"][tool] = {"error": bool(result.is_error), "text": " ".join(texts)}
        if asked.get("resource"):
            read = await client.read_resource(asked["resource"])
            found["resource"] = read.contents[0].text
        if asked.get("prompt"):
            name, arguments = asked["prompt"]
            got = await client.get_prompt(name, arguments)
            found["prompt"] = got.messages[0].content.text
    return found


print(json.dumps(asyncio.run(use(json.load(sys.stdin)["data"]))))
