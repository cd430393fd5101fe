"""Following a body: bounded collection of JSON documents, events of a stream, content encodings undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from clrk.gateway.interpret import Allowance, ResponseHead
from clrk.gateway.llm.decompress import Decoder, Identity, decoder
from clrk.gateway.llm.framing import Splitter, splitter
from clrk.gateway.llm.sse import MAX_BURST_EVENTS, MAX_EVENT_BYTES, Room, SseEvent

MAX_DOCUMENT_BYTES: Final = 16 << 20
MAX_BURST_BYTES: Final = 1 << 20  # of events out of one compressed chunk: a bomb would hold the event loop for a minute


def media_type(content_type: str | None) -> str:
    """Return `type/subtype` in lower case, without parameters."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_json(content_type: str | None) -> bool:
    """Say whether a Content-Type is JSON (RFC 8259, or a +json suffix of RFC 6839)."""
    kind = media_type(content_type)
    return kind == "application/json" or kind.endswith("+json")


class BoundedBody:
    """Collects up to a bound and within the run's allowance; beyond, all is let go and overflowed stays set."""

    def __init__(self, allowance: Allowance, limit: int = MAX_DOCUMENT_BYTES) -> None:
        self._allowance = allowance
        self._limit = limit
        self._chunks: list[bytes] = []
        self._size = 0
        self.overflowed = False

    def __del__(self) -> None:
        """Give back what an exchange that ended early had kept."""
        self._allowance.give_back(self._size)

    def add(self, chunk: bytes) -> None:
        """Keep a chunk."""
        if self.overflowed:
            return
        if self._size + len(chunk) <= self._limit and self._allowance.take(len(chunk)):
            self._size += len(chunk)
            self._chunks.append(chunk)
        else:
            self.overflowed = True
            self.take()

    def take(self) -> bytes:
        """Return what was collected and let it go."""
        body = b"".join(self._chunks)
        self._chunks.clear()
        self._allowance.give_back(self._size)
        self._size = 0
        return body


class ResponseBody:
    """One response body, as a document or as events.

    framing tells from the media type how events are cut. is_stream: there are events. has_begun: one with data was
    among them (a comment that keeps the connection alive is no answer). is_plain: events' offsets are offsets in the
    chunks themselves. given_up: what came could not be followed to its end (encoding, size, corruption).
    skipped_bytes: see framing.Splitter.
    """

    def __init__(
        self, head: ResponseHead, allowance: Allowance, framing: Callable[[str], Splitter | None] = splitter
    ) -> None:
        self._splitter = framing(media_type(head.header("content-type")))
        if self._splitter is not None:
            self._splitter.room = Room(MAX_EVENT_BYTES, allowance.take, allowance.give_back)
        self._decoder: Decoder | None = decoder(
            ",".join(value for name, value in head.headers if name.lower() == "content-encoding")
        )
        self.is_plain = isinstance(self._decoder, Identity)
        self._document = BoundedBody(allowance)
        self._allowance = allowance
        self._window = 0  # of the decoder, as far as it is filled
        self._burst = False
        self.has_begun = False

    def __del__(self) -> None:
        """Give back the decoder's window, and an event's room."""
        self._allowance.give_back(self._window)
        if self._splitter is not None:
            self._splitter.room.release()

    @property
    def is_stream(self) -> bool:
        """True when the body is read as events."""
        return self._splitter is not None

    @property
    def given_up(self) -> bool:
        """True when the body can not be understood any more."""
        is_lost = self._splitter is not None and self._splitter.failed
        return self._decoder is None or self._decoder.failed or self._document.overflowed or self._burst or is_lost

    @property
    def skipped_bytes(self) -> int:
        """Return how much of it stood in events that were too large to read."""
        return self._splitter.skipped_bytes if self._splitter is not None else 0

    @property
    def expects_lf(self) -> bool:
        """See SseSplitter.expects_lf."""
        return self._splitter is not None and self._splitter.expects_lf

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Take bytes; yield the events of a stream."""
        if self._burst:
            return
        count = 0
        for piece in (chunk,) if self.is_plain else self._decoded(chunk):
            if self._splitter is None:
                self._document.add(piece)
                continue
            for event in self._splitter.feed(piece):
                count += 1
                if count > MAX_BURST_EVENTS:
                    self._burst = True
                    return
                if event.data:
                    self.has_begun = True
                yield event

    def _decoded(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what an encoded chunk holds, until it turns out to be too much."""
        if self._decoder is None:
            return
        size = 0
        for piece in self._decoder.feed(chunk):
            size += len(piece)
            self._burst = not self._fits(len(piece)) or (self.is_stream and size > MAX_BURST_BYTES)
            if self._burst or self._document.overflowed:
                return
            yield piece

    def _fits(self, size: int) -> bool:
        """Take what the decoder keeps of its output from the allowance."""
        more = min(size, self._decoder.window_bytes - self._window) if self._decoder is not None else 0
        if more > 0 and not self._allowance.take(more):
            return False
        self._window += max(0, more)
        return True

    def finish(self) -> SseEvent | bytes | None:
        """Return a stream's last, unterminated event, or the whole document; None when there is nothing to read."""
        if self.given_up:
            return None
        return self._document.take() if self._splitter is None else self._splitter.finish()
