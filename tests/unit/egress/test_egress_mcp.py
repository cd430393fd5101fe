"""MCP under an MCPRoute, through the relay: a denied tool is never called, and clients understand why."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from mcp_lab import ALLOW, BOTH, JSON, LIST, NAME, PAGE, RULE, Server, ask, call, lab, post, raw, routes

# --- what is denied -------------------------------------------------------------------------------------------------


async def test_a_denied_call_is_answered_in_the_clients_words_and_never_sent() -> None:
    server = Server()
    async with lab(server, {"allowedTools": ["get"]}) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(post(raw(call("rm", "a-1"))))
        head, body = await wire.response()
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        found = json.loads(body)
        text = f"tool 'rm' is not allowed by {RULE}; add it to allowedTools there"
        assert found == {
            "jsonrpc": "2.0",
            "id": "a-1",
            "error": {"code": -32010, "message": f"clrk: {text}", "data": {"reason": "tool_denied", "rule": RULE}},
        }
        wire.writer.write(post(raw(call("get"))))  # the connection goes on
        assert (await wire.response())[1] == b'{"jsonrpc":"2.0","id":1,"result":{}}'
        denied, allowed = await one.recorder.wait(2)
    assert server.bodies == [raw(call("get"))]
    assert (denied.name, allowed.name) == ("tools/call rm", "tools/call get")
    assert denied.status.code == "STATUS_CODE_ERROR"
    assert denied.status.message == text
    facts = {name: denied.attributes[name] for name in denied.attributes if "clrk.egress" in name or "gen_ai" in name}
    assert facts == {
        "clrk.egress.deny_reason": "tool_denied", "clrk.egress.route": RULE, "gen_ai.tool.name": "rm",
        "gen_ai.operation.name": "execute_tool",
    }  # fmt: skip
    assert denied.attributes["error.type"] == "tool_denied"
    assert "clrk.body.usage_visible" not in denied.attributes
    assert denied.attributes["jsonrpc.request.id"] == "a-1"
    assert "clrk.egress.deny_reason" not in allowed.attributes


CALL = raw(call("rm"))
TRICKS: dict[str, bytes] = {
    "content type": post(CALL, "Content-Type: text/plain\r\n"),
    "no content type": post(CALL, ""),
    "form": post(CALL, "Content-Type: application/x-www-form-urlencoded\r\n"),
    "put": post(CALL, method="PUT"),
    "get with a body": post(CALL, method="GET"),
    "delete with a body": post(CALL, method="DELETE"),
    "a method of its own": post(CALL, method="XPOST"),
    "gzip": post(gzip.compress(CALL), BOTH + "Content-Encoding: gzip\r\n"),
    "said to be gzip": post(CALL, BOTH + "Content-Encoding: gzip\r\n"),
    "two codings": post(CALL, BOTH + "Content-Encoding: identity\r\nContent-Encoding: br\r\n"),
    "utf-16": post(json.dumps(call("rm")).encode("utf-16")),
    "utf-16 by its charset": post(
        json.dumps(call("rm")).encode("utf-16-le"), "Content-Type: application/json; charset=utf-16\r\n"
    ),
    "utf-7": post(CALL.replace(b"rm", b"+AHIAbQ-"), "Content-Type: application/json; charset=utf-7\r\n"),
    "byte order mark": post(b"\xef\xbb\xbf" + CALL),
    "method twice": post(b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call","params":{"name":"rm"}}'),
    "name twice": post(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"get","name":"rm"}}'),
    "params twice": post(
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"get"},"params":{"name":"rm"}}'
    ),
    "escaped": post(b'{"jsonrpc":"2.0","id":1,"m\\u0065thod":"tools\\/c\\u0061ll","params":{"n\\u0061me":"r\\u006d"}}'),
    "case of a method": post(CALL.replace(b"tools/call", b"Tools/Call")),
    "case of a member": post(CALL.replace(b'"name"', b'"Name"')),
    "two cases": post(CALL.replace(b'"name": "rm"', b'"name": "get", "NAME": "rm"')),
    "case of a tool": post(CALL.replace(b'"rm"', b'"RM"')),
    "full width": post(raw(call("\uff52\uff4d"))),
    "zero width": post(raw(call("r\u200bm"))),
    "nul": post(raw(call("get\0rm"))),
    "blank": post(raw(call("rm "))),
    "batch": post(raw([call("get"), call("rm", 2)])),
    "batch in a batch": post(raw([[call("rm")]])),
    "batch of one": post(raw([call("rm")])),
    "notification": post(raw({"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "rm"}})),
    "no jsonrpc": post(raw({"id": 1, "method": "tools/call", "params": {"name": "rm"}})),
    "null id": post(raw(call("rm", None))),
    "two documents": post(raw(call("get")) + CALL),
    "two lines": post(raw(call("get")) + b"\n" + CALL),
    "trailing bytes": post(CALL + b"}"),
    "nan": post(CALL[:-1] + b',"x":NaN}'),
    "nested": post(CALL[:-1] + b',"x":' + b"[" * 90_000 + b"]" * 90_000 + b"}"),
    "comment": post(b"/**/" + CALL),
    "single quotes": post(CALL.replace(b'"', b"'")),
    "multipart": post(b"--b\r\n\r\n" + CALL + b"\r\n--b--", "Content-Type: multipart/form-data; boundary=b\r\n"),
    "empty": post(b""),
    "other endpoint": post(CALL, target="/../messages?x=1"),
    "header of another method": post(
        raw({"jsonrpc": "2.0", "id": 1, "method": "ping"}), BOTH + "Mcp-Method: tools/call\r\nMcp-Name: rm\r\n"
    ),
    "chunked": f"POST /mcp HTTP/1.1\r\nHost: {NAME}\r\n{BOTH}Transfer-Encoding: chunked\r\n\r\n".encode()
    + b"".join(b"1\r\n%c\r\n" % byte for byte in CALL) + b"0\r\n\r\n",
    "upgrade": f"GET /mcp HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".encode(),
    "expect": post(CALL, BOTH + "Expect: 100-continue\r\n"),
    "session": post(CALL, BOTH + "Mcp-Session-Id: s\r\n"),
    "another accept": post(CALL, JSON + "Accept: text/html\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
async def test_no_trick_calls_a_denied_tool(trick: str) -> None:
    server = Server()
    async with lab(server, {"allowedTools": ["get"]}) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(TRICKS[trick])
        async with asyncio.timeout(25):
            head = await wire.reader.readuntil(b"\r\n\r\n")
            if b" 100 " in head:
                head = await wire.reader.readuntil(b"\r\n\r\n")
        spans = await one.recorder.wait()
    assert server.bodies == []
    assert [span.status.code for span in spans] == ["STATUS_CODE_ERROR"] * len(spans)
    assert all(span.attributes["clrk.egress.deny_reason"] for span in spans)
    assert int(head.split()[1]) in (200, 202, 400, 403)


async def test_a_body_too_large_to_be_judged_goes_nowhere() -> None:
    server = Server()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        head, _ = await ask(one, post(CALL[:-1] + b',"x":"' + b"x" * (5 << 20) + b'"}'))
        await one.recorder.wait()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert server.bodies == []


@pytest.mark.parametrize(
    ("first", "tls"),
    [(b"post /mcp HTTP/1.1\r\n", {}), (b"\x00\x01", {}), (b"\x16\x03\x01\x00\x05hello", {})],
    ids=["lower-case", "binary", "no-tls"],
)
async def test_nothing_but_http_goes_to_a_governed_host(first: bytes, tls: dict) -> None:
    server = Server()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(NAME, 80)
        wire.writer.write(first + CALL)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            assert await wire.reader.readexactly(1)
        (span,) = await one.recorder.wait()
    assert span.name == "egress.dial.denied"
    assert server.heads == []


async def test_tls_that_is_passed_through_can_not_be_judged() -> None:
    server = Server()
    async with lab(server, {"deniedTools": ["rm"]}, tls={"mode": "Passthrough"}) as one:
        with pytest.raises(OSError):  # noqa: PT011 - the kind of failure is TLS's affair
            await one.dial_tls(NAME, 443)
        (span,) = await one.recorder.wait()
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "http_only")
    assert server.heads == []


async def test_a_plain_connection_to_an_address_is_judged_by_its_host_header() -> None:
    server = Server()
    async with (
        upstream(server) as port,
        laboratory(
            gateway={}, rules=[{"cidrs": ["127.0.0.1/32"]}], recognise="real", config=routes(deniedTools=["rm"])
        ) as one,
    ):
        wire = await one.dial("127.0.0.1", port)
        wire.writer.write(
            post(CALL, BOTH.replace("\r\n", "\r\n", 1)).replace(NAME.encode(), f"{NAME}:{port}".encode(), 1)
        )
        _, body = await wire.response()
        await one.recorder.wait()
    assert json.loads(body)["error"]["data"]["reason"] == "tool_denied"
    assert server.bodies == []


async def test_a_server_that_a_route_names_by_its_address_is_governed() -> None:
    server = Server()
    config = routes(["127.0.0.1"], deniedTools=["rm"])
    async with (
        upstream(server) as port,
        laboratory(gateway={}, rules=[{"cidrs": ["127.0.0.1/32"]}], recognise="real", config=config) as one,
    ):
        wire = await one.dial("127.0.0.1", port)
        wire.writer.write(post(CALL).replace(NAME.encode(), b"127.0.0.1:%d" % port, 1))
        _, body = await wire.response()
    assert json.loads(body)["error"]["data"]["reason"] == "tool_denied"
    assert server.bodies == []


# --- forms of a denial ----------------------------------------------------------------------------------------------


async def test_a_batch_with_a_denied_call_is_answered_as_a_whole() -> None:
    server = Server()
    batch = [call("get", 1), {"jsonrpc": "2.0", "method": "notifications/x"}, call("rm", "2")]
    async with lab(server, {"allowedTools": ["get"]}) as one:
        _, body = await ask(one, post(raw(batch)))
        spans = await one.recorder.wait(3)
    assert server.bodies == []
    found = [(item["id"], item["error"]["data"]["reason"]) for item in json.loads(body)]
    assert found == [(1, "batch_denied"), ("2", "tool_denied")]
    assert {span.name for span in spans} == {"tools/call get", "notifications/x", "tools/call rm"}
    assert all(span.attributes["clrk.egress.deny_reason"] == "tool_denied" for span in spans)
    assert sum("http.request.method" in span.attributes for span in spans) == 1
    assert sum(span.attributes["clrk.resp.bytes"] for span in spans) == len(body)


async def test_an_allowed_batch_passes_and_each_call_has_its_span() -> None:
    answers = [{"jsonrpc": "2.0", "id": 2, "result": {"isError": True}}, {"jsonrpc": "2.0", "id": 1, "result": {}}]
    server = Server(answer(raw(answers), headers=JSON))
    batch = raw([call("get", 1), call("set", 2)])
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        _, body = await ask(one, post(batch))
        spans = {span.name: span for span in await one.recorder.wait(2)}
    assert server.bodies == [batch]
    assert body == raw(answers)
    assert spans["tools/call get"].status.code == "STATUS_CODE_UNSET"
    assert spans["tools/call set"].attributes["error.type"] == "tool_error"
    assert len({span.span_id for span in spans.values()}) == 2
    assert len({span.parent_span_id for span in spans.values()}) == 1


async def test_a_denied_notification_is_accepted_and_goes_nowhere() -> None:
    server = Server()
    async with lab(server, {"allowedTools": ["get"]}) as one:
        head, body = await ask(one, post(raw({"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "rm"}})))
        (span,) = await one.recorder.wait()
    assert head.startswith(b"HTTP/1.1 202 ")
    assert body == b""
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("tools/call rm", "tool_denied")
    assert server.bodies == []


async def test_a_client_that_reads_events_only_gets_an_event() -> None:
    async with lab(Server(), {"allowedTools": ["get"]}) as one:
        head, body = await ask(one, post(CALL, JSON + "Accept: text/event-stream\r\n"))
    assert b"Content-Type: text/event-stream\r\n" in head
    assert body.startswith(b"event: message\ndata: {")
    assert json.loads(body.split(b"data: ")[1])["error"]["code"] == -32010


async def test_what_can_not_be_judged_is_a_json_rpc_error_without_id() -> None:
    async with lab(Server(), {"allowedTools": ["get"]}) as one:
        head, body = await ask(one, post(b"{"))
        (span,) = await one.recorder.wait()
    assert head.startswith(b"HTTP/1.1 400 ")
    found = json.loads(body)
    assert (found["id"], found["error"]["code"], found["error"]["data"]["reason"]) == (None, -32700, "mcp_unreadable")
    assert found["error"]["data"]["rule"] == "MCPRoute default/mcp-0"
    assert span.attributes["clrk.egress.deny_reason"] == "mcp_unreadable"
    assert span.attributes["clrk.egress.route"] == "MCPRoute default/mcp-0"


# --- counting -------------------------------------------------------------------------------------------------------


async def test_concurrent_calls_never_overshoot() -> None:
    release = asyncio.Event()
    seen: list[bytes] = []

    async def slow(reader, writer) -> None:
        while True:
            seen.append((await read_request(reader))[1])
            await release.wait()
            writer.write(answer(b'{"jsonrpc":"2.0","id":1,"result":{}}', headers=JSON))

    async with lab(slow, {"maxCallsPerExecution": 5}) as one:
        asking = [asyncio.create_task(ask(one, post(raw(call("get", at))))) for at in range(40)]
        while sum(task.done() for task in asking) < 35:
            await asyncio.sleep(0.01)
        release.set()
        bodies = [json.loads(body) for _, body in await asyncio.gather(*asking)]
        _, last = await ask(one, post(raw(call("get"))))
        _, other = await ask(one, post(raw({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})))
    assert len(seen) == 6  # with the list
    assert sum("result" in body for body in bodies) == 5
    assert {body["error"]["data"]["reason"] for body in bodies if "error" in body} == {"tool_calls_exceeded"}
    assert json.loads(last)["error"]["message"] == (
        f"clrk: {RULE} allows 5 tool calls in one execution (maxCallsPerExecution)"
    )
    assert "result" in json.loads(other)


async def test_a_call_that_never_went_out_does_not_count() -> None:
    server = Server()
    async with upstream(server) as port:
        pass
    async with laboratory(
        gateway=aliased(port, NAME), rules=ALLOW, recognise="real", config=routes(maxCallsPerExecution=1)
    ) as one:
        for _ in range(2):
            head, _ = await ask(one, post(raw(call("get"))))
            assert head.startswith(b"HTTP/1.1 502 ")


# --- only watching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["Shadow", "Record"])
async def test_where_the_gateway_only_watches_nothing_changes(mode: str) -> None:
    server = Server(answer(raw(PAGE), headers=JSON))
    async with lab(server, {"deniedTools": ["rm"]}, mode=mode) as one:
        assert (await ask(one, post(CALL)))[1] == raw(PAGE)
        assert (await ask(one, post(LIST, BOTH + "Accept-Encoding: br\r\n")))[1] == raw(PAGE)
        assert (await ask(one, post(b"{")))[1] == raw(PAGE)
        denied, listed, unread = await one.recorder.wait(3)
    assert server.bodies == [CALL, LIST, b"{"]
    assert b"Accept-Encoding: br\r\n" in server.heads[1]
    assert denied.attributes["clrk.egress.would_deny"] == "tool_denied"
    assert "clrk.egress.would_deny" not in listed.attributes
    assert unread.attributes["clrk.egress.would_deny"] == "mcp_unreadable"
    assert "clrk.egress.deny_reason" not in denied.attributes


async def test_a_host_that_no_route_names_is_not_governed() -> None:
    server = Server()
    async with lab(server, {"deniedTools": ["rm"]}) as one:
        other = post(CALL).replace(NAME.encode(), b"other.example.com", 1)
        assert b"result" in (await ask(one, other, "other.example.com"))[1]
    assert server.bodies == [CALL]


# --- together with a budget -----------------------------------------------------------------------------------------


async def test_neither_a_budget_nor_an_mcp_route_is_a_way_around_the_other() -> None:
    budget = {"filters": [{"type": "TokenBudget", "tokenBudget": {"maxTokensPerDay": 5}}]}
    matches = {"matches": [{"provider": "openai_compatible", "hostnames": [NAME]}]}
    ai_route = {"kind": "AIProviderRoute", "metadata": {"name": "ai"}, "spec": {"rules": [budget | matches]}}
    both = routes(deniedTools=["rm"]) | {"ai_routes": [ai_route]}
    server = Server()
    chat = {"jsonrpc": "2.0", "id": 1, "method": "x/y", "model": "m", "messages": [{"role": "user", "content": "hi"}]}
    async with (
        upstream(server) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, recognise="real", config=both) as one,
    ):
        for body in (raw(chat), CALL):
            await ask(one, post(body, target="/v1/chat/completions"))
        spans = await one.recorder.wait(2)
    assert server.bodies == []
    assert all(span.attributes["clrk.egress.deny_reason"] for span in spans)
