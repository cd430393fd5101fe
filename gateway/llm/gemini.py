"""Google's generateContent and its kin: the Gemini API, and Vertex AI for Google's own models.

The model and what is asked of it stand in the path: `…/models/{model}:{method}`. A stream is server-sent events with
`?alt=sse`, else one JSON array that comes element by element; each element is a whole response with the counts so far.
JSON written from protocol buffers leaves out what is 0, and accepts names in camelCase and snake_case.

Source: ai.google.dev/api (v1beta: generate-content, tokens, embeddings),
cloud.google.com/vertex-ai/docs/reference/rest.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import framing, values
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.llm.google_errors import CONTENT_TYPE, error_document, note_error
from clrk.gateway.llm.reading import ABSENT, MALFORMED, SMALL_BYTES, reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

_CALL: Final = r"/(models|tunedModels|endpoints)/((?:[^/:%]|%(?!3[Aa]))+)(?::|%3[Aa])"
PATH: Final = re.compile(
    _CALL + r"(generateContent|streamGenerateContent|countTokens|embedContent|batchEmbedContents)/?$"
)
PREDICT_PATH: Final = re.compile(_CALL + r"(predict)/?$")  # TensorFlow Serving and others have it too
_OPERATIONS: Final = {
    "countTokens": names.OPERATION_COUNT_TOKENS,
    "embedContent": names.OPERATION_EMBEDDINGS,
    "batchEmbedContents": names.OPERATION_EMBEDDINGS,
}


class _Request(msgspec.Struct):
    """Only what becomes an attribute: contents, tools and instructions are skipped unread."""

    camel: Any = msgspec.field(default=None, name="generationConfig")
    snake: Any = msgspec.field(default=None, name="generation_config")
    serviceTier: Any = None
    service_tier: Any = None


class _Outline(msgspec.Struct):
    """A response without what was generated, an element of a stream, or an error. Vectors are skipped unread."""

    promptFeedback: Any = None
    usageMetadata: Any = None
    responseId: Any = None
    modelVersion: Any = None
    error: Any = None


class _Part(msgspec.Struct):
    text: Any = None
    functionCall: msgspec.Raw = ABSENT
    executableCode: msgspec.Raw = ABSENT
    inlineData: msgspec.Raw = ABSENT


class _Content(msgspec.Struct):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct):
    index: Any = None
    finishReason: Any = None
    groundingMetadata: Any = None
    content: _Content | None = None


class _Document(_Outline):
    candidates: list[_Candidate] | None = None


class _Embeddings(msgspec.Struct):
    statistics: Any = None


class _Prediction(msgspec.Struct):
    embeddings: _Embeddings | None = None


class _Predictions(msgspec.Struct):
    """The answer of Vertex AI's older embedding models."""

    predictions: list[_Prediction] = []


_read_request = reader(_Request)
_read_document = reader(_Document)
_read_outline = reader(_Outline)  # where the candidates are none
_ERRORS: Final = msgspec.json.Decoder(list[_Outline])
_PREDICTIONS: Final = msgspec.json.Decoder(_Predictions)


def path_model(path: str) -> tuple[str | None, str]:
    """Return model and method of a request path; tuned models and endpoints keep the word in front."""
    found = PATH.search(path) or PREDICT_PATH.search(path)
    if found is None:
        return None, ""
    kind, model, method = found.groups()
    return values.text(unquote(model) if kind == "models" else f"{kind}/{unquote(model)}"), method


