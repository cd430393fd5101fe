"""Where an exchange may break, stall or end by half: at any byte, on either side, and what the other one sees of it."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc

import pytest
from differential import reset
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, GET, NAME, replying

REQUEST = b"POST /x HTTP/1.1\r\nHost: tools.internal\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: 1\r\n\r\n"
HEAD_SIZE = REQUEST.index(b"\r\n\r\n") + 4
REPLIES = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nT: 1\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde",
    "close": b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nabcde",
}
MIB = 2**20


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("framing", REPLIES)
async def test_an_upstream_that_breaks_at_any_byte_gives_no_whole_answer(framing, how):
    """A cut answer never reads as a whole one; each exchange has one span, and it says that something broke."""
    reply = REPLIES[framing]
    cuts = range(len(reply) + (framing == "close" and how == "reset"))

    async def handle(reader, writer):
        head, _ = await read_request(reader)
        cut = int(head.split(b"/", 2)[1].split(b" ")[0])
        writer.write(reply[:cut])
        if how == "reset":
            if cut > reply.index(b"\r\n\r\n") + 4:
                await asyncio.wait_for(seen[cut].wait(), 10)  # a reset destroys what is not read yet
            reset(writer)

    async def one(lab, cut: int) -> tuple[int, bytes, bool]:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(f"GET /{cut} HTTP/1.1\r\nHost: tools.internal\r\n\r\n".encode())
        raw, broke = b"", False
        try:
            while data := await asyncio.wait_for(wire.reader.read(1000), 20):
                raw += data
                seen[cut].set()
        except ConnectionResetError:
            broke = True
        return cut, raw, broke

    seen = {cut: asyncio.Event() for cut in cuts}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        found = await asyncio.gather(*(one(lab, cut) for cut in cuts))
        spans = await lab.recorder.wait(len(cuts))
    head_size = reply.index(b"\r\n\r\n") + 4
    for cut, raw, broke in found:
        if cut < head_size:
            assert raw.startswith(b"HTTP/1.1 502 "), (cut, raw)
        elif framing == "close":
            assert broke is (how == "reset"), (cut, raw)  # without a length, only a reset tells
        else:
            assert broke or b"200 OK" in raw
            assert not raw.endswith((b"\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nT: 1\r\n\r\n", b"\r\n\r\nabcde")), (cut, raw)
            assert b"\r\n0\r\n" not in raw
    assert len(spans) == len(cuts)
    broken = [span for span in spans if "error.type" in span.attributes]
    assert len(broken) == (head_size if framing == "close" and how == "fin" else len(cuts))


async def test_an_agent_that_resets_at_any_byte_leaves_one_span_and_no_whole_request():
    bodies = []

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        try:
            bodies.append(await reader.readuntil(b"0\r\nT: 1\r\n\r\n"))
        except (asyncio.IncompleteReadError, ConnectionError):
            bodies.append(b"broken")
            raise
        await reader.read()

    cuts = range(1, len(REQUEST))
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        for cut in cuts:
            wire = await lab.dial(NAME, 80)
            wire.writer.write(REQUEST[:cut])
            await asyncio.sleep(0)
            wire.reset()
        async with asyncio.timeout(60):
            while len(lab.spans) + lab.service.counters.closed_unused < len(cuts):
                await asyncio.sleep(0.01)
        spans = list(lab.spans)
    # A reset may overtake all that was sent: such a connection was never used for anything, and is counted as such.
    assert len(spans) + lab.service.counters.closed_unused == len(cuts)
    assert all("error.type" in span.attributes for span in spans)
    assert set(bodies) <= {b"broken"}


@pytest.mark.parametrize("cut", [1, 10, HEAD_SIZE - 1])
async def test_an_agent_that_ends_inside_a_head_is_told_and_has_a_span(cut):
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(REQUEST[:cut])
        await wire.writer.drain()
        if cut > 5:  # fewer bytes do not say yet that this is HTTP
            wire.writer.write_eof()
            raw = await wire.reader.read()
            (span,) = await lab.recorder.wait()
            assert raw.startswith(b"HTTP/1.1 400 ")
            assert span.attributes["clrk.egress.deny_reason"] == "bad_request_truncated"


@pytest.mark.parametrize("cut", range(HEAD_SIZE, len(REQUEST)))
async def test_an_agent_that_ends_inside_a_body_sends_no_whole_request(cut):
    arrived = []

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        arrived.append(await reader.read())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(REQUEST[:cut])
        wire.writer.write_eof()
        raw = await asyncio.wait_for(wire.reader.read(), 20)
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert span.attributes["clrk.egress.deny_reason"] == "bad_request_truncated"
    assert all(b"0\r\nT" not in seen for seen in arrived)


@pytest.mark.parametrize("framing", REPLIES)
async def test_an_agent_may_half_close_behind_its_request(framing):
    """`nc -N`, shutdown(SHUT_WR): the request is complete, and the answer still comes, all of it."""
    go_on = asyncio.Event()

    async def handle(reader, writer):
        await read_request(reader)
        await go_on.wait()
        writer.write(REPLIES[framing])

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET.replace(b"Connection: close\r\n", b""))
        wire.writer.write_eof()
        await asyncio.sleep(0.05)
        go_on.set()
        raw = await asyncio.wait_for(wire.reader.read(), 20)
        (span,) = await lab.recorder.wait()
    assert raw.endswith(REPLIES[framing].partition(b"\r\n\r\n")[2])
    assert "error.type" not in span.attributes


async def test_an_upstream_that_says_close_ends_the_agents_connection_too():
    async with upstream(replying(answer(b"hi", headers="Connection: close\r\n"))) as port, laboratory(
        gateway=aliased(port, NAME), rules=ALLOW
    ) as lab:  # fmt: skip
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(GET.replace(b"Connection: close\r\n", b""))
    assert b"\r\nConnection: close\r\n" in raw
    assert raw.endswith(b"hi")


@pytest.mark.parametrize("many", [True, False], ids=["1000-headers", "one-header"])
async def test_64_kib_of_headers_pass_both_ways(many):
    lines = [f"X-{number:04}: {'v' * 55}\r\n" for number in range(1000)] if many else [f"X: {'v' * 65_530}\r\n"]
    block = "".join(lines).encode()
    assert len(block) >= 64_000
    seen = []

    async def handle(reader, writer):
        seen.append((await read_request(reader))[0])
        writer.write(b"HTTP/1.1 200 OK\r\n" + block + b"Content-Length: 2\r\n\r\nhi")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(GET.replace(b"Connection", block + b"Connection"))
    assert block in seen[0]
    assert block in raw
    assert raw.endswith(b"hi")


async def test_silence_of_an_agent_inside_a_body_is_408_and_not_the_upstreams_fault():
    async def handle(reader, writer):
        await reader.read()

    spec = {"requestTimeout": "200ms"}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(REQUEST[:-5])
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 408 ")
    assert span.attributes["error.type"] == "request_timeout"


async def test_a_stream_that_moves_is_never_cut_by_request_timeout():
    """requestTimeout is the longest silence: an answer of an LLM may well take longer than five minutes."""

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(12):
            await asyncio.sleep(0.3)
            writer.write(b"1\r\na\r\n")
        writer.write(b"0\r\n\r\n")

    spec = {"requestTimeout": "3s"}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(GET)
    assert raw.endswith(b"1\r\na\r\n" * 12 + b"0\r\n\r\n")


async def test_silence_inside_an_answer_cuts_it_visibly():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.read()

    spec = {"requestTimeout": "200ms"}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(GET)
        (span,) = await lab.recorder.wait()
    assert raw.endswith(b"\r\n\r\n1\r\na\r\n")
    assert span.attributes["error.type"] == "timeout"


async def test_a_head_that_does_not_come_to_its_end_is_408(monkeypatch):
    monkeypatch.setattr("clrk.gateway.egress.http.HEAD_TIMEOUT_S", 0.2)
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(REQUEST[:30])
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 408 ")
    assert span.attributes["clrk.egress.deny_reason"] == "bad_request_timeout"


async def test_a_slow_reader_stops_the_upstream():
    """Neither side is read ahead of the other: what one run can make the gateway hold does not grow with the answer."""
    sent = 0
    size = 48 * MIB
    block = bytes(64 * 1024)

    async def handle(reader, writer):
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(block)
            await writer.drain()
            sent += len(block)

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.transport.pause_reading()
        wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        wire.writer.write(GET)
        before = await _steady(lambda: sent)
        assert before < size // 2, "the kernel's buffers, and a few hundred KiB of ours"
        wire.writer.transport.resume_reading()
        got = 0
        async with asyncio.timeout(30):
            await wire.reader.readuntil(b"\r\n\r\n")
            while data := await wire.reader.read(MIB):
                got += len(data)
        (span,) = await lab.recorder.wait()
    assert got == size
    assert "error.type" not in span.attributes


async def test_an_agent_that_stops_reading_for_request_timeout_is_let_go_and_the_upstream_not_blamed():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65_536))
            await writer.drain()

    spec = {"requestTimeout": "300ms"}
    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.transport.pause_reading()
        wire.writer.write(GET)
        (span,) = await lab.recorder.wait()
    assert span.attributes["error.type"] == "agent_disconnected"
    assert "nothing moved for 0.3 s" in span.status.message


async def test_a_slow_upstream_stops_the_agent():
    sent = 0
    go_on = asyncio.Event()

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        while (await reader.read(MIB)).find(b"end") < 0:
            pass
        writer.write(answer(b"ok"))

    async def pump(wire):
        nonlocal sent
        while sent < 48 * MIB:
            wire.writer.write(bytes(65_536))
            await wire.writer.drain()
            sent += 65_536
        wire.writer.write(b"end")

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(b"POST / HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: %d\r\n\r\n" % (48 * MIB + 3))
        pumping = asyncio.ensure_future(pump(wire))
        tracemalloc.start()
        stopped_at = await _steady(lambda: sent)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert stopped_at < 24 * MIB
        assert peak < 4 * MIB, "both ends and the gateway, in this process"
        go_on.set()
        await pumping
        assert (await wire.response())[1] == b"ok"


async def _steady(value) -> int:
    """Return a number once it has not changed for a while."""
    last, same = -1, 0
    async with asyncio.timeout(30):
        while same < 5:
            await asyncio.sleep(0.1)
            same = same + 1 if value() == last and last > 0 else 0
            last = value()
    return last
