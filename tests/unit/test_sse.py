"""Splitting event streams: line ends, bounds, and never out of step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_exchange import cuts

from clrk.gateway.llm.sse import SseSplitter


def events(chunks: list[bytes], **options: int) -> list[tuple[bytes, bytes]]:
    splitter = SseSplitter(**options)
    found = [(event.name, event.data) for chunk in chunks for event in splitter.feed(chunk)]
    last = splitter.finish()
    return found + ([(last.name, last.data)] if last is not None else [])


@pytest.mark.parametrize(
    ("stream", "want"),
    [
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a\n\n", [(b"", b" a")]),
        (b"data: a\ndata: b\ndata\n\n", [(b"", b"a\nb\n")]),
        (b"event: x\nid: 7\nretry: 10\ndata: a\n\ndata: b\n\n", [(b"x", b"a"), (b"", b"b")]),
        (b"event: x\r\ndata: a\r\n\r\nevent: y\r\ndata: b\r\n\r\n", [(b"x", b"a"), (b"y", b"b")]),
        (b"event: x\rdata: a\r\revent: y\rdata: b\r\r", [(b"x", b"a"), (b"y", b"b")]),
        (b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\n", [(b"", b"a"), (b"", b"b"), (b"", b"c")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"", b"a")]),
        (b"\n\xef\xbb\xbfdata: a\n\n", [(b"", b""), (b"", b"")]),
        (b": ping\n\ndata: a\n\n", [(b"", b""), (b"", b"a")]),
        (b": note\ndata: a\nunknown: b\nDATA: c\n\n", [(b"", b"a")]),
        (b"data: a: b\n\n", [(b"", b"a: b")]),
        (b"data: a\n\ndata: [DONE]", [(b"", b"a"), (b"", b"[DONE]")]),
        (b"data: a\nevent: x\n", [(b"x", b"a")]),
        (b"data: a\n\n: ping", [(b"", b"a")]),
        (b"", []),
    ],
)
def test_streams_however_cut(stream: bytes, want: list[tuple[bytes, bytes]]) -> None:
    for chunks in cuts(stream):
        assert events(chunks) == want


def test_offsets_are_behind_the_blank_line() -> None:
    splitter = SseSplitter()
    assert [found.end for found in splitter.feed(b"data: a\r\n\r\n: x\n\ndata")] == [11, 16]
    assert [found.end for found in splitter.feed(b": b\r\r")] == [5]
    assert splitter.expects_lf
    assert [found.end for found in splitter.feed(b"\n\ndata: c\n\n")] == [2, 11]


def test_an_oversized_event_is_emptied_and_the_next_one_is_whole() -> None:
    for body in (b"data: " + b"x" * 100 + b"\n", b"data: x\n" * 20, b":" * 200 + b"\n", b"event: " + b"y" * 90 + b"\n"):
        for chunks in cuts(body + b"\ndata: next\n\n"):
            found = events(chunks, max_event_bytes=64)
            assert found[-1] == (b"", b"next")
            assert [data for _, data in found] == [b"", b"next"]
    assert events([b"data: " + b"x" * 58 + b"\n\n"], max_event_bytes=64) == [(b"", b"x" * 58)]
    assert events([b"data: " + b"x" * 59 + b"\n\n"], max_event_bytes=64) == [(b"", b"")]


def test_memory_is_bounded_within_one_event() -> None:
    splitter = SseSplitter(max_event_bytes=1000)
    for _ in range(100):
        assert list(splitter.feed(b"data: " + b"x" * 1000)) == []
        assert len(splitter._line) <= 1000


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: a", b"event: b", b":", b"\xef\xbb\xbf", b"\xff"])),
    st.data(),
)
def test_cuts_do_not_matter(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pieces)
    at = data.draw(st.integers(0, len(stream)))
    assert events([stream[:at], stream[at:]]) == events([stream])
