"""Bedrock's InvokeModel and its stream: every model's own request and response, behind one address.

Claude is read by the dialect of Anthropic. The others differ in names only, so one reader knows the names of all:
Nova, Titan, Llama, Mistral AI, Cohere, DeepSeek, and who imitates OpenAI. A stream is an event stream of `chunk`
events, whose payload holds one of the model's own events in base64; the last one has Bedrock's counts
(invocationMetrics).

Source: docs.aws.amazon.com/bedrock/latest/userguide/model-parameters.html
"""

from __future__ import annotations

import binascii
from dataclasses import fields, replace
from typing import Any, Final

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.bedrock import BedrockDialect, path_shape, usage
from clrk.gateway.llm.bedrock_converse import converse_usage, count_delta
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.openai_chat import count_chat_delta
from clrk.gateway.llm.reading import MALFORMED, reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

PATH: Final = path_shape("invoke", "invoke-with-response-stream")
_GUARDED: Final = "amazon-bedrock-guardrailAction"
_METRICS: Final = "amazon-bedrock-invocationMetrics"


class _Chunk(msgspec.Struct):
    bytes: str = ""


class _Request(msgspec.Struct):
    """The members of every model's request that become attributes; prompts and messages are skipped unread."""

    anthropic_version: Any = None
    inferenceConfig: Any = None
    textGenerationConfig: Any = None
    max_gen_len: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_new_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    p: Any = None
    k: Any = None
    stop: Any = None
    stop_sequences: Any = None
    num_generations: Any = None


class _Outline(msgspec.Struct):
    """The members of every model's response and events that are read; vectors are skipped unread."""

    metrics: Any = msgspec.field(default=None, name=_METRICS)
    guarded: Any = msgspec.field(default=None, name=_GUARDED)
    # Llama; Cohere; Titan's stream
    generation: Any = None
    prompt_token_count: Any = None
    generation_token_count: Any = None
    stop_reason: Any = None
    text: Any = None
    finish_reason: Any = None
    outputText: Any = None
    completionReason: Any = None
    inputTextTokenCount: Any = None
    totalOutputTextTokenCount: Any = None
    usage: Any = None
    # Nova, whose events wrap one member each
    stopReason: Any = None
    contentBlockDelta: Any = None
    messageStop: Any = None
    metadata: Any = None
    id: Any = None


class _Answer(msgspec.Struct):
    """One of several answers: Titan, Mistral AI, Cohere, and who imitates OpenAI."""

    completionReason: Any = None
    stop_reason: Any = None
    finish_reason: Any = None
    tokenCount: Any = None
    text: Any = None
    outputText: Any = None
    delta: Any = None


class _Document(_Outline):
    results: list[_Answer] | None = None
    outputs: list[_Answer] | None = None
    generations: list[_Answer] | None = None
    choices: list[_Answer] | None = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)
_read_request = reader(_Request)
_read_document = reader(_Document)
_read_outline = reader(_Outline)  # where a list of answers is none
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_gen_len", "max_new_tokens")
_NESTED_LIMITS: Final = ("maxTokens", "max_new_tokens", "maxTokenCount")
_TEXTS: Final = ("generation", "text", "outputText")
_REASONS: Final = ("completionReason", "stop_reason", "finish_reason", "stopReason")


