"""Budgets on the way of real bytes: sockets, TLS, the relay, and the ledger in its file."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json

import pytest
from budget_runs import ai_route
from egress_lab import Lab, Wire, aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

from clrk.gateway.budget import Amount, Balance
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import StatusCode

HOST = "api.openai.com"
USAGE = {
    "id": "chatcmpl-1",
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5},
}


def _rule(**budget) -> dict:
    return {"filters": [{"type": "TokenBudget", "tokenBudget": budget}]}


def _post(**more) -> bytes:
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Provider:
    """Answers each call when it is let; counts what came."""

    def __init__(self) -> None:
        self.authority = Authority("upstream")
        self.requests: list[bytes] = []
        self.go = asyncio.Event()
        self.go.set()
        self.response = answer(json.dumps(USAGE).encode(), headers="Content-Type: application/json\r\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            self.requests.append(head + body)
            await self.go.wait()
            writer.write(self.response if head.startswith(b"POST") else answer(b"{}"))
            await writer.drain()


def _lab(provider: Provider, port: int, *rules: dict, **options):
    spec = {**aliased(port, HOST), **options.pop("spec", {})}
    return laboratory(
        gateway=spec, rules=[{"hostnames": [HOST]}], recognise="real", upstream_ca=provider.authority.cert_pem,
        config={"ai_routes": [ai_route(*rules)]}, **options,
    )  # fmt: skip


def _server(provider: Provider):
    return upstream(provider.serve, provider.authority.server_context([HOST]))


async def _ask(wire: Wire, request: bytes) -> tuple[int, dict[str, str], bytes]:
    wire.writer.write(request)
    head, body = await wire.response()
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers, body


def _taken(lab: Lab) -> Balance:
    entries = lab.service._governance.budgets.ledger
    day = next(iter(entries._open().execute("SELECT window FROM accounts WHERE window NOT LIKE 'run:%'")))[0]
    return entries.entries(day, 10)[0].balance


async def test_a_hundred_calls_at_once_against_a_budget_for_ten(tmp_path):
    provider = Provider()
    provider.go.clear()
    ledger = BudgetLedger(tmp_path / "budgets.db")
    # A call of this size is taken for at most 300 tokens; it uses 15.
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=2_400), ledger=ledger) as lab:
        wires = await asyncio.gather(*(lab.dial_tls(HOST) for _ in range(100)))
        calls = [asyncio.ensure_future(_ask(wire, _post(max_tokens=100))) for wire in wires]
        async with asyncio.timeout(30):
            while sum(call.done() for call in calls) + len(provider.requests) < 100:
                await asyncio.sleep(0.01)
        assert 8 <= len(provider.requests) <= 12
        assert _taken(lab).taken.tokens <= 2_400
        provider.go.set()
        answers = await asyncio.gather(*calls)
        gone = [status for status, _, _ in answers].count(200)
        assert gone == len(provider.requests)
        assert [status for status, _, _ in answers].count(429) == 100 - gone
        await lab.recorder.wait(100)
        assert _taken(lab) == Balance(Amount(15 * gone, _taken(lab).used.nano_usd))
        # Each connection goes on, and what was not used is there again.
        status, _, _ = await _ask(
            wires[answers.index(next(one for one in answers if one[0] == 429))], _post(max_tokens=9)
        )
        assert status == 200


async def test_a_reload_forgets_nothing_that_a_run_has_spent():
    provider = Provider()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerExecution=350)) as lab:
        for sent in (1, 2, 3):  # 15 of them each; what a call may use at most fits once
            wire = await lab.dial_tls(HOST)
            status, _, _ = await _ask(wire, _post(max_tokens=100))
            assert status == 200
            await lab.recorder.wait(sent)
            other = ai_route(_rule(maxTokensPerExecution=350 - 15 * sent if sent == 3 else 350))
            config = lab.config.model_copy(update={"ai_routes": [other]})
            lab.service.reconfigure(config)
            lab.egress.reconfigure(config.gateways[0])
            gc.collect()  # nobody holds the budgets of the rules before
        status, _, body = await _ask(await lab.dial_tls(HOST), _post(max_tokens=290))
        assert status == 429
        assert "maxTokensPerExecution is 305, 45 used" in json.loads(body)["error"]["message"]


async def test_a_run_that_has_ended_is_no_run_that_goes_on():
    provider = Provider()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerExecution=1_000)) as lab:
        assert (await _ask(await lab.dial_tls(HOST), _post(max_tokens=100)))[0] == 200
        await lab.recorder.wait(1)
        held = lab.egress._acceptor.way_out  # whoever still holds on to it, the run is over
        assert [item["execution"] for item in lab.service.report_budgets(None)["items"]] == [
            None, lab.identity.invocation_id,
        ]  # fmt: skip
        await lab.egress.close()
        assert [item["execution"] for item in lab.service.report_budgets(None)["items"]] == [None]
        assert held is not None


async def test_a_denied_call_tells_the_agent_and_the_trace_and_the_connection_goes_on():
    provider = Provider()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=50)) as lab:
        wire = await lab.dial_tls(HOST)
        status, headers, body = await _ask(wire, _post(max_tokens=100))
        assert (status, headers["content-type"], headers["x-should-retry"]) == (429, "application/json", "false")
        assert 0 < int(headers["retry-after"]) <= 86_400
        assert "maxTokensPerDay is 50, 0 used, 50 left" in json.loads(body)["error"]["message"]
        (span,) = await lab.recorder.wait(1)
        assert (span.name, span.status.code) == ("chat gpt-4o", StatusCode.ERROR)
        found = span.attributes
        assert found[attr.CLRK_BUDGET_DENIED] is True
        assert found[attr.CLRK_BUDGET_ROUTE] == "default/llm"
        assert (found[attr.CLRK_BUDGET_DAILY_USED], found[attr.CLRK_BUDGET_DAILY_MAX]) == (0, 50)
        assert found[attr.CLRK_EGRESS_DENY_REASON] == found[attr.ERROR_TYPE] == "budget_exceeded"
        assert found[attr.CLRK_EGRESS_ROUTE] == "AIProviderRoute default/llm rules[0]"
        assert found[attr.HTTP_RESPONSE_STATUS_CODE] == 429
        assert found[attr.GEN_AI_REQUEST_MODEL] == "gpt-4o"
        assert provider.requests == []
        status, _, _ = await _ask(wire, f"GET /v1/models HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        assert status == 200


def _event(text: str) -> bytes:
    chunk = {"id": "c", "model": "gpt-4o", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def test_a_stream_is_cut_between_two_events_and_ends_cleanly():
    provider = Provider()
    gone = asyncio.Event()

    async def stream(reader, writer):
        head, body = await read_request(reader)
        provider.requests.append(head + body)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(10_000):
                raw = _event("word " * 100)
                for piece in (raw[:50], raw[50:]):  # events come in pieces
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
        finally:
            gone.set()

    provider.serve = stream
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerExecution=3_000)) as lab:
        wire = await lab.dial_tls(HOST)
        wire.writer.write(_post(stream=True))
        async with asyncio.timeout(20):
            raw = await wire.reader.read(-1)
            await gone.wait()  # the upstream is told to stop
        assert raw.endswith(b"0\r\n\r\n")
        _, _, rest = raw.partition(b"\r\n\r\n")
        body = b""
        while not rest.startswith(b"0\r\n"):
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        events = body.split(b"\n\n")
        assert events.pop() == b""
        *passed, last = [json.loads(event.partition(b"data: ")[2]) for event in events]
        assert "maxTokensPerExecution is reached" in last["error"]["message"]
        assert 20 < len(passed) < 2_000  # some 125 tokens each; what is read at once is judged at once
        assert b"accept-encoding: identity" in provider.requests[0].lower()
        (span,) = await lab.recorder.wait(1)
        assert span.attributes[attr.ERROR_TYPE] == "budget_exceeded"
        assert attr.CLRK_BUDGET_DENIED not in span.attributes  # it went out, and counts as a call
        assert 125 * len(passed) <= _taken(lab).used.tokens < 125 * len(passed) + 500


async def test_an_agent_that_leaves_has_paid():
    provider = Provider()
    provider.go.clear()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=5_000)) as lab:
        for spent in range(1, 4):
            wire = await lab.dial_tls(HOST)
            wire.writer.write(_post(max_tokens=1_000))
            while len(provider.requests) < spent:
                await asyncio.sleep(0.01)
            wire.close()
            await lab.recorder.wait(spent)
            assert _taken(lab).used.tokens >= 1_000 * spent
            assert _taken(lab).reserved == Amount()


async def test_a_gateway_that_watches_lets_it_go_and_says_so():
    provider = Provider()
    watching = {"mode": "Shadow"}
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=5), spec=watching) as lab:
        wire = await lab.dial_tls(HOST)
        assert (await _ask(wire, _post(max_tokens=100)))[0] == 200
        (span,) = await lab.recorder.wait(1)
        assert span.attributes[attr.CLRK_EGRESS_WOULD_DENY] == "budget_exceeded"
        assert attr.CLRK_BUDGET_DENIED not in span.attributes
        assert _taken(lab).used.tokens == 15


async def test_a_call_that_reaches_nobody_costs_nothing():
    provider = Provider()
    async with _lab(provider, 9, _rule(maxTokensPerDay=5_000)) as lab:  # nobody listens on that port
        wire = await lab.dial_tls(HOST)
        assert (await _ask(wire, _post(max_tokens=100)))[0] == 502
        await lab.recorder.wait(1)
        assert _taken(lab) == Balance()


@pytest.mark.parametrize(
    "request_head",
    [
        "GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
        "POST /v1/batches HTTP/1.1\r\nContent-Length: 0\r\n",
        "HEAD /v1/chat/completions HTTP/1.1\r\nContent-Length: 0\r\nX-HTTP-Method-Override: POST\r\n",
    ],
)
async def test_what_can_not_be_metered_does_not_go_out(request_head):
    provider = Provider()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=5_000)) as lab:
        wire = await lab.dial_tls(HOST)
        wire.writer.write(f"{request_head}Host: {HOST}\r\n\r\n".encode())
        async with asyncio.timeout(25):
            assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 403 ")
        (span,) = await lab.recorder.wait(1)
        assert span.attributes[attr.CLRK_EGRESS_DENY_REASON] == "budget_unmetered"
        assert provider.requests == []


@pytest.mark.parametrize("first", [b"post /v1/chat/completions HTTP/1.1\r\n", b"\x16\x03\x01", b"\x00\x01binary"])
async def test_nothing_but_http_goes_to_a_host_with_a_budget(first):
    provider = Provider()
    async with _server(provider) as port, _lab(provider, port, _rule(maxTokensPerDay=5_000)) as lab:
        wire = await lab.dial_tls(HOST)
        wire.writer.write(first + b"\r\n\r\n")
        async with asyncio.timeout(25):
            with contextlib.suppress(OSError):
                assert await wire.reader.read(-1) == b""
        (span,) = await lab.recorder.wait(1)
        assert (span.name, span.attributes[attr.CLRK_EGRESS_DENY_REASON]) == (attr.SPAN_EGRESS_DIAL_DENIED, "http_only")
        assert provider.requests == []


@pytest.mark.parametrize("rules", [({},), (_rule(maxTokensPerDay=100_000),)], ids=["free", "budgeted"])
async def test_an_event_that_is_held_back_reaches_the_agent_when_its_stream_breaks(rules):
    provider = Provider()
    half = b'data: {"id":"c","model":"gpt-4o","cho'

    async def stream(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (_event("Hello"), half):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        writer.close()

    provider.serve = stream
    async with _server(provider) as port, _lab(provider, port, *rules) as lab:
        wire = await lab.dial_tls(HOST)
        wire.writer.write(_post(stream=True))
        async with asyncio.timeout(20):
            raw = await wire.reader.read(-1)
        assert _event("Hello") in raw
        assert raw.endswith(b"%x\r\n%s\r\n" % (len(half), half))
