"""Headers and bodies of one exchange as span events, where the agent's EgressGateway asks for it (CONTRACT section 13).

Watches bytes that pass and never touches them; whatever fails here costs events and nothing else. A body of a known
length keeps its first bytes; a stream (chunked, until close, event stream) its last. Compressed bodies are decoded as
they come, since the end of one alone can not be. Redaction happens at the end, on what was put together.
"""

from __future__ import annotations

import codecs
import logging
import time
from collections.abc import Callable
from typing import Final

from clrk.core.egress_resources import CaptureBody
from clrk.gateway.egress.http1 import Body, Head
from clrk.gateway.interpret import Allowance
from clrk.gateway.llm.decompress import decoder
from clrk.gateway.media import MediaType, parse_media_type
from clrk.gateway.redact import KNOWN_SECRETS, Redactor
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import AttributeValue, SpanEvent

MAX_KEPT_BYTES: Final = 16 << 20  # of the bodies of one run that are under way
_STREAMS: Final = frozenset(
    ("text/event-stream", "application/x-ndjson", "application/ndjson", "application/jsonl", "application/json-seq")
)
_TEXT: Final = _STREAMS | {"application/x-www-form-urlencoded", "application/graphql", "application/xml"}
_CHARSETS: Final = frozenset(("utf-8", "ascii", "iso8859-1", "cp1252"))  # in which ASCII is ASCII, whoever lies
_LOG: Final = logging.getLogger(__name__)


