"""Splitting a server-sent event stream (WHATWG HTML, section 9.2.6) as it passes.

Theory of operation: bytes are cut into lines at CR LF, LF or CR, whichever comes; a CR ends its line at once, and an LF
that follows in the next chunk belongs to it. A blank line ends an event. An event that grows over the bound is emptied,
but its lines are still followed, so the next blank line is found and the stream is never out of step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

MAX_EVENT_BYTES: Final = 1 << 20
MAX_LARGE_EVENT_BYTES: Final = 8 << 20  # with a picture in it
MAX_BURST_EVENTS: Final = 8192  # in one read: each costs some 10 us of the event loop, and none of use is so small
_EOL: Final = re.compile(rb"\r\n|\r|\n")
# A whole event as nearly all are written: perhaps a name, and one line of data.
_USUAL: Final = re.compile(rb"(?:event: ?([^\r\n]*)\r?\n)?data: ?([^\r\n]*)\r?\n\r?\n")
_BOM: Final = b"\xef\xbb\xbf"


class SseEvent(NamedTuple):
    """One block up to its blank line; blocks without data (comments, keep-alives) come too, with empty data.

    Shape: end is the offset in the chunk just fed, behind the blank line. name is empty without an `event` field.
    """

    name: bytes
    data: bytes
    end: int


class Room:
    """How large an event may become: free bytes, and more while somebody pays for them.

    Shape: take asks for so many bytes more, give returns them all.
    """

    def __init__(
        self,
        free: int = MAX_EVENT_BYTES,
        take: Callable[[int], bool] = lambda size: False,
        give: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.bytes = self._free = free
        self._take, self._give = take, give

    def fits(self, size: int) -> bool:
        """Say whether an event of this size is kept."""
        if size <= self.bytes:
            return True
        wanted = min(max(size, 2 * self.bytes), MAX_LARGE_EVENT_BYTES)
        if size > wanted or not self._take(wanted - self.bytes):
            return False
        self.bytes = wanted
        return True

    def release(self) -> None:
        """The event is over."""
        if self.bytes > self._free:
            self._give(self.bytes - self._free)
            self.bytes = self._free


class SseSplitter:
    """Splits one stream (see framing.Splitter)."""

    failed = False

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.skipped_bytes = 0
        self.room = Room(max_event_bytes)
        self._over = False
        self._line = bytearray()
        self._line_seen = False  # the line has bytes, even if they were not kept
        self._name = b""
        self._data: list[bytes] = []
        self._size = 0
        self._first_line = True
        self._after_cr = False

    @property
    def expects_lf(self) -> bool:
        """True when the last byte was a CR: an LF at the head of the next chunk belongs to what was before."""
        return self._after_cr

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Yield the events that end in this chunk."""
        if not chunk:
            return
        at = 1 if self._after_cr and chunk.startswith(b"\n") else 0
        self._after_cr = chunk.endswith(b"\r")
        usual_bytes = self.room.bytes
        while True:
            while not self._size and (usual := _USUAL.match(chunk, at)) is not None and usual.end() - at <= usual_bytes:
                at, self._first_line = usual.end(), False
                yield SseEvent(usual[1] or b"", usual[2], at)
            if (eol := _EOL.search(chunk, at)) is None:
                break
            self._add(chunk, at, eol.start())
            at = eol.end()
            if (event := self._end_line(at)) is not None:
                yield event
        self._add(chunk, at, len(chunk))

    def finish(self) -> SseEvent | None:
        """Return what a stream left unterminated at its end. Browsers drop it; we only want to understand it."""
        if self._line_seen:
            self._end_line(0)
        return self._end_line(0) if self._data or self._name else None

    def _add(self, chunk: bytes, start: int, end: int) -> None:
        if end <= start:
            return
        self._line_seen = True
        self._size += end - start
        if not self._over and self.room.fits(self._size):
            self._line += chunk[start:end]
        else:
            self._over = True
            self.room.release()
            self.skipped_bytes += end - start + len(self._line) + sum(map(len, self._data))
            self._line.clear()
            self._data.clear()

    def _end_line(self, end: int) -> SseEvent | None:
        if not self._line_seen:
            return self._end_event(end)
        if not self._over:
            self._field(bytes(self._line))
        self._line.clear()
        self._line_seen = self._first_line = False
        return None

    def _field(self, line: bytes) -> None:
        if self._first_line:
            line = line.removeprefix(_BOM)
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value

    def _end_event(self, end: int) -> SseEvent:
        event = SseEvent(self._name, b"" if self._over else b"\n".join(self._data), end)
        self._name, self._size, self._first_line, self._over = b"", 0, False, False
        self._data.clear()
        self.room.release()
        return event
