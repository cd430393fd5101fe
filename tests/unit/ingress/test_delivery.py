"""Delivery over real connections: bodies of every kind, kept connections, slow callers, and callers that vanish."""

import asyncio
import io
import json
import resource

import pytest
from gateway_caller import running_gateway
from scripted_agents import AGENTS, CURL, agent

from clrk.core.ids import new_invocation_id
from clrk.core.messages import StartRun, StopRun

MEGABYTE = 1_000_000
DECODE = 'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin).get("data_base64", "")))'
DATA = f"python3 -c 'import base64,json,sys; {DECODE}'"
POST_BIG = f"head -c 8000000 /dev/zero | {CURL} --data-binary @- $URL/v1/response"
STATUS = "-H 'X-Clrk-Status: {}'"
EXTRA = [
    agent("bytes", DATA),
    agent("whole", "printf hello", streaming={"enabled": False}, content_type="text/plain"),
    agent("wholemute", "printf part; sleep 600", streaming={"enabled": False}),
    agent("wholebytes", DATA, streaming={"enabled": False}),
    agent("postgate", f"{CURL} -d early $URL/v1/response; read -r < \"$GATE\"", mode="Metadata"),
    agent("postbig", f"{POST_BIG}; sleep 600", mode="Metadata"),
    agent("post205", f"{CURL} -d body {STATUS.format(205)} $URL/v1/response", mode="Metadata"),
    agent("post304", f"{CURL} -d body {STATUS.format(304)} $URL/v1/response", mode="Metadata"),
    agent("post599", f"{CURL} -d body {STATUS.format(599)} $URL/v1/response", mode="Metadata"),
    agent("trickle", "for i in 1 2 3; do printf $i; sleep 0.05; done"),
]  # fmt: skip


@pytest.fixture
async def ingress(tmp_path):
    async with running_gateway([*AGENTS, *EXTRA], tmp_path, auto_decompress=False) as running:
        yield running
    assert running.runtime.app._parts.invocations._held_bytes == 0


async def exchange(gateway, request, answers=1):
    """Send bytes on one connection that the last request closes; return what comes back, split into answers."""
    reader, writer = await gateway.raw(request)
    async with asyncio.timeout(20):
        raw = await reader.read()
    writer.close()
    parts = raw.split(b"HTTP/1.1 ")[1:]
    assert len(parts) == answers, raw
    return [(int(part[:3]), *part.partition(b"\r\n\r\n")[::2]) for part in parts]


def head(line, *headers, close=True):
    fields = [line, "Host: x", *headers, *(["Connection: close"] if close else []), "", ""]
    return "\r\n".join(fields).encode()


async def ended(gateway, invocation_id):
    """Return the record once the invocation has ended."""
    invocations = gateway.runtime.app._parts.invocations
    await gateway.runtime.until(lambda: (found := invocations.record(invocation_id)) and found.phase.ended)
    return invocations.record(invocation_id)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "wholebytes"])
@pytest.mark.parametrize("body", [b"", b"\0", bytes(range(256)) * 3, b"\r\n0\r\n\r\n", b"\xff" * 20 * MEGABYTE])
async def test_any_bytes_go_in_and_come_out(ingress, name, body):
    status, _, answer = await ingress.call(f"/agents/{name}", data=io.BytesIO(body))
    assert (status, answer == body) == (200, True)


async def test_whole_answers_have_a_length_and_streamed_ones_do_not(ingress):
    headers = (await ingress.call("/agents/whole"))[1]
    assert (headers["Content-Length"], headers["Content-Type"]) == ("5", "text/plain")
    assert "Content-Length" not in (await ingress.call("/agents/text"))[1]


@pytest.mark.parametrize(("name", "length"), [("text", 5), ("whole", 5), ("silent", 0), ("flood", 200_000_000)])
async def test_head_says_what_get_would_and_has_no_body(ingress, name, length):
    ((status, fields, body),) = await exchange(ingress, head(f"HEAD /agents/{name} HTTP/1.1"))
    assert (status, body) == (200, b"")
    assert f"Content-Length: {length}".encode() in fields.split(b"\r\n")


