"""The seam between following an LLM exchange and reading one provider's API."""

from __future__ import annotations

from typing import Protocol

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm import framing
from clrk.gateway.llm.completion import Completion
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class Dialect(Protocol):
    """Reads the bodies of one API. Nothing raises: what can not be read leaves the completion as it was.

    Shape: operation is gen_ai.operation.name. request_model, streams, max_output_tokens (of one choice, as the request
    limits it; None: it does not) and choices are known after request(), which may be called again with the same body.
    output_limit_name is the member of the request that limits it (`object.member` inside another); None: there is none.
    completion holds what the response has said so far. event() says True of the one event that exists only because
    usage was asked for. takes_include_usage: the API has OpenAI's `stream_options.include_usage`. spends_tokens: False
    where tokens are only counted. price_models: the names to look for a price under, the one to trust most first.
    """

    completion: Completion
    operation: str
    request_model: str | None
    streams: bool
    max_output_tokens: int | None
    choices: int
    takes_include_usage: bool
    output_limit_name: str | None
    spends_tokens: bool

    @property
    def price_models(self) -> tuple[str | None, ...]:
        """Names of the model, as price lists may know them."""

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the attributes of a request body (without content coding); empty when it is malformed."""

    def response_head(self, head: ResponseHead) -> None:
        """Take the response's head: some APIs say things only there."""

    def splitter(self, media_type: str) -> framing.Splitter | None:
        """Return what cuts a response of this media type into events, None when it is one document."""

    def document(self, body: bytes) -> None:
        """Take a whole response body."""

    def event(self, event: SseEvent) -> bool:
        """Take one event of a streamed response."""

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """Return Content-Type and body of an error in the provider's schema; code is clrk's own, stable reason."""

    def error_headers(self, status: int) -> tuple[tuple[str, str], ...]:
        """Return the headers, but for Content-Type, that an error in the provider's schema has."""

    def error_event(self, code: str, message: str) -> bytes:
        """Return the event that ends a stream with an error, to be sent between two events."""


class JsonDialect:
    """What dialects have in common; the rest of Dialect is theirs."""

    operation = names.OPERATION_CHAT
    spends_tokens = True
    takes_include_usage = False
    output_limit_name: str | None = None

    def __init__(self, head: RequestHead) -> None:
        self.completion = Completion()
        self.request_model: str | None = None
        self.streams = False
        self.max_output_tokens: int | None = None
        self.choices = 1

    @property
    def price_models(self) -> tuple[str | None, ...]:
        """See Dialect."""
        return self.completion.model, self.request_model

    def splitter(self, media_type: str) -> framing.Splitter | None:
        """See Dialect."""
        return framing.splitter(media_type)

    def response_head(self, head: ResponseHead) -> None:
        """See Dialect: everything stands in the body."""

    def error_headers(self, status: int) -> tuple[tuple[str, str], ...]:
        """See Dialect."""
        return ()
