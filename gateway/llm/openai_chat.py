"""OpenAI Chat Completions (POST …/chat/completions), as documents and as events, and what imitates it."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Completion, Usage
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.llm.openai_errors import OpenAiErrors, take_error
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

API_TYPE: Final = "chat_completions"  # semconv 1.41.1, openai.api.type


class _Request(msgspec.Struct):
    """Only what becomes an attribute: messages and tools are skipped unread."""

    model: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    stop: Any = None
    stream: Any = None
    seed: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    n: Any = None
    service_tier: Any = None
    response_format: Any = None


class _Choice(msgspec.Struct):
    index: Any = None
    finish_reason: Any = None
    delta: Any = None


class _Document(msgspec.Struct):
    """A completion, a chunk or an error: they share these members."""

    id: Any = None
    model: Any = None
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    service_tier: Any = None
    system_fingerprint: Any = None


class _ErrorDocument(msgspec.Struct):
    """When choices are no choices there may still be an error in it."""

    error: Any = None


_REQUEST: Final = msgspec.json.Decoder(_Request)
_DOCUMENT: Final = msgspec.json.Decoder(_Document)
_ERROR: Final = msgspec.json.Decoder(_ErrorDocument)
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/")  # Azure OpenAI: the model may be named by the path only
_OUTPUT_TYPES: Final = {"text": "text", "json_object": "json", "json_schema": "json"}


class OpenAiChat(OpenAiErrors, JsonDialect):
    """Dialect of Chat Completions (see dialect.Dialect)."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        deployment = _DEPLOYMENT.search(head.path)
        self._deployment = values.text(deployment.group(1)) if deployment is not None else None

    @property
    def usage_due(self) -> bool:
        """True once every choice has finished: what follows is the usage chunk and `[DONE]`."""
        return len(self.completion.finish_reasons) >= self.choices

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        try:
            request = _REQUEST.decode(body)
        except _MALFORMED:
            return {}
        self.request_model = values.text(request.model) or self._deployment
        self.streams = request.stream is True
        self.choices = values.count(request.n) or 1
        limit = values.count(request.max_completion_tokens)
        self.max_output_tokens = values.count(request.max_tokens) if limit is None else limit
        found: dict[str, AttributeValue | None] = {
            names.GEN_AI_REQUEST_MODEL: self.request_model,
            names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
            names.GEN_AI_REQUEST_TEMPERATURE: values.number(request.temperature),
            names.GEN_AI_REQUEST_TOP_P: values.number(request.top_p),
            names.GEN_AI_REQUEST_TOP_K: values.number(request.top_k),
            names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(request.stop),
            names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
            names.GEN_AI_REQUEST_SEED: values.integer(request.seed),
            names.GEN_AI_REQUEST_FREQUENCY_PENALTY: values.number(request.frequency_penalty),
            names.GEN_AI_REQUEST_PRESENCE_PENALTY: values.number(request.presence_penalty),
            names.GEN_AI_REQUEST_CHOICE_COUNT: self.choices if self.choices != 1 else None,
            names.GEN_AI_OUTPUT_TYPE: _output_type(request.response_format),
            names.OPENAI_REQUEST_SERVICE_TIER: _service_tier(request.service_tier),
            names.OPENAI_API_TYPE: API_TYPE,
        }
        return {key: value for key, value in found.items() if value is not None}

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._take(body)

    def event(self, event: SseEvent) -> bool:
        """Take one event; True for the chunk that exists only because usage was asked for."""
        if not event.data or event.data.strip() == b"[DONE]":
            return False
        document = self._take(event.data)
        return document is not None and document.choices == [] and isinstance(document.usage, dict)

    def _take(self, raw: bytes) -> _Document | None:
        try:
            document = _DOCUMENT.decode(raw)
        except _MALFORMED:
            self._error_only(raw)
            return None
        done = self.completion
        done.response_id = values.text(document.id) or done.response_id
        done.model = values.text(document.model) or done.model
        for position, choice in enumerate(document.choices or ()):
            if (reason := values.text(choice.finish_reason)) is not None:
                index = values.count(choice.index)
                done.finished(position if index is None else index, reason)
            if isinstance(choice.delta, dict):
                _count_delta(done, choice.delta)
        if isinstance(document.usage, dict):
            done.usage = _usage(document.usage)
        for name, value in (
            (names.OPENAI_RESPONSE_SERVICE_TIER, values.code(document.service_tier)),
            (names.OPENAI_RESPONSE_SYSTEM_FINGERPRINT, values.text(document.system_fingerprint)),
        ):
            if value is not None:
                done.extra[name] = value
        take_error(done, document.error)
        return document

    def _error_only(self, raw: bytes) -> None:
        try:
            take_error(self.completion, _ERROR.decode(raw).error)
        except _MALFORMED:
            return


def _count_delta(done: Completion, delta: dict[str, object]) -> None:
    """Count what a chunk adds: text, refusal, reasoning as DeepSeek and vLLM send it, and arguments of tools."""
    done.generated(delta.get("content"), delta.get("refusal"), delta.get("reasoning_content"), delta.get("reasoning"))
    called = delta.get("tool_calls")
    for call in called if isinstance(called, list) else ():
        function = values.member(call, "function")
        done.generated(values.member(function, "name"), values.member(function, "arguments"))


def _output_type(response_format: object) -> str | None:
    kind = values.code(values.member(response_format, "type"))
    return _OUTPUT_TYPES.get(kind) if kind is not None else None


def _service_tier(tier: object) -> str | None:
    found = values.code(tier)
    return None if found == "auto" else found  # semconv: only when requested and not auto


def _usage(reported: dict[object, object]) -> Usage:
    prompt, answer = reported.get("prompt_tokens_details"), reported.get("completion_tokens_details")
    return Usage(
        input_tokens=values.count(reported.get("prompt_tokens")),
        output_tokens=values.count(reported.get("completion_tokens")),
        cache_read=values.count(values.member(prompt, "cached_tokens")),
        reasoning=values.count(values.member(answer, "reasoning_tokens")),
        input_audio=values.count(values.member(prompt, "audio_tokens")),
        output_audio=values.count(values.member(answer, "audio_tokens")),
    )
