"""What is posted to an MCP server is read in one way, or refused: every trick with which two parsers part ways."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cost import as_objects, assert_cheap

from clrk.gateway.mcp.strict import MAX_POSTED_BYTES, Message, Post, UnreadableError, read_post

JSON = (("Content-Type", "application/json"),)


def call(tool: object = "x", **more: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {}}} | more


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        (call(), [Message("tools/call", 1, "x")]),
        (call(id="a"), [Message("tools/call", "a", "x")]),
        (call(id=7.0), [Message("tools/call", 7, "x")]),
        (call("späß \u200b x"), [Message("tools/call", 1, "späß \u200b x")]),
        ({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, [Message("tools/list", 1)]),
        ({"jsonrpc": "2.0", "method": "notifications/initialized"}, [Message("notifications/initialized")]),
        ({"jsonrpc": "2.0", "id": 1, "method": "x/y", "params": [1]}, [Message("x/y", 1)]),
        (
            {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": "a://b"}},
            [Message("resources/read", 1, uri="a://b")],
        ),
        ({"jsonrpc": "2.0", "id": 3, "result": {"Name": 1, "tools": []}}, [Message("", 3)]),
        ({"jsonrpc": "2.0", "id": "q", "error": {"code": 1, "message": "m"}}, [Message("", "q")]),
        (call(params={"name": "x", "arguments": {"Name": "y", "METHOD": "z"}}), [Message("tools/call", 1, "x")]),
    ],
)
def test_messages(body: Any, messages: list[Message]) -> None:
    assert read_post(JSON, raw(body)) == Post(tuple(messages), is_batch=False)
    assert read_post((), b" \r\n\t" + raw([body, body]) + b"\n") == Post((*messages, *messages), is_batch=True)


TWICE = b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call","params":{"name":"x"}}'
NAMED_TWICE = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","name":"x"}}'
ESCAPED_TWICE = b'{"jsonrpc":"2.0","id":1,"method":"ping","m\\u0065thod":"tools/call","params":{"name":"x"}}'
PARAMS_TWICE = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a"},"params":{"name":"x"}}'


@pytest.mark.parametrize(
    "body",
    [
        TWICE, NAMED_TWICE, ESCAPED_TWICE, PARAMS_TWICE, b"[" + raw(call()) + b"," + NAMED_TWICE + b"]",
    ],
    ids=["method", "name", "escaped", "params", "in-a-batch"],
)  # fmt: skip
def test_two_members_of_one_name_are_refused(body: bytes) -> None:
    with pytest.raises(UnreadableError, match="same name"):
        read_post(JSON, body)


@pytest.mark.parametrize(
    "found",
    [
        {"Method": "tools/call"}, {"METHOD": "tools/call"}, {"Params": {"name": "x"}}, {"param\u017f": {"name": "x"}},
        {"method ": "tools/call"}, {"\ufeffmethod": "tools/call"}, {"\uff4dethod": "tools/call"}, {"method\0": "ping"},
        {"ID": 2}, {"jsonRPC": "2.0"}, {"params": {"name": "a", "Name": "x"}},
        {"params": {"name": "a", "n\u200bame": "x"}},
        {"params": {"name": "a", "NAME": "x"}}, {"Result": {}},
    ],
)  # fmt: skip
def test_names_that_a_lenient_parser_takes_for_ours_are_refused(found: dict[str, Any]) -> None:
    with pytest.raises(UnreadableError, match="may be taken for"):
        read_post(JSON, raw(call("a") | found))


@pytest.mark.parametrize(
    "method",
    [
        "Tools/Call",
        "TOOLS/CALL",
        "tools/call ",
        " tools/call",
        "tools\u200b/call",
        "\uff54ools/call",
        "tool\u017f/call",
    ],
)
def test_methods_that_a_lenient_server_takes_for_others_are_refused(method: str) -> None:
    with pytest.raises(UnreadableError, match="may be taken for"):
        read_post(JSON, raw(call(method=method)))


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"null", b"7", b'"tools/call"', b"[]", b"{}", b"[[]]", b"\xff", b"NaN",
        raw(call()) + b"x", raw(call()) + b"\n" + raw(call()), raw(call()) + b"\0", b"\0" + raw(call()),
        b"\xef\xbb\xbf" + raw(call()), json.dumps(call()).encode("utf-16"), json.dumps(call()).encode("utf-16-le"),
        json.dumps(call()).encode("utf-32"), b"//\n" + raw(call()), raw(call())[:-1] + b",}",
        raw(call()).replace(b'"', b"'"), b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"\xc0\xb8"}}',
        raw([[call()]]), raw([call(), 7]), raw([call(), None]), raw([call()] * 257), raw(call(jsonrpc="1.0")),
        raw(call(jsonrpc=2.0)), raw({k: v for k, v in call().items() if k != "jsonrpc"}), raw(call(id=None)),
        raw(call(id=True)), raw(call(id=1.5)), raw(call(id={})), raw(call(id=[1])), raw(call(method=None)),
        raw(call(method=7)), raw(call(method="")), raw(call(method=["tools/call"])), raw(call(method="tools/call\0")),
        raw(call(method="tools/call\n")), raw(call(params=None)), raw(call(params=["x"])), raw(call(params="x")),
        raw(call(params={})), raw(call(None)), raw(call(7)), raw(call("")), raw(call(["x"])), raw(call("x\0")),
        raw(call("x\n")), raw(call("\ud800x")), raw(call(result={})), raw(call(error={})),
        raw({"jsonrpc": "2.0", "id": 1}), raw({"jsonrpc": "2.0", "result": {}}),
        raw({"jsonrpc": "2.0", "id": 1, "result": {}, "error": {}}),
        raw({"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": 7}}),
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":NaN}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":-Infinity}}',
        b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"tools/call","params":{"name":"x"}}',
        b"[" * 100_000, b'{"params":' * 100_000, raw(call())[:-2] + b',"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        raw(call(x="x" * MAX_POSTED_BYTES)), b"method=tools%2Fcall&name=x",
        b"--b\r\nContent-Type: application/json\r\n\r\n" + raw(call()) + b"\r\n--b--",
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_post(JSON, body)


@pytest.mark.parametrize(
    "header",
    [
        ("Content-Encoding", "gzip"), ("content-encoding", "identity, gzip"), ("Content-Encoding", "x"),
        ("Content-Type", "application/json; charset=utf-16"), ("Content-Type", 'application/json;charset="UTF-7"'),
        ("Content-Type", "application/json; charset = shift_jis"), ("Content-Type", "text/plain; charset=ibm037"),
        ("Content-Type", "application/json; charset*=utf-16''"), ("Content-Type", "application/json; charset*0=utf-7"),
        ("Content_Type", "application/json; charset=utf-16"), ("CONTENT_ENCODING", "gzip"), ("Mcp_Name", "y"),
        ("Mcp-Method", "tools/list"), ("Mcp-Name", "y"), ("mcp-name", ""),
        ("Mcp-Name", "=?base64?" + base64.b64encode(b"y").decode() + "?="), ("Mcp-Name", "=?base64?!?="),
    ],
)  # fmt: skip
def test_headers_that_say_something_else_are_refused(header: tuple[str, str]) -> None:
    with pytest.raises(UnreadableError):
        read_post((*JSON, header), raw(call()))
    with pytest.raises(UnreadableError):
        read_post((("Mcp-Method", "tools/call"), ("Mcp-Name", "x"), header), raw(call()))


def test_headers_that_agree() -> None:
    named = ("Mcp-Name", "=?base64?" + base64.b64encode(b"x").decode() + "?=")
    for extra in (("Mcp-Name", "x"), named, ("Content-Type", "application/json; charset=UTF-8"), ("Accept", "*/*")):
        headers = (("Content-Encoding", "identity"), ("Mcp-Method", "tools/call"), extra)
        assert read_post(headers, raw(call())).messages[0].tool == "x"


@pytest.mark.parametrize("header", [("Mcp-Method", "tools/call"), ("Mcp_Method", "tools/call")])
def test_an_answer_of_the_client_is_no_call_by_its_header(header: tuple[str, str]) -> None:
    with pytest.raises(UnreadableError):
        read_post((*JSON, header), raw({"jsonrpc": "2.0", "id": 1, "result": {}, "params": {"name": "x"}}))


def test_the_type_that_a_body_is_said_to_have_does_not_matter() -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"):
        assert read_post((("Content-Type", kind),), raw(call())).messages[0].tool == "x"


def refused(body: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_post(JSON, body)


@pytest.mark.parametrize("unit", [b'{"abc":0},', b"[],", b'{"name":"y"},'])
def test_what_is_sent_to_cost_time_is_not_built(unit: bytes) -> None:
    many = unit * ((MAX_POSTED_BYTES - 200) // len(unit))
    unreadable = b"[" + many + b"0]"
    assert_cheap(lambda: refused(unreadable), as_objects, at_most=0.75)
    body = raw(call()).replace(b'"arguments": {}', b'"arguments": [' + many + b"0]")
    assert read_post(JSON, body).messages[0].tool == "x"
    assert_cheap(lambda: read_post(JSON, body), as_objects, at_most=0.75)


def test_objects_with_endless_members_and_names_are_refused() -> None:
    members = ",".join(f'"m{at}":0' for at in range(5000))
    for body in (
        raw(call())[:-1] + b"," + members.encode() + b"}",
        raw(call()).replace(b'{"name"', b"{" + members.encode() + b',"name"'),
        raw(call() | {"m" + "\u200b" * 300 + "ethod": "ping"}),
        raw(call("x" * 5000)),
        raw(call(method="m" * 5000)),
    ):
        with pytest.raises(UnreadableError):
            read_post(JSON, body)
