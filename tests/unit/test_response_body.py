"""Content encodings and bounds of the bodies that interpreters read."""

from __future__ import annotations

import gzip
import zlib

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import cuts

from clrk.gateway.interpret import Allowance, ResponseHead
from clrk.gateway.llm.body import BoundedBody, ResponseBody, is_json
from clrk.gateway.llm.decompress import Brotli, Decoder, Inflate, Zstd, decoder

TEXT = b'{"usage": {"input_tokens": 1}}' * 20


def deflate(text: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(text) + packer.flush()


def zstd(text: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(text)


def zstd_bomb(blocks: int) -> bytes:
    """A frame with a window of 8 MiB, of blocks of 4 bytes that stand for 128 KiB each (RFC 8878, 3.1.1)."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    return b"\x28\xb5\x2f\xfd\x00\x68" + block * blocks


ENCODED = {
    "identity": ("identity", TEXT),
    "none": (None, TEXT),
    "gzip": ("gzip", gzip.compress(TEXT)),
    "x-gzip": (" X-GZIP ", gzip.compress(TEXT)),
    "gzip members": ("gzip", gzip.compress(TEXT[:90]) + gzip.compress(TEXT[90:])),
    "gzip and padding": ("gzip", gzip.compress(TEXT) + bytes(512)),
    "zlib": ("deflate", deflate(TEXT, zlib.MAX_WBITS)),
    "raw deflate": ("deflate", deflate(TEXT, -zlib.MAX_WBITS)),
    "br": ("br", brotli.compress(TEXT)),
    "zstd": ("zstd", zstd(TEXT)),
    "zstd frames": ("ZSTD", zstd(TEXT[:90]) + zstd(TEXT[90:])),
    "gzip in br": ("gzip, br", brotli.compress(gzip.compress(TEXT))),
    "zstd in zlib, and identity": ("identity, zstd,,deflate", deflate(zstd(TEXT), zlib.MAX_WBITS)),
    "zlib and rubbish": ("deflate", deflate(TEXT, zlib.MAX_WBITS) + b"rubbish"),
}


@pytest.mark.parametrize(("encoding", "raw"), ENCODED.values(), ids=ENCODED.keys())
def test_encodings_however_cut(encoding: str | None, raw: bytes) -> None:
    for chunks in cuts(raw):
        reader = decoder(encoding)
        assert reader is not None
        assert b"".join(piece for chunk in chunks for piece in reader.feed(chunk)) == TEXT
        assert not reader.failed


@pytest.mark.parametrize("encoding", ["compress", "\x00", "gzip, aws-chunked", "gzip;q=1", "gzip, gzip, gzip, gzip"])
def test_encodings_that_are_given_up(encoding: str) -> None:
    assert decoder(encoding) is None
    body = ResponseBody(ResponseHead(200, (("Content-Encoding", encoding),)), Allowance())
    assert list(body.feed(b"anything")) == []
    assert body.given_up
    assert body.finish() is None


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "br, gzip"])
@given(rubbish=st.binary(max_size=200))
def test_rubbish_fails_quietly(coding: str, rubbish: bytes) -> None:
    reader = decoder(coding)
    assert reader is not None
    pieces = [piece for byte in rubbish for piece in reader.feed(bytes([byte]))]
    assert sum(map(len, pieces)) < 1 << 20


BOMBS = {
    "gzip": (Inflate(gzip=True, max_output=30_000), gzip.compress(bytes(1 << 20))),
    "br": (Brotli(max_output=30_000), brotli.compress(bytes(1 << 24))),
    "zstd": (Zstd(max_output=30_000), zstd_bomb(1000)),
}


@pytest.mark.parametrize(("reader", "raw"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_given_up_at_its_bound(reader: Decoder, raw: bytes) -> None:
    assert sum(len(piece) for piece in reader.feed(raw)) <= 30_000
    assert reader.failed
    assert list(reader.feed(b"more")) == []


@pytest.mark.parametrize(
    ("coding", "raw", "piece"),
    [
        ("br", brotli.compress(bytes(1 << 26)), 1 << 17),
        ("zstd", zstd_bomb(400), 8 << 20),
        ("zstd", zstd(bytes(1 << 25)), 8 << 20),
        ("gzip, zstd", zstd(gzip.compress(bytes(1 << 25))), 1 << 17),
    ],
)
def test_no_piece_is_large(coding: str, raw: bytes, piece: int) -> None:
    reader = decoder(coding)
    assert reader is not None
    assert 0 < max(len(found) for found in reader.feed(raw)) <= piece


def flushed(coding: str, size: int) -> bytes:
    if coding == "br":
        brotli_stream = brotli.Compressor()
        return brotli_stream.process(bytes(size)) + brotli_stream.flush()
    stream = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
    return stream.compress(bytes(size)) + stream.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_all_that_a_chunk_holds_comes_with_it(coding: str) -> None:
    """The libraries hold output back when it would pass the limit of one call, though they have taken all input."""
    for size in [*range((64 << 10) - 2, (64 << 10) + 300), 1 << 20, (1 << 20) + 1]:
        reader = decoder(coding)
        assert reader is not None
        assert sum(map(len, reader.feed(flushed(coding, size)))) == size


def test_the_next_gzip_member_may_come_in_the_next_chunk() -> None:
    member = gzip.compress(bytes(64 << 10))
    reader = Inflate(gzip=True)
    assert sum(len(piece) for chunk in (member, member) for piece in reader.feed(chunk)) == 128 << 10


def test_rubbish_behind_brotli_is_an_error_however_cut() -> None:
    raw = brotli.compress(TEXT) + b"rubbish"
    for chunks in cuts(raw):
        reader = Brotli()
        for chunk in chunks:
            list(reader.feed(chunk))
        assert reader.failed


def test_a_zstd_window_over_what_a_content_coding_may_ask_for_is_refused() -> None:
    """RFC 9659: 8 MiB. A decoder with more would take it from memory that all sandboxes share."""
    reader = Zstd()
    assert list(reader.feed(b"\x28\xb5\x2f\xfd\x00\x70" + zstd_bomb(1)[6:])) == []
    assert reader.failed


def test_a_decoders_window_is_taken_from_the_runs_allowance() -> None:
    allowance = Allowance(limit=1 << 20)
    head = ResponseHead(200, (("Content-Type", "text/event-stream"), ("Content-Encoding", "zstd")))
    body = ResponseBody(head, allowance)
    assert list(body.feed(zstd(b"data: 1\n\n")))
    assert allowance.left == (1 << 20) - 9
    assert list(body.feed(zstd_bomb(9))) == []
    assert body.given_up
    del body
    assert allowance.left == 1 << 20


def test_corruption_in_the_middle_is_noticed() -> None:
    raw = bytearray(gzip.compress(bytes(range(256)) * 40))
    raw[200] ^= 0xFF
    reader = Inflate(gzip=True)
    assert len(b"".join(reader.feed(bytes(raw)))) <= 10240
    assert reader.failed
    assert list(reader.feed(b"more")) == []


@pytest.mark.parametrize("raw", [gzip.compress(bytes(1 << 20)), gzip.compress(gzip.compress(bytes(1 << 26)))])
def test_a_bomb_comes_in_bounded_pieces_and_is_given_up(raw: bytes) -> None:
    reader = Inflate(gzip=True, max_output=30_000)
    sizes = [len(piece) for piece in reader.feed(raw)]
    assert reader.failed
    assert sum(sizes) <= 30_000
    roomy = Inflate(gzip=True)
    assert max(len(piece) for piece in roomy.feed(raw)) <= 64 << 10


def test_a_document_up_to_its_bound() -> None:
    body = BoundedBody(Allowance(), limit=10)
    body.add(b"12345")
    body.add(b"67890")
    assert (body.take(), body.overflowed) == (b"1234567890", False)
    over = BoundedBody(Allowance(), limit=10)
    over.add(b"12345")
    over.add(b"678901")
    over.add(b"2")
    assert (over.take(), over.overflowed) == (b"", True)


@pytest.mark.parametrize(
    ("content_type", "json"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
        ("application/problem+json", True),
        ("application/jsonp", False),
        ("text/plain; x=application/json", False),
        ("", False),
        (None, False),
    ],
)
def test_json_content_types(content_type: str | None, json: bool) -> None:
    assert is_json(content_type) is json


@pytest.mark.parametrize(
    ("content_type", "event", "emptied"),
    [
        ("text/event-stream", b"data: " + b"A" * 3_000_000 + b"\n\n", [0, 0]),
        ("application/x-ndjson", b"A" * 3_000_000 + b" \n", []),
    ],
)
def test_a_large_event_is_kept_while_the_run_has_room_and_gives_it_back(
    content_type: str, event: bytes, emptied: list[int]
) -> None:
    head = ResponseHead(200, (("Content-Type", content_type),))
    allowance = Allowance(10 << 20)
    bodies = [ResponseBody(head, allowance) for _ in range(5)]
    for body in bodies:
        for at in range(0, len(event) - 2, 50_000):
            assert list(body.feed(event[at : at + 50_000][: len(event) - 2 - at])) == []
    kept = [len(found.data) for body in bodies for found in body.feed(event[-2:])]
    assert sorted(kept) == [*emptied, *[3_000_000] * 3]  # as many as 10 MiB, and a free one each, hold
    assert allowance.left == 10 << 20
    assert sorted(body.skipped_bytes > 0 for body in bodies) == [False, False, False, True, True]
    assert [len(found.data) for found in bodies[-1].feed(event)] == [3_000_000]  # in step again
    list(bodies[0].feed(event[:2_500_000]))
    assert allowance.left < 10 << 20
    del bodies, body
    assert allowance.left == 10 << 20


def test_an_event_without_end_is_let_go() -> None:
    allowance = Allowance(100 << 20)
    body = ResponseBody(ResponseHead(200, (("Content-Type", "text/event-stream"),)), allowance)
    for _ in range(200):
        assert list(body.feed(b"x" * 100_000)) == []
    assert allowance.left == 100 << 20
    assert body.skipped_bytes >= 11 << 20
