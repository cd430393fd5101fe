"""HTTP in a tunnel would be requests that nobody judges: it is cut before a server acts on it, and nothing else is."""

from __future__ import annotations

import asyncio

import pytest
from egress_lab import aliased, laboratory, upstream
from tls_material import Authority

from clrk.gateway.egress.hidden_http import MAX_LINE, FirstLine, HiddenHttpError

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME]}]
SECOND = b"POST /v1/messages HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 0\r\n\r\n"
LINES = [
    b"get / HTTP/1.1\r\nHost: x\r\n\r\n", b"F00 / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET\x0b/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"_ / http/1.1\r\n\r\n", b"a\t/\tHTTP/1.0\n\n", b"get http://x/ HTTP/1.1\r\n\r\n",
]  # fmt: skip


async def tell(pieces: list[bytes], *, tls: bool = False) -> tuple[bytes, list]:
    """Say something through a connection; return what arrived, and the spans."""
    arrived, theirs = bytearray(), Authority("upstream CA")

    async def handle(reader, writer):
        while data := await reader.read(65_536):
            arrived.extend(data)

    context = theirs.server_context([NAME]) if tls else None
    async with upstream(handle, context) as port, laboratory(
        gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem
    ) as lab:  # fmt: skip
        wire = await (lab.dial_tls(NAME) if tls else lab.dial(NAME, 80))
        for piece in pieces:
            if not wire.writer.is_closing():
                wire.writer.write(piece)
            await asyncio.sleep(0.05)
        try:
            await asyncio.wait_for(wire.reader.read(), 10)
        except ConnectionResetError:
            pass
        return bytes(arrived), list(await lab.recorder.wait())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("line", LINES)
async def test_a_method_that_nobody_uses_opens_no_tunnel_for_the_next_request(line, tls):
    arrived, (span,) = await tell([line + SECOND], tls=tls)
    assert b"\n" not in arrived
    assert span.name in ("egress.tcp", "egress.dial.denied")
    assert span.attributes["error.type"] in ("http_in_tunnel", "bad_request_request_line")


async def test_a_method_that_is_cut_short_opens_none_either(monkeypatch):
    monkeypatch.setattr("clrk.gateway.egress.accept.FIRST_BYTES_TIMEOUT_S", 0.02)
    arrived, (span,) = await tell([b"GE", b"T / HTTP", b"/1.1\r\nHost: x\r\n\r\n", SECOND])
    assert b"\n" not in arrived
    assert (span.name, span.attributes["error.type"]) == ("egress.tcp", "http_in_tunnel")


@pytest.mark.parametrize("line", LINES)
def test_every_split_is_found_before_the_end_of_the_line(line):
    for cut in range(1, len(line)):
        watch, passed = FirstLine(), b""
        try:
            for piece in (line[:cut], line[cut:]):
                watch.goes_on(piece)
                passed += piece
        except HiddenHttpError:
            pass
        assert b"\n" not in passed


@pytest.mark.parametrize(
    "said",
    [b"ruok", b"PING\r\n", b"get key\r\n", b"*1\r\n$4\r\nPING\r\n", b"NICK me\r\nUSER me 0 * :HTTP/1.1\r\n",
     b"\x00\x00\x00\x08\x04\xd2\x16\x2f HTTP/1.1\n", b"0032git-upload-pack /x.git\0host=y\0", b"{}\n", b"a" * 100_000,
     b"OPTIONS sip:x SIP/2.0\r\n", b"<?xml version='1.0'?><stream:stream to='HTTP'>"],
)  # fmt: skip
def test_other_protocols_are_let_be(said):
    assert FirstLine().goes_on(said) in (True, False)
    watch = FirstLine()
    for at in range(min(len(said), 300)):
        watch.goes_on(said[at : at + 1])


def test_what_is_kept_is_bounded():
    watch = FirstLine()
    assert watch.goes_on(b"a" * MAX_LINE)
    assert not watch.goes_on(b"a")
