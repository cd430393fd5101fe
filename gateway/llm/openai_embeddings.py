"""OpenAI Embeddings (POST …/embeddings). Source: platform.openai.com/docs/api-reference/embeddings."""

from __future__ import annotations

from typing import Any

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.openai_common import OpenAiDialect, take_error
from clrk.gateway.llm.reading import reader
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class _Request(msgspec.Struct):
    model: Any = None
    dimensions: Any = None
    encoding_format: Any = None


class _Document(msgspec.Struct):
    """A list of embeddings, or an error: the vectors are skipped unread."""

    model: Any = None
    usage: Any = None
    error: Any = None


_read_request = reader(_Request)
_read_document = reader(_Document)


class OpenAiEmbeddings(OpenAiDialect):
    """Dialect of the Embeddings API (see dialect.Dialect). Nothing is generated, so there is no output to count."""

    operation = names.OPERATION_EMBEDDINGS

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self.max_output_tokens = 0

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the request's attributes; empty when it is malformed."""
        request = _read_request(body)
        if request is None:
            return {}
        self.take_model(request.model)
        return values.known(
            {
                names.GEN_AI_REQUEST_MODEL: self.request_model,
                names.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: values.count(request.dimensions),
                names.GEN_AI_REQUEST_ENCODING_FORMATS: values.texts(request.encoding_format),
            }
        )

    def document(self, body: bytes) -> None:
        """Take a whole JSON response."""
        document = _read_document(body)
        if document is None:
            return
        self.completion.model = values.text(document.model)
        given = values.count(values.member(document.usage, "prompt_tokens"))
        self.completion.usage = Usage(input_tokens=given, generates=False)
        take_error(self.completion, document.error)

    def event(self, event: SseEvent) -> bool:
        """Take one event; the API streams nothing."""
        return False
