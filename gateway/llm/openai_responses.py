"""OpenAI Responses (POST …/responses), as documents and as typed events.

A stream is a row of events with a `type`; `response.completed`, `response.incomplete` and `response.failed` hold the
whole response, usage included. Source: platform.openai.com/docs/api-reference/{responses,responses-streaming}.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.openai_common import OpenAiDialect, output_type, take_error, take_tier
from clrk.gateway.llm.reading import ABSENT, MALFORMED, SMALL_BYTES, reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class _Request(msgspec.Struct):
    """Only what becomes an attribute: input, instructions and tools are skipped unread."""

    model: Any = None
    max_output_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    stream: Any = None
    service_tier: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    text: Any = None


class _Item(msgspec.Struct):
    """One item of the output. content is read for messages only."""

    type: Any = None
    content: msgspec.Raw = ABSENT
    action: Any = None


class _Part(msgspec.Struct):
    type: Any = None


class _Envelope(msgspec.Struct):
    """What is left to read when the output is none."""

    id: Any = None
    model: Any = None
    status: Any = None
    error: Any = None
    incomplete_details: Any = None
    usage: Any = None
    service_tier: Any = None
    conversation: Any = None


class _Response(_Envelope):
    output: list[_Item] | None = None


class _Event(msgspec.Struct):
    """An event of a stream; an error event has code and message at its top."""

    type: Any = None
    response: msgspec.Raw = ABSENT
    delta: Any = None
    partial_image_b64: Any = None
    code: Any = None
    message: Any = None
    error: Any = None


_read_request = reader(_Request)
_read_response = reader(_Response)
_read_envelope = reader(_Envelope)
_read_event = reader(_Event)
_PARTS: Final = msgspec.json.Decoder(list[_Part])
_ENDED: Final = frozenset(("completed", "incomplete", "failed", "cancelled"))
_LAST: Final = frozenset(("response.completed", "response.incomplete", "response.failed"))


class OpenAiResponses(OpenAiDialect):
    """Dialect of the Responses API (see dialect.Dialect). Usage is part of the protocol."""

    output_limit_name: str | None = "max_output_tokens"

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        request = _read_request(body)
        if request is None:
            return {}
        self.take_model(request.model)
        self.streams = request.stream is True
        self.max_output_tokens = values.count(request.max_output_tokens)
        tier = values.code(request.service_tier)
        return values.known(
            {
                names.GEN_AI_REQUEST_MODEL: self.request_model,
                names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
                names.GEN_AI_REQUEST_TEMPERATURE: values.number(request.temperature),
                names.GEN_AI_REQUEST_TOP_P: values.number(request.top_p),
                names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
                names.GEN_AI_REQUEST_PREVIOUS_RESPONSE_ID: values.text(request.previous_response_id),
                names.GEN_AI_CONVERSATION_ID: _conversation(request.conversation),
                names.GEN_AI_OUTPUT_TYPE: output_type(values.member(request.text, "format")),
                names.OPENAI_REQUEST_SERVICE_TIER: None if tier == "auto" else tier,  # semconv: only when not auto
                names.OPENAI_API_TYPE: "responses",
            }
        )

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._response(body)

    def event(self, event: SseEvent) -> bool:
        """Take one event of a stream."""
        found = _read_event(event.data) if event.data else None
        kind = values.code(found.type) if found is not None else None
        if found is None or kind is None:
            return False
        if isinstance(media := found.delta if kind == "response.audio.delta" else found.partial_image_b64, str):
            self.completion.generated_media(len(media))
        elif kind.endswith(".delta"):
            self.completion.generated(found.delta)
            self.completion.refused |= kind == "response.refusal.delta"
        elif kind == "error":
            take_error(self.completion, found.error or {"code": found.code, "message": found.message})
        elif raw := bytes(found.response):
            self._response(raw)
            self.completion.ended |= kind in _LAST
        return False

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect. The sequence number is one that no stream reaches: nobody can tell which is next."""
        error = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": 2**31 - 1}
        return b"event: error\ndata: " + msgspec.json.encode(error) + b"\n\n"

    def _response(self, raw: bytes) -> None:
        response: _Envelope | None = _read_response(raw) or _read_envelope(raw)
        if response is None:
            return
        done = self.completion
        done.response_id = values.text(response.id) or done.response_id
        done.model = values.text(response.model) or done.model
        status = values.code(response.status)
        if status in _ENDED:
            why = values.text(values.member(response.incomplete_details, "reason"))
            done.finished(0, why if status == "incomplete" and why is not None else str(status))
        if (conversation := _conversation(response.conversation)) is not None:
            done.extra[names.GEN_AI_CONVERSATION_ID] = conversation
        if isinstance(response.usage, dict):
            output = response.output or [] if isinstance(response, _Response) else []
            done.usage = _usage(response.usage, output)
        if isinstance(response, _Response):
            done.refused |= any(_refuses(item) for item in response.output or ())
        take_tier(done, response.service_tier)
        take_error(done, response.error)


def _conversation(value: object) -> str | None:
    """Return a conversation's id: it stands there as a text, or as an object."""
    return values.text(value) or values.text(values.member(value, "id"))


def _refuses(item: _Item) -> bool:
    if item.type != "message" or len(bytes(item.content)) > SMALL_BYTES:
        return False
    try:
        return any(part.type == "refusal" for part in _PARTS.decode(item.content))
    except MALFORMED:
        return False


def _searches(item: _Item) -> bool:
    """Say whether an item is a web search that is billed: opening a page is none."""
    return item.type == "web_search_call" and values.member(item.action, "type") in (None, "search")


def _usage(reported: dict[object, object], output: list[_Item]) -> Usage:
    given, made = reported.get("input_tokens_details"), reported.get("output_tokens_details")
    return Usage(
        input_tokens=values.count(reported.get("input_tokens")),
        output_tokens=values.count(reported.get("output_tokens")),
        cache_read=values.count(values.member(given, "cached_tokens")),
        cache_creation=values.count(values.member(given, "cache_write_tokens")),
        reasoning=values.count(values.member(made, "reasoning_tokens")),
        web_searches=sum(map(_searches, output)),
        storage_searches=sum(item.type == "file_search_call" for item in output),
    )
