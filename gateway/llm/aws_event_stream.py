"""AWS event streams (application/vnd.amazon.eventstream): binary messages, cut out of a body as they pass.

Theory of operation: a message is a prelude (total length, headers' length, CRC-32 of both), headers, payload and a
CRC-32 of all before it; every number is big-endian. The prelude has its own checksum, so a length is believed before
the message is there: one that is too large to keep is skipped without losing step. A checksum or a structure that does
not hold ends the understanding (`failed`), for nothing behind it can be found.

Why not botocore's EventStreamBuffer: it takes whole messages of up to 24 MiB into a buffer that it copies with every
chunk, does not say where in a chunk a message ended, and can not skip. It is what the tests compare this with.

Source: the event stream specification of AWS's Smithy, "Amazon Event Stream Specification" (smithy.io/2.0/aws).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from clrk.gateway.llm.sse import MAX_EVENT_BYTES, Room, SseEvent

MEDIA_TYPE: Final = "application/vnd.amazon.eventstream"
MAX_HEADERS_BYTES: Final = 128 << 10
MAX_MESSAGE_BYTES: Final = 25 << 20  # 24 MiB of payload, headers and frame: what AWS's own clients accept
_PRELUDE: Final = struct.Struct("!III")
_CRC: Final = struct.Struct("!I")
_OVERHEAD: Final = _PRELUDE.size + _CRC.size
_U16: Final = struct.Struct("!H")
_MAX_BLOCKS: Final = 16  # of headers that are kept read
_MAX_BLOCK_BYTES: Final = 256
_STRING: Final = 7
_BYTES: Final = 6
_FIXED_SIZES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # by type: booleans, integers, time, UUID


class EventStreamSplitter:
    """Cuts one body into events (see framing.Splitter).

    Shape: an event's name is `event/TYPE`, `exception/TYPE` or `error/CODE`, its data the payload; an error, which has
    no payload, gets `{"message": …}`. A message over the bound is an event without name and data.
    """

    expects_lf = False

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.failed = False
        self.skipped_bytes = 0
        self.room = Room(max_event_bytes)
        self._message = bytearray()
        self._headers_size = 0
        self._wanted = _PRELUDE.size  # bytes of the message that have to be there before the next step
        self._skip = 0
        self._blocks: dict[bytes, dict[str, str] | None] = {}  # what headers say: each kind of event has its own

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        """Yield the messages that end in this chunk; nothing any more once failed."""
        at = 0
        while at < len(chunk) and not self.failed:
            if self._skip:
                step = min(self._skip, len(chunk) - at)
                self._skip -= step
                self.skipped_bytes += step
                at += step
                if not self._skip:
                    yield SseEvent(b"", b"", at)
                continue
            part = chunk[at : at + self._wanted - len(self._message)]
            self._message += part
            at += len(part)
            if len(self._message) < self._wanted:
                return
            if self._wanted == _PRELUDE.size:
                self._prelude()
            elif (event := self._end_message(at)) is not None:
                yield event

    def finish(self) -> SseEvent | None:
        """Return nothing: a message without its checksum is none."""
        return None

    def _prelude(self) -> None:
        total, headers, checksum = _PRELUDE.unpack(self._message)
        if (
            checksum != zlib.crc32(self._message[:8])
            or headers > MAX_HEADERS_BYTES
            or not headers + _OVERHEAD <= total <= MAX_MESSAGE_BYTES
        ):
            self._fail()
        elif not self.room.fits(total):
            self._skip = total - _PRELUDE.size
            self._message.clear()
        else:
            self._wanted, self._headers_size = total, headers

    def _end_message(self, end: int) -> SseEvent | None:
        message = bytes(self._message)
        self._message.clear()
        self.room.release()
        self._wanted = _PRELUDE.size
        if _CRC.unpack_from(message, len(message) - _CRC.size)[0] != zlib.crc32(message[: -_CRC.size]):
            self._fail()
            return None
        payload_at = _PRELUDE.size + self._headers_size
        headers = self._headers(message[_PRELUDE.size : payload_at])
        if headers is None:
            self._fail()
            return None
        kind = headers.get(":message-type", "event")
        payload = message[payload_at : -_CRC.size]
        if kind == "error":
            payload = msgspec.json.encode({"message": headers.get(":error-message", "")})
        name = headers.get({"exception": ":exception-type", "error": ":error-code"}.get(kind, ":event-type"), "")
        return SseEvent(f"{kind}/{name}".encode(), payload, end)

    def _headers(self, block: bytes) -> dict[str, str] | None:
        if block in self._blocks:
            return self._blocks[block]
        found = _read_headers(block)
        if len(self._blocks) < _MAX_BLOCKS and len(block) <= _MAX_BLOCK_BYTES:
            self._blocks[block] = found
        return found

    def _fail(self) -> None:
        self.failed = True
        self.room.release()
        self._message.clear()


def _read_headers(raw: bytes) -> dict[str, str] | None:
    """Return the string headers, None when the block is malformed or names one twice."""
    found: dict[str, str] = {}
    seen: set[bytes] = set()
    at = 0
    while at < len(raw):
        name_end = at + 1 + raw[at]
        name = raw[at + 1 : name_end]
        if name_end >= len(raw) or name in seen:  # a type has to follow
            return None
        seen.add(name)
        kind, at = raw[name_end], name_end + 1
        if kind in (_BYTES, _STRING):
            if at + _U16.size > len(raw):
                return None
            size: int = _U16.unpack_from(raw, at)[0]
            at += _U16.size
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            return None
        value = raw[at : at + size]
        at += size
        if len(value) < size:
            return None
        if kind == _STRING:
            try:
                found[name.decode()] = value.decode()
            except UnicodeDecodeError:
                return None
    return found


def encode_message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one message with string headers."""
    block = b"".join(
        bytes((len(name.encode()),)) + name.encode() + b"\7" + _U16.pack(len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    lengths = struct.pack("!II", len(block) + len(payload) + _OVERHEAD, len(block))
    message = lengths + _CRC.pack(zlib.crc32(lengths)) + block + payload
    return message + _CRC.pack(zlib.crc32(message))