async def test_head_and_options_are_invocations_like_any_other(ingress):
    for method in ("HEAD", "OPTIONS"):
        _, headers, _ = await ingress.call("/agents/echo", method)
        record = await ended(ingress, headers["X-Clrk-Invocation-ID"])
        assert (record.phase, record.status) == ("Succeeded", 200)
        span = await ingress.span(record.invocation_id, "ingress.dispatch")
        assert span["attributes"]["http.request.method"] == method
        assert (span["attributes"]["clrk.resp.bytes"] == 0) is (method == "HEAD")


@pytest.mark.parametrize(("name", "status"), [("post204", 204), ("post205", 205), ("post304", 304)])
async def test_statuses_without_content_never_spoil_the_connection(ingress, name, status):
    """What the agent posts with them would be read as the next answer."""
    request = head(f"GET /agents/{name} HTTP/1.1", close=False) + head("GET /agents/whole HTTP/1.1")
    first, second = await exchange(ingress, request, answers=2)
    assert (first[0], first[2]) == (status, b"")
    assert (second[0], second[2]) == (200, b"hello")


async def test_a_posted_status_goes_out_and_is_recorded(ingress):
    status, headers, body = await ingress.call("/agents/post599")
    assert (status, body) == (599, b"body")
    assert (await ended(ingress, headers["X-Clrk-Invocation-ID"])).status == 599


async def test_trailers_are_accepted_and_never_delivered(ingress):
    request = head("POST /agents/echo HTTP/1.1", "Transfer-Encoding: chunked", "Trailer: ce-late")
    request += b"2\r\nhi\r\n0\r\nce-late: smuggled\r\nce-id: smuggled\r\nX-Clrk-Trigger: smuggled\r\n\r\n"
    ((status, _, body),) = await exchange(ingress, request)
    event = json.loads(body.split(b"\r\n")[1])
    assert (status, event["data_base64"], event["subject"]) == (200, "aGk=", "http")
    assert b"smuggled" not in body


@pytest.mark.parametrize(("limit", "value"), [("_BODY_IDLE_S", 0.1), ("_BODY_TOTAL_S", 0.3)])
async def test_a_body_that_does_not_come_frees_its_slot(ingress, monkeypatch, limit, value):
    """A byte now and then is no way to hold a slot for ever either."""
    monkeypatch.setattr(f"clrk.gateway.ingress.{limit}", value)
    reader, writer = await ingress.raw(head("POST /agents/one HTTP/1.1", "Content-Length: 1000"))

    async def trickle():
        while limit == "_BODY_TOTAL_S":
            writer.write(b"x")
            await asyncio.sleep(0.02)

    sender = asyncio.create_task(trickle())
    async with asyncio.timeout(25):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    sender.cancel()
    writer.close()
    assert not ingress.runtime.app._parts.invocations.running("default", "one")
    assert len(ingress.runtime.received) == 1


# --- connections ------------------------------------------------------------------------------------------------------


async def test_a_kept_connection_carries_nothing_from_one_invocation_to_the_next(ingress):
    trace = "0af7651916cd43dd8448eb211c80319c"
    first = head(
        "POST /agents/echo HTTP/1.1", f"traceparent: 00-{trace}-b7ad6b7169203331-01", "ce-x-tenant: a",
        "Content-Type: text/plain", "Content-Length: 3", close=False,
    ) + b"abc"  # fmt: skip
    answers = await exchange(ingress, first + head("GET /agents/echo HTTP/1.1"), answers=2)
    events = [json.loads(body.split(b"\r\n")[1]) for _, _, body in answers]
    assert events[0]["traceparent"].startswith(f"00-{trace}-")
    assert trace not in events[1]["traceparent"]
    assert events[0]["invocationid"] != events[1]["invocationid"]
    assert {"x-tenant", "data", "datacontenttype"} <= set(events[0])
    assert not {"x-tenant", "data", "data_base64", "datacontenttype"} & set(events[1])


