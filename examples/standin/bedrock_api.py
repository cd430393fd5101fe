"""The runtime of Amazon Bedrock, as its public reference describes it: Converse and InvokeModel, streamed too.

Streams are real event streams (application/vnd.amazon.eventstream), written here byte by byte from the specification.
The same request gets the same bytes every time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

import anthropic_api
import prose
from aiohttp import web

HOSTNAME = "bedrock-runtime.us-east-1.amazonaws.com"
THROTTLED = "[throttled]"  # in the prompt: the call is throttled; when streamed, in mid-stream
TOOL = "[tool]"  # the first tool is used
_METRICS = "amazon-bedrock-invocationMetrics"
_STREAM = "application/vnd.amazon.eventstream"

Event = tuple[str, dict[str, Any]]


def application() -> web.Application:
    """Return the app of bedrock-runtime.us-east-1.amazonaws.com."""
    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/model/{model}/{method}", _call)
    app.router.add_route("*", "/{rest:.*}", _unknown)
    return app


def _error(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status, headers=_headers() | {"x-amzn-errortype": kind})


def _headers() -> dict[str, str]:
    return {"x-amzn-requestid": str(uuid.uuid4())}


async def _unknown(_request: web.Request) -> web.Response:
    return _error(404, "UnknownOperationException", "")


async def _call(request: web.Request) -> web.StreamResponse:
    signature = request.headers.get("authorization", "")
    if not (signature.startswith("AWS4-HMAC-SHA256 ") and "/us-east-1/bedrock/aws4_request" in signature):
        return _error(403, "MissingAuthenticationTokenException", "Missing Authentication Token")
    model, method = request.match_info["model"], request.match_info["method"]
    try:
        body = json.loads(await request.read())
    except ValueError:
        return _error(400, "ValidationException", "Malformed input request, please reformat your input and try again.")
    if "." not in model:
        return _error(400, "ValidationException", "The provided model identifier is invalid.")
    match method:
        case "converse" | "converse-stream":
            events = list(_converse(body))
            return await (_whole_converse(events) if method == "converse" else _stream(request, events))
        case "invoke" | "invoke-with-response-stream":
            return await _invoke(request, model, body)
        case "count-tokens":
            return web.json_response({"inputTokens": prose.count_tokens(body["input"])}, headers=_headers())
    return await _unknown(request)


# --- Converse -------------------------------------------------------------------------------------------------------


def _converse(body: dict[str, Any]) -> Iterator[Event]:
    """Yield the events of ConverseStream, an exception as the last one where the prompt asks for it."""
    prompt = prose.text_of(body["messages"][-1]["content"])
    text, cut = prose.answer_to(prompt, body.get("inferenceConfig", {}).get("maxTokens", 4096))
    yield "messageStart", {"role": "assistant"}
    if TOOL in prompt:
        name = body["toolConfig"]["tools"][0]["toolSpec"]["name"]
        start = {"toolUse": {"toolUseId": "tooluse_kZJMlvQmRJ6eAyJE5GIl7Q", "name": name}}
        yield "contentBlockStart", {"start": start, "contentBlockIndex": 0}
        yield "contentBlockDelta", {"delta": {"toolUse": {"input": '{"country": "DE"}'}}, "contentBlockIndex": 0}
    else:
        for piece in prose.pieces(text):
            if THROTTLED in piece:
                yield "!throttlingException", {"message": "Too many requests, please wait before trying again."}
                return
            yield "contentBlockDelta", {"delta": {"text": piece}, "contentBlockIndex": 0}
    yield "contentBlockStop", {"contentBlockIndex": 0}
    yield "messageStop", {"stopReason": "tool_use" if TOOL in prompt else "max_tokens" if cut else "end_turn"}
    given, produced = prose.count_tokens(body["messages"]), prose.count_tokens(text)
    usage = {
        "inputTokens": given,
        "outputTokens": produced,
        "totalTokens": given + produced + 12,
        "cacheReadInputTokens": 12,
        "cacheWriteInputTokens": 0,
    }
    yield "metadata", {"usage": usage, "metrics": {"latencyMs": 551}}


async def _whole_converse(events: list[Event]) -> web.Response:
    if events[-1][0].startswith("!"):
        return _error(429, "ThrottlingException", events[-1][1]["message"])
    deltas = [payload["delta"] for kind, payload in events if kind == "contentBlockDelta"]
    tools = [payload["start"]["toolUse"] for kind, payload in events if kind == "contentBlockStart"]
    content = [{"toolUse": tool | {"input": json.loads(deltas[0]["toolUse"]["input"])}} for tool in tools]
    content = content or [{"text": "".join(delta["text"] for delta in deltas)}]
    members = {key: value for kind, payload in events[-2:] for key, value in payload.items()}
    answer = {"output": {"message": {"role": "assistant", "content": content}}} | members
    return web.json_response(answer, headers=_headers())


# --- InvokeModel ----------------------------------------------------------------------------------------------------


async def _invoke(request: web.Request, model: str, body: dict[str, Any]) -> web.StreamResponse:
    prompt, given, events = _own_events(model, body)
    streams = request.match_info["method"].endswith("stream")
    if THROTTLED in prompt and not streams:
        return _error(429, "ThrottlingException", "Too many requests, please wait before trying again.")
    if streams:
        return await _stream(request, [_chunk(event) for event in events])
    document, produced = _own_document(model, body, prompt, events)
    counts = {
        "x-amzn-bedrock-input-token-count": str(given),
        "x-amzn-bedrock-output-token-count": str(produced),
        "x-amzn-bedrock-invocation-latency": "551",
    }
    return web.json_response(document, headers=_headers() | counts)


def _own_events(model: str, body: dict[str, Any]) -> tuple[str, int, list[dict[str, Any]]]:
    """Return prompt, input tokens and the model's own events, the last one with Bedrock's counts."""
    if "anthropic.claude" in model:
        prompt = prose.text_of(body["messages"][-1]["content"])
        given = prose.count_tokens(body["messages"])
        body["model"] = "claude-haiku-4-5-20251001"
        events = list(anthropic_api.events(body, prompt))
        for event in events:  # ids are the only thing that chance decides
            if event["type"] == "message_start":
                event["message"]["id"] = "msg_bdrk_01XFDUDYJgAACzvnptvVoYEL"
        produced = events[-2]["usage"]["output_tokens"] if events[-2]["type"] == "message_delta" else 1
    elif "llama" in model:
        prompt, given = body["prompt"], prose.count_tokens(body["prompt"])
        text, cut = prose.answer_to(prompt, body.get("max_gen_len", 512))
        events = _llama(text, given, "length" if cut else "stop")
        produced = len(events)
    else:  # Nova
        prompt, given = prose.text_of(body["messages"][-1]["content"]), prose.count_tokens(body["messages"])
        events = [{kind: payload} for kind, payload in _converse(body) if not kind.startswith("!")]
        produced = events[-1]["metadata"]["usage"]["outputTokens"] if "metadata" in events[-1] else 1
    metrics = {"inputTokenCount": given, "outputTokenCount": produced, "invocationLatency": 551, "firstByteLatency": 99}
    events[-1] = events[-1] | {_METRICS: metrics}
    return prompt, given, events


def _llama(text: str, given: int, reason: str) -> list[dict[str, Any]]:
    pieces = prose.pieces(text)
    return [
        {
            "generation": piece,
            "prompt_token_count": given if number == 1 else None,
            "generation_token_count": number,
            "stop_reason": reason if number == len(pieces) else None,
        }
        for number, piece in enumerate(pieces, 1)
    ]


def _own_document(
    model: str, body: dict[str, Any], prompt: str, events: list[dict[str, Any]]
) -> tuple[dict[str, Any], int]:
    if "anthropic.claude" in model:
        document = anthropic_api.message(body, prompt) | {"id": "msg_bdrk_01XFDUDYJgAACzvnptvVoYEL"}
        return document, document["usage"]["output_tokens"]
    if "llama" in model:
        last = events[-1]
        text = "".join(event["generation"] for event in events)
        counts = {"prompt_token_count": events[0]["prompt_token_count"]}
        produced: int = last["generation_token_count"]
        return {
            "generation": text,
            **counts,
            "generation_token_count": produced,
            "stop_reason": last["stop_reason"],
        }, produced
    text = "".join(event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event)
    usage = events[-1]["metadata"]["usage"]
    renamed = {key.replace("InputTokens", "InputTokenCount") if "cache" in key else key: usage[key] for key in usage}
    answer = {"message": {"role": "assistant", "content": [{"text": text}]}}
    return {"output": answer, "stopReason": events[-2]["messageStop"]["stopReason"], "usage": renamed}, usage[
        "outputTokens"
    ]


def _chunk(event: dict[str, Any]) -> Event:
    if event.get("type") == "error":
        return "!throttlingException", {"message": "Too many requests, please wait before trying again."}
    return "chunk", {"bytes": base64.b64encode(json.dumps(event).encode()).decode()}


# --- event stream ---------------------------------------------------------------------------------------------------


async def _stream(request: web.Request, events: list[Event]) -> web.StreamResponse:
    response = web.StreamResponse(
        headers=_headers() | {"content-type": _STREAM, "x-amzn-bedrock-content-type": "application/json"}
    )
    await response.prepare(request)
    for number, (kind, payload) in enumerate(events):
        padding = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[: 1 + number * 7 % 60]
        await response.write(_frame(kind, payload if kind.startswith("!") else payload | {"p": padding}))
        await asyncio.sleep(0)
    await response.write_eof()
    return response


def _frame(kind: str, payload: dict[str, Any]) -> bytes:
    """Return one message: prelude with checksum, string headers, payload, checksum."""
    message = "exception" if kind.startswith("!") else "event"
    headers = {
        f":{message}-type": kind.removeprefix("!"),
        ":content-type": "application/json",
        ":message-type": message,
    }
    block = b"".join(
        struct.pack(f"!B{len(name)}sBH{len(value)}s", len(name), name.encode(), 7, len(value), value.encode())
        for name, value in headers.items()
    )
    body = json.dumps(payload, separators=(",", ":")).encode()
    prelude = struct.pack("!II", 16 + len(block) + len(body), len(block))
    checked = prelude + struct.pack("!I", zlib.crc32(prelude)) + block + body
    return checked + struct.pack("!I", zlib.crc32(checked))
