"""Asking OpenAI for a stream's usage on behalf of an agent that did not, unnoticed by it (CONTRACT section 11).

Two halves. The request gets `stream_options.include_usage`, written into its bytes where they are; nothing else in it
changes. The response then has one chunk more, with empty `choices`; that one is dropped. An event that is cut between
two reads waits until it shows that it is another: at its first choice, at `[DONE]`, at a comment. What is dropped
depends on the event's bytes only, never on how they came.
"""

from __future__ import annotations

import json
import re
from typing import Final

from clrk.gateway.llm.body import MAX_DOCUMENT_BYTES, ResponseBody
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.json_members import read_members

_WANTED: Final = frozenset(("stream", "stream_options"))
_ASK: Final = '"stream_options":{"include_usage":true},'
MAX_HELD_BYTES: Final = 16 << 10  # the usage chunk has some hundred; what comes byte by byte is looked at each time
# What the usage chunk does not have: a choice, data that is no object, a comment.
_OTHER: Final = re.compile(rb'"choices"\s*:\s*\[\s*[^\]\s]|(?:\A|[\r\n])(?::|data:[ \t]*[^{ \t])')


def ask_for_usage(body: bytes) -> bytes:
    """Return the request body with include_usage set; the same object when it does not stream, or asks itself.

    Azure refuses the two together: answers out of `data_sources` have no usage.
    """
    if b'"stream"' not in body or b'"data_sources"' in body or len(body) > MAX_DOCUMENT_BYTES:
        return body
    try:
        text = body.decode()
        first, members = read_members(text, wanted=_WANTED)
    except (ValueError, RecursionError):
        return body
    if "stream" not in members or members["stream"].value is not True:
        return body
    if "stream_options" not in members:
        return (text[:first] + _ASK + text[first:]).encode()
    known = members["stream_options"]
    options = known.value
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage") is True:
        return body
    asked = json.dumps({**options, "include_usage": True}, separators=(",", ":"))
    return (text[: known.start] + asked + text[known.end :]).encode()


class UsageChunkFilter:
    """Passes a stream's bytes on, but for the chunk that is there because we asked.

    Invariant: what feed() and finish() return, joined, is the input without whole events.
    """

    def __init__(self, body: ResponseBody, dialect: Dialect) -> None:
        self._body = body
        self._dialect = dialect
        self._held = b""  # an event's beginning that may turn out to be the usage chunk
        self._leaked = False  # the current event's beginning was passed on, so the event can not be dropped
        self._dropped = False  # the last byte seen was the end of a dropped event
        self.boundary: int | None = None  # see LlmInterpreter.boundary

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes and return what the agent gets now."""
        out: list[bytes] = []
        at = self._belated_lf(chunk, out)
        self.boundary = None
        for event in self._body.feed(chunk):
            raw = self._held + chunk[at : event.end]
            self._dropped = self._dialect.event(event) and not self._leaked and _may_be_chunk(raw)
            if not self._dropped:
                out.append(raw)
            self._held, self._leaked, at = b"", False, event.end
            self.boundary = 0
        if self.boundary is not None:
            self.boundary = sum(map(len, out))
        if at < len(chunk):
            out.append(self._tail(chunk[at:]))
        passed = b"".join(out)
        return chunk if passed == chunk else passed

    def finish(self) -> bytes:
        """Return held bytes; to be called after the body's own finish() had its last event judged."""
        held, self._held = self._held, b""
        return held

    def drop_held(self) -> None:
        """Forget held bytes: they were the usage chunk, without the blank line."""
        self._held = b""

    def _belated_lf(self, chunk: bytes, out: list[bytes]) -> int:
        """Give an LF that completes the CR of the last chunk to whom it belongs; return how many bytes that used."""
        if not self._body.expects_lf or not chunk.startswith(b"\n"):
            return 0
        if self._held:
            self._held += b"\n"
        elif not self._dropped:
            out.append(b"\n")
        return 1

    def _tail(self, tail: bytes) -> bytes:
        """Hold a cut event while it may be the usage chunk, else return it."""
        self._dropped = False
        rest = self._held + tail
        if not self._leaked and not self._body.given_up and _may_be_chunk(rest):
            self._held = rest
            return b""
        self._held, self._leaked = b"", True
        return rest


def _may_be_chunk(event: bytes) -> bool:
    """Say whether an event that begins so can be the chunk; what is none once is none however it goes on."""
    return len(event) <= MAX_HELD_BYTES and _OTHER.search(event) is None
