"""How a response body is cut into events: server-sent events, JSON lines, the elements of one JSON array.

Every splitter yields SseEvent (without a name where the framing has none), keeps at most one event, and empties what
grows over its bound without losing step; skipped_bytes counts what was in there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Protocol

from clrk.gateway.llm.sse import MAX_EVENT_BYTES, Room, SseEvent, SseSplitter

EVENT_STREAM: Final = "text/event-stream"
JSON_LINES: Final = frozenset(f"application/{name}" for name in ("x-ndjson", "ndjson", "jsonl", "x-jsonlines"))
# The next bracket, over what is no structure and whole strings; a quote where none follows, or a string does not end.
# Unrolled, so that it takes linear time; without possessive quantifiers, which Python 3.11.2 gets wrong.
_STRUCTURE: Final = re.compile(rb'(?s)[^"\[\]{}]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"\[\]{}]*)*(["\[\]{}])')
_IN_STRING: Final = re.compile(rb'(?s)[^"\\]*(?:\\.[^"\\]*)*')  # up to a quote, or to half an escape
_QUOTE: Final = ord('"')
_OPENING: Final = ord("[")  # of the array
_CLOSING: Final = b"]}"
_SPACE: Final = b" \t\r\n"


class Splitter(Protocol):
    """Cuts one body into events as it passes; feed() is to be iterated to its end.

    Shape: failed: nothing behind this can be found. skipped_bytes are those of events over the bound, so far. room is
    the bound, and may be replaced before the first feed().
    """

    room: Room
    failed: bool
    skipped_bytes: int

    @property
    def expects_lf(self) -> bool:
        """See SseSplitter.expects_lf."""

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Yield the events that end in this chunk."""

    def finish(self) -> SseEvent | None:
        """Return what the body left unterminated at its end."""


class LineSplitter:
    """JSON lines (NDJSON): one event a line, blank lines are none."""

    expects_lf = failed = False

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.skipped_bytes = 0
        self.room = Room(max_event_bytes)
        self._line = bytearray()
        self._over = False

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Yield the lines that end in this chunk."""
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            self._add(chunk, at, end)
            at = end + 1
            if (event := self._take(at)) is not None:
                yield event
        self._add(chunk, at, len(chunk))

    def finish(self) -> SseEvent | None:
        """Return a last line without its end."""
        return self._take(0)

    def _add(self, chunk: bytes, start: int, end: int) -> None:
        if self._over or not self.room.fits(len(self._line) + end - start):
            self._over = True
            self.room.release()
            self.skipped_bytes += len(self._line) + end - start
            self._line.clear()
        else:
            self._line += chunk[start:end]

    def _take(self, end: int) -> SseEvent | None:
        line = self._line.strip(_SPACE)
        self._line.clear()
        self.room.release()
        self._over = False
        return SseEvent(b"", bytes(line), end) if line else None


class ArraySplitter:
    """One JSON array that comes element by element; a value that is no array (an error object) is one event.

    Only objects and arrays are events: numbers and words between the commas mean nothing in any protocol that we read.
    Nothing is checked beyond brackets and strings; whoever reads an event decodes it.
    """

    expects_lf = failed = False

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.skipped_bytes = 0
        self.room = Room(max_event_bytes)
        self._value = bytearray()
        self._over = False
        self._depth = 0  # of brackets inside the current element
        self._in_array = False
        self._in_string = False
        self._escaped = False  # the last byte was a backslash in a string

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Yield the elements that end in this chunk."""
        at = start = 0
        while at < len(chunk):
            if self._in_string:
                at = self._string(chunk, at)
                continue
            mark = _STRUCTURE.match(chunk, at)
            if mark is None:
                break
            at = mark.end()
            byte = chunk[at - 1]
            if byte == _QUOTE:
                self._in_string = True
            elif byte in _CLOSING:
                if self._depth > 1:
                    self._depth -= 1
                elif self._depth:
                    self._keep(chunk, start, at)
                    yield self._take(at)
                    start, self._depth = at, 0
            elif self._depth:
                self._depth += 1
            else:
                start = self._open(byte, start, at)
        self._keep(chunk, start, len(chunk))

    def finish(self) -> SseEvent | None:
        """Return nothing: an element without its end is no JSON."""
        return None

    def _open(self, byte: int, start: int, at: int) -> int:
        """Take the array's opening bracket, or an element's, that ends at `at`; return where the element begins."""
        if not self._in_array and byte == _OPENING:
            self._in_array = True
            return start
        self._depth = 1
        return at - 1

    def _string(self, chunk: bytes, at: int) -> int:
        """Skip to behind the string's end, or to the chunk's."""
        if self._escaped:
            self._escaped = False
            return at + 1
        mark = _IN_STRING.match(chunk, at)
        end = mark.end() if mark is not None else at
        if end == len(chunk):
            return end
        self._in_string = chunk[end] != _QUOTE
        self._escaped = self._in_string
        return end + 1

    def _keep(self, chunk: bytes, start: int, end: int) -> None:
        if self._depth == 0:
            return
        if self._over or not self.room.fits(len(self._value) + end - start):
            self._over = True
            self.room.release()
            self.skipped_bytes += len(self._value) + end - start
            self._value.clear()
        else:
            self._value += chunk[start:end]

    def _take(self, end: int) -> SseEvent:
        value = bytes(self._value)
        self._value.clear()
        self.room.release()
        self._over = False
        return SseEvent(b"", value, end)


def splitter(media_type: str) -> Splitter | None:
    """Return what cuts a body of this media type into events, None when it is one document."""
    if media_type == EVENT_STREAM:
        return SseSplitter()
    return LineSplitter() if media_type in JSON_LINES else None
