"""JSON lines and JSON arrays, cut into events however they come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import cuts

from clrk.gateway.interpret import Allowance, ResponseHead
from clrk.gateway.llm.body import ResponseBody
from clrk.gateway.llm.framing import ArraySplitter, LineSplitter, Splitter, splitter

OBJECTS = [{"a": 'x"y\\'}, {}, {"b": [1, {"c": "]}[{,"}]}, {"é": "\\\\"}, [1, [2]]]


def events(reader: Splitter, chunks: list[bytes]) -> list[bytes]:
    """Return the data of all events; their ends are checked against where the chunks say they are."""
    found = []
    for chunk in chunks:
        for event in reader.feed(chunk):
            assert 0 < event.end <= len(chunk)
            found.append(event.data)
    last = reader.finish()
    return found if last is None else [*found, last.data]


LINES = {
    "lf": b"\n".join(json.dumps(value).encode() for value in OBJECTS) + b"\n",
    "crlf, blank lines, no end": b"\r\n\n \r\n".join(json.dumps(value).encode() for value in OBJECTS),
}
ARRAYS = {
    "dense": json.dumps(OBJECTS, separators=(",", ":")).encode(),
    "as google sends it": b"[" + b"\n,\r\n".join(json.dumps(value, indent=2).encode() for value in OBJECTS) + b"\n]\n",
    "plain values between": json.dumps([1, "[{", *OBJECTS, None, "}]", 7]).encode(),
}


@pytest.mark.parametrize("raw", LINES.values(), ids=LINES)
def test_lines_however_cut(raw: bytes) -> None:
    for chunks in cuts(raw):
        assert [json.loads(data) for data in events(LineSplitter(), chunks)] == OBJECTS


@pytest.mark.parametrize("raw", ARRAYS.values(), ids=ARRAYS)
def test_elements_however_cut(raw: bytes) -> None:
    for chunks in cuts(raw):
        assert [json.loads(data) for data in events(ArraySplitter(), chunks)] == OBJECTS


def test_a_value_that_is_no_array_is_one_event() -> None:
    raw = json.dumps({"error": {"message": "no [quota]"}}).encode()
    for chunks in cuts(raw):
        assert events(ArraySplitter(), chunks) == [raw]


def test_an_element_without_its_end_is_none() -> None:
    assert events(ArraySplitter(), [b'[{"a":1},{"b":']) == [b'{"a":1}']


@pytest.mark.parametrize("make", [LineSplitter, ArraySplitter])
def test_what_is_too_long_is_emptied_and_the_next_one_found(make: type) -> None:
    long = json.dumps({"x": "y" * 50}).encode()
    raw = b"[" + long + b",\n" + b'{"a":1}' + b"]" if make is ArraySplitter else long + b'\n{"a":1}\n'
    for chunks in cuts(raw):
        assert [data for data in events(make(40), chunks) if data] == [b'{"a":1}']


@pytest.mark.parametrize("make", [LineSplitter, ArraySplitter])
@given(raw=st.one_of(st.binary(max_size=60), st.text('[]{}",\\ \n1', max_size=40).map(str.encode)))
def test_rubbish_is_cut_the_same_everywhere(make: type, raw: bytes) -> None:
    whole = events(make(16), [raw])
    assert events(make(16), [raw[at : at + 1] for at in range(len(raw))]) == whole
    assert sum(map(len, whole)) <= len(raw)


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [("text/event-stream", "SseSplitter"), ("application/x-ndjson", "LineSplitter"), ("application/json", "NoneType")],
)
def test_the_media_type_chooses(content_type: str, kind: str) -> None:
    assert type(splitter(content_type)).__name__ == kind
    body = ResponseBody(ResponseHead(200, (("Content-Type", content_type + "; charset=utf-8"),)), Allowance())
    assert body.is_stream is (kind != "NoneType")
