"""The seam between bytes and meaning: what the HTTP relay tells an interpreter, and what it gets back.

LLM and MCP parsers implement Interpreter. The relay asks `recognise` once per request; with None the call is a plain
HTTP call. An interpreter never does I/O, never delays a byte, and gives up (usage_visible=False) instead of raising.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from clrk.gateway.telemetry.spans import AttributeValue

MAX_KEPT_BYTES: Final = 64 << 20  # of one run: a few of the largest bodies, thousands of the usual ones


class Allowance:
    """How many bytes of bodies the gateway may keep in order to understand or rewrite the exchanges of one run.

    Without it, one agent with many large requests under way takes the memory that all sandboxes share. Where it is
    used up, an exchange passes without being understood.
    """

    __slots__ = ("left",)

    def __init__(self, limit: int = MAX_KEPT_BYTES) -> None:
        self.left = limit

    def take(self, size: int) -> bool:
        """Ask for more; False when there is not so much left."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        """Return what was taken."""
        self.left += size


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request as the agent sent it. path is the request target's path, query without `?`; headers in wire order."""

    method: str
    scheme: str
    host: str
    port: int
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]

    @property
    def authority(self) -> str:
        """Return host[:port] as it stands in a URL and in Host: an IPv6 address in brackets, no default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def header(self, name: str) -> str | None:
        """Return the first value of a header; name in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's status and headers, in wire order."""

    status: int
    headers: tuple[tuple[str, str], ...]

    def header(self, name: str) -> str | None:
        """Return the first value of a header; name in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)


@dataclass(frozen=True, slots=True)
class Facts:
    """What an interpreter understood of one exchange.

    Shape: name is the span's name; "" means that the exchange turned out to be plain HTTP, so keep the HTTP name.
    error_type is set for provider and JSON-RPC errors that the HTTP status does not
    show (also put into attributes as error.type); status_message goes into the span's status. also are other calls
    that the exchange carried, each with a span of its own. answered says that the agent has what it asked for: many
    clients leave a stream then. elsewhere says that the answer comes on another exchange, so that the end of this one
    says nothing about it; later that it has not come yet.
    """

    name: str
    attributes: dict[str, AttributeValue] = field(default_factory=dict)
    error_type: str | None = None
    status_message: str = ""
    also: tuple[Facts, ...] = ()
    answered: bool = field(default=False, compare=False)
    elsewhere: bool = False
    later: Later | None = field(default=None, compare=False)


Later = Callable[[Callable[[Facts], None]], Callable[[], None]]
"""Calls back once, with what was understood, when the answer has come or nobody waits any more; what it returns ends
the wait."""


class Interpreter(Protocol):
    """Follows one exchange, chunk by chunk.

    Order: request_data*, request_end, response_head, response_data*, response_end.
    """

    @property
    def wants_whole_request(self) -> bool:
        """True when the relay must collect the request body and pass it through rewrite_request before sending."""

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body to send instead; the same object when nothing changes. At most once, before request_data.

        When it is another object the relay asks upstream for `Accept-Encoding: identity` (the agent accepts it always):
        bytes can be withheld from a plain response only.
        """

    def request_data(self, chunk: bytes) -> None:
        """Take request bytes as the agent sent them."""

    def request_end(self) -> None:
        """The request body is complete."""

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Take the response head; elapsed_s counts from the moment the request began to go upstream."""

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes and return what the agent gets: almost always the same object."""

    def response_end(self, *, complete: bool) -> bytes:
        """The response ended (complete=False: aborted). Return withheld bytes that the agent still has to get."""

    def facts(self) -> Facts:
        """Return what was understood; valid at any time, called once at the end."""
