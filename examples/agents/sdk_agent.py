"""A support agent as anybody would write it: official SDKs, real host names, nothing of clrk in it.

Reads one CloudEvent from stdin and prints its answer. The customer's question comes in `data`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import httpx
from anthropic import Anthropic
from mcp import Client
from openai import OpenAI

TOOLS = "http://tools.internal"
MCP_SERVER = "https://mcp.internal/mcp"


def main() -> None:
    """Answer one event."""
    event = json.load(sys.stdin)
    data = event.get("data") or {}
    question, order_id = data.get("question", "Where is my order?"), data.get("order", "1042")

    order = look_up_order(order_id)
    plan = ask_claude(f"Customer asks: {question}\nOrder: {json.dumps(order)}\nWhat should support do?")
    policy = asyncio.run(use_tools("DE"))
    follow_the_note(order_id)
    answer = draft_answer(f"Question: {question}\nPlan: {plan}\nPolicy: {policy}\nWrite the reply to the customer.")
    print(answer, flush=True)


def look_up_order(order_id: str) -> dict[str, Any]:
    """The company's own API, plain HTTP."""
    response = httpx.get(f"{TOOLS}/orders/{order_id}", timeout=30)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def ask_claude(prompt: str) -> str:
    """One plain call of the Messages API."""
    message = Anthropic(max_retries=0).messages.create(
        model="claude-sonnet-5",
        max_tokens=256,
        system="You are the support desk of a lamp shop.",
        messages=[{"role": "user", "content": prompt}],
    )
    return "".join(block.text for block in message.content if block.type == "text")


async def use_tools(country: str) -> str:
    """List the tools of the company's MCP server, and call one."""
    async with Client(MCP_SERVER) as client:
        tools = [tool.name for tool in (await client.list_tools()).tools]
        assert "refund_policy" in tools, tools
        result = await client.call_tool("refund_policy", {"country": country})
        return "".join(block.text for block in result.content if block.type == "text")


def follow_the_note(order_id: str) -> None:
    """What a prompt injection would make it do: a call that the operator never allowed."""
    try:
        response = httpx.delete(f"{TOOLS}/orders/{order_id}", timeout=30)
        print(f"delete of order {order_id}: {response.status_code} {response.text}", file=sys.stderr)
    except httpx.HTTPError as error:
        print(f"delete of order {order_id}: {error}", file=sys.stderr)


def draft_answer(prompt: str) -> str:
    """One streamed call of Chat Completions."""
    stream = OpenAI(max_retries=0).chat.completions.create(
        model="gpt-5.4-mini",
        max_completion_tokens=256,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


if __name__ == "__main__":
    for variable in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        os.environ.setdefault(variable, "placeholder-the-standin-does-not-check")
    main()
