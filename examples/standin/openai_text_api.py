"""OpenAI Completions and Embeddings APIs, as their public references describe them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import struct
import time
from typing import Any

import prose
from aiohttp import web

_DIMENSIONS = 1536


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: one prompt, plain or streamed."""
    body = json.loads(await request.read())
    text, cut = prose.answer_to(body["prompt"], body.get("max_tokens") or 16)
    envelope = {
        "id": f"cmpl-{secrets.token_urlsafe(21)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body["model"],
    }
    given, made = prose.count_tokens(body["prompt"]), prose.count_tokens(text)
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}

    def choice(piece: str, reason: str | None) -> list[dict[str, Any]]:
        return [{"text": piece, "index": 0, "logprobs": None, "finish_reason": reason}]

    reason = "length" if cut else "stop"
    if not body.get("stream"):
        return web.json_response(envelope | {"choices": choice(text, reason), "usage": usage})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for choices in (*(choice(piece, None) for piece in prose.pieces(text)), choice("", reason)):
        await response.write(f"data: {json.dumps(envelope | {'choices': choices})}\n\n".encode())
        await asyncio.sleep(0)
    if (body.get("stream_options") or {}).get("include_usage"):
        await response.write(f"data: {json.dumps(envelope | {'choices': [], 'usage': usage})}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def embed(request: web.Request) -> web.Response:
    """POST /v1/embeddings: a vector that depends on the text, in the encoding that was asked for."""
    body = json.loads(await request.read())
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    vectors = [_vector(text, body.get("dimensions") or _DIMENSIONS) for text in inputs]
    as_base64 = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if as_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(prose.count_tokens, inputs))
    model = body.get("model") or request.match_info.get("deployment")
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return web.json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _vector(text: str, dimensions: int) -> list[float]:
    seed = hashlib.sha256(text.encode()).digest()
    return [(seed[at % 32] - 127.5) / 256 for at in range(dimensions)]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
