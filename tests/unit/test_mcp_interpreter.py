"""MCP over Streamable HTTP: what calls are named, what fails, and what is no MCP at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llm_exchange import JSON, SSE, event, exchange, post, same_facts_however_cut

from clrk.gateway.interpret import Facts, ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

ACCEPT = ("Accept", "application/json, text/event-stream")
SESSION = ("Mcp-Session-Id", "1868a90c-7a3b-4f0e-9d55-0b1c2d3e4f50")
VERSION = ("MCP-Protocol-Version", "2025-06-18")
HEAD = post("tools.internal", "/mcp", *JSON, ACCEPT, SESSION, VERSION)
FIRST = post("tools.internal", "/mcp", *JSON, ACCEPT)
OK = ResponseHead(200, JSON)
OK_SSE = ResponseHead(200, SSE)

CALL = {
    "jsonrpc": "2.0",
    "id": 7,
    "method": "tools/call",
    "params": {"name": "get_weather", "arguments": {"location": "Oslo", "token": "hunter2"}},
}
RESULT = {"jsonrpc": "2.0", "id": 7, "result": {"content": [{"type": "text", "text": "-3 C, snow"}], "isError": False}}
ATTRIBUTES: dict[str, AttributeValue] = {
    "mcp.method.name": "tools/call",
    "mcp.session.id": SESSION[1],
    "mcp.protocol.version": "2025-06-18",
    "jsonrpc.request.id": "7",
    "gen_ai.operation.name": "execute_tool",
    "gen_ai.tool.name": "get_weather",
}


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


def ask(method: str, params: object = None, **more: Any) -> bytes:
    return raw({"jsonrpc": "2.0", "id": 1, "method": method, "params": params} | more)


def test_a_tool_call_answered_as_a_document() -> None:
    facts, received = same_facts_however_cut(HEAD, raw(CALL), OK, raw(RESULT))
    assert facts == Facts("tools/call get_weather", ATTRIBUTES)
    assert received == raw(RESULT)
    assert "Oslo" not in repr(facts)
    assert "snow" not in repr(facts)


def test_a_tool_call_answered_as_a_stream() -> None:
    progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 7, "progress": 1}}
    sampling = {"jsonrpc": "2.0", "id": 7, "method": "sampling/createMessage", "params": {}}
    stream = (
        b"id: 1\ndata: \n\n"
        + event(progress, "message")
        + event(sampling, "message")
        + event(RESULT, "message")
        + b": bye\n\n"
    )
    facts, received = same_facts_however_cut(HEAD, raw(CALL), OK_SSE, stream)
    assert facts == Facts("tools/call get_weather", ATTRIBUTES)
    assert received == stream
    unterminated = stream.removesuffix(b"\n\n: bye\n\n")
    assert same_facts_however_cut(HEAD, raw(CALL), OK_SSE, unterminated)[0] == facts


def test_tool_errors() -> None:
    failed = RESULT | {"result": {"content": [{"type": "text", "text": "no such place"}], "isError": True}}
    facts, _ = same_facts_however_cut(HEAD, raw(CALL), OK, raw(failed))
    assert facts == Facts("tools/call get_weather", ATTRIBUTES | {"error.type": "tool_error"}, "tool_error", "")
    for truthy in ("true", 1, None, {}):
        body = raw(RESULT | {"result": {"isError": truthy}})
        assert exchange(HEAD, raw(CALL), OK, [body])[0].error_type is None


@pytest.mark.parametrize("head", [OK, ResponseHead(400, JSON)])
def test_protocol_errors(head: ResponseHead) -> None:
    error = {
        "jsonrpc": "2.0",
        "id": 7,
        "error": {"code": -32602, "message": "Unknown tool: get_weather", "data": "secret"},
    }
    facts, _ = same_facts_however_cut(HEAD, raw(CALL), head, raw(error))
    assert facts == Facts(
        "tools/call get_weather",
        ATTRIBUTES | {"error.type": "-32602", "rpc.response.status_code": "-32602"},
        "-32602",
        "Unknown tool: get_weather",
    )


def test_an_error_about_no_request_in_particular() -> None:
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "Parse error"}}
    facts, _, _ = exchange(HEAD, raw(CALL), ResponseHead(400, JSON), [raw(error)])
    assert (facts.error_type, facts.status_message) == ("-32700", "Parse error")
    codeless, _, _ = exchange(HEAD, raw(CALL), OK, [raw({"jsonrpc": "2.0", "id": 7, "error": "x"})])
    assert codeless.error_type == "0"


def test_initialize() -> None:
    request = ask("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "c"}})
    answer = raw({"jsonrpc": "2.0", "id": 1, "result": {"protocolVersion": "2025-03-26", "serverInfo": {"name": "s"}}})
    facts, _, _ = exchange(FIRST, request, ResponseHead(200, (*JSON, SESSION)), [answer])
    assert facts.name == "initialize"
    assert facts.attributes == {
        "mcp.method.name": "initialize",
        "mcp.session.id": SESSION[1],
        "mcp.protocol.version": "2025-03-26",
        "jsonrpc.request.id": "1",
    }
    unanswered, _, _ = exchange(FIRST, request, None, [], complete=False)
    assert unanswered.attributes["mcp.protocol.version"] == "2025-06-18"


@pytest.mark.parametrize(
    ("method", "params", "name", "extra"),
    [
        ("tools/list", {"cursor": "x"}, "tools/list", {}),
        ("tools/list", None, "tools/list", {}),
        ("ping", {"name": "x", "uri": "x://y"}, "ping", {}),
        ("prompts/get", {"name": "review"}, "prompts/get review", {"gen_ai.prompt.name": "review"}),
        ("resources/read", {"uri": "file:///a/b"}, "resources/read", {"mcp.resource.uri": "file:///a/b"}),
        (
            "resources/subscribe",
            {"uri": "https://user:pw@host/a?token=secret"},
            "resources/subscribe",
            {"mcp.resource.uri": "https://host/a"},
        ),
        ("tools/call", {"name": 7}, "tools/call", {"gen_ai.operation.name": "execute_tool"}),
        ("tools/call", [], "tools/call", {"gen_ai.operation.name": "execute_tool"}),
        ("x-vendor/method", {}, "x-vendor/method", {}),
    ],
)
def test_methods(method: str, params: object, name: str, extra: dict[str, AttributeValue]) -> None:
    answer = raw({"jsonrpc": "2.0", "id": 1, "result": {}})
    facts, _, _ = exchange(HEAD, ask(method, params), OK, [answer])
    common = {"mcp.method.name": method, "jsonrpc.request.id": "1"}
    session = {"mcp.session.id": SESSION[1], "mcp.protocol.version": "2025-06-18"}
    assert facts == Facts(name, common | session | extra)


def test_a_notification_has_no_id_and_expects_no_answer() -> None:
    body = raw({"jsonrpc": "2.0", "method": "notifications/initialized"})
    facts, _, _ = exchange(HEAD, body, ResponseHead(202, ()), [])
    assert facts.name == "notifications/initialized"
    assert "jsonrpc.request.id" not in facts.attributes
    assert "clrk.body.usage_visible" not in facts.attributes


@pytest.mark.parametrize(
    ("id_", "text"), [(7, "7"), ("7", "7"), ("a-b", "a-b"), (7.0, "7"), (0, "0"), ("x" * 999, "x" * 256)]
)
def test_ids_in_string_form(id_: object, text: str) -> None:
    facts, _, _ = exchange(HEAD, raw(CALL | {"id": id_}), OK, [raw(RESULT | {"id": id_})])
    assert facts.attributes["jsonrpc.request.id"] == text
    assert "clrk.body.usage_visible" not in facts.attributes


@pytest.mark.parametrize("id_", [None, True, [], {}, 1.5, ""])
def test_ids_that_are_none(id_: object) -> None:
    facts, _, _ = exchange(HEAD, raw(CALL | {"id": id_}), OK, [raw(RESULT)])
    assert "jsonrpc.request.id" not in facts.attributes


def test_every_call_of_a_batch_has_facts_of_its_own() -> None:
    batch = [CALL | {"id": 1}, {"jsonrpc": "2.0", "method": "notifications/initialized"}, CALL | {"id": "2"}]
    answers = [RESULT | {"id": "2", "result": {"isError": True}}, RESULT | {"id": 1}]
    facts, _ = same_facts_however_cut(HEAD, b" " + raw(batch), OK, raw(answers))
    several = [facts, *facts.also]
    assert [one.name for one in several] == [
        "tools/call get_weather", "notifications/initialized", "tools/call get_weather",
    ]  # fmt: skip
    assert [one.attributes.get("jsonrpc.request.id") for one in several] == ["1", None, "2"]
    assert [one.error_type for one in several] == [None, None, "tool_error"]
    assert all(one.attributes["mcp.session.id"] == SESSION[1] for one in several)
    separate = event(answers[1]) + event(answers[0])
    assert same_facts_however_cut(HEAD, raw(batch), OK_SSE, separate)[0] == facts


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        raw(RESULT | {"id": 8}),
        raw({"id": 7, "result": {}}),
        b"[" * 100_000,
        raw([RESULT, 7]),
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    facts, _, received = exchange(HEAD, raw(CALL), OK, [answer])
    assert facts == Facts("tools/call get_weather", ATTRIBUTES | {"clrk.body.usage_visible": False})
    assert received == answer
    assert exchange(HEAD, raw(CALL), OK_SSE, [b"data: " + answer + b"\n\n"])[0] == facts


def test_the_first_answer_counts() -> None:
    forged = RESULT | {"result": {"isError": True}}
    facts, _, _ = exchange(HEAD, raw(CALL), OK_SSE, [event(RESULT), event(forged)])
    assert facts.error_type is None


def test_a_dead_server_and_an_http_error() -> None:
    dead, _, _ = exchange(HEAD, raw(CALL), None, [], complete=False)
    assert dead.attributes["clrk.body.usage_visible"] is False
    gone, _, _ = exchange(HEAD, raw(CALL), ResponseHead(404, ()), [b"session not found"])
    assert gone == Facts("tools/call get_weather", ATTRIBUTES)


# --- What is no MCP -------------------------------------------------------------------------------------------------

PLAIN = Facts("")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"7", b'"jsonrpc"', b"\xff", b"[" * 100_000, raw({"method": "tools/call", "id": 1}),
        raw(CALL | {"jsonrpc": "1.0"}), raw(CALL | {"jsonrpc": 2.0}), raw(CALL | {"method": 7}),
        raw(CALL | {"method": ""}), raw(CALL | {"method": "a b"}), raw(CALL | {"method": "m" * 200}), raw([CALL, 7]),
        raw(RESULT), raw([CALL, CALL | {"jsonrpc": None}]), raw({"query": '"jsonrpc":"2.0"'}),
    ],
)  # fmt: skip
def test_bodies_that_stay_plain_http(body: bytes) -> None:
    facts, _, received = exchange(HEAD, body, OK, [b'{"error": {"code": 1}}'])
    assert facts == PLAIN
    assert received == b'{"error": {"code": 1}}'


def test_other_json_rpc_protocols_stay_plain_http() -> None:
    a2a = ask("message/stream", {"message": {"role": "user"}})
    assert exchange(FIRST, a2a, OK_SSE, [event(RESULT)])[0] == PLAIN
    assert exchange(HEAD, a2a, OK_SSE, [event(RESULT)])[0].name == "message/stream"  # its headers say MCP


def test_enormous_and_encoded_requests_stay_plain_http() -> None:
    big = raw(CALL | {"params": {"name": "x", "arguments": "x" * (17 << 20)}})
    assert exchange(HEAD, big, OK, [raw(RESULT)])[0] == PLAIN
    encoded = post("tools.internal", "/mcp", *JSON, ACCEPT, VERSION, ("Content-Encoding", "gzip"))
    assert exchange(encoded, raw(CALL), OK, [raw(RESULT)])[0] == PLAIN


def test_an_enormous_answer_is_let_go() -> None:
    answer = raw(RESULT | {"result": {"content": "x" * (17 << 20)}})
    facts, _, received = exchange(HEAD, raw(CALL), OK, [answer[:100], answer[100:]])
    assert received == answer
    assert facts.attributes["clrk.body.usage_visible"] is False


def test_hostile_values_are_bounded() -> None:
    head = post("h", "/mcp", *JSON, ("Mcp-Session-Id", "s\x7f" * 9999), ("MCP-Protocol-Version", "v" * 9999))
    body = raw(CALL | {"params": {"name": "n\n\u202e\ud800" * 9999}})
    facts, _, _ = exchange(head, body, OK, [raw(RESULT | {"error": {"code": 2**70, "message": "m" * 9999}})])
    assert all(len(str(value)) <= 256 for value in facts.attributes.values())
    assert len(facts.name) < 300
    assert "\n" not in facts.name
    facts.name.encode()
    assert len(facts.status_message) <= 256
