"""Requests and responses of the Bedrock runtime, framed as it frames them."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

from llm_exchange import post, same_facts_however_cut

from clrk.gateway.interpret import Facts, RequestHead, ResponseHead
from clrk.gateway.llm.aws_event_stream import MEDIA_TYPE, encode_message

HOST = "bedrock-runtime.us-east-1.amazonaws.com"
HAIKU = "us.anthropic.claude-haiku-4-5-20251001-v1:0"
OK = ResponseHead(200, (("Content-Type", "application/json"), ("x-amzn-RequestId", "req-1")))
STREAMED = ResponseHead(200, (("Content-Type", MEDIA_TYPE), ("x-amzn-RequestId", "req-1")))


def call(method: str, model: str = HAIKU, *headers: tuple[str, str], host: str = HOST) -> RequestHead:
    return post(host, f"/model/{quote(model, safe='')}/{method}", ("Content-Type", "application/json"), *headers)


def raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def frame(kind: str, payload: Any, message: str = "event") -> bytes:
    headers = {f":{message}-type": kind, ":content-type": "application/json", ":message-type": message}
    return encode_message(headers, raw(payload))


def chunk(payload: Any) -> bytes:
    """Return one of a model's own events, as InvokeModelWithResponseStream wraps it."""
    return frame("chunk", {"bytes": base64.b64encode(raw(payload)).decode(), "p": "abcdefgh"})


def facts_of(head: RequestHead, request: Any, response: ResponseHead, answer: Any) -> Facts:
    facts, received = same_facts_however_cut(head, raw(request), response, raw(answer))
    assert received == raw(answer)
    return facts
