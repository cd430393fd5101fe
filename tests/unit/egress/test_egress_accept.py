"""Who is let in: flow record and stamp, and what happens to everything else."""

from __future__ import annotations

import asyncio

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.core import wire
from clrk.gateway.egress import accept

NAME = "db.internal"
ALLOW = [{"hostnames": [NAME]}]
GET = b"GET / HTTP/1.1\r\nHost: db.internal\r\nConnection: close\r\n\r\n"


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"hello"))


async def closed(wire_) -> bytes:
    """Return what came before the connection ended."""
    try:
        async with asyncio.timeout(25):
            return await wire_.reader.read()
    except ConnectionError:
        return b""


async def test_a_connection_without_a_record_is_closed_without_a_span():
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, record=False)
        wire_.writer.write(GET)
        assert await closed(wire_) == b""
        assert lab.spans == []
        assert lab.service.counters.no_record == 1


async def test_a_record_is_good_for_one_connection():
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80)
        assert (await wire_.ask(GET)).endswith(b"hello")
        assert lab.flows.records == {}


def flip(index: int):
    return lambda stamp: stamp[:index] + bytes([stamp[index] ^ 1]) + stamp[index + 1 :]


@pytest.mark.parametrize(
    ("forge", "code"),
    [
        (lambda stamp: b"", "mismatch"),
        (flip(0), "mismatch"),
        (flip(wire.V4_DST_OFFSET), "mismatch"),
        (flip(wire.V4_DST_PORT_OFFSET), "mismatch"),
        (flip(wire.V4_TLV_OFFSET + 5), "mismatch"),
        (flip(wire.HEADER_SIZE - 1), "mismatch"),
        (lambda stamp: b"\0" + stamp, "mismatch"),
        (lambda stamp: stamp[1:], "mismatch"),
    ],
    ids=["none", "signature", "destination", "port", "cookie", "padding", "before", "cut-front"],
)
async def test_anything_but_the_stamp_is_refused(forge, code):
    reached = []

    async def handle(reader, writer):
        reached.append(writer)

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, stamp=False)
        wire_.writer.write(forge(wire_.stamp) + GET)
        assert await closed(wire_) == b""
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.proxy.malformed"
    assert span.status.code == "STATUS_CODE_ERROR"
    assert span.attributes["clrk.proxy.error_code"] == code
    assert span.attributes["clrk.dst.name"] == NAME  # what the record says, not what the bytes say
    assert reached == []


async def test_another_connections_stamp_is_refused():
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        victim = await lab.dial(NAME, 80, stamp=False)
        thief = await lab.dial(NAME, 80, stamp=victim.stamp)
        thief.writer.write(GET)
        assert await closed(thief) == b""
        assert (await lab.recorder.wait())[0].name == "egress.proxy.malformed"


async def test_a_cut_stamp_is_refused():
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, stamp=False)
        wire_.writer.write(wire_.stamp[:511])
        wire_.writer.write_eof()
        assert await closed(wire_) == b""
        assert (await lab.recorder.wait())[0].attributes["clrk.proxy.error_code"] == "truncated"


async def test_a_silent_client_is_refused(monkeypatch):
    monkeypatch.setattr(accept, "STAMP_TIMEOUT_S", 0.05)
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, stamp=False)
        assert await closed(wire_) == b""
        assert (await lab.recorder.wait())[0].attributes["clrk.proxy.error_code"] == "timeout"


async def test_closing_before_the_first_byte_is_normal():
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, stamp=False)
        wire_.writer.write_eof()
        assert await closed(wire_) == b""
        assert lab.spans == []
        assert lab.service.counters.closed_unused == 1


async def test_the_stamp_may_come_byte_by_byte(monkeypatch):
    monkeypatch.setattr(accept, "STAMP_TIMEOUT_S", 60.0)
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80, stamp=False)
        for index in range(wire.HEADER_SIZE):
            wire_.writer.write(wire_.stamp[index : index + 1])
            await asyncio.sleep(0)
        for index in range(len(GET)):
            wire_.writer.write(GET[index : index + 1])
            await asyncio.sleep(0)
        assert (await closed(wire_)).endswith(b"hello")


async def test_a_second_stamp_is_only_bytes():
    """In mid-stream a header is what the agent says: here it is not even HTTP."""
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 80)
        raw = await wire_.ask(wire_.stamp + GET)
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert span.attributes["process.pid"] == 1234


async def test_the_ipv6_listener_serves_ipv6_destinations():
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        await lab.resolve(NAME)
        wire_ = await lab.dial("fd00:c1:0:1::1", 80, family=wire.FAMILY_V6)
        assert (await wire_.ask(GET)).endswith(b"hello")
        assert (await lab.recorder.wait())[0].attributes["clrk.dst.name"] == NAME


