"""Who speaks first, and what arrives when a run ends: tunnels beside what the kernel and real servers prove in e2e."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

from clrk.gateway.egress import accept

NAME = "db.internal"
ALLOW = [{"hostnames": [NAME]}]
GET = b"GET / HTTP/1.1\r\nHost: db.internal%b\r\nConnection: close\r\n\r\n"


async def greeter(reader, writer):
    writer.write(b"220 ready\r\n")
    assert await reader.readline() == b"EHLO x\r\n"
    writer.write(b"250 ok\r\n")


async def web(reader, writer):
    await read_request(reader)
    writer.write(answer(b"hello"))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(accept, "SILENCE_S", 0.1)
    monkeypatch.setattr(accept, "STAMP_TIMEOUT_S", 1.5)


@pytest.mark.parametrize("port", [22, 2222, 9999])
async def test_a_server_may_speak_first_on_any_port(port, impatient):
    async with upstream(greeter) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, port, stamp=False)
        async with asyncio.timeout(25):
            assert await wire.reader.readline() == b"220 ready\r\n"
            await asyncio.sleep(1.8)  # longer than a silent client has otherwise
            wire.writer.write(wire.stamp + b"EHLO x\r\n")
            assert await wire.reader.readline() == b"250 ok\r\n"
            wire.writer.write_eof()
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == ("egress.tcp", 8, 19)
    assert "error.type" not in span.attributes


@pytest.mark.parametrize("forged", [b"EHLO forged\r\n", b""])
async def test_the_stamp_is_demanded_on_any_port_before_a_byte_goes_up(forged, impatient):
    got = []

    async def handle(reader, writer):
        writer.write(b"220 ready\r\n")
        got.append(await reader.read())

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 2222, stamp=False)
        assert await wire.reader.readline() == b"220 ready\r\n"
        wire.writer.write(forged or wire.stamp[:100])
        wire.writer.write_eof()
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        spans = await lab.recorder.wait(2)
    assert [span.name for span in spans] == ["egress.tcp", "egress.proxy.malformed"]
    assert spans[0].attributes["error.type"] == "not_admitted"
    assert spans[0].attributes["clrk.req.bytes"] == 0
    assert got in ([], [b""])


async def test_where_neither_speaks_it_is_over_after_three_seconds(impatient):
    connected = []

    async def mute(reader, writer):
        connected.append(1)
        await reader.read()

    async with upstream(mute) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 5432, stamp=False)
        async with asyncio.timeout(60):
            assert await wire.reader.read() == b""
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["error.type"]) == ("egress.proxy.malformed", "timeout")
    assert connected == [1]


@pytest.mark.parametrize("port", [80, 443])
async def test_nobody_is_dialled_for_a_silent_client_of_the_web(port, impatient):
    connected = []

    async def handle(reader, writer):
        connected.append(1)

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        await lab.dial(NAME, port, stamp=False)
        (span,) = await lab.recorder.wait()
    assert span.name == "egress.proxy.malformed"
    assert connected == []


async def test_nobody_is_dialled_for_a_silent_client_that_no_rule_lets_out(impatient):
    async with laboratory(gateway=aliased(9, NAME), rules=[{"hostnames": [NAME], "ports": [5432]}]) as lab:
        await lab.dial(NAME, 5433, stamp=False)
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["error.type"]) == ("egress.proxy.malformed", "timeout")


@pytest.mark.parametrize("port", [22, 25])
async def test_what_no_rule_allows_is_reset_also_where_servers_speak_first(port):
    async with laboratory(gateway=aliased(9, NAME), rules=[{"hostnames": [NAME], "ports": [80]}]) as lab:
        wire = await lab.dial(NAME, port, stamp=False)
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "port_not_allowed")


# --- no port is a way around what looks at requests -------------------------------------------------------------------


@pytest.mark.parametrize(("port", "late_s"), [(25, 0), (22, 0.3), (4222, 0), (8080, 0.3)])
async def test_http_is_read_as_http_whatever_the_port(port, late_s, impatient):
    async with upstream(web) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, port, stamp=False)
        await asyncio.sleep(late_s)
        wire.writer.write(wire.stamp)
        assert (await wire.ask(GET % f":{port}".encode())).endswith(b"hello")
        (span,) = await lab.recorder.wait()
    assert span.name == f"GET {NAME}"


@pytest.mark.parametrize("port", [25, 465, 993])
async def test_https_is_opened_and_read_whatever_the_port(port, impatient):
    theirs = Authority("upstream CA")
    async with (
        upstream(web, theirs.server_context([NAME])) as server,
        laboratory(gateway=aliased(server, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME, port)
        assert (await wire.ask(GET % f":{port}".encode())).endswith(b"hello")
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["url.full"]) == (f"GET {NAME}", f"https://{NAME}:{port}/")


async def test_a_client_that_speaks_at_once_keeps_the_connection_that_was_dialled():
    """ssh sends its version without waiting for the server's: that must not cost the server a second connection."""
    connected = []

    async def sshd(reader, writer):
        connected.append(await reader.readline())
        writer.write(b"SSH-2.0-server\r\n")

    async with upstream(sshd) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 22)
        wire.writer.write(b"SSH-2.0-client\r\n")
        assert await wire.reader.readline() == b"SSH-2.0-server\r\n"
        wire.writer.write_eof()
        (span,) = await lab.recorder.wait()
    assert connected == [b"SSH-2.0-client\r\n"]
    assert (span.name, span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == ("egress.tcp", 16, 16)


async def test_a_server_that_hangs_up_without_a_word_ends_the_connection():
    async def busy(reader, writer):
        writer.close()

    async with upstream(busy) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 22, stamp=False)
        async with asyncio.timeout(60):
            assert await wire.reader.read() == b""
        wire.writer.write_eof()
        (span,) = await lab.recorder.wait()
    assert (span.name, span.attributes["clrk.resp.bytes"]) == ("egress.tcp", 0)


