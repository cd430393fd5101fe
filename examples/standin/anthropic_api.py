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
OVERLOADED = "[overloaded]"  # in the prompt: the call fails as on a busy day; when streamed, in mid-stream


def application() -> web.Application:
    """Return the app of api.anthropic.com."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_route("*", "/{rest:.*}", _not_found)
    return app


def _error(kind: str, message: str) -> web.Response:
    request_id = _new_id("req")
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return web.json_response(body, status=_STATUS[kind], headers={"request-id": request_id})


async def _not_found(_request: web.Request) -> web.Response:
    return _error("not_found_error", "Not found")


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
    content = {"content": [{"type": "text", "text": text}], "stop_reason": "max_tokens" if cut else "end_turn"}
    return _message(body, _usage(body, prose.count_tokens(text))) | content


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
    return {
        "input_tokens": prose.count_tokens([body.get("system", ""), body["messages"], body.get("tools", [])]),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
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
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    yield {"type": "ping"}
    for piece in prose.pieces(text):
        if OVERLOADED in piece:
            yield {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
            return
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    yield {"type": "content_block_stop", "index": 0}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": "max_tokens" if cut else "end_turn", "stop_sequence": None},
        "usage": _usage(body, prose.count_tokens(text)),
    }
    yield {"type": "message_stop"}


def _headers() -> dict[str, str]:
    return {
        "request-id": _new_id("req"),
        "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_01{uuid.uuid4().hex[:22]}"
