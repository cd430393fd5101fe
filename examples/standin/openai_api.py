"""OpenAI Chat Completions API, as its public reference describes it: POST /v1/chat/completions, plain and streamed.

The same for Azure OpenAI, which has the deployment in the path and the key in a header of its own, and for a server of
one's own that speaks the API, as vLLM does. Words in the prompt choose what happens: see the constants.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import openai_responses_api
import openai_text_api
import prose
from aiohttp import web

HOSTNAME = "api.openai.com"
AZURE_HOSTNAME = "standin.openai.azure.com"
SELF_HOSTED_HOSTNAME = "llm.internal"
BUSY = "[busy]"  # in the prompt: 429, as on a busy day
REFUSE = "[refuse]"
CACHED = "[cached]"  # half of the prompt was in the cache
ENDLESS = "[endless]"  # a stream that stops in its middle and stays open, until the client has enough
BROKEN = "[broken]"  # a stream whose connection breaks in its middle
_SNAPSHOTS = {"gpt-5.4-mini": "gpt-5.4-mini-2026-03-17", "gpt-4.1": "gpt-4.1-2025-04-14"}
_MAX_OUTPUT_TOKENS = 16_384


def application() -> web.Application:
    """Return the app of api.openai.com, and of a server of one's own."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_post("/v1/responses", openai_responses_api.respond)
    app.router.add_post("/v1/completions", openai_text_api.complete)
    app.router.add_post("/v1/embeddings", openai_text_api.embed)
    app.router.add_route("*", "/{rest:.*}", _unknown_url)
    return app


def azure_application() -> web.Application:
    """Return the app of an Azure OpenAI resource: deployments in the path, and the newer v1 paths."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/openai/deployments/{deployment}/chat/completions", _chat_completions)
    app.router.add_post("/openai/deployments/{deployment}/embeddings", openai_text_api.embed)
    app.router.add_post("/openai/v1/chat/completions", _chat_completions)
    app.router.add_post("/openai/v1/responses", openai_responses_api.respond)
    app.router.add_route("*", "/{rest:.*}", _unknown_url)
    return app


def _error(status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return web.json_response(body, status=status, headers=_headers())


async def _unknown_url(request: web.Request) -> web.Response:
    message = f"Invalid URL ({request.method} {request.path})"
    return _error(404, message, kind="invalid_request_error")


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    has_key = request.headers.get("authorization", "").startswith("Bearer ") or "api-key" in request.headers
    if not has_key and request.host != SELF_HOSTED_HOSTNAME:
        return _error(401, "You didn't provide an API key.", kind="invalid_request_error")
    try:
        body = json.loads(await request.read())
    except ValueError:
        return _error(400, "We could not parse the JSON body of your request.", kind="invalid_request_error")
    body.setdefault("model", request.match_info.get("deployment"))
    for field in ("model", "messages"):
        if body.get(field) is None:
            message = f"Missing required parameter: '{field}'."
            code = "missing_required_parameter"
            return _error(400, message, kind="invalid_request_error", param=field, code=code)
    prompt = prose.text_of(body["messages"][-1]["content"]) if body["messages"] else ""
    if BUSY in prompt:
        return _error(429, "Rate limit reached for requests", kind="requests", code="rate_limit_exceeded")
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or _MAX_OUTPUT_TOKENS
    text, cut = prose.answer_to(prompt, limit)
    calls = _tool_calls(body, prompt)
    finish_reason = "tool_calls" if calls else "length" if cut else "stop"
    if body.get("stream"):
        return await _stream(request, body, text, finish_reason, calls)
    completion = _envelope(body, "chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": _message(text, calls, refuse=REFUSE in prompt),
                "logprobs": None,
                "finish_reason": finish_reason,
            }
            for index in range(body.get("n") or 1)
        ],
        "usage": _usage(body, text),
    }
    response = web.json_response(completion, headers=_headers())
    response.enable_compression()
    return response


def _message(text: str, calls: list[dict[str, Any]], *, refuse: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if refuse:
        message |= {"content": None, "refusal": "I can't help with that."}
    elif calls:
        message |= {"content": None, "tool_calls": calls}
    return message


def _tool_calls(body: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """Call the first tool that was given, unless its result is here already."""
    tools = body.get("tools") or []
    if not tools or body["messages"][-1]["role"] == "tool":
        return []
    arguments = json.dumps({"words": len(prompt.split())})
    function = {"name": tools[0]["function"]["name"], "arguments": arguments}
    return [{"id": f"call_{secrets.token_urlsafe(18)}", "type": "function", "function": function}]


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
    cached = prompt_tokens // 2 if CACHED in json.dumps(body["messages"]) else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def _stream(
    request: web.Request, body: dict[str, Any], text: str, finish_reason: str, calls: list[dict[str, Any]]
) -> web.StreamResponse:
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
    for call in calls:
        head, arguments = call | {"index": 0}, call["function"]["arguments"]
        await send(choice({"tool_calls": [head | {"function": call["function"] | {"arguments": ""}}]}))
        for at in range(0, len(arguments), 4):
            await send(choice({"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 4]}}]}))
    for piece in () if calls else prose.pieces(text):
        await send(choice({"content": piece}))
        if piece.strip() in (BROKEN, ENDLESS):
            if piece.strip() == ENDLESS:
                await asyncio.sleep(30)
            assert request.transport is not None
            request.transport.abort()
            return response
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
