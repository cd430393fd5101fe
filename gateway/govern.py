"""The seam between a call and what governs it: budgets, tool policies. Pure; the relay asks, governors decide.

An Interpreter (interpret.py) understands a call and fails open; a Governor decides about it and fails closed. The relay
collects the request body, asks `judge` before a byte goes upstream, shows the governor what the agent is about to get,
and tells it once how the exchange ended, whatever happened to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from clrk.gateway.interpret import Facts, Interpreter, RequestHead, ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

MAX_GOVERNED_BYTES: Final = 32 << 20  # of a request body: what can not be judged as a whole does not go out


@dataclass(frozen=True, slots=True)
class Answer:
    """What the agent gets in place of the upstream's answer, in the words that its client understands.

    Shape: reason is stable and low-cardinality (clrk.egress.deny_reason, error.type); message is for people; rule names
        the resource and rule that decided; attributes go on the span.
    """

    status: int
    content_type: str
    body: bytes
    reason: str
    message: str
    rule: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """End the answer here: last is what the agent still gets, in the protocol's own words, before a clean end.

    Shape: an empty last has nothing to say, so the end is visibly none: half an answer would look like a whole one.
    """

    last: bytes
    reason: str
    message: str


class ErrorWriter(Protocol):
    """Words errors as a provider does (see llm.dialect.Dialect), so that its SDK shows them."""

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """Return Content-Type and body, which is a JSON object."""

    def error_headers(self, status: int) -> tuple[tuple[str, str], ...]:
        """Return the other headers."""


Inject = Callable[[bytes], bool]
"""Puts bytes into an answer under way, between two of its pieces; False when that is not possible (any more)."""


class Governor(Protocol):
    """Decides about one exchange and follows it.

    Order: judge, then (if the exchange goes upstream) response_head, response_data*, response_end, and always settle.
    """

    @property
    def wants_plain_response(self) -> bool:
        """True when the upstream is to be asked for an answer without content coding; asked once, after judge."""

    @property
    def rewrites_response(self) -> bool:
        """True when response_data may return other bytes than it took; asked once, after response_head.

        The answer then loses its Content-Length.
        """

    @property
    def decodes_response(self) -> bool:
        """True when what response_data returns has no content coding any more; asked once, after response_head."""

    def judge(self, body: bytes) -> Answer | None:
        """Judge the request by its whole body, as the agent sent it; None: it may go."""

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body to send instead; the same object when nothing changes. Called after judge."""

    def response_head(self, head: ResponseHead) -> None:
        """Take the final response head."""

    def stream_opened(self, inject: Inject) -> None:
        """The answer has begun; called before the first response_data.

        inject puts bytes between two pieces of it: for a governor whose response_data returns whole events.
        """

    def response_data(self, chunk: bytes) -> bytes | Cut:
        """Take what the agent would get next, after the interpreter has seen it; return what it gets."""

    def response_end(self, *, complete: bool) -> bytes | Cut:
        """The response ended (complete=False: aborted). Return withheld bytes that the agent still has to get."""

    def settle(self, facts: Facts | None, *, sent: bool) -> Mapping[str, AttributeValue]:
        """The exchange is over; return attributes for its span. facts are the interpreter's, None without one.

        Shape: sent says whether the upstream may have seen the request. Called exactly once after judge.
        """


Govern = Callable[[RequestHead, Interpreter | None], Governor | None]


def ungoverned(head: RequestHead, interpreter: Interpreter | None) -> Governor | None:
    """Govern nothing."""
    return None
