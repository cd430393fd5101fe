"""Google's Gemini API, as its public reference describes it: content plain and streamed, counted tokens, embeddings.

The handlers also answer for Google's models on Vertex AI (`vertex_api.py`). The same request gets the same bytes every
time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import prose
from aiohttp import web

HOSTNAME = "generativelanguage.googleapis.com"
OVERLOADED = "[overloaded]"  # in the prompt: the call fails as on a busy day; when streamed, in mid-stream
BLOCKED = "[blocked]"  # the prompt is refused
TOOL = "[tool]"  # the first declared function is called
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    503: "UNAVAILABLE",
}
_THOUGHTS = 17
_MODELS = ("gemini-", "text-embedding-")


def application() -> web.Application:
    """Return the app of generativelanguage.googleapis.com."""
    app = web.Application(client_max_size=32 * 2**20)
    for version in ("v1", "v1beta"):
        app.router.add_post(f"/{version}/models/{{model}}:{{method}}", call)
    app.router.add_route("*", "/{rest:.*}", not_found)
    return app


def error(code: int, message: str, *, as_array: bool = False) -> web.Response:
    """Return an error as Google writes it; the methods whose answer is an array wrap it in one."""
    found: Any = {"error": {"code": code, "message": message, "status": _STATUS[code]}}
    body = json.dumps([found] if as_array else found, indent=2)
    return web.Response(status=code, text=body, headers={"content-type": "application/json; charset=UTF-8"})


async def not_found(_request: web.Request) -> web.Response:
    """Answer for what is not there."""
    return error(404, "Requested entity was not found.")


async def call(request: web.Request) -> web.StreamResponse:
    """Answer one method of one model."""
    model, method = request.match_info["model"], request.match_info["method"]
    as_array = method == "streamGenerateContent" and request.query.get("alt") != "sse"
    if not (request.headers.get("x-goog-api-key") or request.query.get("key") or "authorization" in request.headers):
        return error(403, "Method doesn't allow unregistered callers.", as_array=as_array)
    raw = await request.read()
    try:
        body = json.loads(raw)
    except ValueError:
        return error(400, "Invalid JSON payload received.", as_array=as_array)
    if not model.startswith(_MODELS):
        return error(404, f"models/{model} is not found for API version v1beta.", as_array=as_array)
    match method:
        case "countTokens":
            return _json({"totalTokens": prose.count_tokens(body["contents"]), "promptTokensDetails": []})
        case "embedContent":
            tokens = prose.count_tokens(body["content"])
            return _json({"embedding": {"values": _vector(raw)}, "usageMetadata": {"promptTokenCount": tokens}})
        case "batchEmbedContents":
            return _json({"embeddings": [{"values": _vector(raw)} for _ in body["requests"]]})
        case "predict":
            return _json({"predictions": [_prediction(raw, instance) for instance in body["instances"]]})
        case "generateContent" | "streamGenerateContent" if "contents" in body:
            return await _generate(request, model, body, raw)
        case "generateContent" | "streamGenerateContent":
            return error(400, "* GenerateContentRequest.contents: contents is not specified", as_array=as_array)
    return await not_found(request)


async def _generate(request: web.Request, model: str, body: dict[str, Any], raw: bytes) -> web.StreamResponse:
    prompt = prose.text_of(body["contents"][-1].get("parts", []))
    answer = list(_responses(model, body, prompt, hashlib.sha256(raw).hexdigest()[:22]))
    if request.match_info["method"] == "streamGenerateContent":
        return await _stream(request, answer, as_sse=request.query.get("alt") == "sse")
    if OVERLOADED in prompt:
        return error(503, "The model is overloaded. Please try again later.")
    parts = [part for one in answer for part in _parts(one)]
    whole = answer[-1]
    if parts and "text" in parts[0]:
        parts = [{"text": "".join(part["text"] for part in parts)}]
    if "candidates" in whole:
        whole["candidates"][0]["content"]["parts"] = parts
    return _json(whole)


def _parts(response: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = response["candidates"][0]["content"]["parts"] if "candidates" in response else []
    return found


def _responses(model: str, body: dict[str, Any], prompt: str, response_id: str) -> Iterator[dict[str, Any]]:
    """Yield the elements of a stream: each with the counts so far, the last one with the reason."""
    given = prose.count_tokens([body["contents"], body.get("tools", [])])
    envelope = {"modelVersion": model, "responseId": response_id}
    if BLOCKED in prompt:
        usage: dict[str, Any] = {"promptTokenCount": given, "totalTokenCount": given}
        yield {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage} | envelope
        return
    limit = body.get("generationConfig", {}).get("maxOutputTokens", 8192)
    text, cut = prose.answer_to(prompt, limit)
    parts: list[dict[str, Any]] = [{"text": piece} for piece in prose.pieces(text)]
    if TOOL in prompt:
        function = body["tools"][0]["functionDeclarations"][0]
        parts = [{"functionCall": {"name": function["name"], "args": {"country": "DE"}}}]
    produced = 0
    for number, part in enumerate(parts, 1):
        produced += prose.count_tokens(part)
        usage = {
            "promptTokenCount": given,
            "candidatesTokenCount": produced,
            "totalTokenCount": given + produced + _THOUGHTS,
            "thoughtsTokenCount": _THOUGHTS,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": given}],
        }
        candidate: dict[str, Any] = {"content": {"parts": [part], "role": "model"}}
        if number == len(parts):
            candidate["finishReason"] = "MAX_TOKENS" if cut else "STOP"
        candidate["index"] = 0
        yield {"candidates": [candidate], "usageMetadata": usage} | envelope


async def _stream(request: web.Request, answer: list[dict[str, Any]], *, as_sse: bool) -> web.StreamResponse:
    kind = "text/event-stream" if as_sse else "application/json; charset=UTF-8"
    response = web.StreamResponse(headers={"content-type": kind})
    await response.prepare(request)
    overloaded = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
    for number, one in enumerate(answer):
        element = overloaded if OVERLOADED in json.dumps(one) else one
        text = json.dumps(element) if as_sse else json.dumps(element, indent=2)
        framed = f"data: {text}\r\n\r\n" if as_sse else f"{',' if number else '['}{text}\r\n"
        await response.write(framed.encode())
        await asyncio.sleep(0)
        if "error" in element:
            break
    if not as_sse:
        await response.write(b"]\n")
    await response.write_eof()
    return response


def _json(value: Any) -> web.Response:
    response = web.Response(
        text=json.dumps(value, indent=2), headers={"content-type": "application/json; charset=UTF-8"}
    )
    response.enable_compression()
    return response


def _vector(raw: bytes) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(raw).digest()[:8]]


def _prediction(raw: bytes, instance: dict[str, Any]) -> dict[str, Any]:
    statistics = {"truncated": False, "token_count": float(prose.count_tokens(instance["content"]))}
    return {"embeddings": {"statistics": statistics, "values": _vector(raw)}}
