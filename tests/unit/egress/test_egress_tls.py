"""TLS towards agents and towards upstreams, with real clients."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}]
GET = b"GET /v1?x=1 HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"secure"))


async def test_https_is_opened_read_and_verified_upstream():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        tls = wire.writer.get_extra_info("ssl_object")
        assert tls.selected_alpn_protocol() is None  # nothing was offered
        assert (await wire.ask(GET)).endswith(b"secure")
        span = (await lab.recorder.wait())[0]
    assert span.name == "GET api.example.com"
    assert span.attributes["url.full"] == "https://api.example.com/v1?x=1"
    assert span.attributes["server.port"] == 443


async def test_alpn_is_http_1_1_only():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        context = lab.ca.client_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        wire = await lab.dial_tls(NAME, context=context)
        assert wire.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_curl_accepts_the_leaf_and_nothing_else_signed_by_us(version, tmp_path):
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        bundle = tmp_path / "ca.pem"
        bundle.write_text(lab.ca.cert_pem)
        through = await lab.forwarder(NAME, 443)
        limit = "1.2" if version is ssl.TLSVersion.TLSv1_2 else "1.3"
        curl = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--http1.1", "--cacert", bundle, f"--tlsv{limit}", "--tls-max", limit, "-w", " %{http_code}",
            "--connect-to", f"{NAME}:443:127.0.0.1:{through}", f"https://{NAME}/", "-d", "body",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await curl.communicate()
    assert (out, err, curl.returncode) == (b"secure 200", b"", 0)


async def test_an_address_without_sni_gets_a_leaf_for_the_address():
    theirs = Authority("upstream CA")
    async with upstream(hello, theirs.server_context(["127.0.0.1"])) as port:
        rules = [{"cidrs": ["127.0.0.0/8"]}]
        async with laboratory(gateway={}, rules=rules, upstream_ca=theirs.cert_pem) as lab:
            wire = await lab.dial_tls("127.0.0.1", port)
            request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
            assert (await wire.ask(request)).endswith(b"secure")
            span = (await lab.recorder.wait())[0]
    assert span.attributes["url.full"] == f"https://127.0.0.1:{port}/"


async def test_no_sni_uses_the_dialled_name():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        context = lab.ca.client_context()
        context.check_hostname = False
        wire = await lab.dial(NAME, 443)
        await wire.writer.start_tls(context, server_hostname="")
        cert = wire.writer.get_extra_info("peercert")
        assert ("DNS", NAME) in cert["subjectAltName"]
        assert (await wire.ask(GET)).endswith(b"secure")


@pytest.mark.parametrize(
    ("sni", "host", "reason"),
    [("other.example.com", "other.example.com", "sni_mismatch"), (NAME, "other.example.com", "host_mismatch")],
)
async def test_names_that_disagree_are_421(sni, host, reason):
    async with laboratory(gateway=aliased(9, NAME), rules=ALLOW) as lab:
        wire = await lab.dial_tls(NAME, sni=sni)
        raw = await wire.ask(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 421 ")
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["reason"] == reason
    assert span.attributes["clrk.egress.deny_reason"] == reason


def expired(theirs: Authority) -> ssl.SSLContext:
    return theirs.server_context([NAME], days=-1)


@pytest.mark.parametrize(
    ("make", "known", "error"),
    [
        (expired, True, "tls_certificate_expired"),
        (lambda theirs: theirs.server_context(["wrong.example.com"]), True, "tls_wrong_host"),
        (lambda theirs: theirs.server_context([NAME]), False, "tls_unknown_ca"),
        (lambda theirs: None, True, "tls_not_spoken"),
    ],
    ids=["expired", "wrong-host", "unknown-ca", "not-tls"],
)
async def test_an_upstream_that_can_not_prove_its_name_is_502(make, known, error):
    theirs = Authority("upstream CA")
    reached = []

    async def handle(reader, writer):
        if theirs_context is not None:
            reached.append(await reader.read())
        else:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    theirs_context = make(theirs)
    async with (
        upstream(handle, theirs_context) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem if known else None) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        raw = await wire.ask(GET)
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", error)
    assert [data for data in reached if data] == []


async def test_a_client_that_rejects_our_ca_is_recorded():
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        through = await lab.forwarder(NAME, 443)
        curl = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--connect-to", f"{NAME}:443:127.0.0.1:{through}", f"https://{NAME}/",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await curl.communicate()
        assert curl.returncode == 60  # CURLE_PEER_FAILED_VERIFICATION
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.dial.failed"
    assert span.attributes["clrk.tls.client_rejected_ca"] is True
    assert span.status.code == "STATUS_CODE_ERROR"
    assert span.attributes["clrk.dst.name"] == NAME


@pytest.mark.parametrize("spec", [{"tls": {"mode": "Passthrough"}}, {"tls": {"passthroughHosts": ["*.example.com"]}}])
async def test_passthrough_is_tunnelled_unread(spec):
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab,
    ):
        wire = await lab.dial_tls(NAME, context=theirs.client_context())  # the upstream's own certificate
        assert (await wire.ask(GET)).endswith(b"secure")
        wire.close()
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.tcp"
    assert span.attributes["tls.client.server_name"] == NAME
    assert span.attributes["clrk.req.bytes"] > len(GET)
    assert span.attributes["clrk.resp.bytes"] > 500


async def test_passthrough_to_an_address_that_is_listed():
    """What a client that pins is told to do holds for one that dials an address."""
    theirs = Authority("upstream CA")
    spec = {"tls": {"passthroughHosts": ["127.0.0.1"]}}
    async with (
        upstream(hello, theirs.server_context(["127.0.0.1"])) as port,
        laboratory(gateway=spec, rules=[{"cidrs": ["127.0.0.0/8"]}]) as lab,
    ):
        wire = await lab.dial_tls("127.0.0.1", port, context=theirs.client_context(), sni=None)
        assert (await wire.ask(GET)).endswith(b"secure")
        wire.close()
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.tcp"


async def test_passthrough_to_another_name_than_was_dialled_is_denied():
    spec = {"tls": {"mode": "Passthrough"}}
    async with laboratory(gateway=spec, rules=ALLOW) as lab:
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await lab.dial_tls(NAME, sni="other.example.com")
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "sni_mismatch")


async def test_passthrough_does_not_allow():
    spec = {"tls": {"passthroughHosts": ["api.example.com"]}}
    async with laboratory(gateway=spec, rules=[{"hostnames": ["other.example.com"]}]) as lab:
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await lab.dial_tls(NAME)
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "no_rule")


async def test_a_rule_for_some_requests_does_not_open_a_tunnel():
    rules = [{"hostnames": [NAME], "http": {"methods": ["GET"]}}]
    async with laboratory(gateway={"tls": {"mode": "Passthrough"}}, rules=rules) as lab:
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await lab.dial_tls(NAME)
        assert (await lab.recorder.wait())[0].attributes["clrk.egress.deny_reason"] == "http_only"
        wire = await lab.dial(NAME, 9000)
        wire.writer.write(b"\x00\x01\x02")
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        assert (await lab.recorder.wait(2))[1].attributes["clrk.egress.deny_reason"] == "http_only"


async def test_other_protocols_inside_tls_are_tunnelled_over_tls():
    async def echo(reader, writer):
        writer.write((await reader.readexactly(5)).upper())

    theirs = Authority("upstream CA")
    async with (
        upstream(echo, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME, 6380)
        wire.writer.write(b"*1\r\nx")
        async with asyncio.timeout(25):
            assert await wire.reader.read() == b"*1\r\nX"
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.req.bytes"]) == ("egress.tcp", 5)
    assert "error.type" not in span.attributes


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00", b"\x16\x03\x01\x00\x00", b"\x16\x09", b"\x16\x03\x01\xff\xff"],
)
async def test_a_broken_client_hello_is_closed_and_recorded(garbage):
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 443)
        wire.writer.write(garbage)
        wire.writer.write_eof()
        try:
            assert await wire.reader.read() == b""
        except ConnectionResetError:
            pass
        span = (await lab.recorder.wait())[0]
    assert span.attributes["clrk.egress.deny_reason"] == "bad_client_hello"


async def test_64_mib_through_tls_on_both_sides():
    block = bytes(range(256)) * 4096

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(64):
            writer.write(await reader.readexactly(len(block)))
            await writer.drain()

    theirs = Authority("upstream CA")

    async def echoing(reader, writer):
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {64 * len(block)}\r\n\r\n".encode()
        writer.write(head)
        await handle(reader, writer)

    async with (
        upstream(echoing, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        length = f"Content-Length: {64 * len(block)}\r\nConnection: close\r\n\r\n".encode()

        async def send():
            wire.writer.write(b"POST / HTTP/1.1\r\nHost: api.example.com\r\n" + length)
            for _ in range(64):
                wire.writer.write(block)
                await wire.writer.drain()

        sending = asyncio.ensure_future(send())
        await wire.reader.readuntil(b"\r\n\r\n")
        for _ in range(64):
            assert await wire.reader.readexactly(len(block)) == block
        await sending
        span = (await lab.recorder.wait())[0]
    assert span.attributes["clrk.req.bytes"] == span.attributes["clrk.resp.bytes"] == 64 * len(block)


def test_python_verifies_the_chain_strictly():
    """OpenSSL's strict RFC 5280 checks, which Python 3.13 turns on by default."""
    from clrk.gateway.ca import LeafIssuer

    ca = Authority("clrk test CA")
    server = LeafIssuer(ca.cert_pem, ca.key_pem).context("x" * 60 + ".very-long.example.com")
    client = ca.client_context()
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()
    with left, right:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        a = client.wrap_bio(to_client, to_server, server_hostname="x" * 60 + ".very-long.example.com")
        b = server.wrap_bio(to_server, to_client, server_side=True)
        done = [False, False]
        for _ in range(10):
            for index, side in enumerate((a, b)):
                try:
                    side.do_handshake()
                    done[index] = True
                except ssl.SSLWantReadError:
                    continue
        assert done == [True, True]
