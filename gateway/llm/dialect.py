"""The seam between following an LLM exchange and reading one provider's API."""

from __future__ import annotations

from typing import Protocol

from clrk.gateway.llm.completion import Completion
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.telemetry.spans import AttributeValue


class Dialect(Protocol):
    """Reads the bodies of one API. Nothing raises: what can not be read leaves the completion as it was.

    Shape: request_model and streams are known after request(); usage_due says that the next event may be the one that
    exists only because usage was asked for, and event() says True when it was.
    """

    completion: Completion
    request_model: str | None
    streams: bool

    @property
    def usage_due(self) -> bool:
        """True when every choice of a stream has finished."""

    def request(self, body: bytes) -> dict[str, AttributeValue]:
        """Return the attributes of a request body; empty when it is malformed."""

    def document(self, body: bytes) -> None:
        """Take a whole response body."""

    def event(self, event: SseEvent) -> bool:
        """Take one event of a streamed response."""
