"""The seam to what governs a call: nothing goes out unjudged, a bug denies, and each call is settled once."""

from __future__ import annotations

import asyncio

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.gateway.egress import upload
from clrk.gateway.govern import Answer, Cut
from clrk.gateway.interpret import Facts, ResponseHead

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME]}]
DENIAL = Answer(
    429,
    "application/json",
    b'{"error":"budget"}',
    "budget_exceeded",
    "no tokens are left",
    "AIProviderRoute default/x",
    headers=(("Retry-After", "60"),),
    attributes={"clrk.budget.denied": True},
)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Judge:
    """Decides as it was told to, and writes down what it was asked."""

    def __init__(self, *, verdict=None, rewrite=None, response=None, fails="", tail=b"", decodes=False) -> None:
        self.verdict, self.rewrite, self.response, self.fails, self.tail = verdict, rewrite, response, fails, tail
        self.decodes_response = decodes
        self.rewrites_response = response is not None
        self.wants_plain_response = response is not None
        self.judged: list[bytes] = []
        self.settled: list[tuple[Facts | None, bool]] = []
        self.ended: list[bool] = []

    def _step(self, name: str) -> None:
        if self.fails == name:
            raise ValueError(name)

    def judge(self, body: bytes) -> Answer | None:
        self.judged.append(body)
        self._step("judge")
        return self.verdict

    def rewrite_request(self, body: bytes) -> bytes:
        self._step("rewrite_request")
        return self.rewrite or body

    def response_head(self, head: ResponseHead) -> None:
        self._step("response_head")

    def stream_opened(self, inject) -> None:
        self._step("stream_opened")

    def response_data(self, chunk: bytes) -> bytes | Cut:
        self._step("response_data")
        return self.response(chunk) if self.response else chunk

    def response_end(self, *, complete: bool) -> bytes:
        self.ended.append(complete)
        self._step("response_end")
        return self.tail

    def settle(self, facts: Facts | None, *, sent: bool):
        self.settled.append((facts, sent))
        self._step("settle")
        return {"clrk.budget.daily_used": 7}


async def exchange(judge, request: bytes, reply: bytes = answer(b"reply"), mode="Enforce", asks=1):
    """What reached the upstream, what the agent got until it had `asks` answers or the end, and the spans."""
    seen = []

    async def handle(reader, writer):
        while True:
            seen.append(await read_request(reader))
            writer.write(reply)

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, NAME) | {"mode": mode}, rules=ALLOW, govern=lambda *_: judge) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(request)
        spans = list(await lab.recorder.wait(asks))
    return seen, raw, spans


def post(body: bytes = b"question", extra: bytes = b"Connection: close\r\n") -> bytes:
    return b"POST /v1/x HTTP/1.1\r\nHost: api.example.com\r\n%bContent-Length: %d\r\n\r\n%b" % (extra, len(body), body)


async def test_a_denied_call_goes_nowhere_and_says_why():
    judge = Judge(verdict=DENIAL)
    seen, raw, (span,) = await exchange(judge, post())
    assert seen == []
    assert judge.judged == [b"question"]
    assert judge.settled == [(None, False)]
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"Retry-After: 60" in head
    assert body == DENIAL.body
    assert span.status.code == "STATUS_CODE_ERROR"
    assert span.status.message == "no tokens are left"
    found = span.attributes
    assert (found["error.type"], found["clrk.egress.deny_reason"]) == ("budget_exceeded", "budget_exceeded")
    assert (found["http.response.status_code"], found["clrk.budget.denied"]) == (429, True)
    assert (found["clrk.egress.route"], found["clrk.budget.daily_used"]) == ("AIProviderRoute default/x", 7)


async def test_the_connection_goes_on_after_a_denial():
    judge = Judge(verdict=DENIAL)
    _, raw, spans = await exchange(judge, post(extra=b"") + post(b"again"), asks=2)
    assert raw.count(DENIAL.body) == 2
    assert judge.judged == [b"question", b"again"]
    assert len(judge.settled) == len(spans) == 2


async def test_http_1_0_gets_its_denial_and_the_end():
    request = post().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Connection: close\r\n", b"")
    _, raw, _ = await exchange(Judge(verdict=DENIAL), request)
    assert b"Connection: close" in raw


@pytest.mark.parametrize("mode", ["Shadow", "Record"])
async def test_a_watching_gateway_lets_it_go_and_says_what_it_would_have_done(mode):
    judge = Judge(verdict=DENIAL)
    seen, raw, (span,) = await exchange(judge, post(), mode=mode)
    assert len(seen) == 1
    assert raw.endswith(b"reply")
    assert span.attributes["clrk.egress.would_deny"] == "budget_exceeded"
    assert "clrk.egress.deny_reason" not in span.attributes
    assert "clrk.budget.denied" not in span.attributes
    assert judge.settled == [(None, True)]


async def test_a_rewritten_request_and_a_rewritten_answer_have_the_right_length():
    judge = Judge(rewrite=b"a longer question", response=lambda chunk: chunk.replace(b"rep", b""), tail=b"<tail>")
    seen, raw, (span,) = await exchange(judge, post())
    assert seen[0][1] == b"a longer question"
    assert b"accept-encoding: identity" in seen[0][0]
    assert raw.endswith(b"2\r\nly\r\n6\r\n<tail>\r\n0\r\n\r\n")
    assert judge.ended == [True]
    assert span.attributes["clrk.req.bytes"] == 17