def probes_between(near, far) -> tuple[int, int]:
    """Return SO_KEEPALIVE and its delay of this process' socket between two addresses."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if (sock.getsockname(), sock.getpeername()) == (near, far):
                idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                return sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), idle
    raise AssertionError("no such socket")


async def test_a_silent_tunnel_is_kept_alive_towards_the_upstream():
    """What probes an agent asks for end at the gateway, so its own have to do."""
    options = []

    async def handle(reader, writer):
        writer.write(b"ready\r\n")
        await reader.readline()
        options.append(probes_between(writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
        writer.write(b"seen\r\n")

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 22)
        wire.writer.write(b"hello\r\n")
        assert await wire.reader.readline() == b"ready\r\n"
        assert await wire.reader.readline() == b"seen\r\n"
    assert options == [(1, 120)]


SAID = 12 << 20

# --- the end of the run -----------------------------------------------------------------------------------------------


async def test_what_an_agent_said_before_it_ended_arrives(monkeypatch):
    monkeypatch.setattr("clrk.gateway.egress.tcp.FLUSH_S", 60.0)  # half a second is little on a loaded machine
    got = []

    async def slow(reader, writer):
        await reader.readexactly(1)
        await asyncio.sleep(0.2)  # the run is over before the first piece is read
        got.append(await reader.read())

    async with upstream(slow) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 5432)
        wire.writer.write(b"\0" + b"x" * SAID)  # more than fits into the buffers on the way
        wire.writer.write_eof()
        while not lab.recorder.begun:
            await asyncio.sleep(0.01)
        await lab.egress.close()
        (span,) = lab.spans
        while not got:
            await asyncio.sleep(0.01)
    assert len(got[0]) == SAID
    assert "error.type" not in span.attributes
    assert span.attributes["clrk.req.bytes"] == SAID + 1


async def test_a_tunnel_whose_agent_never_ends_is_cut_in_time():
    ends = []

    async def handle(reader, writer):
        try:
            ends.append(await reader.read())
        except ConnectionResetError:
            ends.append("reset")

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 5432)
        wire.writer.write(b"\0hello")
        while not lab.recorder.begun:
            await asyncio.sleep(0.01)
        await lab.egress.close()
        (span,) = lab.spans
        while not ends:
            await asyncio.sleep(0.01)
    assert ends == ["reset"]
    assert span.attributes["error.type"] == "cancelled"