async def test_pipelined_requests_are_answered_in_order(ingress):
    requests = [head(f"GET /agents/{name} HTTP/1.1", close=False) for name in ("trickle", "nobody", "whole")]
    answers = await exchange(ingress, b"".join(requests) + head("GET /agents/fails HTTP/1.1"), answers=4)
    assert [status for status, *_ in answers] == [200, 404, 200, 500]
    fields = [line for _, fields, _ in answers for line in fields.split(b"\r\n")]
    ids = [line for line in fields if line.startswith(b"X-Clrk-Invocation-ID: ")]
    assert len(ids) == 4
    assert len(set(ids)) == 4


async def test_a_caller_that_vanishes_starts_none_of_what_it_pipelined(ingress):
    wanted = new_invocation_id()
    request = head("GET /agents/mute HTTP/1.1", f"X-Clrk-Invocation-ID: {wanted}", close=False)
    _, writer = await ingress.raw(request + head("GET /agents/text HTTP/1.1"))
    await ingress.runtime.until(lambda: ingress.runtime.runs)
    writer.transport.abort()
    assert (await ended(ingress, wanted)).phase == "Cancelled"
    await ingress.runtime.until(lambda: not ingress.runtime.runs)
    assert [m.run_id for m in ingress.runtime.received if isinstance(m, StartRun)] == [wanted]


# --- callers that vanish ----------------------------------------------------------------------------------------------


async def vanishing(gateway, name, *, when, body=b"", length=None):
    """Send a request, vanish when the condition holds; return the record and the dispatch span."""
    wanted = new_invocation_id()
    fields = (f"X-Clrk-Invocation-ID: {wanted}", f"Content-Length: {len(body) if length is None else length}")
    reader, writer = await gateway.raw(head(f"POST /agents/{name} HTTP/1.1", *fields) + body)
    await when(wanted, reader)
    writer.transport.abort()
    record = await ended(gateway, wanted)
    return record, await gateway.span(wanted, "ingress.dispatch")


def check_cancelled(record, span):
    assert (record.phase, record.message) == ("Cancelled", "the caller went away")
    assert span["status"] == {"code": "STATUS_CODE_ERROR", "message": "the caller went away"}
    assert (span["attributes"]["error.type"], span["attributes"]["clrk.phase"]) == ("client_disconnected", "Cancelled")


async def test_before_its_body_is_there(ingress):
    async def admitted(wanted, _):
        await ingress.runtime.until(lambda: ingress.runtime.app._parts.invocations.record(wanted))

    record, span = await vanishing(ingress, "echo", when=admitted, body=b"half", length=100)
    check_cancelled(record, span)
    assert record.started_ns == 0
    assert "http.response.status_code" not in span["attributes"]
    assert len(ingress.runtime.received) == 1


async def test_before_there_is_a_sandbox(ingress):
    async def asked(wanted, _):
        await ingress.runtime.until(lambda: any(isinstance(m, StartRun) for m in ingress.runtime.received))

    wanted = new_invocation_id()
    _, writer = await ingress.raw(head("GET /agents/unstarted HTTP/1.1", f"X-Clrk-Invocation-ID: {wanted}"))
    await asked(wanted, None)
    writer.transport.abort()
    await ingress.runtime.until(lambda: StopRun(wanted) in ingress.runtime.received)
    span = await ingress.span(wanted, "ingress.dispatch")
    assert span["attributes"]["error.type"] == "client_disconnected"
    ingress.runtime.app._parts.invocations.abandon_all()  # the runtime of this test never answers
    assert (await ended(ingress, wanted)).phase == "Cancelled"


@pytest.mark.parametrize("name", ["mute", "wholemute"])
async def test_before_the_answer(ingress, name):
    async def running(wanted, _):
        await ingress.runtime.until(lambda: wanted in ingress.runtime.runs)

    check_cancelled(*await vanishing(ingress, name, when=running))


