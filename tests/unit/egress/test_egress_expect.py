"""What comes before the final answer: 100-continue is the upstream's to say, and every other 1xx passes as it comes."""

from __future__ import annotations

import asyncio

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, GET, NAME, through
from test_egress_hostile import Quiet, recogniser

ASKING = b"POST / HTTP/1.1\r\nHost: tools.internal\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_the_upstreams_continue_brings_the_body():
    """Nobody answers for the upstream: it says 100 only after the test has seen that the agent has got nothing yet."""
    asked, go_on = asyncio.Event(), asyncio.Event()
    seen = []

    async def handle(reader, writer):
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        asked.set()
        await go_on.wait()
        writer.write(CONTINUE)
        seen.append(await reader.readexactly(3))
        writer.write(answer(b"ok"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(ASKING)
        async with asyncio.timeout(25):
            await asked.wait()
            early = asyncio.ensure_future(wire.reader.readuntil(b"\r\n\r\n"))
            done, _ = await asyncio.wait((early,), timeout=0.1)
            assert not done
            go_on.set()
            assert await early == CONTINUE
            wire.writer.write(b"abc")
            assert (await wire.response())[1] == b"ok"
    assert b"\r\nExpect: 100-continue\r\n" in seen[0]
    assert seen[1] == b"abc"


@pytest.mark.parametrize("status", ["417 Expectation Failed", "401 Unauthorized", "200 OK"])
async def test_a_final_answer_in_place_of_continue_arrives_and_no_body_was_needed(status):
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"no", status, "Connection: close\r\n"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(ASKING)
        (span,) = await lab.recorder.wait()
    assert raw.startswith(f"HTTP/1.1 {status}\r\n".encode())
    assert raw.endswith(b"no")
    assert b"100 Continue" not in raw
    assert span.attributes["http.response.status_code"] == int(status[:3])


async def test_an_agent_that_does_not_wait_is_not_held_up():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(b"ok"))  # an upstream that does not know Expect

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(ASKING + b"abc")
        assert (await wire.response())[1] == b"ok"


async def test_a_body_that_is_needed_whole_is_asked_for_at_once_and_expect_goes_no_further():
    seen = []

    async def handle(reader, writer):
        seen.append(await read_request(reader))
        writer.write(CONTINUE + answer(b"ok"))  # its own 100 would be a second one

    async with upstream(handle) as port, laboratory(
        gateway=aliased(port, NAME), rules=ALLOW, recognise=recogniser(Quiet(b"{more}"))
    ) as lab:  # fmt: skip
        wire = await lab.dial(NAME, 80)
        wire.writer.write(ASKING.replace(b"Expect", b"Connection: close\r\nExpect"))
        async with asyncio.timeout(25):
            assert await wire.reader.readuntil(b"\r\n\r\n") == CONTINUE
        raw = await wire.ask(b"abc")
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert raw.endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")  # its length might have been another
    assert b"Expect" not in seen[0][0]
    assert seen[0][1] == b"{more}"


async def test_http_1_0_knows_no_interim_answers():
    async def handle(reader, writer):
        head, _ = await read_request(reader)
        writer.write(CONTINUE + b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer(head))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(ASKING.replace(b"/1.1", b"/1.0") + b"abc")
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Expect" not in raw


async def test_interim_answers_arrive_one_by_one_before_the_final_one():
    taken = asyncio.Semaphore(0)

    async def handle(reader, writer):
        await read_request(reader)
        for number in range(5):
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </%d>\r\nLink: </b>\r\n\r\n" % number)
            await taken.acquire()
        writer.write(answer(b"ok"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(GET)
        async with asyncio.timeout(25):
            for number in range(5):
                hints = await wire.reader.readuntil(b"\r\n\r\n")
                assert hints == b"HTTP/1.1 103 Early Hints\r\nLink: </%d>\r\nLink: </b>\r\n\r\n" % number
                taken.release()
            assert (await wire.response())[1] == b"ok"


async def test_an_interim_answer_can_not_speak_of_framing_or_other_ways():
    hints = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
        b'Alt-Svc: h3=":443"\r\nConnection: close\r\n\r\n'
    )
    raw, _ = await through(hints + answer(b"hi"))
    assert raw.startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n")
