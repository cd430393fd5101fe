"""Payloads of OpenAI Chat Completions, as the API reference describes them."""

from __future__ import annotations

import json
from typing import Any

from llm_exchange import JSON, SSE, event, post

from clrk.gateway.interpret import ResponseHead

HEAD = post("api.openai.com", "/v1/chat/completions", *JSON, ("Authorization", "Bearer sk-secret"))
OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)

REQUEST: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Is the build green?"}],
    "max_completion_tokens": 256,
    "temperature": 0,
    "top_p": 1,
    "stop": "END",
    "seed": 42,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "n": 2,
    "service_tier": "flex",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x"}},
}
USAGE = {
    "prompt_tokens": 1000,
    "completion_tokens": 100,
    "total_tokens": 1100,
    "prompt_tokens_details": {"cached_tokens": 400, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 64, "audio_tokens": 0, "accepted_prediction_tokens": 0},
}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
    "object": "chat.completion",
    "created": 1741569952,
    "model": "gpt-4o-2024-08-06",
    "choices": [
        {"index": 1, "message": {"role": "assistant", "content": "No."}, "logprobs": None, "finish_reason": "length"},
        {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "logprobs": None, "finish_reason": "stop"},
    ],
    "usage": USAGE,
    "service_tier": "default",
    "system_fingerprint": "fp_44709d6fcb",
}
COST = (600 * 2.5 + 400 * 1.25 + 100 * 10) / 1e6


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    head = {key: COMPLETION[key] for key in ("id", "created", "model", "service_tier", "system_fingerprint")}
    return event(head | {"object": "chat.completion.chunk", "choices": list(choices)} | more)


def part(index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}


ONE = {"model": "gpt-4o", "messages": [], "stream": True}
BEFORE = (
    chunk(part(0, "Y\u00e9s \U0001f600"), usage=None) + b": keep-alive\n\n" + chunk(part(0, None, "stop"), usage=None)
)
USAGE_CHUNK = chunk(usage=USAGE)
DONE = b"data: [DONE]\n\n"
STREAM = BEFORE + USAGE_CHUNK + DONE
