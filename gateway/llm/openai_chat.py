"""OpenAI Chat Completions and Completions (POST …/chat/completions, …/completions), and what imitates them.

Both as documents and as events. Sources: platform.openai.com/docs/api-reference/{chat,completions}; Azure OpenAI names
the deployment in the path; DeepSeek, xAI, Groq and vLLM differ where a comment says so.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Completion, Usage
from clrk.gateway.llm.openai_common import (
    OpenAiDialect,
    output_type,
    take_error,
    take_tier,
    takes_include_usage,
)
from clrk.gateway.llm.reading import ABSENT, MALFORMED, reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class _Request(msgspec.Struct):
    """Only what becomes an attribute, or tells how much may be used: messages and tools are skipped unread."""

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
    best_of: Any = None
    prompt: msgspec.Raw = ABSENT
    service_tier: Any = None
    response_format: Any = None


class _Message(msgspec.Struct):
    refusal: Any = None


class _Choice(msgspec.Struct):
    index: Any = None
    finish_reason: Any = None
    delta: Any = None
    message: _Message | None = None
    text: Any = None


class _Envelope(msgspec.Struct):
    """What is left to read when choices are no choices."""

    id: Any = None
    model: Any = None
    usage: Any = None
    error: Any = None
    service_tier: Any = None
    system_fingerprint: Any = None
    x_groq: Any = None


class _Document(_Envelope):
    """A completion, a chunk or an error: they share these members."""

    choices: list[_Choice] | None = None


_read_request = reader(_Request)
_read_document = reader(_Document)
_read_envelope = reader(_Envelope)
_SEVERAL: Final = re.compile(rb'\[[ \t\r\n]*["\[]')  # texts, or lists of tokens
_MAX_PROMPTS_BYTES: Final = 1 << 20
_PROMPTS: Final = msgspec.json.Decoder(list[msgspec.Raw])


class OpenAiChat(OpenAiDialect):
    """Dialect of Chat Completions (see dialect.Dialect)."""

    api_type: str | None = "chat_completions"  # semconv 1.41.1, openai.api.type
    output_limit_name: str | None = "max_completion_tokens"

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self.takes_include_usage = takes_include_usage(head)

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        request = _read_request(body)
        if request is None:
            return {}
        self.take_model(request.model)
        self.streams = request.stream is True
        limit = values.count(request.max_completion_tokens)
        self.max_output_tokens = values.count(request.max_tokens) if limit is None else limit
        wanted = values.count(request.n) or 1
        # best_of are generated, and billed, of which n are returned.
        self.choices = max(wanted, values.count(request.best_of) or 1) * _prompts(request.prompt)
        tier = values.code(request.service_tier)
        return values.known(
            {
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
                names.GEN_AI_REQUEST_CHOICE_COUNT: wanted if wanted != 1 else None,
                names.GEN_AI_OUTPUT_TYPE: output_type(request.response_format),
                names.OPENAI_REQUEST_SERVICE_TIER: None if tier == "auto" else tier,  # semconv: only when not auto
                names.OPENAI_API_TYPE: self.api_type,
            }
        )

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._take(body)

    def event(self, event: SseEvent) -> bool:
        """Take one event; True for the chunk that exists only because usage was asked for."""
        if event.data.strip() == b"[DONE]":
            self.completion.ended = True
            return False
        if not event.data:
            return False
        document = self._take(event.data)
        return document is not None and document.choices == [] and isinstance(document.usage, dict)

    def _take(self, raw: bytes) -> _Document | None:
        document: _Document | None = None
        envelope: _Envelope | None = _read_document(raw) or _read_envelope(raw)
        if envelope is None:
            return None
        done = self.completion
        if envelope.id != done.response_id:  # each chunk of a stream repeats both
            done.response_id = values.text(envelope.id) or done.response_id
        if envelope.model != done.model:
            done.model = values.text(envelope.model) or done.model
        if isinstance(envelope, _Document):
            document = envelope
            for position, choice in enumerate(document.choices or ()):
                self._choice(position, choice)
        reported = envelope.usage or values.member(envelope.x_groq, "usage")  # Groq's last chunk of a stream
        if isinstance(reported, dict):
            done.usage = _usage(reported)
            # Perplexity bills citations too, and says so in other words than its price list.
            done.off_list = done.off_list or bool(values.count(reported.get("citation_tokens")))
        take_tier(done, envelope.service_tier)
        if (fingerprint := values.text(envelope.system_fingerprint)) is not None:
            done.extra[names.OPENAI_RESPONSE_SYSTEM_FINGERPRINT] = fingerprint
        take_error(done, envelope.error)
        return document

    def _choice(self, position: int, choice: _Choice) -> None:
        done = self.completion
        if (reason := values.text(choice.finish_reason)) is not None:
            index = values.count(choice.index)
            done.finished(position if index is None else index, reason)
        if isinstance(choice.delta, dict):
            count_chat_delta(done, choice.delta)
        elif choice.message is not None and values.text(choice.message.refusal) is not None:
            done.refused = True
        done.generated(choice.text)


class OpenAiCompletions(OpenAiChat):
    """Dialect of the older Completions: a prompt, or several, in place of messages."""

    operation = names.OPERATION_TEXT_COMPLETION
    output_limit_name: str | None = "max_tokens"
    api_type = None  # semconv 1.41.1 has no value for it

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self.takes_include_usage &= self._deployment is None  # Azure's has no stream_options


def _prompts(prompt: msgspec.Raw) -> int:
    """Return how many prompts there are: a text or a list of tokens is one."""
    raw = bytes(prompt)
    if not _SEVERAL.match(raw) or len(raw) > _MAX_PROMPTS_BYTES:
        return 1
    try:
        return len(_PROMPTS.decode(raw))
    except MALFORMED:
        return 1


def count_chat_delta(done: Completion, delta: dict[str, object]) -> None:
    """Count what a chunk adds: text, refusal, reasoning as DeepSeek and vLLM send it, calls of tools and functions."""
    for name, value in delta.items():  # one or two, of all that there may be
        match name:
            case "content" | "reasoning_content" | "reasoning":
                done.generated(value)
            case "refusal":
                done.generated(value)
                done.refused = done.refused or values.text(value) is not None
            case "audio":
                done.generated(values.member(value, "transcript"))
                if isinstance(data := values.member(value, "data"), str):
                    done.generated_media(len(data))
            case "function_call":
                _count_function(done, value)
            case "tool_calls" if isinstance(value, list):
                for call in value:
                    _count_function(done, values.member(call, "function"))


def _count_function(done: Completion, function: object) -> None:
    done.generated(values.member(function, "name"), values.member(function, "arguments"))


def _usage(reported: dict[object, object]) -> Usage:
    prompt, answer = reported.get("prompt_tokens_details"), reported.get("completion_tokens_details")
    given, output = values.count(reported.get("prompt_tokens")), values.count(reported.get("completion_tokens"))
    reasoning = values.count(values.member(answer, "reasoning_tokens"))
    total = values.count(reported.get("total_tokens"))
    if None not in (given, output, reasoning, total) and total == given + output + reasoning:  # type: ignore[operator]
        output = output + reasoning  # type: ignore[operator]  # xAI counts reasoning beside the completion
    cached = values.count(values.member(prompt, "cached_tokens"))
    return Usage(
        input_tokens=given,
        output_tokens=output,
        cache_read=values.count(reported.get("prompt_cache_hit_tokens")) if cached is None else cached,  # DeepSeek
        cache_creation=values.count(values.member(prompt, "cache_write_tokens")),
        reasoning=reasoning,
        input_audio=values.count(values.member(prompt, "audio_tokens")),
        output_audio=values.count(values.member(answer, "audio_tokens")),
    )
