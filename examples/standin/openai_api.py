"""OpenAI Chat Completions API, as its public reference describes it: POST /v1/chat/completions, plain and streamed."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import prose
from aiohttp import web

HOSTNAME = "api.openai.com"
_SNAPSHOTS = {"gpt-5.4-mini": "gpt-5.4-mini-2026-03-17", "gpt-4.1": "gpt-4.1-2025-04-14"}
_MAX_OUTPUT_TOKENS = 16_384


def application() -> web.Application:
    """Return the app of api.openai.com."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_route("*", "/{rest:.*}", _unknown_url)
    return app


def _error(status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return web.json_response(body, status=status, headers=_headers())


async def _unknown_url(request: web.Request) -> web.Response:
    message = f"Invalid URL ({request.method} {request.path})"
    return _error(404, message, kind="invalid_request_error")


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    if not request.headers.get("authorization", "").startswith("Bearer "):
        return _error(401, "You didn't provide an API key.", kind="invalid_request_error")
    try:
        body = json.loads(await request.read())
    except ValueError:
        return _error(400, "We could not parse the JSON body of your request.", kind="invalid_request_error")
    for field in ("model", "messages"):
        if field not in body:
            message = f"Missing required parameter: '{field}'."
            code = "missing_required_parameter"
            return _error(400, message, kind="invalid_request_error", param=field, code=code)
    prompt = prose.text_of(body["messages"][-1]["content"]) if body["messages"] else ""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or _MAX_OUTPUT_TOKENS
    text, cut = prose.answer_to(prompt, limit)
    finish_reason = "length" if cut else "stop"
    if body.get("stream"):
        return await _stream(request, body, text, finish_reason)
    completion = _envelope(body, "chat.completion") | {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": _usage(body, text),
    }
    response = web.json_response(completion, headers=_headers())
    response.enable_compression()
    return response


def _envelope(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_urlsafe(21)}",
        "object": kind,
        "created": int(time.time()),
        "model": _SNAPSHOTS.get(body["model"], body["model"]),
        "service_tier": "default",
        "system_fingerprint": "fp_57db37749c",
    }


def _usage(body: dict[str, Any], text: str) -> dict[str, Any]:
    prompt_tokens, completion_tokens = prose.count_tokens(body["messages"]), prose.count_tokens(text)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def _stream(request: web.Request, body: dict[str, Any], text: str, finish_reason: str) -> web.StreamResponse:
    options = body.get("stream_options") or {}
    include_usage = bool(options.get("include_usage"))
    envelope = _envelope(body, "chat.completion.chunk")
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", **_headers()})
    await response.prepare(request)

    async def send(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> None:
        chunk = envelope | {"choices": choices}
        if include_usage:
            chunk["usage"] = usage
        if options.get("include_obfuscation", True):
            chunk["obfuscation"] = secrets.token_urlsafe(6)
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await asyncio.sleep(0)

    def choice(delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

    await send(choice({"role": "assistant", "content": "", "refusal": None}))
    for piece in prose.pieces(text):
        await send(choice({"content": piece}))
    await send(choice({}, finish_reason))
    if include_usage:
        await send([], _usage(body, text))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _headers() -> dict[str, str]:
    return {
        "x-request-id": f"req_{secrets.token_hex(16)}",
        "openai-organization": "org-standin",
        "openai-processing-ms": "12",
        "openai-version": "2020-10-01",
    }
