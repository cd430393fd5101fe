"""The HTTP/1 codec: whole, byte by byte, at every split, with bytes behind; h11 is the independent reader."""

from __future__ import annotations

import re

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.http1 import (
    _NOT_A_REQUEST_TRAILER,
    MAX_HEAD_SIZE,
    ChunkedBody,
    HeadReader,
    LengthBody,
    parse_request,
    parse_response,
    render_chunk,
    render_head,
    render_last_chunk,
    request_body,
    response_body,
)

HEAD = b"POST /a?b HTTP/1.1\r\nHost: x\r\nX-Y:  z \t\r\nempty:\r\n\r\n"
CHUNKS = b'3\r\nabc\r\nA;ext="1"\r\n0123456789\r\n0\r\nX-T: 1\r\nx-t: 2\r\n\r\n'


def test_head_at_every_split_keeps_what_follows():
    for cut in range(len(HEAD) + 1):
        reader = HeadReader()
        first = reader.feed(HEAD[:cut])
        found = first or reader.feed(HEAD[cut:] + b"rest")
        assert found == (HEAD[:-2], b"" if first else b"rest")


def test_head_byte_by_byte():
    reader = HeadReader()
    found = None
    for index in range(len(HEAD)):
        assert found is None
        found = reader.feed(HEAD[index : index + 1])
    request = parse_request(found[0])
    assert (request.method, request.target, request.minor) == ("POST", "/a?b", 1)
    assert request.headers == (("Host", "x"), ("X-Y", "z"), ("empty", ""))


@pytest.mark.parametrize("size", [MAX_HEAD_SIZE + 4, MAX_HEAD_SIZE * 2])
def test_a_head_without_end_is_refused(size):
    with pytest.raises(ProtocolError) as caught:
        HeadReader().feed(b"a" * size)
    assert caught.value.code == "head_too_large"


def test_chunks_at_every_pair_of_splits():
    for first in range(len(CHUNKS) + 1):
        for second in range(first, len(CHUNKS) + 1, 5):
            body = ChunkedBody()
            out = b"".join(
                body.feed(piece)
                for piece in (CHUNKS[:first], CHUNKS[first:second], CHUNKS[second:] + b"NEXT")
                if not body.done
            )
            assert out == b"abc0123456789"
            assert body.done
            assert body.trailers == (("X-T", "1"), ("x-t", "2"))
            assert b"NEXT".endswith(body.rest[-4:])


def test_chunks_byte_by_byte_and_rest():
    body = ChunkedBody()
    out = b""
    for index in range(len(CHUNKS)):
        assert not body.done
        out += body.feed(CHUNKS[index : index + 1])
    assert (out, body.done, body.rest) == (b"abc0123456789", True, b"")
    again = ChunkedBody()
    assert again.feed(CHUNKS + b"GET / HTTP/1.1") == b"abc0123456789"
    assert again.rest == b"GET / HTTP/1.1"


@pytest.mark.parametrize(
    "raw",
    [b"\r\n", b"g\r\n", b"0x1\r\na\r\n", b" 1\r\na\r\n", b"-1\r\n", b"1\r\nab\r\n", b"1\r\na\n", b"1\na\n",
     b"1\r\na\r\r\n",
     b"1" * 16 + b"\r\n", b"1;" + b"a" * 2000, b"1;a\x00b\r\n", b"0\r\nbad trailer\r\n\r\n", b"0\r\nX: \x00\r\n\r\n",
     b"0\r\n X: folded\r\n\r\n"],
)  # fmt: skip
def test_broken_chunks_are_refused(raw):
    with pytest.raises(ProtocolError):
        ChunkedBody().feed(raw)


@pytest.mark.parametrize("body", [ChunkedBody(), LengthBody(1)])
def test_an_early_end_is_an_error(body):
    with pytest.raises(ProtocolError) as caught:
        body.eof()
    assert caught.value.code == "truncated"


@pytest.mark.parametrize(("extra", "taken"), [(-1, False), (0, True), (1, True)])
def test_length_exact_minus_and_plus_one(extra, taken):
    body = LengthBody(5)
    data = b"x" * (5 + extra)
    assert body.feed(data) == data[:5]
    assert body.done is taken
    assert body.rest == data[5:]


