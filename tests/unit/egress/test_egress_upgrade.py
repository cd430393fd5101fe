"""Changes of protocol: what was asked for and granted becomes a tunnel; nothing that would hide requests does."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest
import websockets.asyncio.client
import websockets.asyncio.server
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, NAME
from test_egress_hostile import Quiet, recogniser
from test_egress_tcp import probes_between

ASK = b"GET /ws HTTP/1.1\r\nHost: tools.internal\r\nConnection: keep-alive, Upgrade\r\nUpgrade: %b\r\n\r\n"


async def ask_for(protocol: bytes, granted: bytes, *, rules=ALLOW, request: bytes = ASK, recognise=None):
    """Ask to change the protocol; return the head that went up, what came down first, and the span."""
    heads = []

    async def handle(reader, writer):
        heads.append((await read_request(reader))[0])
        writer.write(granted)
        await reader.read()

    async with upstream(handle) as port, laboratory(
        gateway=aliased(port, NAME), rules=rules, recognise=recognise
    ) as lab:  # fmt: skip
        wire = await lab.dial(NAME, 80)
        wire.writer.write(request % protocol if b"%b" in request else request)
        async with asyncio.timeout(25):
            raw = await wire.reader.readuntil(b"\r\n\r\n")
        wire.close()
        return heads[0], raw, (await lab.recorder.wait())[0]


def switching(protocol: bytes) -> bytes:
    return b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: %b\r\nConnection: Upgrade\r\n\r\n" % protocol


@pytest.mark.parametrize("protocol", [b"websocket", b"WebSocket", b"SPDY/3.1", b"tcp"])
async def test_an_upgrade_passes_as_it_is_spelt(protocol):
    head, raw, _ = await ask_for(protocol, switching(protocol))
    assert b"\r\nUpgrade: " + protocol + b"\r\n" in head
    assert b"\r\nConnection: Upgrade\r\n" in head
    assert raw == switching(protocol)


@pytest.mark.parametrize("protocol", [b"h2c", b"H2C", b"HTTP/2.0", b"TLS/1.2", b"websocket, h2c", b"http/1.1", b"h2"])
async def test_what_would_hide_requests_is_not_asked_for(protocol):
    """h2c smuggling: behind the change the upstream would take requests that nobody here reads."""
    head, raw, _ = await ask_for(protocol, answer(b"plain"))
    assert b"upgrade" not in head.lower()
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_where_requests_are_judged_only_a_websocket_passes():
    rules = [{"hostnames": [NAME], "http": {"methods": ["GET"]}}]
    head, _, _ = await ask_for(b"SPDY/3.1", answer(b"plain"), rules=rules)
    assert b"upgrade" not in head.lower()
    head, raw, _ = await ask_for(b"websocket", switching(b"websocket"), rules=rules)
    assert raw == switching(b"websocket")


@pytest.mark.parametrize(
    ("asked", "granted"),
    [(b"websocket", switching(b"h2c")), (b"tcp", switching(b"websocket")), (b"h2c", switching(b"h2c")),
     (b"websocket", b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n"),
     (b"websocket", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")],
)  # fmt: skip
async def test_a_change_to_something_else_is_refused(asked, granted):
    _, raw, span = await ask_for(asked, granted)
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert span.attributes["error.type"] == "bad_response_upgrade"


async def test_an_upstream_that_changes_before_the_request_is_complete_is_refused():
    """Two would read from the agent then, the one who uploads and the tunnel."""
    request = ASK.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nab") % b"websocket"
    upgrade = switching(b"websocket")

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\nab")
        writer.write(upgrade)
        await reader.read()

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(request)
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert span.attributes["error.type"] == "bad_response_upgrade"


async def test_a_silent_websocket_is_kept_alive_towards_the_upstream():
    options = []

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(switching(b"websocket"))
        await reader.readline()
        options.append(probes_between(writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
        writer.write(b"seen\r\n")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(ASK % b"websocket")
        async with asyncio.timeout(25):
            await wire.reader.readuntil(b"\r\n\r\n")
            wire.writer.write(b"hello\r\n")
            assert await wire.reader.readline() == b"seen\r\n"
    assert options == [(1, 120)]


async def test_a_refused_upgrade_is_an_exchange_like_any_other():
    async def handle(reader, writer):
        for _ in range(2):
            head, _ = await read_request(reader)
            writer.write(answer(b"426" if b"/ws" in head else b"next", "426 Upgrade Required"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(ASK % b"websocket")
        assert (await wire.response())[1] == b"426"
        wire.writer.write(b"GET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n")  # and no tunnel to put requests into
        assert (await wire.response())[1] == b"next"
        assert len(await lab.recorder.wait(2)) == 2


async def test_asking_for_an_upgrade_hides_a_call_from_nobody():
    """A header alone must not take a call from its interpreter, nor from its budget."""
    request = b"POST /v1/x HTTP/1.1\r\nHost: tools.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    request += b"Content-Length: 2\r\n\r\n{}"
    recognise = recogniser(Quiet(b"{rewritten}"))
    head, _, _ = await ask_for(b"", answer(b"ok"), request=request, recognise=recognise)
    assert b"\r\nContent-Length: 11\r\n" in head
    assert b"upgrade" not in head.lower()


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_a_websocket_of_two_strict_ends_passes_untouched(compression):
    """`websockets` on both sides checks masks, lengths, UTF-8, compression state and the closing handshake."""
    heads = []

    async def echo(connection):
        heads.append(connection.request.headers.get("Sec-WebSocket-Extensions", ""))
        async for message in connection:
            await connection.send(message)
        await connection.close(4001, "bye")

    noise = os.urandom(300_000)
    text = base64.b64encode(b"again and again " * 5000).decode()
    server = await websockets.asyncio.server.serve(echo, "127.0.0.1", 0, compression=compression, max_size=2**22)
    async with server, laboratory(
        gateway=aliased(server.sockets[0].getsockname()[1], NAME), rules=ALLOW
    ) as lab:  # fmt: skip
        port = await lab.forwarder(NAME, 80)
        async with websockets.asyncio.client.connect(
            f"ws://{NAME}/chat", host="127.0.0.1", port=port, compression=compression, max_size=2**22, proxy=None
        ) as client:  # fmt: skip
            for message in ["", "é" * 1000, noise, text, b"", text, [text[:7], text[7:]]]:
                await client.send(message)
                got = await client.recv()
                assert got == (message if not isinstance(message, list) else text)
            await (await client.ping(b"are you there"))
            assert [type(found).__name__ for found in client.protocol.extensions] == (
                ["PerMessageDeflate"] if compression else []
            )
        (span,) = await lab.recorder.wait()
    assert bool(heads[0]) == bool(compression)
    assert span.attributes["http.response.status_code"] == 101
    assert "error.type" not in span.attributes
    # Had somebody decompressed on the way, far more than the compressed text would have passed.
    passed = span.attributes["clrk.resp.bytes"]
    assert passed < 350_000 if compression else passed > 3 * len(text)