class BedrockInvoke(BedrockDialect):
    """Dialect of InvokeModel and InvokeModelWithResponseStream (see dialect.Dialect)."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self._claude: AnthropicMessages | None = None
        model = self.request_model or ""
        if "anthropic.claude" in model:
            self._read_as_claude(head)
        elif "embed" in model:
            self.operation = names.OPERATION_EMBEDDINGS
        self._head = head
        tier, latency = (
            head.header("x-amzn-bedrock-service-tier"),
            head.header("x-amzn-bedrock-performanceconfig-latency"),
        )
        self.note_tier(tier, latency)

    def _read_as_claude(self, head: RequestHead) -> AnthropicMessages:
        self._claude = self._claude or AnthropicMessages(head)
        self._claude.completion = self.completion
        return self._claude

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; those of the path alone when the body is malformed."""
        request = _read_request(body) or _Request()
        # An application's inference profile has a name that says nothing: only Claude's requests have this member.
        if request.anthropic_version is not None or self._claude is not None:
            claude = self._read_as_claude(self._head)
            found = claude.request(body)
            self.max_output_tokens = claude.max_output_tokens
        else:
            found = self._settings(request)
        own: dict[str, AttributeValue | None] = {
            names.GEN_AI_REQUEST_MODEL: self.request_model,
            names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
            names.AWS_BEDROCK_GUARDRAIL_ID: self.guardrail,
        }
        return found | {key: value for key, value in own.items() if value is not None}

    def _settings(self, request: _Request) -> dict[str, AttributeValue]:
        nested = request.inferenceConfig or request.textGenerationConfig
        limits = [getattr(request, name) for name in _LIMITS] + [values.member(nested, name) for name in _NESTED_LIMITS]
        self.max_output_tokens = next((n for limit in limits if (n := values.count(limit)) is not None), None)
        self.choices = values.count(request.num_generations) or 1

        def first(*candidates: object) -> object:
            return next((value for value in candidates if value is not None), None)

        temperature = first(request.temperature, values.member(nested, "temperature"))
        top_p = first(request.top_p, request.p, values.member(nested, "topP"), values.member(nested, "top_p"))
        top_k = first(request.top_k, request.k, values.member(nested, "topK"), values.member(nested, "top_k"))
        stop = first(request.stop, request.stop_sequences, values.member(nested, "stopSequences"))
        found: dict[str, AttributeValue | None] = {
            names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
            names.GEN_AI_REQUEST_TEMPERATURE: values.number(temperature),
            names.GEN_AI_REQUEST_TOP_P: values.number(top_p),
            names.GEN_AI_REQUEST_TOP_K: values.number(top_k),
            names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(stop),
            names.GEN_AI_REQUEST_CHOICE_COUNT: self.choices if self.choices != 1 else None,
        }
        return {key: value for key, value in found.items() if value is not None}

    def document(self, body: bytes) -> None:
        """Take a whole response."""
        if self.completion.error_type is not None:
            self.note_error("", body)
            return
        if self._claude is not None:
            self._claude.document(body)
        self._take(body)
        if self.operation == names.OPERATION_EMBEDDINGS and self.completion.usage.input_tokens is not None:
            self.completion.usage = Usage(self.completion.usage.input_tokens, generates=False)

    def event(self, event: SseEvent) -> bool:
        """Take one event of a stream."""
        if not event.data or self.stream_error(event.name, event.data):
            return False
        try:
            data = binascii.a2b_base64(_CHUNK.decode(event.data).bytes, strict_mode=True)
        except (*MALFORMED, ValueError):
            return False
        if self._claude is not None:
            self._claude.event(SseEvent(b"", data, event.end))
        self._take(data)
        return False

    def _take(self, raw: bytes) -> None:
        if self._claude is not None and b'"amazon-bedrock-' not in raw:
            return  # nothing of Bedrock's own in it
        document = _read_document(raw) or _read_outline(raw)
        if document is None:
            return
        if self._claude is None:
            self._read(document)
        if document.guarded == "INTERVENED":
            self.note_end(0, "guardrail_intervened")
        if isinstance(document.metrics, dict) and not self.completion.usage.is_whole:
            self.completion.usage = usage(
                values.count(document.metrics.get("inputTokenCount")),
                values.count(document.metrics.get("outputTokenCount")),
                values.count(document.metrics.get("cacheReadInputTokenCount")),
                values.count(document.metrics.get("cacheWriteInputTokenCount")),
            )

    def _read(self, document: _Outline) -> None:
        done = self.completion
        done.response_id = values.text(document.id) or done.response_id
        self._answer(0, document)
        answers = _answers(document)
        for position, answer in enumerate(answers):
            self._answer(position, answer)
        if (reason := values.text(values.member(document.messageStop, "stopReason"))) is not None:
            self.note_end(0, reason)
        count_delta(done, values.member(document.contentBlockDelta, "delta"))
        done.usage = _merged(done.usage, _counts(document, answers))

    def _answer(self, position: int, answer: _Outline | _Answer) -> None:
        """Read one answer: why it ended, and how much text it is."""
        done = self.completion
        reasons = (values.text(getattr(answer, name, None)) for name in _REASONS)
        if (reason := next(filter(None, reasons), None)) is not None:
            self.note_end(position, reason)
        done.generated(*(getattr(answer, name, None) for name in _TEXTS))
        if isinstance(delta := getattr(answer, "delta", None), dict):
            count_chat_delta(done, delta)


def _answers(document: _Outline) -> list[_Answer]:
    """Return the list of answers that there is."""
    if not isinstance(document, _Document):
        return []
    given = document.results or document.outputs or document.generations or document.choices or []
    return given[: values.MAX_ITEMS]


def _counts(document: _Outline, answers: list[_Answer]) -> Usage:
    """Return the counts of one document, under whichever names it has them."""
    reported = document.usage if isinstance(document.usage, dict) else values.member(document.metadata, "usage")
    if isinstance(reported, dict):
        if "prompt_tokens" in reported:
            return Usage(values.count(reported["prompt_tokens"]), values.count(reported.get("completion_tokens")))
        return converse_usage(reported)
    produced = [number for answer in answers if (number := values.count(answer.tokenCount)) is not None]
    outputs = (document.generation_token_count, document.totalOutputTextTokenCount, sum(produced) if produced else None)
    inputs = (document.prompt_token_count, document.inputTextTokenCount)
    return Usage(
        next((n for count in inputs if (n := values.count(count)) is not None), None),
        next((n for count in outputs if (n := values.count(count)) is not None), None),
    )


def _merged(before: Usage, after: Usage) -> Usage:
    """Counts are cumulative; what one event leaves out, an earlier one may have said."""
    known = {field.name: getattr(after, field.name) for field in fields(after)}
    return replace(before, **{name: count for name, count in known.items() if count is not None})
