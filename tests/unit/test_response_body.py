"""Content encodings and bounds of the bodies that interpreters read."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import cuts

from clrk.gateway.interpret import Allowance, ResponseHead
from clrk.gateway.llm.body import BoundedBody, ResponseBody, is_json
from clrk.gateway.llm.decompress import Inflate, decoder

TEXT = b'{"usage": {"input_tokens": 1}}' * 20


def deflate(text: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(text) + packer.flush()


ENCODED = {
    "identity": ("identity", TEXT),
    "none": (None, TEXT),
    "gzip": ("gzip", gzip.compress(TEXT)),
    "x-gzip": (" X-GZIP ", gzip.compress(TEXT)),
    "gzip members": ("gzip", gzip.compress(TEXT[:90]) + gzip.compress(TEXT[90:])),
    "gzip and padding": ("gzip", gzip.compress(TEXT) + bytes(512)),
    "zlib": ("deflate", deflate(TEXT, zlib.MAX_WBITS)),
    "raw deflate": ("deflate", deflate(TEXT, -zlib.MAX_WBITS)),
    "zlib and rubbish": ("deflate", deflate(TEXT, zlib.MAX_WBITS) + b"rubbish"),
}


@pytest.mark.parametrize(("encoding", "raw"), ENCODED.values(), ids=ENCODED.keys())
def test_encodings_however_cut(encoding: str | None, raw: bytes) -> None:
    for chunks in cuts(raw):
        reader = decoder(encoding)
        assert reader is not None
        assert b"".join(piece for chunk in chunks for piece in reader.feed(chunk)) == TEXT
        assert not reader.failed


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "gzip, gzip", "compress", "\x00"])
def test_encodings_that_are_given_up(encoding: str) -> None:
    assert decoder(encoding) is None
    body = ResponseBody(ResponseHead(200, (("Content-Encoding", encoding),)), Allowance())
    assert list(body.feed(b"anything")) == []
    assert body.given_up
    assert body.finish() is None


@pytest.mark.parametrize("gzipped", [True, False])
@given(rubbish=st.binary(max_size=200))
def test_rubbish_fails_quietly(gzipped: bool, rubbish: bytes) -> None:
    reader = Inflate(gzip=gzipped)
    pieces = [piece for byte in rubbish for piece in reader.feed(bytes([byte]))]
    assert sum(map(len, pieces)) < 1 << 20


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
