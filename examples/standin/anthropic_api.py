"""Anthropic Messages API, as its public reference describes it: POST /v1/messages, plain and streamed."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from typing import Any

import prose
from aiohttp import web

HOSTNAME = "api.anthropic.com"
_SNAPSHOTS = {"claude-haiku-4-5": "claude-haiku-4-5-20251001", "claude-opus-4-5": "claude-opus-4-5-20251101"}
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}
REFUSE = "[refuse]"  # in the prompt
CACHED = "[cached]"  # half of the prompt was in the cache
OVERLOADED = "[overloaded]"  # in the prompt: the call fails as on a busy day; when streamed, in mid-stream


def application() -> web.Application:
    """Return the app of api.anthropic.com."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_post("/v1/messages/count_tokens", _count_tokens)
    app.router.add_route("*", "/{rest:.*}", _not_found)
    return app


def _error(kind: str, message: str) -> web.Response:
    request_id = _new_id("req")
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return web.json_response(body, status=_STATUS[kind], headers={"request-id": request_id})


async def _not_found(_request: web.Request) -> web.Response:
    return _error("not_found_error", "Not found")


async def _count_tokens(request: web.Request) -> web.Response:
    body = json.loads(await request.read())
    usage = _usage(body, 0)
    return web.json_response({"input_tokens": usage["input_tokens"]}, headers=_headers())


async def _messages(request: web.Request) -> web.StreamResponse:
    if not request.headers.get("x-api-key") and not request.headers.get("authorization", "").startswith("Bearer "):
        return _error("authentication_error", "x-api-key header is required")
    if "anthropic-version" not in request.headers:
        return _error("invalid_request_error", "anthropic-version: header is required")
    try:
        body = json.loads(await request.read())
    except ValueError:
        return _error("invalid_request_error", "The request body is not valid JSON")
    for field in ("model", "max_tokens", "messages"):
        if field not in body:
            return _error("invalid_request_error", f"{field}: Field required")
    prompt = prose.text_of(body["messages"][-1]["content"]) if body["messages"] else ""
    return await answer(request, body, prompt)


async def answer(request: web.Request, body: dict[str, Any], prompt: str) -> web.StreamResponse:
    """Answer a valid request, here or behind the address of a cloud."""
    if body.get("stream"):
        return await _stream(request, body, prompt)
    if OVERLOADED in prompt:
        return _error("overloaded_error", "Overloaded")
    response = web.json_response(message(body, prompt), headers=_headers())
    response.enable_compression()
    return response


def message(body: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Return a whole message."""
    text, cut = prose.answer_to(prompt, body["max_tokens"])
    content = {"content": _content(body, prompt, text), "stop_reason": _stop_reason(body, prompt, cut=cut)}
    return _message(body, _usage(body, prose.count_tokens(text))) | content


def _calls_tool(body: dict[str, Any]) -> bool:
    """Say whether the first tool is called: not if its result is here already."""
    last = body["messages"][-1]["content"]
    answered = isinstance(last, list) and any(block.get("type") == "tool_result" for block in last)
    return bool(body.get("tools")) and not answered


def _content(body: dict[str, Any], prompt: str, text: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    if body.get("thinking", {}).get("type") == "enabled":
        content.append({"type": "thinking", "thinking": f"{len(prompt.split())} words.", "signature": "c2lnbmVk"})
    if _calls_tool(body):
        tool = {"name": body["tools"][0]["name"], "input": {"words": len(prompt.split())}}
        return [*content, {"type": "tool_use", "id": _new_id("toolu"), **tool}]
    return content if REFUSE in prompt else [*content, {"type": "text", "text": text}]


def _stop_reason(body: dict[str, Any], prompt: str, *, cut: bool) -> str:
    if REFUSE in prompt:
        return "refusal"
    return "tool_use" if _calls_tool(body) else "max_tokens" if cut else "end_turn"


def _message(body: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": _new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": _SNAPSHOTS.get(body["model"], body["model"]),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(body: dict[str, Any], output_tokens: int) -> dict[str, Any]:
    given = [body.get("system", ""), body["messages"], body.get("tools", [])]
    tokens = prose.count_tokens(given)
    cached = tokens // 2 if CACHED in json.dumps(given) else 0
    return {
        "input_tokens": tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }


async def _stream(request: web.Request, body: dict[str, Any], prompt: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", **_headers()})
    await response.prepare(request)
    for event in events(body, prompt):
        await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        await asyncio.sleep(0)
    await response.write_eof()
    return response


def events(body: dict[str, Any], prompt: str) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed message."""
    text, cut = prose.answer_to(prompt, body["max_tokens"])
    yield {"type": "message_start", "message": _message(body, _usage(body, 1))}
    yield {"type": "ping"}
    for index, block in enumerate(_content(body, prompt, text)):
        empty, deltas = _deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            if OVERLOADED in delta.get("text", ""):
                yield {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
                return
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": _stop_reason(body, prompt, cut=cut), "stop_sequence": None},
        "usage": _usage(body, prose.count_tokens(text)),
    }
    yield {"type": "message_stop"}


def _deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as it begins, and what comes to it bit by bit."""
    match block["type"]:
        case "thinking":
            thought = {"type": "thinking_delta", "thinking": block["thinking"]}
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return block | {"thinking": "", "signature": ""}, [thought, signed]
        case "tool_use":
            text = json.dumps(block["input"])
            cut = [text[at : at + 4] for at in range(0, len(text), 4)]
            return block | {"input": {}}, [{"type": "input_json_delta", "partial_json": piece} for piece in cut]
        case _:
            return block | {"text": ""}, [
                {"type": "text_delta", "text": piece} for piece in prose.pieces(block["text"])
            ]


def _headers() -> dict[str, str]:
    return {
        "request-id": _new_id("req"),
        "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_01{uuid.uuid4().hex[:22]}"
