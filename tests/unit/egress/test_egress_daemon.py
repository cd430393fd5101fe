"""Calls of a DaemonAgent: each is a trace of its own, or continues the agent's span, and none names an invocation."""

from __future__ import annotations

import json

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME]}]
GET = b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n"


def replying(seen: list[bytes]):
    async def handle(reader, writer):
        while True:
            head, _ = await read_request(reader)
            seen.append(head)
            writer.write(answer(b"hi"))
            await writer.drain()

    return handle


def sent(head: bytes, name: str) -> list[str]:
    lines = head.decode().lower().split("\r\n")
    return [line.partition(": ")[2] for line in lines if line.startswith(f"{name}:")]


async def test_every_call_is_the_root_of_its_own_trace():
    seen: list[bytes] = []
    async with (
        upstream(replying(seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, daemon=True) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        for _ in range(2):
            wire.writer.write(GET)
            assert (await wire.response())[1] == b"hi"
        spans = await lab.recorder.wait(2)
    assert len({span.trace_id for span in spans} | {lab.identity.context.trace_id}) == 3
    for span, head in zip(spans, seen, strict=True):
        assert span.parent_span_id == ""
        assert sent(head, "traceparent") == [f"00-{span.trace_id}-{span.span_id}-01"]
        assert sent(head, "tracestate") == sent(head, "baggage") == []
    begun = [(facts["trace_id"], facts["span_id"], facts["parent_span_id"]) for facts in lab.recorder.begun]
    assert begun == [(span.trace_id, span.span_id, "") for span in spans]  # what a killed gateway leaves says the same


async def test_the_agents_own_span_is_the_parent_whatever_its_trace():
    seen: list[bytes] = []
    trace_id = "ab" * 16
    async with (
        upstream(replying(seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, daemon=True) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        own = f"traceparent: 00-{trace_id}-00000000000000cd-00\r\ntracestate: mine=2\r\n\r\n"
        wire.writer.write(GET[:-2] + own.encode())
        await wire.response()
        (span,) = await lab.recorder.wait()
    assert (span.trace_id, span.parent_span_id) == (trace_id, "00000000000000cd")
    assert sent(seen[0], "traceparent") == [f"00-{trace_id}-{span.span_id}-00"]
    assert sent(seen[0], "tracestate") == ["mine=2"]


@pytest.mark.parametrize(
    "own",
    [
        "00-" + "0" * 32 + "-00000000000000cd-01",
        "00-" + "ab" * 16 + "-" + "0" * 16 + "-01",
        "ff-" + "ab" * 16 + "-00000000000000cd-01",
        "junk",
    ],
)
async def test_a_broken_traceparent_is_as_good_as_none(own):
    seen: list[bytes] = []
    async with (
        upstream(replying(seen)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, daemon=True) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET[:-2] + f"traceparent: {own}\r\n\r\n".encode())
        await wire.response()
        (span,) = await lab.recorder.wait()
    assert (span.parent_span_id, span.trace_id == "ab" * 16) == ("", False)
    assert sent(seen[0], "traceparent") == [f"00-{span.trace_id}-{span.span_id}-01"]


async def test_what_is_refused_is_a_trace_of_its_own_too():
    async with laboratory(gateway={}, rules=ALLOW, daemon=True) as lab:
        tunnel = await lab.dial("192.0.2.9", 9999)
        tunnel.writer.write(b"\x01\x02")
        forged = await lab.dial("192.0.2.9", 80, stamp=b"GET / HTTP/1.1\r\n\r\n")
        asking = await lab.dial("192.0.2.9", 80)
        raw = await asking.ask(b"GET / HTTP/1.1\r\nHost: 192.0.2.9\r\nConnection: close\r\n\r\n")
        with pytest.raises(IndexError):  # the answer has no address
            await lab.resolve("evil.example")
        spans = await lab.recorder.wait(4)
        forged.close()
    names = {"egress.dial.denied", "egress.proxy.malformed", "egress.dns.denied"}
    assert {span.name for span in spans} == names
    assert {span.parent_span_id for span in spans} == {""}
    assert len({span.trace_id for span in spans} | {lab.identity.context.trace_id}) == 5
    problem = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert problem["status"] == 403
    assert "invocation_id" not in problem
