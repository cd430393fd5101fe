"""A stream that a budget cuts, read by the official SDKs over a real connection: they raise, and say why."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic
import openai
import pytest
from budget_runs import JSON, Office, ai_route, budget_rule, claude_call, openai_call

from clrk.gateway.govern import Cut

CLAUDE = (
    {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "content": [],
                                          "model": "claude-sonnet-4-5", "stop_reason": None, "stop_sequence": None,
                                          "usage": {"input_tokens": 30, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word " * 4_000}},
)  # fmt: skip
GPT = (
    {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o",
     "choices": [{"index": 0, "delta": {"role": "assistant", "content": "word " * 8_000}, "finish_reason": None}]},
)  # fmt: skip


def _cut(call, events, named: bool) -> bytes:
    """What the agent gets of a stream that goes on beyond what its budget has."""
    call.head(200, "text/event-stream")
    got = b""
    for event in events:
        name = b"event: " + event["type"].encode() + b"\n" if named else b""
        found = call.data(name + b"data: " + json.dumps(event).encode() + b"\n\n")
        if isinstance(found, Cut):
            return got + found.last
        got += found
    raise AssertionError("it was not cut")


@contextmanager
def _server(stream: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(stream)))
            self.end_headers()
            self.wfile.write(stream)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_anthropics_sdk_raises_what_the_event_says():
    office = Office(ai_route(budget_rule({"maxTokensPerExecution": 2_000})))
    # The provider goes on beyond the limit that it was given: an honest one does not.
    stream = _cut(claude_call(office, office.run(), max_tokens=500, stream=True), CLAUDE, named=True)
    with _server(stream) as url, anthropic.Anthropic(api_key="x", base_url=url, max_retries=0) as client:
        asked = client.messages.create(
            model="claude-of-ours", max_tokens=500, stream=True, messages=[{"role": "user", "content": "hi"}]
        )
        seen = []
        with pytest.raises(anthropic.APIError, match="maxTokensPerExecution is reached"):
            seen.extend(event.type for event in asked)
    assert seen == ["message_start", "content_block_start", "content_block_delta"]


def test_openais_sdk_raises_what_the_event_says():
    office = Office(ai_route(budget_rule({"maxTokensPerExecution": 5_000})))
    stream = _cut(openai_call(office, office.run(), stream=True), GPT, named=False)
    with _server(stream) as url, openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0) as client:
        asked = client.chat.completions.create(
            model="gpt-4o", stream=True, messages=[{"role": "user", "content": "hi"}]
        )
        seen = []
        with pytest.raises(openai.APIError, match="maxTokensPerExecution is reached"):
            seen.extend(chunk.id for chunk in asked)
    assert seen == ["c"]


def test_what_comes_after_json_headers_is_no_stream_and_is_not_cut():
    office = Office(ai_route(budget_rule({"maxTokensPerExecution": 5_000})))
    call = openai_call(office, office.run(), max_tokens=10)
    call.head(200, dict(JSON)["Content-Type"])
    body = json.dumps(GPT[0]).encode()
    assert call.data(body) == body
