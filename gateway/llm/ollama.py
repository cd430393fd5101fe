"""Ollama's own API (POST /api/chat, /api/generate): JSON lines, streamed unless the request says otherwise.

Source: github.com/ollama/ollama, docs/api.md. The last object has `done: true`, the counts and the reason.
"""

from __future__ import annotations

from typing import Any

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.llm.reading import ABSENT, reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class _Request(msgspec.Struct):
    model: Any = None
    stream: Any = None
    options: Any = None
    format: msgspec.Raw = ABSENT


class _Document(msgspec.Struct):
    model: Any = None
    message: Any = None
    response: Any = None
    thinking: Any = None
    done: Any = None
    done_reason: Any = None
    prompt_eval_count: Any = None
    eval_count: Any = None
    error: Any = None


_read_request = reader(_Request)
_read_document = reader(_Document)


class OllamaChat(JsonDialect):
    """Dialect of /api/chat (see dialect.Dialect)."""

    output_limit_name: str | None = "options.num_predict"

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        request = _read_request(body)
        if request is None:
            return {}
        self.request_model = values.text(request.model)
        self.streams = request.stream is not False
        options = request.options
        limit = values.integer(values.member(options, "num_predict"))
        self.max_output_tokens = limit if limit is not None and limit >= 0 else None  # -1: until it ends by itself
        asks_json = bytes(request.format) not in (b"", b"null", b'""')
        return values.known(
            {
                names.GEN_AI_REQUEST_MODEL: self.request_model,
                names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
                names.GEN_AI_REQUEST_TEMPERATURE: values.number(values.member(options, "temperature")),
                names.GEN_AI_REQUEST_TOP_P: values.number(values.member(options, "top_p")),
                names.GEN_AI_REQUEST_TOP_K: values.number(values.member(options, "top_k")),
                names.GEN_AI_REQUEST_SEED: values.integer(values.member(options, "seed")),
                names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(values.member(options, "stop")),
                names.GEN_AI_REQUEST_FREQUENCY_PENALTY: values.number(values.member(options, "frequency_penalty")),
                names.GEN_AI_REQUEST_PRESENCE_PENALTY: values.number(values.member(options, "presence_penalty")),
                names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
                names.GEN_AI_OUTPUT_TYPE: "json" if asks_json else None,
            }
        )

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._take(body)

    def event(self, event: SseEvent) -> bool:
        """Take one line of a stream."""
        document = self._take(event.data) if event.data else None
        if document is not None:
            message = document.message
            called = values.member(message, "tool_calls")
            self.completion.generated(document.response, document.thinking)
            self.completion.generated(values.member(message, "content"), values.member(message, "thinking"))
            if isinstance(called, list):
                self.completion.generated(msgspec.json.encode(called).decode())
        return False

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """See Dialect."""
        return "application/json; charset=utf-8", msgspec.json.encode({"error": message})

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect."""
        return msgspec.json.encode({"error": message}) + b"\n"

    def _take(self, raw: bytes) -> _Document | None:
        document = _read_document(raw)
        if document is None:
            return None
        done = self.completion
        done.model = values.text(document.model) or done.model
        if document.done is True:
            done.ended = True
            done.finished(0, values.text(document.done_reason) or "stop")
            done.usage = Usage(values.count(document.prompt_eval_count), values.count(document.eval_count))
        if isinstance(document.error, str):
            done.error_type, done.error_message = names.ERROR_TYPE_OTHER, values.message(document.error)
        return document


class OllamaGenerate(OllamaChat):
    """Dialect of /api/generate."""

    operation = names.OPERATION_TEXT_COMPLETION