class GeminiContent(JsonDialect):
    """Dialect of generateContent and its kin (see dialect.Dialect)."""

    output_limit_name: str | None = "generationConfig.maxOutputTokens"

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self.request_model, self._method = path_model(head.path)
        embeds = self._method == "predict" and "embedding" in (self.request_model or "")
        self.operation = (
            names.OPERATION_EMBEDDINGS if embeds else _OPERATIONS.get(self._method, names.OPERATION_GENERATE_CONTENT)
        )
        self.spends_tokens = self.operation != names.OPERATION_COUNT_TOKENS
        self.streams = self._method == "streamGenerateContent"
        self._as_array = self.streams and parse_qs(head.query).get("alt") != ["sse"]
        self._elements = 0
        self._ended = False  # a reason was given why there is no more: counts that are missing now are 0

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; those of the path alone when the body is malformed."""
        request = _read_request(body) or _Request()
        settings = _Settings(request.snake if request.camel is None else request.camel)
        self.max_output_tokens = values.count(settings.get("maxOutputTokens"))
        self.choices = values.count(settings.get("candidateCount")) or 1
        self._priced_elsewhere(request.serviceTier, request.service_tier)
        found: dict[str, AttributeValue | None] = {
            names.GEN_AI_REQUEST_MODEL: self.request_model,
            names.GEN_AI_REQUEST_MAX_TOKENS: self.max_output_tokens,
            names.GEN_AI_REQUEST_TEMPERATURE: values.number(settings.get("temperature")),
            names.GEN_AI_REQUEST_TOP_P: values.number(settings.get("topP")),
            names.GEN_AI_REQUEST_TOP_K: values.number(settings.get("topK")),
            names.GEN_AI_REQUEST_STOP_SEQUENCES: values.texts(settings.get("stopSequences")),
            names.GEN_AI_REQUEST_STREAM: True if self.streams else None,
            names.GEN_AI_REQUEST_SEED: values.integer(settings.get("seed")),
            names.GEN_AI_REQUEST_FREQUENCY_PENALTY: values.number(settings.get("frequencyPenalty")),
            names.GEN_AI_REQUEST_PRESENCE_PENALTY: values.number(settings.get("presencePenalty")),
            names.GEN_AI_REQUEST_CHOICE_COUNT: self.choices if self.choices != 1 else None,
            names.GEN_AI_OUTPUT_TYPE: _output_type(settings),
        }
        return {key: value for key, value in found.items() if value is not None}

    def splitter(self, media_type: str) -> framing.Splitter | None:
        """See Dialect: a stream without alt=sse is an array in a document's clothes."""
        self._as_array &= media_type == "application/json"  # there are other spellings of alt=sse
        return framing.ArraySplitter() if self._as_array else super().splitter(media_type)

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        self._ended = True
        if self._method == "predict":
            self._predictions(body)
        self._take(body)

    def event(self, event: SseEvent) -> bool:
        """Take one element of a stream."""
        self._elements += 1
        if event.data:
            self._take(event.data)
        return False

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """See Dialect."""
        return CONTENT_TYPE, error_document(status, message)

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect."""
        error = error_document(429, message)
        if not self._as_array:
            return b"data: " + error + b"\r\n\r\n"
        return (b",\r\n" if self._elements else b"[") + error + b"]"

    def _take(self, raw: bytes) -> None:
        document = _read_document(raw)
        if document is not None:
            for position, candidate in enumerate((document.candidates or ())[: values.MAX_ITEMS]):
                self._candidate(position, candidate)
        if (outline := document or _read_outline(raw)) is not None:
            self._read(outline)
        elif len(raw) <= SMALL_BYTES:
            self._errors(raw)

    def _errors(self, raw: bytes) -> None:
        """Take an error of a method whose answer is an array."""
        try:
            documents = _ERRORS.decode(raw)
        except MALFORMED:
            return
        for document in documents[:1]:
            self._read(document)

    def _read(self, document: _Outline) -> None:
        done = self.completion
        done.response_id = values.text(document.responseId) or done.response_id
        done.model = values.text(document.modelVersion) or done.model
        # A prompt that is refused has no candidates: why stands where they would say why they ended.
        if (blocked := values.text(values.member(document.promptFeedback, "blockReason"))) is not None:
            done.finished(0, blocked)
            done.refused = self._ended = True
        if isinstance(document.usageMetadata, dict):
            done.usage = self._usage(document.usageMetadata)
            self._priced_elsewhere(document.usageMetadata.get("trafficType"))
        note_error(done, document.error)

    def _priced_elsewhere(self, *tiers: object) -> None:
        """Note a tier, or capacity bought in advance, whose prices are not those of the list."""
        asked = {tier.lower().removeprefix("service_tier_") for tier in tiers if isinstance(tier, str)}
        if asked - _LIST_TIERS:
            self.completion.off_list = True

    def _candidate(self, position: int, candidate: _Candidate) -> None:
        if (reason := values.text(candidate.finishReason)) is not None:
            index = values.count(candidate.index)
            self.completion.finished(position if index is None else index, reason)
            self.completion.refused |= reason in _REFUSALS
            self._ended = True
        # Searches are billed by the prompt or by the query, as the model is old or new: nothing here says which.
        if values.member(candidate.groundingMetadata, "webSearchQueries"):
            self.completion.off_list = True
        if self.streams and candidate.content is not None:
            for part in candidate.content.parts or ():
                called = bytes(part.functionCall) + bytes(part.executableCode)
                self.completion.generated(part.text, called.decode(errors="replace"))
                self.completion.generated_media(len(bytes(part.inlineData)))

    def _usage(self, reported: dict[str, object]) -> Usage:
        """Add up: thoughts are output beside the candidates, results of tools are input beside the prompt."""
        before = self.completion.usage
        prompt, answer = reported.get("promptTokenCount"), reported.get("candidatesTokenCount")
        thoughts = values.count(reported.get("thoughtsTokenCount"))
        read, cached = values.count(reported.get("cachedContentTokenCount")), reported.get("cacheTokensDetails")
        given = _sum(prompt, reported.get("toolUsePromptTokenCount"))
        produced = _sum(answer, thoughts)
        given_as = [reported.get(name) for name in ("promptTokensDetails", "toolUsePromptTokensDetails")]
        made_as = reported.get("candidatesTokensDetails")
        if self.operation == names.OPERATION_EMBEDDINGS:
            media = [_tokens_of(kinds, *given_as) for kinds in (_AUDIO, _IMAGE, _VIDEO)]
            return Usage(given, input_audio=media[0], input_image=media[1], input_video=media[2], generates=False)
        if produced is None and self._ended and given is not None and before.output_tokens is None:
            produced = 0
        return Usage(
            input_tokens=before.input_tokens if given is None else given,
            output_tokens=before.output_tokens if produced is None else produced,
            cache_read=before.cache_read if read is None else read,
            reasoning=before.reasoning if thoughts is None else thoughts,
            input_audio=_tokens_of(_AUDIO, *given_as) or before.input_audio,
            output_audio=_tokens_of(_AUDIO, made_as) or before.output_audio,
            cache_audio=(_tokens_of(_AUDIO, cached) or 0) if isinstance(cached, list) else before.cache_audio,
            input_image=_tokens_of(_IMAGE, *given_as) or before.input_image,
            output_image=_tokens_of(_IMAGE, made_as) or before.output_image,
            input_video=_tokens_of(_VIDEO, *given_as) or before.input_video,
            output_video=_tokens_of(_VIDEO, made_as) or before.output_video,
        )

    def _predictions(self, body: bytes) -> None:
        try:
            predictions = _PREDICTIONS.decode(body).predictions
        except MALFORMED:
            return
        counts = [values.member(p.embeddings.statistics, "token_count") for p in predictions if p.embeddings]
        # Vertex AI writes whole numbers as 7.0 here.
        whole = [int(count) if isinstance(count, float) and count.is_integer() else count for count in counts]
        if whole and (total := _sum(*whole)) is not None:
            self.completion.usage = Usage(total, generates=False)


class _Settings:
    """A generationConfig, by the names of the reference; anything but an object is empty."""

    def __init__(self, given: object) -> None:
        self._given = given if isinstance(given, dict) else {}

    def get(self, name: str) -> object:
        """Return a setting, in camelCase or in snake_case."""
        found = self._given.get(name)
        return self._given.get(_SNAKE.sub(r"_\g<0>", name).lower()) if found is None else found


_REFUSALS: Final = frozenset(
    ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "MODEL_ARMOR")
)
_LIST_TIERS: Final = frozenset(
    ("", "auto", "default", "standard", "unspecified", "on_demand", "traffic_type_unspecified")
)
_AUDIO: Final = ("AUDIO",)
_IMAGE: Final = ("IMAGE", "DOCUMENT")  # a page costs what a picture does
_VIDEO: Final = ("VIDEO",)
_SNAKE: Final = re.compile(r"[A-Z]")


def _output_type(settings: _Settings) -> str | None:
    """Return the modality that was asked for."""
    modalities = settings.get("responseModalities")
    asked = {item for item in modalities if isinstance(item, str)} if isinstance(modalities, list) else set()
    if "IMAGE" in asked:
        return "image"
    if "AUDIO" in asked:
        return "speech"
    kind = settings.get("responseMimeType")
    if kind == "application/json":
        return "json"
    return "text" if isinstance(kind, str) and kind.startswith("text/") else None


def _sum(*parts: object) -> int | None:
    """Add what counts; None when nothing does."""
    known = [number for part in parts if (number := values.count(part)) is not None]
    return values.count(sum(known)) if known else None


def _tokens_of(modalities: tuple[str, ...], *details: object) -> int | None:
    """Return the tokens of some modalities."""
    items = [item for one in details if isinstance(one, list) for item in one[: values.MAX_ITEMS]]
    if not items:  # most elements of a stream: this is asked six times of each
        return None
    return _sum(*(values.member(item, "tokenCount") for item in items if values.member(item, "modality") in modalities))