async def test_a_synthetic_address_that_was_never_given_out_is_denied():
    async with laboratory(gateway={"defaultPolicy": "allow-all"}, rules=[]) as lab:
        wire_ = await lab.dial("198.18.7.7", 80)
        raw = await wire_.ask(b"GET / HTTP/1.1\r\nHost: 198.18.7.7\r\n\r\n")
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.attributes["clrk.egress.deny_reason"] == "address_synthetic"


async def test_a_denied_tunnel_is_reset():
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire_ = await lab.dial("192.0.2.9", 9999)
        wire_.writer.write(b"\x01\x02")
        with pytest.raises(ConnectionResetError):
            await wire_.reader.read()
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "no_rule")


async def test_a_tunnel_keeps_half_close_and_counts():
    async def handle(reader, writer):
        data = await reader.read()  # to the agent's FIN
        writer.write(data[::-1])

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 5432)
        wire_.writer.write(b"\x00\x01abc")
        wire_.writer.write_eof()
        assert await closed(wire_) == b"cba\x01\x00"
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.tcp"
    assert (span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == (5, 5)
    assert span.attributes["network.peer.port"] == port
    assert "error.type" not in span.attributes


async def test_the_upstreams_half_close_leaves_the_other_way_open():
    got = []

    async def handle(reader, writer):
        writer.write(b"bye")
        writer.write_eof()
        got.append(await reader.read())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 5432)
        wire_.writer.write(b"\x00")
        assert await closed(wire_) == b"bye"
        wire_.writer.write(b"still here")
        wire_.writer.write_eof()
        await lab.recorder.wait()
    assert got == [b"\x00still here"]


async def test_a_reset_passes_through_a_tunnel():
    async def handle(reader, writer):
        await reader.readexactly(1)
        import socket
        import struct

        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 5432)
        wire_.writer.write(b"\x00")
        with pytest.raises(ConnectionResetError):
            await wire_.reader.read()
        assert (await lab.recorder.wait())[0].attributes["error.type"] == "connection_reset"


async def test_backpressure_reaches_the_sender():
    """Nobody reads: what the gateway holds is bounded, so the sender stops long before 64 MiB."""
    release = asyncio.Event()

    async def handle(reader, writer):
        await release.wait()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 5432)
        sent = 0
        block = b"\0" * 65_536
        try:
            async with asyncio.timeout(2):
                while sent < 64 * 2**20:
                    wire_.writer.write(block)
                    await wire_.writer.drain()
                    sent += len(block)
        except TimeoutError:
            release.set()
    assert release.is_set()
    assert sent < 48 * 2**20


async def test_server_first_is_dialled_before_the_agent_speaks():
    async def handle(reader, writer):
        writer.write(b"220 ready\r\n")
        assert await reader.readline() == b"EHLO x\r\n"
        writer.write(b"250 ok\r\n")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 25, stamp=False)
        async with asyncio.timeout(25):
            assert await wire_.reader.readline() == b"220 ready\r\n"
            wire_.writer.write(wire_.stamp + b"EHLO x\r\n")
            assert await wire_.reader.readline() == b"250 ok\r\n"
            wire_.writer.write_eof()
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == ("egress.tcp", 8, 19)


async def test_server_first_still_demands_the_stamp():
    got = []

    async def handle(reader, writer):
        writer.write(b"220 ready\r\n")
        got.append(await reader.read())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire_ = await lab.dial(NAME, 25, stamp=False)
        assert await wire_.reader.readline() == b"220 ready\r\n"
        wire_.writer.write(b"EHLO forged\r\n")
        with pytest.raises(ConnectionResetError):
            await wire_.reader.read()
        spans = await lab.recorder.wait()
    assert "egress.proxy.malformed" in [span.name for span in spans]
    assert got in ([], [b""])


async def test_one_sandbox_can_not_use_up_the_gateway(monkeypatch):
    monkeypatch.setattr(accept, "MAX_CONNECTIONS", 4)
    async with upstream(hello) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        idle = [await lab.dial(NAME, 80) for _ in range(8)]
        waiting = await lab.dial(NAME, 80)
        waiting.writer.write(GET)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await waiting.reader.read(1)
        for wire_ in idle:
            wire_.close()
        assert (await closed(waiting)).endswith(b"hello")


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"", None), (b"\x16", "tls"), (b"G", None), (b"GET", None), (b"GET ", "http"), (b"GET /", "http"),
        (b"PROPFIND", None), (b"PROPFIND /x", "http"), (b"PROPFIND x", "tcp"), (b"PING\r\n", "tcp"), (b"*1\r\n", "tcp"),
        (b"\r\nGET /", "http"), (b"\n", "http"), (b"\0", "tcp"), (b"CONNECT a:1 HTTP/1.1", "http"),
        (b"CONNECT {}", None), (b"CONNECT {} \r\n", "tcp"), (b"CONNECT\n", "tcp"),
        (b"A" * 40, "tcp"),
        (b"get /", "tcp"),
    ],
)  # fmt: skip
def test_first_bytes(first, kind):
    assert accept.classify(first) == kind
