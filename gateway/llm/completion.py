"""What one LLM call said about itself, whichever API it came through, and the attributes it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from clrk.gateway.llm.values import MAX_ITEMS, known
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


@dataclass(frozen=True, slots=True)
class Provider:
    """Who answers.

    Shape: name is gen_ai.provider.name, system is gen_ai.system (CONTRACT section 13); price_id is the provider's id in
    genai-prices, None where a price would be a guess. asks_usage: the API is known to take include_usage.
    """

    name: str
    system: str
    price_id: str | None = None
    asks_usage: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used. input_tokens holds the cached ones too, output_tokens the reasoning ones (semconv 1.41.1).

    Shape: generates False: the API has no output to count. Searches are those that the provider made and bills. What is
    sound, picture or video is counted in both; cache_audio is how much sound was read from the cache.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read: int | None = None
    cache_creation: int | None = None
    cache_creation_1h: int | None = None
    reasoning: int | None = None
    input_audio: int | None = None
    output_audio: int | None = None
    cache_audio: int | None = None
    input_image: int | None = None
    output_image: int | None = None
    input_video: int | None = None
    output_video: int | None = None
    web_searches: int = 0
    storage_searches: int = 0
    generates: bool = True

    @property
    def is_whole(self) -> bool:
        """True when both sides were reported."""
        return self.input_tokens is not None and (self.output_tokens is not None or not self.generates)

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the gen_ai.usage attributes that are known."""
        return known(
            {
                names.GEN_AI_USAGE_INPUT_TOKENS: self.input_tokens,
                names.GEN_AI_USAGE_OUTPUT_TOKENS: self.output_tokens,
                names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: self.cache_read,
                names.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS: self.cache_creation,
                names.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: self.reasoning,
                names.CLRK_GEN_AI_USAGE_WEB_SEARCHES: self.web_searches or None,
            }
        )


NO_USAGE: Final = Usage()


MEDIA_SHARE: Final = 50  # bytes of base64 for which a byte of text counts: pictures have 600 a token, sound 2,000


@dataclass(slots=True)
class Completion:
    """Collects while the response passes.

    Shape: extra holds attributes of one API only. output_bytes counts what a stream has generated so far, in bytes of
    UTF-8 (text, reasoning, arguments of tools; media by their share), for whoever has to judge it before the usage
    comes. ended: a stream has said its last word, if its API has one. refused: the model declined. off_list: the call
    is billed by other prices than the listed ones (service tier, fast mode, region).
    """

    response_id: str | None = None
    model: str | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: Usage = NO_USAGE
    error_type: str | None = None
    error_message: str = ""
    output_bytes: int = 0
    ended: bool = False
    refused: bool = False
    off_list: bool = False
    extra: dict[str, AttributeValue] = field(default_factory=dict)

    def finished(self, choice: int, reason: str) -> None:
        """Note why a choice ended."""
        if choice in self.finish_reasons or len(self.finish_reasons) < MAX_ITEMS:
            self.finish_reasons[choice] = reason

    def generated(self, *pieces: object) -> None:
        """Count generated text; what is no text counts nothing."""
        for piece in pieces:
            if isinstance(piece, str):
                self.output_bytes += len(piece) if piece.isascii() else len(piece.encode())

    def generated_media(self, size: int) -> None:
        """Count so many bytes of pictures or sound."""
        self.output_bytes += size // MEDIA_SHARE

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the gen_ai.response and gen_ai.usage attributes that are known."""
        found: dict[str, AttributeValue] = {**self.extra, **self.usage.attributes()}
        if self.refused:
            found[names.CLRK_GEN_AI_REFUSED] = True
        if self.response_id is not None:
            found[names.GEN_AI_RESPONSE_ID] = self.response_id
        if self.model is not None:
            found[names.GEN_AI_RESPONSE_MODEL] = self.model
        if self.finish_reasons:
            found[names.GEN_AI_RESPONSE_FINISH_REASONS] = [reason for _, reason in sorted(self.finish_reasons.items())]
        return found
