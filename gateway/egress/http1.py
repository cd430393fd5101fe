"""HTTP/1.1 messages on the wire: heads and body framing. No I/O; feed bytes, get values, or a ProtocolError.

Strict on purpose: only what RFC 9112 lets a sender write is read, so that no two readers of the same bytes can
disagree about where a message ends (section 11.2, request smuggling). Bare CR or LF, line folding, white space before
the colon, repeated Content-Length, Content-Length beside Transfer-Encoding, chunk extensions in requests: all refused.
What we forward is written anew from what was read; names, values, their order and their case are kept, and so is where
one chunk ends and the next begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from clrk.core.errors import ProtocolError

MAX_HEAD_SIZE: Final = 80 * 1024  # 64 KiB of headers, and a long target
MAX_HEADERS: Final = 1024
MAX_TRAILERS_SIZE: Final = 8 * 1024
MAX_CHUNK_LINE: Final = 1024

Headers = tuple[tuple[str, str], ...]

_TCHAR: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# One line: nothing in it can match in two ways, so it is one pass over the block. Control characters are _CONTROLS.
_FIELD: Final = re.compile(rf"(?m)^({_TCHAR}+):[ \t]*((?:[^ \t\r\n](?:[^\r\n]*[^ \t\r\n])?)?)[ \t]*\r\n")
_REQUEST_LINE: Final = re.compile(rf"({_TCHAR}{{1,32}}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
_OTHER_VERSION: Final = re.compile(r" HTTP/(?!1\.[01]$)\d(\.\d)?$")
_STATUS_LINE: Final = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_CONTROLS: Final = bytes((*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F))
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_SHORTEST_SIZE: Final = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,14})\r\n")
# RFC 9110, section 6.5.1: what frames, routes or authenticates a message has no place behind it. A server that merges
# trailers into the headers would believe the agent's over what the gateway checked, or put there.
_NOT_A_TRAILER: Final = frozenset(
    ("content-length", "transfer-encoding", "host", "connection", "keep-alive", "te", "trailer", "upgrade")
)
_NOT_A_REQUEST_TRAILER: Final = _NOT_A_TRAILER | {
    "authorization", "content-encoding", "content-range", "content-type", "cookie", "expect", "proxy-authorization",
    "proxy-connection", "traceparent", "tracestate",
}  # fmt: skip


class Head:
    """What a request and a response head have in common: headers in wire order, and an index of them."""

    __slots__ = ("_index", "headers", "minor")

    def __init__(self, minor: int, headers: Headers) -> None:
        self.minor = minor
        self.headers = headers
        self._index: dict[str, list[str]] = {}
        for name, value in headers:
            self._index.setdefault(name.lower(), []).append(value)

    def values(self, name: str) -> Sequence[str]:
        """Return every value of a header, in order; name in lower case."""
        return self._index.get(name, ())

    def tokens(self, name: str) -> list[str]:
        """Return the lower-case elements of a comma-separated header."""
        if not (found := self._index.get(name)):
            return []
        return [item.strip(" \t").lower() for value in found for item in value.split(",") if item.strip(" \t")]


class Request(Head):
    """A request head; target as it stood in the request line."""

    __slots__ = ("method", "target")

    def __init__(self, method: str, target: str, minor: int, headers: Headers) -> None:
        super().__init__(minor, headers)
        self.method = method
        self.target = target


class Response(Head):
    """A response head."""

    __slots__ = ("reason", "status")

    def __init__(self, minor: int, status: int, reason: str, headers: Headers) -> None:
        super().__init__(minor, headers)
        self.status = status
        self.reason = reason


class HeadReader:
    """Collects one head: bytes up to and with the empty line."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Return (head, what follows it), or None when more is needed.

        Raises: ProtocolError(head_too_large | control_character); the latter when a line ends with a bare LF, so that
            who ends all lines like this is told so, and does not wait for us as we for him.
        """
        if not self._buffer and 0 <= (end := data.find(b"\r\n\r\n")) <= MAX_HEAD_SIZE:
            return data[: end + 2], data[end + 4 :]
        start, had = max(0, len(self._buffer) - 3), len(self._buffer) - self._buffer.endswith(b"\r")
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n", start)
        if end > MAX_HEAD_SIZE or (end < 0 and len(self._buffer) >= MAX_HEAD_SIZE + 4):
            raise ProtocolError("head_too_large", f"head is over {MAX_HEAD_SIZE} bytes")
        if end < 0:
            if self._buffer.count(b"\n", had) != self._buffer.count(b"\r\n", had):
                raise ProtocolError("control_character", "a bare LF in the head")
            return None
        head, rest = bytes(self._buffer[: end + 2]), bytes(self._buffer[end + 4 :])
        self._buffer.clear()
        return head, rest


def parse_request(head: bytes) -> Request:
    """Read a request head. Raises: ProtocolError(request_line | version | header | …)."""
    line, headers = _split_head(head)
    if (found := _REQUEST_LINE.fullmatch(line)) is None:
        code = "version" if _OTHER_VERSION.search(line) else "request_line"
        raise ProtocolError(code, "request line is not METHOD target HTTP/1.1")
    return Request(found[1], found[2], int(found[3]), headers)


def parse_response(head: bytes) -> Response:
    """Read a response head. Raises: ProtocolError(status_line | header | …)."""
    line, headers = _split_head(head)
    if (found := _STATUS_LINE.fullmatch(line)) is None:
        raise ProtocolError("status_line", "status line is not HTTP/1.1 NNN reason")
    return Response(int(found[1]), int(found[2]), found[3] or "", headers)


def _split_head(head: bytes) -> tuple[str, Headers]:
    _refuse_controls(head, "head")
    line, _, fields = head.decode("latin-1").partition("\r\n")
    return line, _parse_fields(fields)


def _refuse_controls(raw: bytes, where: str) -> None:
    """Refuse control characters, and line ends other than CRLF. By counting: a regex takes ten times as long."""
    if len(raw.translate(None, _CONTROLS)) < len(raw) or not raw.count(b"\r") == raw.count(b"\n") == raw.count(b"\r\n"):
        raise ProtocolError("control_character", f"a control character, a bare CR or a bare LF in the {where}")


def _parse_fields(text: str) -> Headers:
    """Read header lines, each with its CRLF, from what _refuse_controls let pass: what is left out is no field."""
    if (lines := text.count("\n")) > MAX_HEADERS:
        raise ProtocolError("too_many_headers", f"more than {MAX_HEADERS} headers")
    fields = _FIELD.findall(text)
    if len(fields) != lines:
        raise ProtocolError("header", "a header line is not `name: value`")
    return tuple(fields)


def render_head(start_line: str, headers: list[tuple[str, str]] | Headers) -> bytes:
    """Write a head. Names and values were read by this module, or are ours."""
    fields = [f"{name}: {value}\r\n" for name, value in headers]
    return "".join((start_line, "\r\n", *fields, "\r\n")).encode("latin-1")


# --- body framing ---------------------------------------------------------------------------------------------------


class Body:
    """A message body of unknown length that ends with the connection; base of the framed ones.

    Shape: after done, `rest` holds bytes behind the message and `trailers` what a chunked body ended with.
    """

    __slots__ = ("done", "rest", "trailers")
    chunked = False
    until_close = True

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self.trailers: Headers = ()

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes in data, perhaps none. Raises: ProtocolError when the framing is broken."""
        return data

    def framed(self, piece: bytes) -> bytes:
        """Return what goes on the wire for the piece that feed just returned, framed as its sender framed it."""
        return piece

    def eof(self) -> None:
        """The connection ended. Raises: ProtocolError(truncated) when the body had not."""
        self.done = True


