"""Bedrock's Converse, ConverseStream and CountTokens: one shape for every model."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.bedrock import BedrockDialect, path_shape, usage
from clrk.gateway.llm.completion import Completion, Usage
from clrk.gateway.llm.reading import reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

PATH: Final = path_shape("converse", "converse-stream", "count-tokens")


class _Request(msgspec.Struct):
    """Only what becomes an attribute: messages, system and tools are skipped unread."""

    inferenceConfig: Any = None
    additionalModelRequestFields: Any = None
    guardrailConfig: Any = None
    outputConfig: Any = None
    performanceConfig: Any = None
    serviceTier: Any = None


class _Document(msgspec.Struct):
    """A response, or any event of a stream: their members differ in name. What a response says is skipped unread."""

    stopReason: Any = None
    usage: Any = None
    trace: Any = None
    delta: Any = None


_read_request = reader(_Request)
_read_document = reader(_Document)


class BedrockConverse(BedrockDialect):
    """Dialect of Converse, its stream and CountTokens (see dialect.Dialect)."""

    output_limit_name: str | None = "inferenceConfig.maxTokens"

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        if self._method == "count-tokens":
            self.operation = names.OPERATION_COUNT_TOKENS
            self.spends_tokens = False

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; those of the path alone when the body is malformed."""
        request = _read_request(body) or _Request()
        settings = request.inferenceConfig
        self.max_output_tokens = values.count(values.member(settings, "maxTokens"))
        latency = values.member(request.performanceConfig, "latency")
        self.note_tier(values.member(request.serviceTier, "type"), latency)
        form = values.member(values.member(request.outputConfig, "textFormat"), "type")
        found: dict[str, AttributeValue | None] = {
            names.GEN_AI_REQUEST_MODEL: self.request_model,
            names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
            names.GEN_AI_REQUEST_TEMPERATURE: values.number(values.member(settings, "temperature")),
            names.GEN_AI_REQUEST_TOP_P: values.number(values.member(settings, "topP")),
            names.GEN_AI_REQUEST_TOP_K: values.number(values.member(request.additionalModelRequestFields, "top_k")),
            names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(values.member(settings, "stopSequences")),
            names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
            names.GEN_AI_OUTPUT_TYPE: "json" if form == "json_schema" else None,
            names.AWS_BEDROCK_GUARDRAIL_ID: values.text(values.member(request.guardrailConfig, "guardrailIdentifier")),
        }
        return {key: value for key, value in found.items() if value is not None}

    def document(self, body: bytes) -> None:
        """Take a whole response."""
        self._take(body)
        if self.completion.error_type is not None:
            self.note_error("", body)

    def event(self, event: SseEvent) -> bool:
        """Take one event of a stream."""
        if event.data and not self.stream_error(event.name, event.data):
            document = self._take(event.data)
            if document is not None and event.name == b"event/contentBlockDelta":
                count_delta(self.completion, document.delta)
        return False

    def _take(self, raw: bytes) -> _Document | None:
        document = _read_document(raw)
        if document is None:
            return None
        if (reason := values.text(document.stopReason)) is not None:
            self.note_end(0, reason)
        if isinstance(document.usage, dict) and self.spends_tokens:
            self.completion.usage = converse_usage(document.usage)
        # A prompt router says which model it chose.
        chosen = values.text(values.member(values.member(document.trace, "promptRouter"), "invokedModelId"))
        if chosen is not None:
            self.completion.model = self.routed_model = chosen.rpartition("/")[2]
        return document


def count_delta(done: Completion, delta: object) -> None:
    """Count what a delta adds to a content block, in Converse and in Nova's own stream."""
    reasoning, tool = values.member(delta, "reasoningContent"), values.member(delta, "toolUse")
    done.generated(values.member(delta, "text"), values.member(reasoning, "text"), values.member(tool, "input"))


def converse_usage(reported: dict[object, object]) -> Usage:
    """Return the counts of Converse, and of Nova's own API, which adds `Count` to the names of the cache's."""
    details = reported.get("cacheDetails")
    hours = [
        values.count(values.member(item, "inputTokens")) or 0
        for item in (details[: values.MAX_ITEMS] if isinstance(details, list) else ())
        if values.member(item, "ttl") == "1h"
    ]
    return usage(
        values.count(reported.get("inputTokens")),
        values.count(reported.get("outputTokens")),
        values.count(reported.get("cacheReadInputTokens", reported.get("cacheReadInputTokenCount"))),
        values.count(reported.get("cacheWriteInputTokens", reported.get("cacheWriteInputTokenCount"))),
        values.count(sum(hours)) if hours else None,
    )