async def test_a_decoded_answer_loses_its_coding():
    reply = answer(b"reply", headers="Content-Encoding: x-test\r\n")
    _, raw, _ = await exchange(Judge(response=lambda chunk: chunk, decodes=True), post(), reply)
    assert b"ontent-Encoding" not in raw


async def test_a_cut_stream_ends_cleanly_with_the_last_word():
    judge = Judge(response=lambda chunk: Cut(b"data: over\n\n", "budget_exceeded", "tokens ran out"))
    _, raw, (span,) = await exchange(judge, post(), CHUNKED + b"5\r\nreply\r\n")
    assert raw.endswith(b"\r\n\r\nc\r\ndata: over\n\n\r\n0\r\n\r\n")
    assert span.attributes["error.type"] == "budget_exceeded"
    assert judge.settled == [(None, True)]


async def test_a_cut_answer_of_a_known_length_has_no_clean_end():
    class Cutting(Judge):
        rewrites_response = False

        def __init__(self):
            super().__init__(response=lambda chunk: Cut(b"r", "budget_exceeded", "tokens ran out"))
            self.rewrites_response = False

    _, raw, (span,) = await exchange(Cutting(), post())
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Content-Length: 5" in head
    assert body == b"r"
    assert span.attributes["error.type"] == "budget_exceeded"


@pytest.mark.parametrize("step", ["judge", "rewrite_request"])
async def test_a_bug_before_the_call_denies_it(step):
    judge = Judge(fails=step)
    seen, raw, (span,) = await exchange(judge, post())
    assert seen == []
    assert raw.startswith(b"HTTP/1.1 503 ")
    assert span.attributes["clrk.egress.deny_reason"] == "governor_failed"


@pytest.mark.parametrize("step", ["response_head", "stream_opened", "response_data"])
async def test_a_bug_during_the_answer_cuts_it(step):
    seen, raw, (span,) = await exchange(Judge(fails=step), post(), CHUNKED + b"5\r\nreply\r\n0\r\n\r\n")
    assert len(seen) == 1
    assert b"reply" not in raw
    assert span.attributes["error.type"] == "governor_failed"


async def test_a_bug_in_settling_costs_attributes_and_nothing_else():
    _, raw, (span,) = await exchange(Judge(fails="settle"), post())
    assert raw.endswith(b"reply")
    assert "clrk.budget.daily_used" not in span.attributes


async def test_a_bug_in_finding_the_governor_denies():
    def broken(*_):
        raise ValueError("routes")

    async with laboratory(gateway=aliased(1, NAME), rules=ALLOW, govern=broken) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(post())
    assert raw.startswith(b"HTTP/1.1 503 ")


async def test_a_body_that_is_too_large_to_judge_does_not_go_out(monkeypatch):
    monkeypatch.setattr(upload, "MAX_GOVERNED_BYTES", 1000)
    judge = Judge()
    seen, raw, (span,) = await exchange(judge, post(b"x" * 600_000))
    assert seen == []
    assert judge.judged == judge.settled == []
    assert raw.startswith(b"HTTP/1.1 413 ")
    assert span.attributes["clrk.egress.deny_reason"] == "body_too_large"


async def test_an_upstream_that_is_not_there_settles_as_unsent():
    judge = Judge()
    async with laboratory(gateway=aliased(1, NAME), rules=ALLOW, govern=lambda *_: judge) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(post())
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert judge.settled == [(None, False)]


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 nonsense\r\n\r\n", CHUNKED + b"5\r\nrep"])
async def test_a_broken_upstream_settles_once_as_sent(reply):
    judge = Judge()

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(reply)
        writer.close()

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, govern=lambda *_: judge) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        await wire.ask(post())
        await lab.recorder.wait()
    assert judge.settled == [(None, True)]


async def test_an_agent_that_leaves_settles_once():
    judge, asked = Judge(), asyncio.Event()

    async def handle(reader, writer):
        await read_request(reader)
        asked.set()
        await reader.read()

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, govern=lambda *_: judge) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        wire.writer.write(post())
        await asked.wait()
        wire.reset()
        (span,) = await lab.recorder.wait()
    assert span.attributes["error.type"] == "agent_disconnected"
    assert judge.settled == [(None, True)]


async def test_a_denial_that_nobody_waits_for_has_its_span():
    """Behind its goodbye TLS takes no more, so that the answer can not be written any more."""
    judge = Judge(verdict=DENIAL)
    async with laboratory(gateway={}, rules=ALLOW, govern=lambda *_: judge) as lab:
        wire = await lab.dial_tls(NAME)
        wire.writer.write(post(extra=b""))
        wire.writer.close()
        (span,) = await lab.recorder.wait()
    assert span.status.message == "no tokens are left"
    assert (span.attributes["error.type"], span.attributes["clrk.egress.deny_reason"]) == ("budget_exceeded",) * 2
    assert judge.settled == [(None, False)]


async def test_an_agent_that_leaves_inside_its_request_was_never_judged():
    judge = Judge()
    async with laboratory(gateway=aliased(1, NAME), rules=ALLOW, govern=lambda *_: judge) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(post()[:-3])
        await wire.writer.drain()
        wire.reset()
        await lab.recorder.wait()
    assert judge.judged == judge.settled == []
