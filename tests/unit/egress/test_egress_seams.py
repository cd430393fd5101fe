"""Attacks on what lies between the parts: budgets, tool policies, credentials, modes and reloads on one exchange."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socket

import pytest
from budget_runs import ai_route
from credential_policies import AWS, SIGV4, policy
from credentials_lab import BEDROCK, serving
from egress_lab import aliased, answer, laboratory, read_request, upstream
from test_egress_budgets import HOST, USAGE, Provider, _ask, _lab, _post, _rule, _server, _taken
from test_egress_governor import CHUNKED, Judge, exchange, post
from test_egress_mcp import JSON, Server, call, raw
from test_egress_mcp import NAME as MCP
from test_egress_mcp import lab as mcp_lab
from test_egress_mcp import post as mcp_post

from clrk.gateway.egress import upload
from clrk.gateway.egress.channel import Channel
from clrk.gateway.govern import Cut

LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


# --- a reload while a run goes on -----------------------------------------------------------------------------------


async def test_a_reload_forgets_no_tool_call() -> None:
    server = Server()
    async with mcp_lab(server, {"maxCallsPerExecution": 1}) as one:
        wire = await one.dial(MCP, 80)
        for _ in range(3):
            wire.writer.write(mcp_post(raw(call("get"))))
            await wire.response()
            one.service.reconfigure(one.config)
            one.egress.reconfigure(one.config.gateways[0])
    assert len(server.bodies) == 1


# --- names ----------------------------------------------------------------------------------------------------------


async def test_a_plain_connection_to_an_address_is_metered_by_its_host_header() -> None:
    server = Server(answer(json.dumps(USAGE).encode(), headers=JSON))
    matches = {"matches": [{"provider": "openai_compatible", "hostnames": ["llm.internal"]}]}
    config = {"ai_routes": [ai_route(_rule(maxTokensPerDay=5) | matches)]}
    rules = [{"cidrs": ["127.0.0.1/32"]}]
    async with (
        upstream(server) as port,
        laboratory(gateway={}, rules=rules, recognise="real", config=config) as lab,
    ):
        for kind in (b"application/json", b"text/plain"):
            request = _post().replace(HOST.encode(), b"llm.internal:%d" % port).replace(b"application/json", kind)
            wire = await lab.dial("127.0.0.1", port)
            assert (await _ask(wire, request))[0] in (403, 429)
    assert server.bodies == []


# --- how a governed answer ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["response_head", "response_data", "response_end"])
async def test_an_answer_that_a_bug_ends_has_no_clean_end(step: str) -> None:
    _, got, (span,) = await exchange(Judge(fails=step), post(), CHUNKED + b"5\r\nreply\r\n0\r\n\r\n")
    assert not got.endswith(b"0\r\n\r\n")
    assert span.attributes["error.type"] == "governor_failed"


async def test_a_cut_without_a_word_of_its_own_is_no_clean_end() -> None:
    """What is cut in the midst of an event, or of a coding, would look like a whole answer."""
    judge = Judge(response=lambda chunk: Cut(b"", "budget_exceeded", "tokens ran out"))
    _, got, (span,) = await exchange(judge, post(), CHUNKED + b"5\r\nreply\r\n")
    assert not got.endswith(b"0\r\n\r\n")
    assert span.attributes["error.type"] == "budget_exceeded"


async def test_a_list_that_only_we_can_not_read_is_no_empty_answer() -> None:
    server = Server(answer(b"[" * 100_000 + b'"tools"' + b"]" * 100_000, headers=JSON))
    async with mcp_lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(MCP, 80)
        found = await wire.ask(mcp_post(raw(LIST)))
        (span,) = await one.recorder.wait()
    assert not found.endswith(b"0\r\n\r\n")
    assert span.attributes["error.type"] == "mcp_unfilterable"


# --- whatever goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prepare", "send_head"])
async def test_a_bug_of_ours_has_a_span_and_an_answer(monkeypatch, where: str) -> None:
    def fail(*_args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(upload.Upload, where, fail)
    judge = Judge()
    _, got, (span,) = await exchange(judge, post())
    assert got.startswith(b"HTTP/1.1 500 ")
    assert span.attributes["error.type"] == "internal_error"
    assert "a bug" not in span.status.message
    assert len(judge.settled) <= 1


async def test_what_can_not_be_signed_has_a_span_and_an_answer() -> None:
    one = policy(SIGV4, hostnames=[BEDROCK])
    request = b"POST /model/x/converse?\xe4=1 HTTP/1.1\r\nHost: %b\r\nX-Amz-Meta: \xff\xe4\r\n" % BEDROCK.encode()
    async with serving(one, secrets=AWS) as (lab, _):
        wire = await lab.dial_tls(BEDROCK)
        got = await wire.ask(request + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
        await lab.recorder.wait()
    assert got.startswith(b"HTTP/1.1 ")


async def test_an_agent_that_left_while_its_call_was_dialled_sends_nothing() -> None:
    judge, dialled, go = Judge(), asyncio.Event(), asyncio.Event()
    seen = []

    async def handle(reader, writer):
        seen.append(await read_request(reader))
        writer.write(answer(b"reply"))

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, MCP), rules=[{"hostnames": [MCP]}], govern=lambda *_: judge) as lab,
    ):
        dial = lab.egress._acceptor.way_out.upstream._dial_directly

        async def slowly(target):
            dialled.set()
            await go.wait()
            return await dial(target)

        lab.egress._acceptor.way_out.upstream._dial_directly = slowly
        wire = await lab.dial(MCP, 80)
        wire.writer.write(post().replace(b"api.example.com", MCP.encode()))
        await dialled.wait()
        wire.reset()
        await asyncio.sleep(0.1)
        go.set()
        (span,) = await lab.recorder.wait()
    assert seen == []
    assert judge.settled == [(None, False)]
    assert span.attributes["error.type"] == "agent_disconnected"


# --- where the gateway only watches ---------------------------------------------------------------------------------


async def test_under_watch_a_call_over_its_output_limit_is_counted() -> None:
    provider = Provider()
    rule = _rule(maxTokensPerDay=5_000, maxOutputTokensPerRequest=10)
    async with _server(provider) as port, _lab(provider, port, rule, spec={"mode": "Shadow"}) as lab:
        wire = await lab.dial_tls(HOST)
        assert (await _ask(wire, _post(max_tokens=100)))[0] == 200
        (span,) = await lab.recorder.wait()
        assert span.attributes["clrk.egress.would_deny"] == "budget_output_limit"
        assert _taken(lab).used.tokens == 15


async def test_under_watch_a_bug_in_judging_changes_nothing() -> None:
    _, got, (span,) = await exchange(Judge(fails="judge"), post(), mode="Shadow")
    assert got.endswith(b"reply")
    assert span.attributes["clrk.egress.would_deny"] == "governor_failed"


async def test_under_watch_a_body_too_large_to_be_judged_goes_out(monkeypatch) -> None:
    monkeypatch.setattr(upload, "MAX_GOVERNED_BYTES", 4)
    judge = Judge()
    seen, got, (span,) = await exchange(judge, post(b"question" * 100_000), mode="Shadow")
    assert seen[0][1] == b"question" * 100_000
    assert got.endswith(b"reply")
    assert span.attributes["clrk.egress.would_deny"] == "body_too_large"
    assert judge.judged == judge.settled == []


# --- a change of protocol -------------------------------------------------------------------------------------------


async def test_a_governed_call_becomes_no_tunnel() -> None:
    provider = Provider()
    provider.response = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n"
    request = _post(max_tokens=10).replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n", 1)
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=5_000)) as lab:
        wire = await lab.dial_tls(HOST)
        assert (await _ask(wire, request))[0] == 502
    assert b"upgrade: foo" not in provider.requests[0].lower()


# --- what hides an answer -------------------------------------------------------------------------------------------


async def test_a_coding_in_a_second_header_hides_no_list() -> None:
    page = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "get"}, {"name": "rm"}]}}
    packed = gzip.compress(raw(page))
    server = Server(answer(packed, headers=JSON + "Content-Encoding: identity\r\nContent-Encoding: gzip\r\n"))
    async with mcp_lab(server, {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(MCP, 80)
        found = await wire.ask(mcp_post(raw(LIST)).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    assert packed not in found
    assert b'"get"' in found
    assert b'"rm"' not in found


# --- what is charged ------------------------------------------------------------------------------------------------


async def test_an_answer_that_nobody_could_keep_is_charged_by_its_size() -> None:
    """An agent that fills its own run's allowance makes the reader give up; the answer's length is still seen."""
    provider = Provider()
    long = {**USAGE, "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "word " * 20_000}}]}
    provider.response = answer(json.dumps(long).encode(), headers="Content-Type: application/json\r\n")
    provider.go.clear()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=1_000_000)) as lab:
        wire = await lab.dial_tls(HOST)
        asking = asyncio.ensure_future(_ask(wire, _post()))
        while not provider.requests:
            await asyncio.sleep(0.01)
        allowance = lab.egress._acceptor.way_out.allowance
        taken = allowance.left
        assert allowance.take(taken)
        provider.go.set()
        assert (await asking)[0] == 200
        await lab.recorder.wait()
        allowance.give_back(taken)
        assert _taken(lab).used.tokens > 20_000


@pytest.mark.parametrize(("limit", "status"), [({}, 400), ({"max_output_tokens": 50}, 200)])
async def test_what_runs_in_the_background_has_a_limit(limit: dict, status: int) -> None:
    """Its answer comes before its usage, and is read with a GET that costs nothing."""
    provider = Provider()
    queued = {"id": "resp_1", "object": "response", "status": "queued", "model": "gpt-5", "output": [], "usage": None}
    provider.response = answer(json.dumps(queued).encode(), headers="Content-Type: application/json\r\n")
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=50_000)) as lab:
        wire = await lab.dial_tls(HOST)
        request = _post(background=True, input="hi", **limit).replace(b"/v1/chat/completions", b"/v1/responses")
        assert (await _ask(wire, request))[0] == status
    assert len(provider.requests) == (status == 200)


async def test_the_case_of_a_path_is_no_way_around_a_budget() -> None:
    provider = Provider()
    rule = _rule(maxTokensPerDay=5) | {"matches": [{"provider": "openai", "endpoints": ["/v1/chat/*"]}]}
    async with _server(provider) as port, _lab(provider, port, rule) as lab:
        wire = await lab.dial_tls(HOST)
        for path in (b"/v1/chat/completions", b"/V1/Chat/Completions"):
            assert (await _ask(wire, _post().replace(b"/v1/chat/completions", path)))[0] in (403, 429)
    assert provider.requests == []


# --- memory ---------------------------------------------------------------------------------------------------------


async def test_denials_that_nobody_reads_take_no_memory() -> None:
    """An agent that pipelines what is denied, and never reads, is not read on."""
    async with mcp_lab(Server(), {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(MCP, 80)
        wire.writer.transport.pause_reading()
        with socket.socket(fileno=os.dup(wire.writer.get_extra_info("socket").fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(1)
            request = mcp_post(raw(call("rm", "x" * 10_000)))  # an id that is answered

            def send() -> None:
                for _ in range(3_000):  # 30 MB: several times what sockets hold
                    sock.sendall(request)

            with pytest.raises(TimeoutError):
                await asyncio.to_thread(send)


async def test_pipelined_denials_leave_others_their_turn() -> None:
    request = b"GET / HTTP/1.1\r\nHost: %b\r\nUpgrade: x\r\n\r\n" % MCP.encode()
    async with mcp_lab(Server(), {"deniedTools": ["rm"]}) as one:
        wire = await one.dial(MCP, 80)
        wire.writer.write(request * 1_000)
        most = before = 0
        async with asyncio.timeout(20):
            while before < 1_000:
                await asyncio.sleep(0)
                most, before = max(most, len(one.spans) - before), len(one.spans)
    assert most < 10


async def test_pipelined_requests_are_read_no_faster_than_they_are_answered(monkeypatch) -> None:
    """What is taken for one head and put back must not make room for more each time."""
    sizes = [0]
    received = Channel.data_received

    def data_received(self: Channel, data: bytes) -> None:
        received(self, data)
        sizes.append(self._size)

    monkeypatch.setattr(Channel, "data_received", data_received)

    async def handle(reader, writer) -> None:
        while True:
            await read_request(reader)
            await asyncio.sleep(0.002)
            writer.write(answer(b"ok"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, MCP), rules=[{"hostnames": [MCP]}]) as lab:
        wire = await lab.dial(MCP, 80)
        flood = asyncio.ensure_future(_flood(wire, b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % MCP.encode() * 10_000))
        await lab.recorder.wait(100)
        flood.cancel()
    assert max(sizes) < 1 << 20


async def _flood(wire, data: bytes) -> None:
    while True:
        wire.writer.write(data)
        await wire.writer.drain()
