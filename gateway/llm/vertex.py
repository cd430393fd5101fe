"""Other publishers' models on Vertex AI (rawPredict, streamRawPredict): their own API, with the model in the path.

Source: cloud.google.com/vertex-ai/generative-ai/docs/partner-models (Claude, Mistral AI).
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.completion import Completion
from clrk.gateway.llm.google_errors import note_error
from clrk.gateway.llm.openai_chat import OpenAiChat
from clrk.gateway.llm.reading import MALFORMED, SMALL_BYTES
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

_RAW: Final = r"/models/((?:[^/:%]|%(?!3[Aa]))+)(?::|%3[Aa])(rawPredict|streamRawPredict)/?$"
_COUNT_TOKENS: Final = "count-tokens"  # stands where a model would; the model is in the body then
ANTHROPIC_PATH: Final = re.compile("/publishers/anthropic" + _RAW)
OPENAI_PATH: Final = re.compile("/publishers/[^/]+" + _RAW)


class _Error(msgspec.Struct):
    error: object = None


_ERROR: Final = msgspec.json.Decoder(_Error | list[_Error])


def _from_path(head: RequestHead) -> tuple[str | None, bool]:
    """Return the model, and whether the path asks for a stream."""
    found = OPENAI_PATH.search(head.path)
    return (values.text(unquote(found[1])), found[2] == "streamRawPredict") if found else (None, False)


def _google_error(completion: Completion, body: bytes) -> None:
    """Take an error that Google answered before the publisher's server saw the call."""
    try:
        decoded = _ERROR.decode(body) if len(body) <= SMALL_BYTES else _Error()
    except MALFORMED:
        return
    for document in decoded[:1] if isinstance(decoded, list) else [decoded]:
        if isinstance(values.member(document.error, "status"), str):
            note_error(completion, document.error)


# Claude 4.5 and what came after it cost more in a region than at the global endpoint, which is what the list knows.
_SAME_EVERYWHERE: Final = re.compile(r"claude-(?:3-|(?:opus-4|opus-4-1|sonnet-4)(?:@|$))")


class VertexAnthropic(AnthropicMessages):
    """Claude: the Messages API, whose request has no model."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self._model, self._streams = _from_path(head)
        if self._model == _COUNT_TOKENS:
            self.operation, self.spends_tokens, self._model = names.OPERATION_COUNT_TOKENS, False, None
        in_a_region = "/locations/global/" not in head.path
        self._regional = in_a_region and _SAME_EVERYWHERE.match(self._model or "") is None

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes."""
        found = super().request(body)
        if self._regional:
            self.completion.off_list = True
        return found | _path_attributes(self, self._model, streams=self._streams)

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        super().document(body)
        _google_error(self.completion, body)


class VertexOpenAi(OpenAiChat):
    """Mistral AI and others who speak Chat Completions."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self.takes_include_usage = False  # they tell it by themselves
        self._model, self._streams = _from_path(head)

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes."""
        found = super().request(body)
        return found | _path_attributes(self, self._model, streams=self._streams)

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        super().document(body)
        _google_error(self.completion, body)


def _path_attributes(
    dialect: AnthropicMessages | OpenAiChat, model: str | None, *, streams: bool
) -> dict[str, AttributeValue]:
    """Set what the path says, and return it as attributes: it is the path that Google obeys."""
    dialect.request_model = model or dialect.request_model
    dialect.streams = dialect.streams or streams
    found: dict[str, AttributeValue | None] = {
        names.GEN_AI_REQUEST_MODEL: model,
        names.GEN_AI_REQUEST_STREAM: True if streams else None,
    }
    return {key: value for key, value in found.items() if value is not None}
