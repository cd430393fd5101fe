"""Messages that two readers could end in two places: refused by name, and the other side never sees a byte of them.

Each vector is named after what it tries. Sources: RFC 9112, section 11; RFC 9110, sections 5.5, 6.5.1 and 7.6.1; the
request smuggling classes of Linhart et al. (2005) and of Kettle (2019, 2022).
"""

from __future__ import annotations

import asyncio

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from relayed_exchange import ALLOW, GET, NAME, replying, through
from test_egress_refusals import HEAD, refused

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: tools.internal\r\n\r\n"
HOST = b" HTTP/1.1\r\nHost: tools.internal\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
POST = b"POST / HTTP/1.1\r\nHost: tools.internal\r\n"

HEADS = {
    "cl.te": (POST + b"Content-Length: 6\r\n" + CHUNKED, b"0\r\n\r\nG", "transfer_encoding"),
    "te.cl": (POST + CHUNKED + b"Content-Length: 4\r\n", b"5c\r\n" + SMUGGLED, "transfer_encoding"),
    "te.te-second-unknown": (POST + CHUNKED + b"Transfer-encoding: x\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te.te-first-unknown": (POST + b"Transfer-encoding: x\r\n" + CHUNKED, b"0\r\n\r\n", "transfer_encoding"),
    "te-identity-behind": (POST + b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-identity": (POST + b"Transfer-Encoding: identity\r\nContent-Length: 3\r\n", b"abc", "transfer_encoding"),
    "te-empty": (POST + b"Transfer-Encoding:\r\nContent-Length: 3\r\n", b"abc", "transfer_encoding"),
    "te-quoted": (POST + b'Transfer-Encoding: "chunked"\r\n', b"0\r\n\r\n", "transfer_encoding"),
    "te-parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-comma-first": (POST + b"Transfer-Encoding: ,chunked\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-comma-last": (POST + b"Transfer-Encoding: chunked,\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-tab-inside": (POST + b"Transfer-Encoding: chun\tked\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-vertical-tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n", "control_character"),
    "te-form-feed": (POST + b"Transfer-Encoding:\x0cchunked\r\n", b"0\r\n\r\n", "control_character"),
    "te-nbsp": (POST + b"Transfer-Encoding:\xa0chunked\r\n", b"0\r\n\r\n", "transfer_encoding"),
    "te-space-before-colon": (POST + b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n", "header"),
    "te-tab-before-colon": (POST + b"Transfer-Encoding\t: chunked\r\n", b"0\r\n\r\n", "header"),
    "te-in-a-fold": (POST + b"X: y\r\n\tTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", "header"),
    "te-folded-value": (POST + b"Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n", "header"),
    "te-behind-a-bare-lf": (POST + b"X: y\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", "control_character"),
    "te-behind-a-bare-cr": (POST + b"X: y\rTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", "control_character"),
    "te-behind-a-nul": (POST + b"X: y\x00Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", "control_character"),
    "te-behind-a-space": (POST + b" Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", "header"),
    "te-in-http-1.0": (POST.replace(b"/1.1", b"/1.0") + CHUNKED, b"0\r\n\r\n", "transfer_encoding"),
    "cl-twice-different": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n", b"abcd", "content_length"),
    "cl-twice-same": (POST + b"Content-Length: 3\r\nContent-length: 3\r\n", b"abc", "content_length"),
    "cl-list": (POST + b"Content-Length: 5, 5\r\n", b"abcde", "content_length"),
    "cl-plus": (POST + b"Content-Length: +5\r\n", b"abcde", "content_length"),
    "cl-minus-zero": (POST + b"Content-Length: -0\r\n", b"", "content_length"),
    "cl-hex": (POST + b"Content-Length: 0x5\r\n", b"abcde", "content_length"),
    "cl-exponent": (POST + b"Content-Length: 1e1\r\n", b"abcde", "content_length"),
    "cl-fraction": (POST + b"Content-Length: 5.0\r\n", b"abcde", "content_length"),
    "cl-underscore": (POST + b"Content-Length: 1_0\r\n", b"a" * 10, "content_length"),
    "cl-superscript": (POST + b"Content-Length: \xb2\r\n", b"ab", "content_length"),
    "cl-inner-space": (POST + b"Content-Length: 1 0\r\n", b"a" * 10, "content_length"),
    "cl-over-64-bit": (POST + b"Content-Length: 18446744073709551617\r\n", b"a", "content_length"),
    "cl-empty": (POST + b"Content-Length:\r\n", b"", "content_length"),
    "cl-space-before-colon": (POST + b"Content-Length : 5\r\n", b"abcde", "header"),
    "cl-nul-in-name": (POST + b"Content-Length\x00: 5\r\n", b"abcde", "control_character"),
    "cl-nbsp-in-name": (POST + b"Content-Length\xa0: 5\r\n", b"abcde", "header"),
    "cl-behind-the-request-line": (b"POST / HTTP/1.1\r\n Content-Length: 5\r\nHost: tools.internal\r\n", b"", "header"),
    "connection-names-cl": (POST + b"Connection: content-length\r\nContent-Length: 5\r\n", b"abcde", "connection"),
    "connection-names-host": (HEAD + b"Connection: close, host\r\n", b"", "connection"),
    "connection-names-authorization": (HEAD + b"Connection: Authorization\r\n", b"", "connection"),
    "connection-names-cookie-in-a-second-line": (HEAD + b"Connection: x\r\nconnection: cookie\r\n", b"", "connection"),
    "host-twice": (HEAD + b"host: tools.internal\r\n", b"", "host"),
    "host-twice-other-first": (b"GET / HTTP/1.1\r\nHost: evil\r\nHost: tools.internal\r\n", b"", "host"),
    "host-none": (b"GET / HTTP/1.1\r\nX: y\r\n", b"", "host"),
    "host-empty": (b"GET / HTTP/1.1\r\nHost:\r\n", b"", "host"),
    "host-list": (b"GET / HTTP/1.1\r\nHost: tools.internal, evil\r\n", b"", "host"),
    "host-path": (b"GET / HTTP/1.1\r\nHost: tools.internal/evil\r\n", b"", "host"),
    "host-userinfo": (b"GET / HTTP/1.1\r\nHost: tools.internal@evil\r\n", b"", "host"),
    "host-space": (b"GET / HTTP/1.1\r\nHost: tools.internal evil\r\n", b"", "host"),
    "host-port-twice": (b"GET / HTTP/1.1\r\nHost: tools.internal:80:80\r\n", b"", "host"),
    "host-port-empty": (b"GET / HTTP/1.1\r\nHost: tools.internal:\r\n", b"", "host"),
    "host-port-too-large": (b"GET / HTTP/1.1\r\nHost: tools.internal:65616\r\n", b"", "host"),
    "host-backslash": (b"GET / HTTP/1.1\r\nHost: tools.internal\\evil\r\n", b"", "host"),
    "absolute-form-against-host": (b"GET http://evil.internal/" + HOST, b"", "target"),
    "absolute-of-another-port": (b"GET http://tools.internal:81/" + HOST, b"", "target"),
    "absolute-with-userinfo": (b"GET http://tools.internal@evil/" + HOST, b"", "target"),
    "absolute-with-backslash": (b"GET http://tools.internal\\@evil/" + HOST, b"", "target"),
    "absolute-form-without-authority": (b"GET http:///x" + HOST, b"", "target"),
    "absolute-of-another-scheme": (b"GET https://tools.internal/" + HOST, b"", "target"),
    "authority-form": (b"GET tools.internal:80 HTTP/1.1\r\nHost: tools.internal\r\n", b"", None),
    "target-with-a-space": (b"GET /a /b HTTP/1.1\r\nHost: tools.internal\r\n", b"", "request_line"),
    "target-with-a-nul": (b"GET /a\x00 HTTP/1.1\r\nHost: tools.internal\r\n", b"", "control_character"),
    "target-with-a-bare-cr": (b"GET /a\r HTTP/1.1\r\nHost: tools.internal\r\n", b"", "control_character"),
    "target-with-a-fragment": (b"GET /a#b" + HOST, b"", "target"),
    "version-0.9": (b"GET / HTTP/0.9\r\nHost: tools.internal\r\n", b"", "version"),
    "version-1.2": (b"GET / HTTP/1.2\r\nHost: tools.internal\r\n", b"", "version"),
    "version-1.10": (b"GET / HTTP/1.10\r\nHost: tools.internal\r\n", b"", "request_line"),
    "version-leading-zero": (b"GET / HTTP/01.1\r\nHost: tools.internal\r\n", b"", "request_line"),
    "version-in-lower-case": (b"GET / http/1.1\r\nHost: tools.internal\r\n", b"", "request_line"),
    "version-and-a-space": (b"GET / HTTP/1.1 \r\nHost: tools.internal\r\n", b"", "request_line"),
    "request-line-with-tabs": (b"GET\t/\tHTTP/1.1\r\nHost: tools.internal\r\n", b"", "request_line"),
    "name-with-a-space": (HEAD + b"X Y: z\r\n", b"", "header"),
    "name-with-a-slash": (HEAD + b"X/Y: z\r\n", b"", "header"),
    "name-in-utf-8": (HEAD + "Ünïcode: z\r\n".encode(), b"", "header"),
    "name-empty": (HEAD + b": z\r\n", b"", "header"),
    "no-colon": (HEAD + b"Transfer-Encoding chunked\r\n", b"", "header"),
    "value-with-delete": (HEAD + b"X: \x7f\r\n", b"", "control_character"),
    "value-with-backspace": (HEAD + b"X: a\x08\r\n", b"", "control_character"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
async def test_a_head_that_two_could_read_differently_goes_nowhere(name):
    head, tail, code = HEADS[name]
    status, body, span = await refused(head + b"\r\n" + tail + SMUGGLED)
    assert status in (400, 505)
    if code is not None:
        assert body["reason"] == f"bad_request_{code}"
    assert span.attributes["clrk.egress.deny_reason"] == body["reason"]


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\nHost: tools.internal\n\n", b"GET / HTTP/1.1\r\nHost: tools.internal\n\r\n"]
)  # fmt: skip
async def test_a_head_of_bare_line_feeds_is_answered_at_once(head):
    """Its sender waits for an answer: waiting for CR LF CR LF would be five minutes of silence."""
    async with asyncio.timeout(60):
        _, body, _ = await refused(head)
    assert body["reason"] == "bad_request_control_character"


TRAILERS = [
    b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: evil", b"Connection: close", b"TE: trailers",
    b"Upgrade: h2c", b"Trailer: X", b"Keep-Alive: 5", b"Authorization: Bearer x", b"Cookie: a=b", b"Expect: x",
    b"Content-Type: text/plain", b"Content-Encoding: gzip", b"traceparent: 00-1", b"content-LENGTH: 0", b"X y: z",
    b"X : z", b"X: a\x00b", b" X: folded", b"X: a\nTransfer-Encoding: chunked",
]  # fmt: skip


@pytest.mark.parametrize("trailer", TRAILERS)
async def test_a_trailer_can_not_speak_for_the_head(trailer):
    """The head may be upstream by then; the end of the body, and so the request, never is."""
    arrived = []

    async def handle(reader, writer):
        arrived.append(await reader.read())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(POST + CHUNKED + b"\r\n3\r\nabc\r\n0\r\nX-Fine: 1\r\n" + trailer + b"\r\n\r\n" + SMUGGLED)
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert raw.count(b"HTTP/1.1 ") == 1
    assert span.attributes["clrk.egress.deny_reason"].startswith("bad_request_")
    for seen in arrived:
        assert trailer.partition(b":")[2] not in seen.partition(b"\r\n\r\n")[2]
        assert b"0\r\n" not in seen
        assert b"smuggled" not in seen


RESPONSES = {
    "cl-and-te": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "cl-twice": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "cl-list": b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
    "cl-plus": b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
    "te-unknown": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "te-identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc",
    "te-in-http-1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "space-before-colon": b"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc",
    "fold": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 3\r\n\r\nabc",
    "bare-lf": b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
    "bare-cr": b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    "nul": b"HTTP/1.1 200 OK\r\nX: a\x00\r\nContent-Length: 0\r\n\r\n",
    "reason-with-a-bare-lf": b"HTTP/1.1 200 OK\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n",
    "no-colon": b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 0\r\n\r\n",
    "connection-names-cl": b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 3\r\n\r\nabc",
    "version-2": b"HTTP/2 200\r\nContent-Length: 0\r\n\r\n",
    "http-0.9": b"<html>hello</html>\r\n\r\n",
    "interim-with-a-bare-lf": b"HTTP/1.1 103 Early\nX: y\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", RESPONSES)
async def test_an_answer_that_two_could_read_differently_does_not_arrive(name):
    raw, span = await through(RESPONSES[name])
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert raw.count(b"\r\n\r\n") == 1
    assert span.name == "egress.dial.failed"
    assert span.attributes["error.type"].startswith("bad_response_")


@pytest.mark.parametrize(
    "tail", [b"zz\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"-3\r\nabc\r\n", b"ffffffffffffffff\r\n", b"3\nabc\n0\n\n",
             b"0\r\nContent-Length: 3\r\n\r\n", b"0\r\nTransfer-Encoding: x\r\n\r\n", b"0\r\nX: a\x00\r\n\r\n",
             b"0\r\nConnection: close\r\n\r\n", b"3;a\x00b\r\nabc\r\n0\r\n\r\n", b"0\r\nno colon\r\n\r\n"],
)  # fmt: skip
async def test_a_chunked_answer_that_breaks_is_cut_and_never_ended(tail):
    """What was right so far arrived; the last chunk, which would make it look whole, does not."""
    raw, span = await through(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n" + tail)
    if raw.startswith(b"HTTP/1.1 200 OK\r\n"):
        assert b"\r\n0\r\n" not in raw
        assert b"abc" not in raw
    else:
        assert raw.startswith(b"HTTP/1.1 502 ")
    assert span.status.code == "STATUS_CODE_ERROR"


async def test_chunk_extensions_of_an_answer_are_dropped():
    raw, _ = await through(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 ;a="b;c"\r\nhi\r\n0;x\r\n\r\n')
    assert raw.endswith(b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n")


async def test_what_an_upstream_says_behind_its_answer_answers_nobody():
    """Response queue poisoning: the bytes behind an answer must not become the next one."""
    poison = answer(b"hi") + answer(b"poison")
    async with (
        upstream(replying(poison)) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab,
    ):
        for _ in range(2):
            raw = await (await lab.dial(NAME, 80)).ask(GET)
            assert raw.endswith(b"\r\n\r\nhi")


@pytest.mark.parametrize(
    ("method", "reply"),
    [(b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"), (b"GET", b"HTTP/1.1 204 No\r\n\r\npoison"),
     (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison")],
)  # fmt: skip
async def test_a_body_where_none_can_be_is_not_the_next_answer(method, reply):
    async with upstream(replying(reply)) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        for _ in range(2):
            raw = await (await lab.dial(NAME, 80)).ask(GET.replace(b"GET", method))
            assert raw.startswith(reply.partition(b"\r\n")[0])
            assert b"poison" not in raw


async def test_what_follows_a_refused_request_is_never_served():
    reached = []

    async def handle(reader, writer):
        reached.append(await read_request(reader))
        writer.write(answer(b"ok"))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        raw = await (await lab.dial(NAME, 80)).ask(HEAD + b"Content-Length: 1, 1\r\n\r\nx" + SMUGGLED * 3)
    assert reached == []
    assert raw.count(b"HTTP/1.1 ") == 1
