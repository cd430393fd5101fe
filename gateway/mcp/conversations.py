"""What the MCP exchanges of one run know of each other: answers and questions cross from one to another. Pure.

In HTTP+SSE a POST is accepted, and its answer comes on the GET stream that named the POST's endpoint. In Streamable
HTTP the answer to a POST whose stream was closed comes on the GET that resumes it (Last-Event-ID), and a server asks
the client on any stream and gets its answer in a POST.
Source: MCP 2024-11-05, basic/transports; 2025-11-25, basic/transports (resumability, server disconnects).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urljoin, urlsplit

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.mcp.messages import Response

MAX_WAITING: Final = 1024  # calls of a run; those beyond are recorded as if they had no answer
MAX_QUESTIONS: Final = 1024  # of servers; of the oldest it is forgotten what they were
_MAX_KEY: Final = 512

Key = tuple[str, int, str]
Tell = Callable[[Sequence[Response]], None]


def session_key(head: RequestHead, session: str | None) -> Key:
    """Return the key of a session of Streamable HTTP; servers without sessions have one."""
    return head.host, head.port, f"session {session or ''}"[:_MAX_KEY]


def endpoint_key(head: RequestHead, path: str, query: str) -> Key:
    """Return the key of a conversation over HTTP+SSE: its endpoint names it."""
    return head.host, head.port, f"endpoint {path}?{query}"[:_MAX_KEY]


def named_endpoint(head: RequestHead, event: SseEvent) -> Key | None:
    """Return the key of the conversation that a GET stream's event begins; None for an event that names no endpoint."""
    if event.name != b"endpoint":
        return None
    base = f"{head.scheme}://{head.authority}{head.path}"
    try:
        url = urlsplit(urljoin(base, event.data.decode("utf-8", "replace").strip()))
    except ValueError:
        return None
    return endpoint_key(head, url.path, url.query)


@dataclass(slots=True, eq=False)
class Expected:
    """The answers to a POST that come on another exchange, perhaps before the POST itself is over.

    Shape: missing are the ids that are still to come; empty when nobody waits any more.
    """

    key: Key
    missing: set[str]
    answers: list[Response] = field(default_factory=list)
    tell: Tell | None = None


class Conversations:
    """The conversations of one run."""

    def __init__(self) -> None:
        self._expected: OrderedDict[tuple[Key, str], Expected] = OrderedDict()
        self._questions: OrderedDict[tuple[Key, str], str] = OrderedDict()
        self._streams: dict[Key, int] = {}

    def open_stream(self, key: Key) -> None:
        """A stream of the conversation is open."""
        self._streams[key] = self._streams.get(key, 0) + 1

    def close_stream(self, key: Key) -> None:
        """A stream is closed; with its last one a conversation over HTTP+SSE is over."""
        left = self._streams.get(key, 0) - 1
        if left > 0:
            self._streams[key] = left
            return
        self._streams.pop(key, None)
        if key[2].startswith("endpoint "):
            for expected in {one for one in self._expected.values() if one.key == key}:
                self.give_up(expected)

    def has_stream(self, key: Key) -> bool:
        """Say whether a stream of the conversation is open."""
        return key in self._streams

    def is_endpoint(self, head: RequestHead) -> bool:
        """Say whether an open stream of HTTP+SSE named this as the place to post to."""
        return bool(self._streams) and self.has_stream(endpoint_key(head, head.path, head.query))

    def ask(self, key: Key, id_: str, method: str) -> None:
        """Note a server's question to the client."""
        self._questions[key, id_] = method
        if len(self._questions) > MAX_QUESTIONS:
            self._questions.popitem(last=False)

    def question(self, key: Key, id_: str) -> str | None:
        """Return the method of a question that the client answers now."""
        return self._questions.pop((key, id_), None)

    def expect(self, key: Key, ids: set[str]) -> Expected:
        """Collect the answers to a POST from now on."""
        expected = Expected(key, set(ids))
        for id_ in ids:
            if (before := self._expected.get((key, id_))) is not None:
                self.give_up(before)  # an id that is used again: nobody could tell the answers apart
            self._expected[key, id_] = expected
        while len(self._expected) > MAX_WAITING:
            self.give_up(next(iter(self._expected.values())))
        return expected

    def wait(self, expected: Expected, tell: Tell) -> Callable[[], None]:
        """Have tell called once: with all answers, or with what came until the wait is ended by what is returned."""
        expected.tell = tell
        return lambda: self.give_up(expected)

    def answer(self, key: Key, response: Response) -> None:
        """Take a response that came on a stream."""
        expected = self._expected.pop((key, response.id or ""), None)
        if expected is None:
            return
        expected.answers.append(response)
        expected.missing.discard(response.id or "")
        if not expected.missing and expected.tell is not None:
            expected.tell(expected.answers)

    def give_up(self, expected: Expected) -> None:
        """Expect no more. Idempotent."""
        if not expected.missing:
            return
        for id_ in expected.missing:
            if self._expected.get((expected.key, id_)) is expected:
                del self._expected[expected.key, id_]
        expected.missing = set()
        if expected.tell is not None:
            expected.tell(expected.answers)

    def close(self) -> None:
        """The run is over: nothing more comes."""
        while self._expected:
            self.give_up(next(iter(self._expected.values())))
