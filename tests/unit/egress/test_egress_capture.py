"""captureBody: headers and bodies as events of the call's span, without secrets, and without a byte changed."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import brotli
import pytest
import zstandard
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.core.egress_resources import CaptureBody
from clrk.gateway.egress.capture import Capture
from clrk.gateway.egress.http1 import parse_request, parse_response, request_body, response_body
from clrk.gateway.interpret import Allowance
from clrk.gateway.redact import Redactor
from clrk.gateway.telemetry import attributes as attr

RULES = [{"hostnames": ["tools.internal"], "ports": [80]}]
JSON = b"Content-Type: application/json\r\n"


def spec(port: int, **capture) -> dict:
    """A gateway with captureBody."""
    otlp = {"endpoint": "http://127.0.0.1:9", "captureBody": capture}
    return aliased(port, "tools.internal") | {"otlp": otlp}


def request(body: bytes, headers: bytes = JSON, target: bytes = b"/a") -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: tools.internal\r\n%bContent-Length: %d\r\n\r\n" % (target, headers, len(body))
    return head + body


async def events_of(response: bytes, sent: bytes, **capture) -> dict[str, dict]:
    """Make one call; return the events of its span by name, after seeing that no byte was changed."""
    got: list[bytes] = []

    async def serve(reader, writer):
        got.append((await read_request(reader))[1])
        writer.write(response)
        await writer.drain()

    async with upstream(serve) as port, laboratory(gateway=spec(port, **capture), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(sent)
        wire.writer.write_eof()
        async with asyncio.timeout(25):
            received = await wire.reader.read(-1)
        assert plain_body(received) == plain_body(response)
        assert got == [sent.partition(b"\r\n\r\n")[2]]
        (span,) = await lab.recorder.wait()
    times = [event.time_unix_nano for event in span.events]
    assert times == sorted(times)
    assert all(span.start_ns <= time <= span.end_ns for time in times)
    assert len({event.name for event in span.events}) == len(span.events)
    return {event.name: event.attributes for event in span.events}


def plain_body(message: bytes) -> bytes:
    """Return a response's body out of its chunks, which a relay may cut anew."""
    head, _, rest = message.partition(b"\r\n\r\n")
    body = response_body(parse_response(head + b"\r\n"), "POST")
    found = body.feed(rest)
    if not body.done:
        body.eof()
    return found


def chunked(*pieces: bytes, headers: bytes = JSON) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % headers + body


async def test_headers_and_bodies_of_both_sides():
    sent = request(b'{"q": 1, "password": "hunter2"}', JSON + b"X-A: 1\r\nx-a: 2\r\nAuthorization: Bearer hunter2\r\n")
    found = await events_of(
        answer(b'{"r": 2}', headers="Content-Type: application/json\r\nSet-Cookie: s=hunter2\r\n"), sent
    )
    assert found == {
        "http.request.headers": {
            "http.request.header.host": ["tools.internal"],
            "http.request.header.content-type": ["application/json"],
            "http.request.header.x-a": ["1", "2"],
            "http.request.header.authorization": ["[redacted]"],
            "http.request.header.content-length": ["31"],
        },
        "http.request.body": {
            "http.request.body.content": '{"q": 1, "password": "[redacted]"}',
            "http.request.body.size": 31,
            "clrk.body.truncated": False,
        },
        "http.response.headers": {
            "http.response.header.content-type": ["application/json"],
            "http.response.header.set-cookie": ["[redacted]"],
            "http.response.header.content-length": ["8"],
        },
        "http.response.body": {
            "http.response.body.content": '{"r": 2}',
            "http.response.body.size": 8,
            "clrk.body.truncated": False,
        },
    }