class NoBody(Body):
    """A message without a body."""

    __slots__ = ()
    until_close = False

    def __init__(self) -> None:
        super().__init__()
        self.done = True


class LengthBody(Body):
    """A body of Content-Length bytes."""

    __slots__ = ("_left",)
    until_close = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes in data; what lies behind the body goes to rest."""
        if len(data) > self._left:
            data, self.rest = data[: self._left], data[self._left :]
        self._left -= len(data)
        self.done = self._left == 0
        return data

    def eof(self) -> None:
        """Refuse an end before the last byte."""
        if not self.done:
            raise ProtocolError("truncated", f"body ended {self._left} bytes early")


class ChunkedBody(Body):
    """A chunked body (RFC 9112, section 7.1). Chunk extensions of a response are dropped; trailers are kept."""

    __slots__ = ("_buffer", "_frames", "_left", "_of_request", "_state")
    chunked = True
    until_close = False

    _SIZE, _DATA, _DATA_END, _TRAILERS = range(4)

    def __init__(self, *, of_request: bool = False) -> None:
        super().__init__()
        self._buffer = b""
        self._frames: list[bytes] = []
        self._left = 0
        self._of_request = of_request
        self._state = self._SIZE

    def feed(self, data: bytes) -> bytes:
        """Return the decoded bytes in data."""
        data, self._buffer = self._buffer + data, b""
        pieces: list[bytes] = []
        self._frames.clear()
        at = 0
        while not self.done:
            if self._state == self._SIZE:
                at = self._read_whole(data, at, pieces)
            if self._state == self._DATA:
                piece = data[at : at + self._left]
                if not piece:
                    break
                pieces.append(piece)
                self._frames.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = self._DATA_END
            elif (after := self._read_line(data, at)) < 0:
                self._buffer = data[at:]
                break
            else:
                at = after
        else:
            self.rest = data[at:]
        return b"".join(pieces)

    def framed(self, piece: bytes) -> bytes:
        """Return the chunks, or parts of them, of the last feed; without the last chunk and the trailers."""
        return b"".join(self._frames)

    def _read_whole(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Take the chunks that are here from size to end, as most are; return where the last one ends."""
        first = at
        while (found := _SHORTEST_SIZE.match(data, at)) is not None:
            start = found.end()
            end = start + int(found[1], 16)
            if not data.startswith(b"\r\n", end):
                break
            pieces.append(data[start:end])
            at = end + 2
        self._frames.append(data[first:at])
        return at

    def _read_line(self, data: bytes, at: int) -> int:
        """Take one framing line at `at`; return where it ends, or -1 when it is not complete."""
        if self._state == self._TRAILERS:
            return self._read_trailers(data, at)
        if self._state == self._DATA_END:
            return self._read_data_end(data, at)
        end = data.find(b"\r\n", at)
        if end < 0:
            if len(data) - at > MAX_CHUNK_LINE + 1 or data.find(b"\n", at) >= 0:
                raise ProtocolError("chunk", "a chunk's size line is too long or ends with a bare LF")
            return -1
        found = (_CHUNK_SIZE if self._of_request else _CHUNK_LINE).fullmatch(data, at, end + 2)
        if found is None or end - at > MAX_CHUNK_LINE:
            raise ProtocolError("chunk", f"a chunk's size is no hexadecimal number{' by itself' * self._of_request}")
        self._left = int(found[1], 16)
        self._state = self._TRAILERS
        if self._left:
            self._state = self._DATA
            self._frames.append(found[1].lstrip(b"0") + b"\r\n")
        return end + 2

    def _read_data_end(self, data: bytes, at: int) -> int:
        ending = data[at : at + 2]
        if not b"\r\n".startswith(ending):
            raise ProtocolError("chunk", "a chunk is longer than its size")
        if len(ending) < 2:
            return -1
        self._state = self._SIZE
        self._frames.append(b"\r\n")
        return at + 2

    def _read_trailers(self, data: bytes, at: int) -> int:
        if data.startswith(b"\r\n", at):
            self.done = True
            return at + 2
        end = data.find(b"\r\n\r\n", at)
        if end - at > MAX_TRAILERS_SIZE or (end < 0 and len(data) - at >= MAX_TRAILERS_SIZE + 4):
            raise ProtocolError("head_too_large", f"trailers are over {MAX_TRAILERS_SIZE} bytes")
        if end < 0:
            return -1
        raw = data[at : end + 2]
        _refuse_controls(raw, "trailers")
        self.trailers = _parse_fields(raw.decode("latin-1"))
        refused = _NOT_A_REQUEST_TRAILER if self._of_request else _NOT_A_TRAILER
        if any(name.lower() in refused for name, _ in self.trailers):
            raise ProtocolError("trailer", "a trailer has the name of a header that frames, routes or authenticates")
        self.done = True
        return end + 4

    def eof(self) -> None:
        """Refuse an end before the last chunk."""
        if not self.done:
            raise ProtocolError("truncated", "chunked body ended without its last chunk")


