"""TLS towards agents: versions, resumption, protocols, and clients that do not want what we show them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import shutil
import ssl
import sys

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from span_list import Span
from tls_material import Authority

from clrk.core.gateway_config import GatewayConfig, IssuingCa, ca_id
from clrk.gateway import ca as ca_module
from clrk.gateway.ca import Issuers, LeafIssuer
from clrk.gateway.egress.handshake import judge_handshake

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}, {"cidrs": ["127.0.0.0/8"]}]
GET = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode()
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"secure"))


# --- resumption: a client and a server context, without sockets -------------------------------------------------------


def shake(client: ssl.SSLContext, server: ssl.SSLContext, session=None, name: str = NAME) -> ssl.SSLObject:
    """One handshake and one byte, so that the tickets of TLS 1.3 have come; returns the client's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    agent = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    gateway = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (agent, gateway):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    gateway.write(b"x")
    assert agent.read(1) == b"x"
    for side in (agent, gateway, agent):  # a session that did not end well is not resumed by its id
        with contextlib.suppress(ssl.SSLWantReadError):
            side.unwrap()
    return agent


def client_of(issuer_ca: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = issuer_ca.client_context()
    context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_is_resumed_while_its_leaf_is_kept_and_falls_back_to_a_full_handshake_after(version, monkeypatch):
    ca = Authority("clrk test CA")
    issuer, client = LeafIssuer(ca.cert_pem, ca.key_pem), client_of(ca, version)
    first = shake(client, issuer.context(NAME))
    assert not first.session_reused
    again = shake(client, issuer.context(NAME), first.session)
    assert again.session_reused
    monkeypatch.setattr(ca_module, "MAX_CONTEXTS", 1)
    issuer.context("other.example.com")  # pushes the first one out
    fallen = shake(client, issuer.context(NAME), again.session)
    assert not fallen.session_reused
    assert fallen.getpeercert()["serialNumber"] != first.getpeercert()["serialNumber"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_renewed_leaf_is_met_with_a_full_handshake(version, monkeypatch):
    ca = Authority("clrk test CA")
    issuer, client = LeafIssuer(ca.cert_pem, ca.key_pem), client_of(ca, version)
    monkeypatch.setattr(ca_module, "_RENEW_BEFORE", ca_module._LIFETIME - datetime.timedelta(microseconds=1))
    first = shake(client, issuer.context(NAME))
    later = shake(client, issuer.context(NAME), first.session)
    assert not later.session_reused
    assert later.getpeercert()["serialNumber"] != first.getpeercert()["serialNumber"]


def test_a_session_of_one_name_is_not_resumed_for_another():
    ca = Authority("clrk test CA")
    issuer, client = LeafIssuer(ca.cert_pem, ca.key_pem), client_of(ca, ssl.TLSVersion.TLSv1_3)
    first = shake(client, issuer.context(NAME))
    other = shake(client, issuer.context("other.example.com"), first.session, "other.example.com")
    assert not other.session_reused


def test_clients_without_tickets_resume_by_id_and_fill_no_memory():
    ca = Authority("clrk test CA")
    issuer, client = LeafIssuer(ca.cert_pem, ca.key_pem), client_of(ca, ssl.TLSVersion.TLSv1_2)
    client.options |= ssl.OP_NO_TICKET
    first = shake(client, issuer.context(NAME))
    assert shake(client, issuer.context(NAME), first.session).session_reused
    kept = []
    for _ in range(2 * ca_module.MAX_SESSIONS):
        context = issuer.context(NAME)
        shake(client, context)
        kept.append(context.session_stats()["number"])
    assert max(kept) <= ca_module.MAX_SESSIONS


def test_a_leaf_vouches_for_one_name_only():
    """No wildcards: x.example.com may be allowed where y.example.com is not."""
    ca = Authority("clrk test CA")
    issuer = LeafIssuer(ca.cert_pem, ca.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'y\.example\.com'"):
        shake(ca.client_context(), issuer.context("x.example.com"), name="y.example.com")
    for name in ("example.com", "sub.x.example.com"):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake(ca.client_context(), issuer.context("x.example.com"), name=name)


def test_leaves_are_bounded_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(ca_module, "MAX_CONTEXTS", 3)
    ca = Authority("clrk test CA")
    issuer = LeafIssuer(ca.cert_pem, ca.key_pem)
    first = issuer.context("a")
    for name in ("b", "c", "a", "d"):
        issuer.context(name)
    assert len(issuer._contexts) == 3
    assert issuer.context("a") is first


async def test_an_agent_resumes_through_the_gateway():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        through = await lab.forwarder(NAME, 443)
        (bundle := os.memfd_create("ca"), os.write(bundle, lab.ca.pem))
        program = f"""
import socket, ssl
context, session, found = ssl.create_default_context(cafile="/proc/{os.getpid()}/fd/{bundle}"), None, []
for _ in range(3):
    with socket.create_connection(("127.0.0.1", {through})) as sock:
        with context.wrap_socket(sock, server_hostname="{NAME}", session=session) as tls:
            tls.sendall({GET!r})
            assert tls.makefile("rb").read().endswith(b"secure")
            found.append(tls.session_reused)
            session = tls.session
print(found)
"""
        out, err = await run(sys.executable, "-I", "-c", program)
        os.close(bundle)
    assert (out, err) == (b"[False, True, True]\n", b"")


async def run(*argv: str) -> tuple[bytes, bytes]:
    """Run a client to its end."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        return await process.communicate()


# --- protocols ------------------------------------------------------------------------------------------------------


async def test_a_client_that_offers_http_2_only_is_told_so_in_the_handshake():
    async with laboratory(gateway=aliased(9, NAME), rules=ALLOW) as lab:
        context = lab.ca.client_context()
        context.set_alpn_protocols(["h2"])
        with pytest.raises(ssl.SSLError, match="no application protocol"):
            await lab.dial_tls(NAME, context=context)
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.egress.deny_reason"]) == ("egress.dial.denied", "alpn_http2_only")
    assert "http/1.1" in span.status.message
    assert "tls.passthroughHosts" in span.status.message


async def test_a_passthrough_host_may_speak_http_2():
    theirs = Authority("upstream CA")
    server = theirs.server_context([NAME])
    server.set_alpn_protocols(["h2"])
    spec = {"tls": {"passthroughHosts": [NAME]}}
    async with upstream(hello, server) as port:
        async with laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
            context = theirs.client_context()
            context.set_alpn_protocols(["h2"])
            wire = await lab.dial_tls(NAME, context=context)
            assert wire.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"


async def test_other_protocols_than_http_are_not_asked_for_http():
    async def echo(reader, writer):
        writer.write((await reader.readexactly(4)).upper())

    theirs = Authority("upstream CA")
    async with (
        upstream(echo, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        context = lab.ca.client_context()
        context.set_alpn_protocols(["mqtt"])
        wire = await lab.dial_tls(NAME, 8883, context=context)
        wire.writer.write(b"\x10abc")
        async with asyncio.timeout(25):
            assert await wire.reader.read() == b"\x10ABC"


async def test_a_client_certificate_of_an_agent_changes_nothing_and_goes_nowhere(tmp_path):
    theirs = Authority("upstream CA")
    certificate, key = theirs.issue("agent")
    (tmp_path / "agent.pem").write_bytes(key + certificate)
    seen = []

    async def handle(reader, writer):
        seen.append(writer.get_extra_info("peercert"))
        await hello(reader, writer)

    server = theirs.server_context([NAME])
    server.verify_mode, _ = ssl.CERT_OPTIONAL, server.load_verify_locations(cadata=theirs.cert_pem)
    async with (
        upstream(handle, server) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        context = lab.ca.client_context()
        context.load_cert_chain(tmp_path / "agent.pem")
        wire = await lab.dial_tls(NAME, context=context)
        assert (await wire.ask(GET)).endswith(b"secure")
    assert not seen[0]


async def test_a_client_of_old_tls_is_told_apart():
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        port = await lab.forwarder(NAME, 443)
        await run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        span = (await lab.recorder.wait())[0]
    assert span.attributes["error.type"] == "tls_client_protocol_version"
    assert "clrk.tls.client_rejected_ca" not in span.attributes


async def test_an_address_has_a_leaf_of_its_own_that_curl_accepts(tmp_path):
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context(["127.0.0.1"])) as port,
        laboratory(gateway={}, rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        (tmp_path / "ca.pem").write_bytes(lab.ca.pem)
        through = await lab.forwarder("127.0.0.1", port)
        url = f"https://127.0.0.1:{port}/"
        out, err = await run(
            "curl", "-sS", "--cacert", str(tmp_path / "ca.pem"), "--connect-to", f"::127.0.0.1:{through}", url
        )
    assert (out, err) == (b"secure", b"")


# --- clients that do not trust us -----------------------------------------------------------------------------------

CLOSER = """
import socket, ssl
sock, context = socket.create_connection(("127.0.0.1", PORT)), ssl.create_default_context()
received, sending = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(received, sending, server_hostname="api.example.com")
try:
    tls.do_handshake()
except ssl.SSLWantReadError:
    sock.sendall(sending.read())
sock.recv(100)
sock.close()
"""
NODE = 'require("https").get("https://localhost:PORT/", {family: 4}).on("error", e => console.log(e.code))'
HTTPS = "https://localhost:PORT/"
OPENSSL = ["openssl", "s_client", "-connect", "127.0.0.1:PORT"]
REJECTING = {
    "curl": ["curl", "-sS", HTTPS],
    "node": ["node", "-e", NODE],
    "python": [sys.executable, "-I", "-c", f"import urllib.request as r; r.urlopen('{HTTPS}')"],
    "openssl": [*OPENSSL, "-verify_return_error"],
    "apt": ["/usr/lib/apt/apt-helper", "-oAcquire::Retries=0", "download-file", HTTPS, "/dev/null"],
    "closes after the certificate": [sys.executable, "-I", "-c", CLOSER],
}
CLOSING = {
    "git": ["git", "-c", "http.proxy=", "ls-remote", f"{HTTPS}x"],
    "wget": ["wget", "-qO-", "--tries=1", HTTPS],
    "node of TLS 1.2": ["node", "--tls-max-v1.2", "-e", NODE],
    "openssl that does not care": OPENSSL,
    "openssl of TLS 1.2 that does not care": [*OPENSSL, "-tls1_2"],
}


async def _meet_without_trust(argv: list[str]) -> Span:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"no {argv[0]} on this host")
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        port = await lab.forwarder(NAME, 443)
        await run(*(word.replace("PORT", str(port)) for word in argv))
        return (await lab.recorder.wait())[0]


@pytest.mark.parametrize("client", REJECTING)
async def test_whoever_rejects_our_ca_gets_a_span_that_says_what_to_do(client, caplog):
    caplog.set_level(logging.WARNING)
    span = await _meet_without_trust(REJECTING[client])
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "tls_client_rejected_ca")
    assert span.attributes["clrk.tls.client_rejected_ca"] is True
    assert f"add {NAME} to tls.passthroughHosts" in span.status.message
    assert len([record for record in caplog.records if "tls.passthroughHosts" in record.getMessage()]) == 1


@pytest.mark.parametrize("client", CLOSING)
async def test_who_only_closes_behind_the_handshake_is_not_said_to_reject_our_ca(client, caplog):
    caplog.set_level(logging.WARNING)
    span = await _meet_without_trust(CLOSING[client])
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "tls_client_closed")
    assert "clrk.tls.client_rejected_ca" not in span.attributes
    assert "if it did not trust our certificate" in span.status.message
    assert f"add {NAME} to tls.passthroughHosts" in span.status.message
    assert len([record for record in caplog.records if "tls.passthroughHosts" in record.getMessage()]) == 1


async def test_a_client_that_keeps_a_connection_in_advance_and_closes_it_later_is_no_trouble(monkeypatch):
    monkeypatch.setattr("clrk.gateway.egress.accept.LEFT_AT_ONCE_S", 0.0)
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire = await lab.dial_tls(NAME)
        wire.writer.close()
        async with asyncio.timeout(25):
            while not lab.service.counters.closed_unused:
                await asyncio.sleep(0.01)
        assert lab.spans == []


@pytest.mark.parametrize(
    ("exc", "error", "rejected"),
    [
        (ConnectionResetError(), "tls_client_rejected_ca", True),
        (ssl.SSLZeroReturnError(6, "closed"), "tls_client_rejected_ca", True),
        (ConnectionAbortedError("SSL handshake is taking longer than 10 seconds"), "tls_client_handshake", False),
        (TimeoutError(), "tls_client_handshake", False),
        (ssl.SSLError(1, "no shared cipher"), "tls_client_handshake", False),
    ],
)
def test_only_what_looks_like_a_rejection_is_called_one(exc, error, rejected):
    failure = judge_handshake(exc, NAME)
    assert (failure.error_type, failure.rejected_ca) == (error, rejected)


# --- rotation of the CA -----------------------------------------------------------------------------------------------


async def test_a_run_keeps_the_ca_of_its_bundle_and_later_ones_get_the_new_one():
    theirs, new = Authority("upstream CA"), Authority("the next clrk CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        old_ca = {"cert_pem": lab.ca.cert_pem, "key_pem": lab.ca.key_pem}
        update = {"ca_cert_pem": new.cert_pem, "ca_key_pem": new.key_pem, "former_cas": [IssuingCa(**old_ca)]}
        lab.service.reconfigure(lab.config.model_copy(update=update))
        assert (await (await lab.dial_tls(NAME)).ask(GET)).endswith(b"secure")
        with pytest.raises(ssl.SSLCertVerificationError):
            await lab.dial_tls(NAME, context=new.client_context())

        for trusted, name in ((lab.ca, ca_id(lab.ca.cert_pem)), (new, ca_id(new.cert_pem)), (new, "")):
            await lab.egress.close()
            lab.sockets.close()
            lab.renew_sockets(name)
            wire = await lab.dial_tls(NAME, context=trusted.client_context())
            assert (await wire.ask(GET)).endswith(b"secure")


def test_a_ca_that_is_not_known_is_not_replaced_by_one_that_is_trusted(caplog):
    config = {"runtime": {}, "agents": [], "gateways": [], "routes": []}
    ca = Authority("clrk test CA")
    issuers = Issuers()
    issuers.reconfigure(GatewayConfig(**config, ca_cert_pem=ca.cert_pem, ca_key_pem=ca.key_pem))
    kept = issuers.of("")
    assert issuers.of("0badcafe") is kept
    assert "0badcafe is not known" in caplog.text
    issuers.reconfigure(GatewayConfig(**config, ca_cert_pem=ca.cert_pem, ca_key_pem=ca.key_pem))
    assert issuers.of(ca_id(ca.cert_pem)) is kept  # with its leaves