async def test_nothing_is_kept_where_nobody_asks():
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(answer(b"{}", headers="Content-Type: application/json\r\n"))
        await writer.drain()

    async with upstream(serve) as port, laboratory(gateway=aliased(port, "tools.internal"), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(request(b"{}"))
        await wire.response()
        (span,) = await lab.recorder.wait()
        assert list(span.events) == []


async def test_a_known_length_keeps_its_first_bytes():
    body = json.dumps({"a": "word " * 40}).encode()
    found = await events_of(answer(body, headers="Content-Type: application/json\r\n"), request(body), maxBytes=33)
    for side in ("request", "response"):
        event = found[f"http.{side}.body"]
        assert event[f"http.{side}.body.content"] == '{"a": "word word word word word [redacted]'
        assert event[f"http.{side}.body.size"] == len(body)
        assert event["clrk.body.truncated"] is True


@pytest.mark.parametrize(
    "response",
    [
        chunked(*[b"line %d\n" % number for number in range(100)], headers=b"Content-Type: text/plain\r\n"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"".join(b"line %d\n" % n for n in range(100)),
        answer(b"".join(b"line %d\n" % n for n in range(100)), headers="Content-Type: text/event-stream\r\n"),
    ],
    ids=["chunked", "until close", "event stream"],
)
async def test_a_stream_keeps_its_last_bytes(response):
    found = await events_of(response, request(b"{}"), maxBytes=20)
    event = found["http.response.body"]
    assert event["http.response.body.content"] == "[redacted]\nline 98\nline 99\n"
    assert (event["http.response.body.size"], event["clrk.body.truncated"]) == (790, True)


async def test_a_secret_in_pieces_is_one_secret():
    secret = b"sk-ant-api03-Zx81hQw0-_aaBBccDDee"
    pieces = [secret[at : at + 1] for at in range(len(secret))]
    found = await events_of(
        chunked(b'{"text": "', *pieces, b' is it"}'), request(b"{}"),
    )  # fmt: skip
    assert found["http.response.body"]["http.response.body.content"] == '{"text": "[redacted] is it"}'


@pytest.mark.parametrize("max_bytes", range(1, 60))
async def test_no_limit_shows_half_of_a_secret(max_bytes):
    body = b'{"note": "x", "password": "hunter2-hunter2", "y": 1}\n'
    sent = request(body)
    for found in (
        _watch(sent, answer(body, headers="Content-Type: application/json\r\n"), max_bytes),
        _watch(sent, chunked(*[body[at : at + 7] for at in range(0, len(body), 7)]), max_bytes),
    ):
        for side in ("request", "response"):
            assert "unter" not in found[f"http.{side}.body"][f"http.{side}.body.content"]


def _watch(sent: bytes, response: bytes, max_bytes: int = 65_536, allowance: Allowance | None = None, **more) -> dict:
    """Show one exchange to a Capture, without a relay."""
    allowance = allowance or Allowance(1 << 20)
    before = allowance.left
    capture = Capture(CaptureBody(max_bytes=max_bytes, **more), allowance)
    head, _, rest = sent.partition(b"\r\n\r\n")
    asked = parse_request(head + b"\r\n")
    body = request_body(asked)
    capture.request(asked, body)
    if piece := body.feed(rest):
        capture.request_data(piece)
    head, _, rest = response.partition(b"\r\n\r\n")
    answered = parse_response(head + b"\r\n")
    body = response_body(answered, asked.method)
    capture.response(answered, body)
    for at in range(0, len(rest), 1000):
        if piece := body.feed(rest[at : at + 1000]):
            capture.response_data(piece)
    found = {event.name: event.attributes for event in capture.events()}
    capture.close()
    capture.close()
    assert allowance.left == before
    return found


def coded(body: bytes, coding: str, *, length: bool = True) -> bytes:
    headers = b"Content-Type: text/plain\r\nContent-Encoding: %b\r\n" % coding.encode()
    return answer(body, headers=headers.decode()) if length else chunked(body, headers=headers)


def content(found: dict) -> object:
    event = found["http.response.body"]
    return event.get("http.response.body.content", event.get("clrk.body.skipped"))


def test_compressed_bodies_are_shown_as_text():
    text = b"".join(b"line %d\n" % number for number in range(10_000))
    sent = request(b"{}")
    assert content(_watch(sent, coded(gzip.compress(text), "gzip"), 100_000)) == text.decode()
    assert content(_watch(sent, coded(zlib.compress(text), "deflate"), 16)) == "line 0\nline 1\n[redacted]"
    assert content(_watch(sent, coded(brotli.compress(text), "br"), 100_000)) == text.decode()
    assert content(_watch(sent, coded(zstandard.compress(text), "zstd"), 16)) == "line 0\nline 1\n[redacted]"
    assert content(_watch(sent, coded(gzip.compress(text), "gzip", length=False), 20)) == "[redacted]\nline 9999\n"
    event = _watch(sent, coded(gzip.compress(text), "gzip"))["http.response.body"]
    assert event["http.response.body.size"] == len(gzip.compress(text))


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (coded(b"plain", "compress"), "encoding"),
        (coded(b"xx", "gzip, compress"), "encoding"),
        (coded(b"no gzip at all", "gzip"), "encoding"),
        (answer(b"a\0b", headers="Content-Type: text/plain\r\n"), "binary"),
        (answer("sk-abcdefgh".encode("utf-16-le"), headers="Content-Type: text/plain\r\n"), "binary"),
        (answer("abc".encode("utf-16"), headers="Content-Type: text/plain; charset=utf-16\r\n"), "binary"),
        (answer(b"said to be: sk-abcdefgh", headers="Content-Type: text/plain; charset=utf-16-le\r\n"), "binary"),
        (answer(b"abc", headers="Content-Type: text/plain; charset=utf-7\r\n"), "binary"),
        (answer(b"abc", headers="Content-Type: text/plain; charset=rot13\r\n"), "binary"),
    ],
)
def test_bodies_that_can_not_be_shown_are_noted(response, reason):
    event = _watch(request(b"{}"), response)["http.response.body"]
    body = response.partition(b"\r\n\r\n")[2]
    assert event == {"http.response.body.size": len(body), "clrk.body.skipped": reason}