class Capture:
    """One exchange. Order: request, request_data*, response, response_data*, events, close."""

    def __init__(self, wanted: CaptureBody, allowance: Allowance, redactor: Redactor = KNOWN_SECRETS) -> None:
        self._wanted, self._allowance = wanted, allowance
        self._redactor = redactor
        self._events: list[SpanEvent] = []
        self._request: _Body | None = None
        self._response: _Body | None = None
        self._failed = False

    def request(self, head: Head, body: Body) -> None:
        """Take the request as the agent sent it."""
        self._guard(lambda: self._begin_request(head, body))

    def request_data(self, piece: bytes) -> None:
        """Take body bytes, out of their chunks."""
        if self._request is not None:
            body = self._request
            self._guard(lambda: body.feed(piece))

    def response(self, head: Head, body: Body | None) -> None:
        """Take the final response as the upstream sent it; body None: the connection becomes something else."""
        self._guard(lambda: self._begin_response(head, body))

    def response_data(self, piece: bytes) -> None:
        """Take body bytes, out of their chunks."""
        if self._response is not None:
            body = self._response
            self._guard(lambda: body.feed(piece))

    def events(self) -> list[SpanEvent]:
        """Return the events, without secrets, in the order in which they happened; at most once."""
        self._guard(self._end)
        return sorted(self._events, key=lambda event: event.time_unix_nano)

    def close(self) -> None:
        """Let go of what was kept. Idempotent."""
        for body in (self._request, self._response):
            if body is not None:
                body.close()
        self._request = self._response = None

    def _begin_request(self, head: Head, body: Body) -> None:
        self._add_headers(attr.EVENT_HTTP_REQUEST_HEADERS, attr.HTTP_REQUEST_HEADER_PREFIX, head)
        self._request = self._body(head, body)

    def _begin_response(self, head: Head, body: Body | None) -> None:
        self._add_headers(attr.EVENT_HTTP_RESPONSE_HEADERS, attr.HTTP_RESPONSE_HEADER_PREFIX, head)
        self._response = self._body(head, body) if body is not None else None

    def _add_headers(self, name: str, prefix: str, head: Head) -> None:
        found = self._redactor.headers(head.headers)
        shown: dict[str, AttributeValue] = {prefix + key: values for key, values in found.items()}
        self._events.append(SpanEvent(name, time.time_ns(), shown))

    def _body(self, head: Head, body: Body) -> _Body | None:
        """Return what will keep the body; None for one that is empty, or of a type that is not asked for."""
        media = parse_media_type(", ".join(head.values("content-type")))
        if body.done or media is None or not _is_included(media, self._wanted):
            return None
        is_stream = body.chunked or body.until_close or media.essence in _STREAMS
        return _Body(head, media, self._wanted.max_bytes, self._allowance, self._redactor, is_stream=is_stream)

    def _end(self) -> None:
        if self._request is not None and self._request.size:
            names = (attr.HTTP_REQUEST_BODY_CONTENT, attr.HTTP_REQUEST_BODY_SIZE)
            self._events.append(self._request.event(attr.EVENT_HTTP_REQUEST_BODY, *names))
        if self._response is not None and self._response.size:
            names = (attr.HTTP_RESPONSE_BODY_CONTENT, attr.HTTP_RESPONSE_BODY_SIZE)
            self._events.append(self._response.event(attr.EVENT_HTTP_RESPONSE_BODY, *names))

    def _guard(self, step: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            step()
        except Exception:  # the telemetry edge: the call goes on, and what is left of its events is shown
            self._failed = True
            _LOG.exception("capturing a call failed: it goes on without")


class _Body:
    """Keeps max_bytes of one body: its first, or with is_stream its last."""

    def __init__(
        self,
        head: Head,
        media: MediaType,
        max_bytes: int,
        allowance: Allowance,
        redactor: Redactor,
        *,
        is_stream: bool,
    ) -> None:
        self.size = 0  # as transferred
        self._decoder = decoder(", ".join(head.values("content-encoding")))
        self._charset = media.parameters.get("charset", "utf-8")
        self._max_bytes, self._allowance, self._is_stream = max_bytes, allowance, is_stream
        self._redactor = redactor
        self._kept = bytearray()
        self._charged = 0  # bytes of the allowance
        self._truncated = False  # there was more than is kept
        self._skipped = "encoding" if self._decoder is None else ""
        self._time_ns = 0

    def feed(self, piece: bytes) -> None:
        """Take bytes as they were transferred."""
        self.size += len(piece)
        self._time_ns = time.time_ns()
        if self._decoder is None or not self._wants_more():
            return
        for plain in self._decoder.feed(piece):
            self._keep(plain)
            if not self._wants_more():
                return

    def event(self, name: str, content: str, size: str) -> SpanEvent:
        """Return the event."""
        damaged = self._decoder is not None and self._decoder.failed
        found: dict[str, AttributeValue] = {size: self.size}
        if self._skipped:
            found[attr.CLRK_BODY_SKIPPED] = self._skipped
        elif damaged and not self._kept:
            found[attr.CLRK_BODY_SKIPPED] = "encoding"
        elif (text := self._text(damaged=damaged)) is None:
            found[attr.CLRK_BODY_SKIPPED] = "binary"
        else:
            found |= {content: text, attr.CLRK_BODY_TRUNCATED: self._truncated or damaged}
        return SpanEvent(name, self._time_ns, found)

    def close(self) -> None:
        """Give the memory back."""
        self._allowance.give_back(self._charged)
        self._charged = 0
        self._kept = bytearray()

    def _wants_more(self) -> bool:
        return not self._skipped and (self._is_stream or not self._truncated)

    def _keep(self, plain: bytes) -> None:
        kept = self._kept
        grown = min(self._max_bytes, len(kept) + len(plain)) - len(kept)
        if not self._allowance.take(grown):
            self.close()
            self._skipped = "memory"
            return
        self._charged += grown
        if len(kept) + len(plain) > self._max_bytes:
            self._truncated = True
        if not self._is_stream:
            kept += plain[:grown]
            return
        kept += plain[-self._max_bytes :]
        del kept[: max(0, len(kept) - self._max_bytes)]

    def _text(self, *, damaged: bool) -> str | None:
        """Return what was kept, without secrets; None for what is no text."""
        try:
            charset = codecs.lookup(self._charset).name
        except (LookupError, ValueError):
            charset = ""
        text = self._kept.decode(charset, "replace") if charset in _CHARSETS else "\0"
        if "\0" in text:  # binary, or in a coding that hides its letters from us
            return None
        cut_start = self._truncated and self._is_stream
        cut_end = damaged or (self._truncated and not self._is_stream)
        return self._redactor.text(text, cut_start=cut_start, cut_end=cut_end)


def _is_included(media: MediaType, wanted: CaptureBody) -> bool:
    if wanted.include_content_types:
        return any(entry in (media.essence, f"{media.type}/*") for entry in wanted.include_content_types)
    return media.is_json or media.type == "text" or media.essence in _TEXT or media.subtype.endswith("+xml")