@pytest.mark.parametrize(
    ("status", "method", "headers", "kind"),
    [
        (200, "HEAD", "Content-Length: 5", "NoBody"), (204, "GET", "Content-Length: 5", "NoBody"),
        (304, "GET", "Transfer-Encoding: chunked", "NoBody"), (200, "GET", "X: y", "Body"),
        (200, "GET", "Content-Length: 5", "LengthBody"), (200, "GET", "Transfer-Encoding: CHUNKED", "ChunkedBody"),
    ],
)  # fmt: skip
def test_response_framing(status, method, headers, kind):
    response = parse_response(f"HTTP/1.1 {status} x\r\n{headers}\r\n".encode())
    assert type(response_body(response, method)).__name__ == kind


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 99 x\r\n", b"HTTP/1.1 2000 x\r\n", b"HTTP/1.1  200 x\r\n", b"HTTP/2 200\r\n", b"http/1.1 200 x\r\n",
     b"HTTP/1.1 200 a\x00\r\n", b"\r\n"],
)  # fmt: skip
def test_broken_status_lines(head):
    with pytest.raises(ProtocolError):
        parse_response(head)


NAMES = st.from_regex(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,12}", fullmatch=True).filter(
    lambda name: name.lower() not in _NOT_A_REQUEST_TRAILER
)
VALUES = st.from_regex(r"([!-~]([ -~]{0,20}[!-~])?)?", fullmatch=True)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)


@given(FIELDS, FIELDS, st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.data())
@settings(max_examples=150, deadline=None)
def test_h11_reads_what_we_write_and_we_read_it_back(fields, trailers, pieces, data):
    headers = [("Host", "x"), *fields, ("Transfer-Encoding", "chunked")]
    wire = render_head("POST /p HTTP/1.1", headers)
    wire += b"".join(render_chunk(piece) for piece in pieces) + render_last_chunk(tuple(trailers))
    cut = data.draw(st.integers(0, len(wire)))

    reader = HeadReader()
    first = reader.feed(wire[:cut])
    head, rest = first if first is not None else reader.feed(wire[cut:])
    rest += wire[cut:] if first is not None else b""
    request = parse_request(head)
    body = request_body(request)
    assert body.feed(rest) == b"".join(pieces)
    assert body.done
    assert request.headers == tuple(headers)
    assert body.trailers == tuple(trailers)

    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(wire)
    event = oracle.next_event()
    assert isinstance(event, h11.Request)
    assert [(n.decode(), v.decode()) for n, v in event.headers.raw_items()] == headers
    got = b""
    while isinstance(event := oracle.next_event(), h11.Data):
        got += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert got == b"".join(pieces)
    assert [(n.decode(), v.decode()) for n, v in event.headers.raw_items()] == trailers


@given(st.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_whatever_comes_ends_in_a_value_or_a_code(raw):
    assert code_of(lambda: parse_request(raw + b"\r\n")) in (
        "", "request_line", "version", "header", "control_character", "too_many_headers",
    )  # fmt: skip
    assert code_of(lambda: parse_response(raw + b"\r\n")) in (
        "", "status_line", "header", "control_character", "too_many_headers",
    )  # fmt: skip
    assert code_of(lambda: ChunkedBody().feed(raw)) in ("", "chunk", "header", "control_character")


def code_of(parse) -> str:
    try:
        parse()
    except ProtocolError as exc:
        return exc.code
    return ""


NOISE = st.sampled_from([b"\r", b"\n", b" ", b"\t", b":", b"\0", b",", b"chunked", b"\x0b", b"\xa0"])


@given(NOISE, st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_what_we_accept_h11_reads_the_same(noise, at):
    """One stray byte anywhere in a framed request: refused, or understood exactly as h11 does."""
    wire = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nA: b\r\n\r\nabc"
    wire = wire[:at] + noise + wire[at:]
    try:
        reader = HeadReader()
        found = reader.feed(wire)
        if found is None:
            return
        request = parse_request(found[0])
        body = request_body(request)
    except ProtocolError:
        return
    mine = body.feed(found[1]) if not body.done else b""
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(wire)
    try:
        event = oracle.next_event()
        assert isinstance(event, h11.Request)
        theirs = oracle.next_event()
    except h11.RemoteProtocolError:
        return  # stricter than we are about something that is not framing, such as a header's value
    assert mine == (bytes(theirs.data) if isinstance(theirs, h11.Data) else b"")


PIECES = st.sampled_from(["a", "A-b", ":", " ", "\t", "\r\n", "\r", "\n", "x: y", "\x00", "\xe4", "!"])


@given(st.lists(PIECES, max_size=12))
@settings(max_examples=500)
def test_a_block_of_fields_is_read_as_line_by_line(pieces):
    block = "".join(pieces) + "\r\n"
    lines = block.split("\r\n")[:-1]
    expected = [(line.partition(":")[0], line.partition(":")[2].strip(" \t")) for line in lines]
    is_good = not re.search(r"[\r\n\x00]", "".join(lines)) and all(
        re.fullmatch(r"[A-Za-z!-]+:.*", line) for line in lines
    )
    head = b"GET / HTTP/1.1\r\n" + block.encode("latin-1")
    if is_good:
        assert parse_request(head).headers == tuple(expected)
    else:
        assert code_of(lambda: parse_request(head)) in ("header", "control_character")