def test_a_body_whose_coding_breaks_shows_what_came_before():
    text = b"".join(b"line %d\n" % number for number in range(20_000))
    broken = bytearray(gzip.compress(text))
    broken[len(broken) // 2 :] = b"\xff" * 1000
    event = _watch(request(b"{}"), coded(bytes(broken), "gzip"))["http.response.body"]
    assert event["http.response.body.content"].startswith("line 0\nline 1\n")
    assert event["clrk.body.truncated"] is True


def test_other_charsets():
    text = "pässword and sk-abcdefghij"
    for charset, header in (("utf-8", "UTF8"), ("latin-1", "ISO-8859-1"), ("cp1252", '"windows-1252"')):
        response = answer(text.encode(charset), headers=f"Content-Type: text/plain; charset={header}\r\n")
        assert content(_watch(request(b"{}"), response)) == "pässword and [redacted]"


@pytest.mark.parametrize(
    ("content_type", "wanted", "kept"),
    [
        ("application/json; charset=utf-8", [], True),
        ("application/vnd.api+json", [], True),
        ("text/html", [], True),
        ("application/x-www-form-urlencoded", [], True),
        ("text/event-stream", [], True),
        ("application/x-ndjson", [], True),
        ("application/octet-stream", [], False),
        ("image/png", [], False),
        ("multipart/form-data; boundary=x", [], False),
        ("", [], False),
        ("nonsense", [], False),
        ("text/html", ["application/json"], False),
        ("Application/JSON", ["application/json"], True),
        ("text/html", ["text/*"], True),
        ("application/octet-stream", ["application/octet-stream"], True),
    ],
)
def test_content_types(content_type, wanted, kept):
    found = _watch(
        request(b"{}"), answer(b"x", headers=f"Content-Type: {content_type}\r\n"), include_content_types=wanted
    )
    assert ("http.response.body" in found) is kept
    assert "http.response.headers" in found


def test_memory_of_a_run_is_bounded():
    allowance = Allowance(10_000)
    text = answer(b"a" * 20_000, headers="Content-Type: text/plain\r\n")
    assert content(_watch(request(b"{}"), text, 8_000, allowance)) == "a" * 3904 + "[redacted]"
    assert content(_watch(request(b"{}"), text, 12_000, allowance)) == "memory"
    stream = chunked(*[b"b\n" * 1000] * 100, headers=b"Content-Type: text/plain\r\n")
    assert content(_watch(request(b"{}"), stream, 9_000, allowance)).endswith("b\n" * 4000)
    assert content(_watch(request(b"{}"), stream, 12_000, allowance)) == "memory"


async def test_a_failure_costs_the_events_only(monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Redactor, "headers", broken)
    found = await events_of(answer(b"{}", headers="Content-Type: application/json\r\n"), request(b"{}"))
    assert found == {}
    assert "capturing a call failed" in caplog.text


async def test_a_failed_call_shows_what_was_sent():
    async with upstream(lambda _, writer: _hang_up(writer)) as port, laboratory(gateway=spec(port), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(request(b'{"a": 1}'))
        head, _ = await wire.response()
        assert b" 502 " in head
        (span,) = await lab.recorder.wait()
        assert span.name == attr.SPAN_EGRESS_DIAL_FAILED
        assert [event.name for event in span.events] == ["http.request.headers", "http.request.body"]


async def _hang_up(writer) -> None:
    writer.close()


async def test_a_call_that_is_cut_off_shows_what_had_come():
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(chunked(b'data: {"a": 1}\n\n', headers=b"Content-Type: text/event-stream\r\n")[:-5])
        await writer.drain()
        await asyncio.Event().wait()

    async with upstream(serve) as port, laboratory(gateway=spec(port), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(request(b"{}"))
        async with asyncio.timeout(25):
            await wire.reader.readuntil(b'"a": 1}\n\n')
        await lab.egress.close()
        (span,) = await lab.recorder.wait()
        found = {event.name: event.attributes for event in span.events}
        assert found["http.response.body"]["http.response.body.content"] == 'data: {"a": 1}\n\n'


async def test_upgrades_show_their_heads():
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframe")
        await writer.drain()

    async with upstream(serve) as port, laboratory(gateway=spec(port), rules=RULES) as lab:
        wire = await lab.dial("tools.internal", 80)
        wire.writer.write(
            b"GET / HTTP/1.1\r\nHost: tools.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Protocol: bearer.x\r\n\r\n"
        )
        wire.writer.write_eof()
        async with asyncio.timeout(25):
            assert (await wire.reader.read(-1)).endswith(b"frame")
        (span,) = await lab.recorder.wait()
        assert [event.name for event in span.events] == ["http.request.headers", "http.response.headers"]
