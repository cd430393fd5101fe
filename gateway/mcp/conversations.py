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

from clrk.gateway.interpret import RequestHead
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


@dataclass(slots=True)
class _Waiting:
    """A POST whose answers are still to come."""

    key: Key
    ids: set[str]
    tell: Tell
    answers: list[Response] = field(default_factory=list)


class Conversations:
    """The conversations of one run."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[Key, str], _Waiting] = OrderedDict()
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
            for waiting in {id(one): one for one in self._waiting.values() if one.key == key}.values():
                self._end(waiting)

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

    def wait(self, key: Key, ids: set[str], tell: Tell) -> Callable[[], None]:
        """Have tell called once: with all answers, or with what came until the wait is ended by what is returned."""
        waiting = _Waiting(key, set(ids), tell)
        for id_ in ids:
            if (before := self._waiting.get((key, id_))) is not None:
                self._end(before)  # an id that is used again: nobody could tell the answers apart
            self._waiting[key, id_] = waiting
        while len(self._waiting) > MAX_WAITING:
            self._end(next(iter(self._waiting.values())))
        return lambda: self._end(waiting)

    def answer(self, key: Key, response: Response) -> None:
        """Take a response that came on a stream."""
        waiting = self._waiting.pop((key, response.id or ""), None)
        if waiting is None:
            return
        waiting.answers.append(response)
        waiting.ids.discard(response.id or "")
        if not waiting.ids:
            waiting.tell(waiting.answers)

    def close(self) -> None:
        """The run is over: nothing more comes."""
        while self._waiting:
            self._end(next(iter(self._waiting.values())))

    def _end(self, waiting: _Waiting) -> None:
        if not waiting.ids:
            return
        for id_ in waiting.ids:
            if self._waiting.get((waiting.key, id_)) is waiting:
                del self._waiting[waiting.key, id_]
        waiting.ids = set()
        waiting.tell(waiting.answers)
