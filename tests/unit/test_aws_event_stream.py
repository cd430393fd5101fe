"""AWS event streams: the same messages as botocore reads, however they arrive; what is broken ends it, once."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise

import pytest
from botocore.eventstream import EventStreamBuffer
from llm_exchange import cuts

from clrk.gateway.llm.aws_event_stream import (
    MAX_HEADERS_BYTES,
    MAX_MESSAGE_BYTES,
    EventStreamSplitter,
    encode_message,
)

EVENT = {":event-type": "contentBlockDelta", ":content-type": "application/json", ":message-type": "event"}
EXCEPTION = {":exception-type": "throttlingException", ":message-type": "exception"}
ERROR = {":error-code": "InternalError", ":error-message": 'a "bad" day', ":message-type": "error"}
STREAM = (
    encode_message(EVENT, b'{"delta":{"text":"hi"}}')
    + encode_message({}, b"")
    + encode_message(EXCEPTION, b'{"message":"slow down"}')
    + encode_message(ERROR, b"")
)
WANTED = [
    (b"event/contentBlockDelta", b'{"delta":{"text":"hi"}}'),
    (b"event/", b""),
    (b"exception/throttlingException", b'{"message":"slow down"}'),
    (b"error/InternalError", b'{"message":"a \\"bad\\" day"}'),
]


def framed(block: bytes, payload: bytes = b"", headers_size: int | None = None) -> bytes:
    """Return a message with a block of headers as given, and right checksums."""
    size = len(block) if headers_size is None else headers_size
    lengths = struct.pack("!II", len(block) + len(payload) + 16, size)
    message = lengths + struct.pack("!I", zlib.crc32(lengths)) + block + payload
    return message + struct.pack("!I", zlib.crc32(message))


def read(chunks: list[bytes], limit: int = 1 << 20) -> tuple[list[tuple[bytes, bytes]], bool]:
    splitter = EventStreamSplitter(limit)
    found = [(event.name, event.data) for chunk in chunks for event in splitter.feed(chunk)]
    assert splitter.finish() is None
    return found, splitter.failed


def test_messages_however_they_are_cut() -> None:
    for chunks in cuts(STREAM):
        assert read(chunks) == (WANTED, False)


def test_offsets_are_behind_the_messages() -> None:
    splitter = EventStreamSplitter()
    ends = [0, *(event.end for event in splitter.feed(STREAM + STREAM[:5]))]
    assert [read([STREAM[start:end]])[0] for start, end in pairwise(ends)] == [[message] for message in WANTED]
    assert [event.end for event in splitter.feed(STREAM[5:])] == [end - 5 for end in ends[1:]]


def test_botocore_reads_what_we_write_and_we_agree() -> None:
    buffer = EventStreamBuffer()
    buffer.add_data(STREAM)
    theirs = list(buffer)
    assert [message.headers for message in theirs] == [EVENT, {}, EXCEPTION, ERROR]
    assert [message.payload for message in theirs[:3]] == [data for _, data in WANTED[:3]]


def test_headers_of_every_type_are_passed_over() -> None:
    block = b"".join(
        bytes((2,)) + b"h%d" % kind + bytes((kind,)) + value
        for kind, value in enumerate(
            (b"", b"", b"\1", b"\1\2", b"\1\2\3\4", bytes(8), b"\0\3abc", b"\0\0", bytes(8), bytes(16))
        )
    )
    message = framed(block + b"\x0b:event-type\7\0\5chunk", b"{}")
    assert read([message]) == ([(b"event/chunk", b"{}")], False)
    buffer = EventStreamBuffer()
    buffer.add_data(message)
    assert next(buffer).headers[":event-type"] == "chunk"


def flipped(at: int) -> bytes:
    one = encode_message(EVENT, b"{}")
    return one[:at] + bytes((one[at] ^ 1,)) + one[at + 1 :]


BROKEN = {
    "total length": flipped(3),
    "headers length": flipped(7),
    "prelude checksum": flipped(8),
    "header": flipped(20),
    "payload": flipped(-6 + len(encode_message(EVENT, b"{}"))),
    "message checksum": flipped(len(encode_message(EVENT, b"{}")) - 1),
    "shorter than a frame": framed(b"", headers_size=0)[:0]
    + struct.pack("!III", 15, 0, zlib.crc32(struct.pack("!II", 15, 0))),
    "headers over the message": framed(b"", b"abcd", headers_size=5),
    "headers over the cap": struct.pack("!II", MAX_HEADERS_BYTES + 17, MAX_HEADERS_BYTES + 1)
    + struct.pack("!I", zlib.crc32(struct.pack("!II", MAX_HEADERS_BYTES + 17, MAX_HEADERS_BYTES + 1))),
    "message over the cap": struct.pack("!II", MAX_MESSAGE_BYTES + 1, 0)
    + struct.pack("!I", zlib.crc32(struct.pack("!II", MAX_MESSAGE_BYTES + 1, 0))),
    "name over the block": framed(b"\x05abc"),
    "no type": framed(b"\x03abc"),
    "no length": framed(b"\x03abc\7\0"),
    "value over the block": framed(b"\x03abc\7\0\2x"),
    "number over the block": framed(b"\x03abc\4\0\0\0"),
    "unknown type": framed(b"\x03abc\x0a"),
    "named twice": framed(b"\x01a\0\x01a\1"),
    "no utf-8": framed(b"\x01a\7\0\1\xff"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_ends_it_and_keeps_what_was_before(broken: bytes) -> None:
    first = encode_message(EVENT, b"{}")
    for chunks in cuts(first + broken + first):
        assert read(chunks) == ([(b"event/contentBlockDelta", b"{}")], True)


def test_a_message_over_the_bound_is_skipped_in_step() -> None:
    small, large = encode_message(EVENT, b"{}"), encode_message(EVENT, bytes(300))
    for chunks in cuts(large + small + large):
        assert read(chunks, limit=200) == ([(b"", b""), (b"event/contentBlockDelta", b"{}"), (b"", b"")], False)


def test_a_cut_message_is_none() -> None:
    for end in range(1, len(encode_message(EVENT, b"{}"))):
        assert read([encode_message(EVENT, b"{}")[:end]]) == ([], False)


def test_a_message_of_exactly_the_bound_is_kept() -> None:
    one = encode_message(EVENT, b"{}")
    assert read([one], limit=len(one))[0] == [(b"event/contentBlockDelta", b"{}")]
    assert read([one], limit=len(one) - 1)[0] == [(b"", b"")]
