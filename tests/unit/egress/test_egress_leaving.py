"""How a connection ends: early answers arrive, and TLS ends as the other side ended it."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from egress_lab import Lab, Wire, aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

from clrk.gateway.egress.channel import Channel

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME]}]
GET = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
SIZE = 20 * 2**20  # more than all buffers between two ends of a connection hold
TOO_LARGE = answer(b"too large", status="413 Content Too Large", headers="Connection: close\r\n")


async def dial(lab: Lab, *, tls: bool) -> Wire:
    return await (lab.dial_tls(NAME) if tls else lab.dial(NAME, 80))


async def upload(wire: Wire) -> bytes:
    """Send a whole request before anything is read, as most clients do. Raises: OSError when it can not be sent."""
    wire.writer.write(f"POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {SIZE}\r\n\r\n".encode())
    async with asyncio.timeout(30):
        for _ in range(SIZE // 65_536):
            wire.writer.write(bytes(65_536))
            await wire.writer.drain()
        head, body = await wire.response()
    return head + body


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_who_sends_a_large_body_to_a_denied_place_still_hears_why(tls):
    async with laboratory(gateway={}, rules=[{"hostnames": [NAME], "http": {"methods": ["GET"]}}]) as lab:
        raw = await upload(await dial(lab, tls=tls))
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert b"add_rule" in raw


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_an_upstream_that_answers_early_and_ends_is_heard_by_who_sends_on(tls):
    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(TOO_LARGE)
        if writer.can_write_eof():
            writer.write_eof()  # and reads on, as servers do that want to be heard
            await reader.read(-1)

    theirs = Authority("upstream CA")
    async with (
        upstream(refuse, theirs.server_context([NAME]) if tls else None) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        assert await upload(await dial(lab, tls=tls)) == TOO_LARGE


async def test_who_never_stops_sending_is_not_listened_to_for_ever(monkeypatch):
    monkeypatch.setattr("clrk.gateway.egress.http.LINGER_S", 0.2)
    async with laboratory(gateway={}, rules=[]) as lab:
        wire = await lab.dial("203.0.113.1", 80)
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

        async def send_for_ever() -> None:
            while True:
                wire.writer.write(b"1\r\nx\r\n")
                await wire.writer.drain()
                await asyncio.sleep(0.01)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_for_ever(), 20)


# --- the end of TLS -------------------------------------------------------------------------------------------------


class Silent(ssl.SSLObject):
    """TLS that ends without close_notify."""

    def unwrap(self) -> None:
        pass


class TlsClient:
    """A TLS client by hand: asyncio's streams do not say how TLS ended."""

    def __init__(self, wire: Wire, context: ssl.SSLContext) -> None:
        self._wire = wire
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=NAME)

    async def _step(self, step):
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._wire.writer.write(self._outgoing.read())
                async with asyncio.timeout(20):
                    data = await self._wire.reader.read(65_536)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    async def ask(self, request: bytes) -> tuple[bytes, str]:
        """Send and read to the end; return what came, and how it ended: close_notify, ragged or reset."""
        await self._step(self._tls.do_handshake)
        self._tls.write(request)
        self._wire.writer.write(self._outgoing.read())
        received = b""
        try:
            while data := await self._step(lambda: self._tls.read(65_536)):
                received += data
        except ssl.SSLError as exc:
            return received, "ragged" if exc.reason == "UNEXPECTED_EOF_WHILE_READING" else str(exc)
        except ConnectionResetError:
            return received, "reset"
        return received, "close_notify"

    def leave(self) -> None:
        """Close without a goodbye."""
        self._wire.writer.close()


def ending(how: str, said: bytes):
    """Return a handler that answers with said, and then ends like this."""

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(said)
        await writer.drain()
        if how == "reset":
            Wire(reader, writer, b"").reset()

    return handle


def server(theirs: Authority, how: str) -> ssl.SSLContext:
    context = theirs.server_context([NAME])
    if how == "ragged":
        context.sslobject_class = Silent
    return context


@pytest.mark.parametrize("how", ["close_notify", "ragged", "reset"])
async def test_a_body_until_close_ends_as_the_upstream_ended_it(how):
    theirs = Authority("upstream CA")
    said = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(300_000)
    async with (
        upstream(ending(how, said), server(theirs, how)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        received, ended = await TlsClient(await lab.dial(NAME, 443), lab.ca.client_context()).ask(GET)
        span = (await lab.recorder.wait())[0]
    assert ended == how
    if how != "reset":
        assert received.partition(b"\r\n\r\n")[2] == bytes(300_000)
    assert span.attributes.get("error.type") == (None if how == "close_notify" else "connection_reset")
    assert ("without close_notify" in span.status.message) == (how == "ragged")


async def test_a_chunked_answer_that_breaks_off_raggedly_is_no_whole_one_for_http_1_0():
    theirs = Authority("upstream CA")
    said = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with (
        upstream(ending("ragged", said), server(theirs, "ragged")) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        old = f"GET / HTTP/1.0\r\nHost: {NAME}\r\n\r\n".encode()
        _, ended = await TlsClient(await lab.dial(NAME, 443), lab.ca.client_context()).ask(old)
    assert ended == "reset"


@pytest.mark.parametrize("how", ["close_notify", "ragged"])
async def test_a_tunnel_inside_tls_ends_as_the_upstream_ended_it(how):
    async def speak(reader, writer):
        assert await reader.readexactly(4) == b"\x10abc"
        writer.write(b"\x20done")

    theirs = Authority("upstream CA")
    async with (
        upstream(speak, server(theirs, how)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        client = TlsClient(await lab.dial(NAME, 8883), lab.ca.client_context())
        assert await client.ask(b"\x10abc") == (b"\x20done", how)
        client.leave()
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.tcp"
    assert "error.type" not in span.attributes


# --- who left -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(8))
async def test_an_agent_that_leaves_tls_is_not_its_upstreams_failure(monkeypatch, turns):
    """It is over some turns of the event loop behind its close_notify, and its upstream may speak in any."""
    loop, theirs = asyncio.get_running_loop(), Authority("upstream CA")
    channels: list[Channel] = []
    made, ended = Channel.connection_made, Channel.eof_received

    def connection_made(channel, transport):
        channels.append(channel)
        made(channel, transport)

    def speak(left):
        if left:
            loop.call_soon(speak, left - 1)
        else:
            (channel,) = (one for one in channels if one.peer[1] == port)
            channel.data_received(b"1\r\nb\r\n")

    def eof_received(channel):
        if channel.peer[1] != port:
            speak(turns)
        return ended(channel)

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.read()

    monkeypatch.setattr(Channel, "connection_made", connection_made)
    monkeypatch.setattr(Channel, "eof_received", eof_received)
    async with (
        upstream(handle, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        wire.writer.write(GET)
        await wire.reader.readuntil(b"1\r\na\r\n")
        wire.writer.close()
        (span,) = await lab.recorder.wait()
    assert span.attributes["error.type"] == "agent_disconnected"
