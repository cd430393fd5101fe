"""Lists of tools lose what may not be called, in documents and in streams, however they arrive; the rest stays."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from cost import as_objects, assert_cheap
from llm_exchange import cuts, event

from clrk.gateway.interpret import Allowance
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.mcp.list_filter import (
    MAX_HELD_BYTES,
    DocumentFilter,
    EventFilter,
    UnfilterableError,
    filter_message,
)


def shows(tool: str) -> bool:
    return tool.startswith("get_")


def listing(*names: Any, **more: Any) -> dict[str, Any]:
    tools = [{"name": name, "inputSchema": {"type": "object"}, "description": "späß"} for name in names]
    return {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools} | more}


def raw(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def document(body: bytes) -> bytes:
    allowance = Allowance(1 << 30)
    results = set()
    for chunks in cuts(body):
        one = DocumentFilter(shows, allowance)
        assert b"".join(map(one.feed, chunks)) == b""
        results.add(one.finish())
    assert allowance.left == 1 << 30
    assert len(results) == 1
    return results.pop()


def stream(body: bytes) -> bytes:
    results = set()
    for chunks in cuts(body):
        one = EventFilter(shows, Allowance())
        results.add(b"".join(map(one.feed, chunks)) + one.finish())
    assert len(results) == 1
    return results.pop()


def test_hidden_tools_are_left_out_and_all_else_is_kept() -> None:
    page = listing("get_a", "rm", "get_b", "RM", nextCursor="c2", _meta={"x": [1.50, 2]}, ttlMs=5)
    found = json.loads(document(raw(page)))
    assert found == listing("get_a", "get_b", nextCursor="c2", _meta={"x": [1.5, 2]}, ttlMs=5)
    assert json.loads(document(raw(listing("rm", nextCursor="c")))) == listing(nextCursor="c")
    batch = [listing("rm"), {"jsonrpc": "2.0", "id": 2, "result": {}}, listing("get_a", "rm")]
    assert json.loads(document(raw(batch))) == [listing(), batch[1], listing("get_a")]


@pytest.mark.parametrize(
    "body",
    [
        raw(listing("get_a", "get_b")), raw(listing()), b"", b" ", b"tools", b'{"tools":', b"\xff tools", b"[1, tools]",
        b"<html>tools</html>", raw({"jsonrpc": "2.0", "id": 1, "result": {"content": [{"text": "tools: rm"}]}}),
        raw({"jsonrpc": "2.0", "id": 1, "result": {"tools": {"name": "rm"}}}), raw({"tools": [{"name": "rm"}]}),
        raw({"result": {"x": {"tools": [{"name": "rm"}]}}}), raw({"jsonrpc": "2.0", "id": 1, "error": {"tools": []}}),
        raw([[listing("rm")]]), b"7", b"null", b'"tools"',
    ],
)  # fmt: skip
def test_what_is_no_list_or_hides_nothing_passes_to_the_letter(body: bytes) -> None:
    assert document(body) == body
    lines = b"".join(b"data: " + line + b"\n" for line in body.split(b"\n"))
    assert stream(b"id: 1\n" + lines + b"\n") == b"id: 1\n" + lines + b"\n"


@pytest.mark.parametrize(
    "body",
    [
        b'{"result":{"t\\u006fols":[{"name":"rm"}]}}', b'{"result":{"tools":[{"n\\u0061me":"rm"}]}}',
        b'{"result":{"tools":[{"name":"rm"}],"tools":[]}}', b'{"result":{"tools":[],"tools":[{"name":"rm"}]}}',
        b'{"result":{"tools":[{"name":"rm","name":"get_a"}]}}', b'{"result":{"tools":[{"name":"get_a","name":"rm"}]}}',
        b'{"result":{"tools":[{"name":"rm"}]},"result":{"tools":[]}}',
        b'\xef\xbb\xbf{"result":{"tools":[{"name":"rm"}]}}',
        b'{"x":"\xff","result":{"tools":[{"name":"rm"}]}}', b'{"x":NaN,"result":{"tools":[{"name":"rm"}]}}',
        b'{"x":1e999,"y":-1E999,"result":{"tools":[{"name":"rm"}]}}',
        b'{"x":"\\ud800","result":{"tools":[{"name":"rm"}]}}',
        b'{"x":' + b"9" * 5000 + b',"result":{"tools":[{"name":"rm"}]}}',
        b'{"x":"a\tb","result":{"tools":[{"name":"rm"}]}}',
        b'{"result":{"tools":[{"name":null},{"name":["rm"]},"rm",7,{"Name":"rm"},["rm"]]}}',
        b'{"result":{"tools":[{"name":"get_a\\u0000rm"},{"name":"get_\\ud800rm"},{"name":"get_\\nrm"}]}}',
        b'[{"result":{"tools":[{"name":"rm"}]}}]',
    ],
)  # fmt: skip
def test_no_spelling_brings_a_hidden_tool_through(body: bytes) -> None:
    for shown in (document(body), stream(b"data: " + body + b"\r\n\r\n")[6:]):
        assert b"rm" not in shown
        json.loads(shown, parse_constant=pytest.fail, parse_int=float)


def test_what_only_we_can_not_read_ends_the_answer() -> None:
    deep = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"result":{"tools":[{"name":"rm"}]}}'
    with pytest.raises(UnfilterableError, match="nested"):
        filter_message(deep, shows)
    one = DocumentFilter(shows, Allowance())
    with pytest.raises(UnfilterableError, match="large"):
        one.feed(b"x" * (MAX_HELD_BYTES + 1))
    with pytest.raises(UnfilterableError, match="large"):
        DocumentFilter(shows, Allowance(10)).feed(b"x" * 11)
    endless = EventFilter(shows, Allowance())
    for _ in range(15):
        assert endless.feed(b"data: " + b"x" * (1 << 20) + b"\n") == b""
    with pytest.raises(UnfilterableError, match="large"):
        endless.feed(b"x" * (1 << 20))


@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"])
def test_streams(eol: str) -> None:
    other = event({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"tools": "rm"}}, "message", eol)
    before = f": hi{eol}{eol}event: endpoint{eol}data: /messages?session=1{eol}{eol}".encode() + other
    hidden = f"id: 7{eol}event: message{eol}retry: 5{eol}".encode()
    full, less = (
        event(json.dumps(listing(*names), separators=(",", ":")), None, eol) for names in (("rm", "get_a"), ("get_a",))
    )
    body = before + hidden + full + other
    assert stream(body) == before + hidden + less + other
    assert stream(body + hidden + full.rstrip(b"\r\n")) == before + hidden + less + other + hidden + less.rstrip(
        b"\r\n"
    )


def test_data_in_several_lines_becomes_one() -> None:
    lines = json.dumps(listing("rm", "get_a"), indent=1).split("\n")
    body = "id: 1\n" + "".join(f"data:{line}\n" for line in lines) + "x: y\ndata\n\n"
    before, data, *after = stream(body.encode()).split(b"\n")
    assert (before, after) == (b"id: 1", [b"x: y", b"", b""])
    assert json.loads(data.removeprefix(b"data: ")) == listing("get_a")
    assert stream(b"\xef\xbb\xbf" + event(listing("rm"))).endswith(event(json.dumps(listing(), separators=(",", ":"))))


def test_whole_events_come_out_at_once() -> None:
    seen: list[SseEvent] = []
    one = EventFilter(shows, Allowance(), seen.append)
    assert one.feed(b"event: endpoint\nda") == b""
    assert one.feed(b"ta: /m\n\ndata: x") == b"event: endpoint\ndata: /m\n\n"
    assert [(found.name, found.data) for found in seen] == [(b"endpoint", b"/m")]
    assert one.feed(b"\n\n") == b"data: x\n\n"


def test_what_is_held_goes_back_to_the_run() -> None:
    allowance = Allowance(100)
    one, other = EventFilter(shows, allowance), DocumentFilter(shows, allowance)
    one.feed(b"data: x\n")
    other.feed(b"1234")
    assert allowance.left == 88
    for _ in range(2):
        one.close()
        other.close()
    assert allowance.left == 100


def refused(body: bytes) -> None:
    with pytest.raises(UnfilterableError, match="no clean JSON"):
        filter_message(body, shows)


@pytest.mark.parametrize("items", [b"[]," * 700_000, b"1," * 1_000_000, b'{"name":"get_a"},' * 200_000])
def test_what_is_sent_to_cost_time_is_not_built(items: bytes) -> None:
    body = b'{"a":["tools",' + items + b"1]}"
    assert filter_message(body, shows) == body
    assert_cheap(lambda: filter_message(body, shows), as_objects, at_most=2)
    for costly in (body + b"\xff", b'{"result":{"tools":[' + items + b"1]}}", b'["tools",' + items + b"{}]"):
        assert_cheap(partial(refused, costly), as_objects, at_most=2)


def test_what_is_kept_is_kept_to_the_letter() -> None:
    kept = '{ "name" : "get_a", "x": [1.50, 1E400, 12345678901234567890123, "\\u00e9"] }'
    body = '{"jsonrpc":"2.0","id":1.0,"result":{"tools":[{"name":"rm"},' + kept + '],"nextCursor":"c"},"x":-0}'
    assert document(body.encode()) == body.replace('{"name":"rm"},', "").encode()
