"""Every call that an upstream may have seen has begun its span before (CONTRACT section 13, issue 3.6)."""

from __future__ import annotations

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import SpanKind

RULES = [{"hostnames": ["tools.internal"], "ports": [80, 9000]}]
GET = b"GET /a?key=hunter2 HTTP/1.1\r\nHost: tools.internal\r\n\r\n"


async def test_an_http_call_has_begun_when_the_upstream_gets_its_first_byte():
    begun_at_first_byte = []

    async def serve(reader, writer):
        first = await reader.readexactly(1)
        begun_at_first_byte.extend(lab.recorder.begun)
        await reader.readuntil(b"\r\n\r\n")
        assert first == b"G"
        writer.write(answer(b"hello"))
        await writer.drain()

    async with upstream(serve) as port, laboratory(gateway=aliased(port, "tools.internal"), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(GET)
        await wire.response()
        (span,) = await lab.recorder.wait()
        (begun,) = begun_at_first_byte
        assert begun["span_id"] == span.span_id
        assert begun["parent_span_id"] == span.parent_span_id == lab.identity.context.span_id
        assert (begun["name"], begun["kind"], begun["start_ns"]) == (span.name, SpanKind.CLIENT, span.start_ns)
        known = begun["attributes"]
        assert known[attr.URL_FULL] == "http://tools.internal/a?key=REDACTED"
        assert known[attr.NETWORK_PEER_PORT] == port
        assert known[attr.PROCESS_PID] == 1234
        later = {attr.CLRK_RESP_BYTES, attr.HTTP_RESPONSE_STATUS_CODE}
        assert {name: value for name, value in span.attributes.items() if name not in later} == {
            name: value for name, value in known.items() if name not in later
        }


async def test_a_tunnel_has_begun_when_the_upstream_gets_its_first_byte():
    begun_at_first_byte = []

    async def serve(reader, writer):
        await reader.readexactly(1)
        begun_at_first_byte.extend(lab.recorder.begun)
        writer.write(b"ok")

    async with upstream(serve) as port, laboratory(gateway=aliased(port, "tools.internal"), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 9000)
        wire.writer.write(b"\x00raw")
        assert await wire.reader.readexactly(2) == b"ok"
        wire.writer.write_eof()
        (span,) = await lab.recorder.wait()
        (begun,) = begun_at_first_byte
        assert (begun["span_id"], begun["name"]) == (span.span_id, attr.SPAN_EGRESS_TCP)
        assert begun["attributes"][attr.NETWORK_TRANSPORT] == "tcp"


async def test_what_no_upstream_saw_has_not_begun():
    async def never(reader, writer):
        writer.close()

    async with upstream(never) as port:
        spec = aliased(port, "tools.internal")
    # the server is gone: connection refused
    async with laboratory(gateway=spec, rules=RULES) as lab:
        failed = await lab.dial("tools.internal", 80)
        assert b" 502 " in await failed.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        denied = await lab.dial("tools.internal", 80)
        assert b" 421 " in await denied.ask(GET.replace(b"Host: tools", b"Host: other"))
        tunnel = await lab.dial("tools.internal", 9000)
        with pytest.raises(ConnectionResetError):
            await tunnel.ask(b"\x00raw")
        names = [span.name for span in await lab.recorder.wait(3)]
        assert names == [attr.SPAN_EGRESS_DIAL_FAILED, attr.SPAN_EGRESS_DIAL_DENIED, attr.SPAN_EGRESS_DIAL_FAILED]
        assert lab.recorder.begun == []


async def test_a_call_that_is_sent_again_begins_once_and_says_so():
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        await read_request(reader)
        writer.write(answer(b"hello"))
        await writer.drain()
        if len(connections) == 1:
            await read_request(reader)  # and no answer: this connection is dead

    async with upstream(serve) as port, laboratory(gateway=aliased(port, "tools.internal"), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        for _ in range(2):
            wire.writer.write(GET)
            await wire.response()
        first, second = await lab.recorder.wait(2)
        assert len(connections) == 2
        assert [begun["span_id"] for begun in lab.recorder.begun] == [first.span_id, second.span_id]
        assert attr.HTTP_REQUEST_RESEND_COUNT not in first.attributes
        assert second.attributes[attr.HTTP_REQUEST_RESEND_COUNT] == 1


@pytest.mark.parametrize("minor", [0, 1])
async def test_the_version_is_the_one_that_the_upstream_speaks(minor):
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(f"HTTP/1.{minor} 200 OK\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    async with upstream(serve) as port, laboratory(gateway=aliased(port, "tools.internal"), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(GET)
        await wire.response()
        (span,) = await lab.recorder.wait()
        assert span.attributes[attr.NETWORK_PROTOCOL_VERSION] == f"1.{minor}"
        assert lab.recorder.begun[0]["attributes"][attr.NETWORK_PROTOCOL_VERSION] == "1.1"
