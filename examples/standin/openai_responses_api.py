"""OpenAI Responses API, as its public reference describes it: POST /v1/responses, plain and as typed events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import prose
from aiohttp import web

_SNAPSHOTS = {"gpt-5": "gpt-5-2025-08-07"}
_REASONING_TOKENS = 64
FAIL = "[fail]"  # in the input: a streamed response fails in its middle; a plain one says so


async def respond(request: web.Request) -> web.StreamResponse:
    """Answer one request."""
    body = json.loads(await request.read())
    prompt = _prompt(body["input"])
    text, cut = prose.answer_to(prompt, body.get("max_output_tokens") or 4096)
    response = _response(body) | _ending(body, prompt, text, cut=cut)
    if body.get("stream"):
        return await _stream(request, body, response)
    return web.json_response(response, headers={"x-request-id": f"req_{secrets.token_hex(16)}"})


def _prompt(given: Any) -> str:
    if isinstance(given, str):
        return given
    last = given[-1]
    return prose.text_of(last.get("content") or last.get("output") or "")


def _response(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": _SNAPSHOTS.get(body["model"], body["model"]),
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "service_tier": "auto",
        "store": True,
        "temperature": body.get("temperature", 1.0),
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
        "metadata": {},
    }


def _ending(body: dict[str, Any], prompt: str, text: str, *, cut: bool) -> dict[str, Any]:
    if FAIL in prompt:
        return {"status": "failed", "error": {"code": "server_error", "message": "The model failed."}}
    output = [_item(body, prompt, text)]
    reasoning = _REASONING_TOKENS if body.get("reasoning") else 0
    given, made = prose.count_tokens(body["input"]), prose.count_tokens(text) + reasoning
    usage = {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": given // 2 if body.get("previous_response_id") else 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": given + made,
    }
    ended = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
    return {"status": "completed", "service_tier": "default", "output": output, "usage": usage} | ended


def _item(body: dict[str, Any], prompt: str, text: str) -> dict[str, Any]:
    tools = body.get("tools") or []
    answered = isinstance(body["input"], list) and body["input"][-1].get("type") == "function_call_output"
    if tools and not answered:
        return {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "completed",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": tools[0]["name"],
            "arguments": json.dumps({"words": len(prompt.split())}),
        }
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    identity = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "completed", "role": "assistant"}
    return identity | {"content": content}


async def _stream(request: web.Request, body: dict[str, Any], response: dict[str, Any]) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await answer.prepare(request)
    sent = 0

    async def send(kind: str, **more: Any) -> None:
        nonlocal sent
        event = {"type": kind, "sequence_number": sent, **more}
        sent += 1
        await answer.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())
        await asyncio.sleep(0)

    begun = _response(body) | {"id": response["id"]}
    await send("response.created", response=begun)
    await send("response.in_progress", response=begun)
    for index, item in enumerate(response["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "function_call":
            await send("response.output_item.added", output_index=index, item=item | {"arguments": ""})
            for at in range(0, len(item["arguments"]), 4):
                delta = item["arguments"][at : at + 4]
                await send("response.function_call_arguments.delta", **place, delta=delta)
            await send("response.function_call_arguments.done", **place, arguments=item["arguments"], name=item["name"])
        else:
            await send("response.output_item.added", output_index=index, item=item | {"content": []})
            place["content_index"] = 0
            empty = item["content"][0] | {"text": ""}
            await send("response.content_part.added", **place, part=empty)
            for piece in prose.pieces(item["content"][0]["text"]):
                await send("response.output_text.delta", **place, delta=piece, logprobs=[])
            await send("response.output_text.done", **place, text=item["content"][0]["text"], logprobs=[])
            await send("response.content_part.done", **place, part=item["content"][0])
        await send("response.output_item.done", output_index=index, item=item)
    await send(f"response.{response['status']}", response=response)
    await answer.write_eof()
    return answer
