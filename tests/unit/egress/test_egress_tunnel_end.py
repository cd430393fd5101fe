"""How a tunnel ended does not depend on whether its end or that of its run is heard of first.

On a busy host both are there at once. Each test makes one moment of it: so many rounds of the loop lie between the two.
"""

from __future__ import annotations

import asyncio
import os
import socket

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

from clrk.gateway.egress.channel import LINGER_RESET

NAME = "db.internal"
ALLOW = [{"hostnames": [NAME]}]
moments = pytest.mark.parametrize("rounds", range(12))


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    writer.transport.abort()


async def pass_by(rounds: int) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)


@moments
async def test_a_reset_by_the_agent(rounds: int) -> None:
    heard = asyncio.Event()

    async def handle(reader, writer):
        await reader.readexactly(6)
        heard.set()
        await reader.read()

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 5432)
        wire.writer.write(b"\0hello")
        await heard.wait()
        reset(wire.writer)
        await pass_by(rounds)
        await lab.egress.close()
        (span,) = lab.spans
    assert "error.type" not in span.attributes


@moments
async def test_a_reset_by_the_server_after_the_agents_end(rounds: int) -> None:
    heard, writers = asyncio.Event(), []

    async def handle(reader, writer):
        await reader.read()
        writers.append(writer)
        heard.set()
        await asyncio.Event().wait()

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 5432)
        wire.writer.write(b"\0hello")
        wire.writer.write_eof()
        await heard.wait()
        reset(writers[0])
        await pass_by(rounds)
        await lab.egress.close()
        (span,) = lab.spans
    assert span.attributes.get("error.type") in (
        None,
        "connection_reset",
    )  # whether it came before is the server's affair


@moments
async def test_the_agents_end_of_a_connection_that_was_upgraded(rounds: int) -> None:
    heard, got = asyncio.Event(), []

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        got.append(await reader.read())
        heard.set()

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(b"GET / HTTP/1.1\r\nHost: db.internal\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await wire.reader.readuntil(b"\r\n\r\n")
        wire.writer.write(b"hello")
        wire.writer.write_eof()
        await heard.wait()
        await pass_by(rounds)
        await lab.egress.close()
        (span,) = lab.spans
    assert got == [b"hello"]
    assert (span.name, span.attributes["http.response.status_code"]) == ("GET db.internal", 101)
    assert "error.type" not in span.attributes


@moments
@pytest.mark.parametrize("upgraded", [False, True], ids=["tunnel", "upgraded"])
async def test_the_agents_end_of_tls_without_a_goodbye(rounds: int, upgraded: bool) -> None:
    """As from a process that died: it leaves nothing to do, and is no failure."""
    theirs, heard = Authority("upstream CA"), asyncio.Event()

    async def handle(reader, writer):
        if upgraded:
            await read_request(reader)
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await reader.readexactly(6)
        heard.set()
        await reader.read()

    async with (
        upstream(handle, theirs.server_context([NAME])) as server,
        laboratory(gateway=aliased(server, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME, 443 if upgraded else 8883)
        if upgraded:
            wire.writer.write(b"GET / HTTP/1.1\r\nHost: db.internal\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
            await wire.reader.readuntil(b"\r\n\r\n")
        wire.writer.write(b"\x10hello")
        await heard.wait()
        with socket.socket(fileno=os.dup(wire.writer.get_extra_info("socket").fileno())) as connection:
            connection.shutdown(socket.SHUT_WR)
        await pass_by(rounds)
        await lab.egress.close()
        (span,) = lab.spans
    assert "error.type" not in span.attributes


@moments
async def test_a_run_that_ends_behind_a_whole_answer_while_its_request_goes_on(rounds: int) -> None:
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"enough"))
        await reader.read()

    async with upstream(handle) as server, laboratory(gateway=aliased(server, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: db.internal\r\nContent-Length: 9\r\n\r\nabc")
        await wire.reader.readuntil(b"enough")
        await pass_by(rounds)
        await lab.egress.close()
        (span,) = lab.spans
    assert span.attributes["http.response.status_code"] == 200
    assert "error.type" not in span.attributes