async def test_during_the_answer(ingress):
    async def reading(_, reader):
        await reader.readuntil(b"ready\n")

    record, span = await vanishing(ingress, "forever", when=reading)
    check_cancelled(record, span)
    assert (record.status, span["attributes"]["http.response.status_code"]) == (200, 200)


async def test_during_a_posted_answer(ingress):
    async def reading(_, reader):
        await reader.readexactly(100)

    check_cancelled(*await vanishing(ingress, "postbig", when=reading))


async def test_after_a_posted_answer_the_agent_goes_on(ingress):
    async def reading(_, reader):
        await reader.readuntil(b"early")

    wanted = new_invocation_id()
    reader, writer = await ingress.raw(head("GET /agents/postgate HTTP/1.1", f"X-Clrk-Invocation-ID: {wanted}"))
    await reading(wanted, reader)
    span = await ingress.span(wanted, "ingress.dispatch")
    writer.transport.abort()
    assert (span["status"]["code"], span["attributes"]["http.response.status_code"]) == ("STATUS_CODE_UNSET", 200)
    ingress.runtime.open_gate()
    record = await ended(ingress, wanted)
    assert (record.phase, record.status) == ("Succeeded", 200)
    assert StopRun(wanted) not in ingress.runtime.received


# --- records ----------------------------------------------------------------------------------------------------------


async def test_a_record_goes_through_its_phases_and_is_pending_before_anything_is_asked_for(ingress, monkeypatch):
    invocations, story = ingress.runtime.app._parts.invocations, []
    keep, send = invocations._telemetry.record_invocation, invocations._commands.send
    monkeypatch.setattr(
        invocations._telemetry, "record_invocation", lambda record: (story.append(record.phase.value), keep(record))
    )
    monkeypatch.setattr(
        invocations._commands, "send", lambda message: (story.append(type(message).__name__), send(message))
    )
    _, headers, _ = await ingress.call("/agents/fails")
    record = await ended(ingress, headers["X-Clrk-Invocation-ID"])
    assert story == ["Pending", "StartRun", "Running", "Failed", "Failed"]  # the last with the status
    assert record.created_ns < record.started_ns < record.ended_ns
    assert (record.status, record.exit_code, record.exit_reason) == (500, 3, "exited")
    assert (record.trigger, record.identity) == ("http", {})
    dispatch = await ingress.span(record.invocation_id, "ingress.dispatch")
    run = await ingress.span(record.invocation_id, "invoke_agent fails")
    assert (record.trace_id, record.dispatch_span_id, record.run_span_id) == (
        dispatch["trace_id"], dispatch["span_id"], run["span_id"],
    )  # fmt: skip


async def test_records_in_memory_are_bounded(ingress, monkeypatch):
    monkeypatch.setattr("clrk.gateway.invocations._MAX_ENDED", 3)
    held = asyncio.create_task(ingress.call("/agents/one"))
    await ingress.runtime.until(lambda: ingress.runtime.runs)
    ids = [(await ingress.call("/agents/text"))[1]["X-Clrk-Invocation-ID"] for _ in range(5)]
    invocations = ingress.runtime.app._parts.invocations
    assert [invocations.record(each) is not None for each in ids] == [False, False, True, True, True]
    assert len(invocations._open) == 1  # what runs is never forgotten
    ingress.runtime.open_gate()
    assert (await held)[0] == 200
    await ingress.runtime.app._parts.telemetry.flush()
    status, _, _ = await ingress.call("/agents/text", headers={"X-Clrk-Invocation-ID": ids[0]})
    assert status == 409  # and what is forgotten is still known


async def test_many_refusals_cost_no_memory(ingress):
    """A caller that is refused again and again leaves records in the store, not in the gateway."""
    ingress.runtime.app._parts.invocations.max_running = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        assert (await ingress.call("/agents/echo", data=io.BytesIO(bytes(100_000))))[0] == 503
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
