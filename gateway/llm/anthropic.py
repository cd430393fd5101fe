"""Anthropic Messages (POST /v1/messages), as documents and as events.

In a stream the counts come in two parts: `message_start` has the input side and a placeholder for the output,
`message_delta` has the output so far and, in newer versions of the API, the input side again. Both are cumulative, so
the last one seen is right; the output side is believed only from message_delta.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.llm.reading import reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class _Request(msgspec.Struct):
    """Only what becomes an attribute: messages, system and tools are skipped unread."""

    model: Any = None
    max_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    stop_sequences: Any = None
    stream: Any = None
    output_config: Any = None


class _Document(msgspec.Struct):
    """A message, an event or an error: they share these members. content is skipped unread."""

    type: Any = None
    id: Any = None
    model: Any = None
    stop_reason: Any = None
    usage: Any = None
    message: Any = None
    delta: Any = None
    error: Any = None


_GENERATED: Final = ("text", "thinking", "partial_json", "content")  # of a content_block_delta; content: a compaction
_BESIDE: Final = frozenset(("compaction", "advisor_message"))  # iterations that the counts of usage leave out
_COUNTS: Final = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_LISTED: Final = {"speed": ("standard",), "inference_geo": ("global", "not_available")}  # of usage: the list's prices
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_read_request = reader(_Request)
_read_document = reader(_Document)


class AnthropicMessages(JsonDialect):
    """Dialect of the Messages API (see dialect.Dialect)."""

    output_limit_name: str | None = "max_tokens"

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        request = _read_request(body)
        if request is None:
            return {}
        self.request_model = values.text(request.model)
        self.streams = request.stream is True
        self.max_output_tokens = values.count(request.max_tokens)
        asks_json = values.member(values.member(request.output_config, "format"), "type") == "json_schema"
        return values.known(
            {
                names.GEN_AI_REQUEST_MODEL: self.request_model,
                names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
                names.GEN_AI_REQUEST_TEMPERATURE: values.number(request.temperature),
                names.GEN_AI_REQUEST_TOP_P: values.number(request.top_p),
                names.GEN_AI_REQUEST_TOP_K: values.number(request.top_k),
                names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(request.stop_sequences),
                names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
                names.GEN_AI_OUTPUT_TYPE: "json" if asks_json else None,
            }
        )

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._take(body, streamed=False)

    def event(self, event: SseEvent) -> bool:
        """Take one event of a stream."""
        if event.data:
            self._take(event.data, streamed=True)
        return False

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """See Dialect. Source: docs.anthropic.com/en/api/errors."""
        kind = _ERROR_TYPES.get(status, "api_error")
        return "application/json", msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect."""
        _, body = self.error_body(429, code, message)
        return b"event: error\ndata: " + body + b"\n\n"

    def _take(self, raw: bytes, *, streamed: bool) -> None:
        document = _read_document(raw)
        if document is None:
            return
        if document.type == "message" and not streamed:
            self._message(document, final=True)
        elif document.type == "content_block_delta" and streamed:
            self.completion.generated(*(values.member(document.delta, key) for key in _GENERATED))
        elif document.type == "message_start" and streamed:
            self._start(document.message)
        elif document.type == "message_delta" and streamed:
            self._stop(values.member(document.delta, "stop_reason"))
            self._usage(document.usage, final=True)
        elif document.type == "message_stop":
            self.completion.ended = True
        elif document.type == "error":
            self.completion.error_type = values.code(values.member(document.error, "type")) or names.ERROR_TYPE_OTHER
            self.completion.error_message = values.message(values.member(document.error, "message"))

    def _start(self, message: object) -> None:
        try:
            self._message(msgspec.convert(message, _Document), final=False)
        except msgspec.ValidationError:
            return

    def _message(self, message: _Document, *, final: bool) -> None:
        self.completion.response_id = values.text(message.id)
        self.completion.model = values.text(message.model)
        self._stop(message.stop_reason)
        self._usage(message.usage, final=final)

    def _stop(self, reason: object) -> None:
        if (found := values.text(reason)) is not None:
            self.completion.finished(0, found)
            self.completion.refused |= found == "refusal"

    def _usage(self, reported: object, *, final: bool) -> None:
        """Merge counts: input_tokens leaves out what was read from or written to the cache, semconv wants it in."""
        self._billing(reported)
        usage, counts = self.completion.usage, _all_counts(reported)
        if counts["input_tokens"] is not None:
            usage = _larger(usage, _input_side(counts, reported, usage))
        output = counts["output_tokens"]
        searches = values.count(values.member(values.member(reported, "server_tool_use"), "web_search_requests"))
        usage = replace(usage, web_searches=max(usage.web_searches, searches or 0))
        if final and output is not None:
            thought = values.count(values.member(values.member(reported, "output_tokens_details"), "thinking_tokens"))
            usage = replace(usage, output_tokens=output, reasoning=usage.reasoning if thought is None else thought)
        self.completion.usage = usage

    def _billing(self, reported: object) -> None:
        """Note what makes a call cost something else than the list says: tier, fast mode, where it was served."""
        done = self.completion
        if (tier := values.code(values.member(reported, "service_tier"))) is not None:
            done.extra[names.CLRK_GEN_AI_RESPONSE_SERVICE_TIER] = tier
            done.off_list = done.off_list or tier != "standard"
        for key, listed in _LISTED.items():
            found = values.code(values.member(reported, key))
            done.off_list = done.off_list or found not in (None, *listed)
        models = {values.text(values.member(item, "model")) for item in _iterations(reported)}
        done.off_list = done.off_list or bool(models - {None, done.model, self.request_model})


def _iterations(reported: object) -> list[object]:
    found = values.member(reported, "iterations")
    return found[: values.MAX_ITEMS] if isinstance(found, list) else []


def _all_counts(reported: object) -> dict[str, int | None]:
    """Return the counts, with those of the iterations that they leave out."""
    parts = [reported, *(item for item in _iterations(reported) if values.member(item, "type") in _BESIDE)]
    counts = {name: [values.count(values.member(part, name)) for part in parts] for name in _COUNTS}
    return {
        name: values.count(sum(one or 0 for one in found)) if any(one is not None for one in found) else None
        for name, found in counts.items()
    }


def _input_side(counts: dict[str, int | None], reported: object, before: Usage) -> Usage:
    read, written = counts["cache_read_input_tokens"], counts["cache_creation_input_tokens"]
    read = before.cache_read if read is None else read
    written = before.cache_creation if written is None else written
    an_hour = values.count(values.member(values.member(reported, "cache_creation"), "ephemeral_1h_input_tokens"))
    return replace(
        before,
        input_tokens=values.count((counts["input_tokens"] or 0) + (read or 0) + (written or 0)),
        cache_read=read,
        cache_creation=written,
        cache_creation_1h=before.cache_creation_1h if an_hour is None else an_hour,
    )


def _larger(before: Usage, after: Usage) -> Usage:
    """Cumulative counts do not fall: servers that imitate the API send zeros in one of the two places."""
    return after if (after.input_tokens or 0) >= (before.input_tokens or 0) else before