def render_chunk(data: bytes) -> bytes:
    """Return one chunk; data is not empty, since an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def render_last_chunk(trailers: Headers) -> bytes:
    """Return the end of a chunked body."""
    return b"0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in trailers).encode("latin-1") + b"\r\n"


def request_body(request: Request) -> Body:
    """Return how the request's body is framed (RFC 9112, section 6.3).

    Raises: ProtocolError(content_length | transfer_encoding): anything that two readers could read differently.
    """
    lengths, codings = request.values("content-length"), request.values("transfer-encoding")
    if codings:
        if lengths:
            raise ProtocolError("transfer_encoding", "Content-Length beside Transfer-Encoding")
        if request.minor == 0:
            raise ProtocolError("transfer_encoding", "Transfer-Encoding in HTTP/1.0")
        return _chunked(codings, of_request=True)
    return LengthBody(_length(lengths)) if lengths else NoBody()


def response_body(response: Response, method: str) -> Body:
    """Return how the response's body is framed. Raises: ProtocolError as request_body does."""
    if method == "HEAD" or response.status in (204, 304) or response.status < 200:
        return NoBody()
    lengths, codings = response.values("content-length"), response.values("transfer-encoding")
    if codings:
        if lengths:
            raise ProtocolError("transfer_encoding", "Content-Length beside Transfer-Encoding")
        if response.minor == 0:
            raise ProtocolError("transfer_encoding", "Transfer-Encoding in HTTP/1.0")
        return _chunked(codings, of_request=False)
    return LengthBody(_length(lengths)) if lengths else Body()


def _chunked(codings: Sequence[str], *, of_request: bool) -> ChunkedBody:
    if [coding.lower() for coding in codings] != ["chunked"]:
        raise ProtocolError("transfer_encoding", "the only transfer coding here is one `chunked`")
    return ChunkedBody(of_request=of_request)


def _length(lengths: Sequence[str]) -> int:
    if len(lengths) != 1 or _LENGTH.fullmatch(lengths[0]) is None:
        raise ProtocolError("content_length", "Content-Length is not one number")
    return int(lengths[0])
