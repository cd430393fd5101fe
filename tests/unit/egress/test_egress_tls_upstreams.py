"""TLS towards upstreams: what is refused and how it is told apart, and sessions that are resumed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator

import pytest
from connect_proxy import connect_proxy
from cryptography.x509.oid import ExtendedKeyUsageOID
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

pytestmark = pytest.mark.usefixtures("brief_linger")

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}]
GET = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode()
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"secure"))


def limited(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = version
    return context


def old(theirs: Authority) -> ssl.SSLContext:
    context = theirs.server_context([NAME])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what it is here for
        return limited(context, ssl.TLSVersion.TLSv1_1)


def demanding(version: ssl.TLSVersion):
    def make(theirs: Authority) -> ssl.SSLContext:
        context = limited(theirs.server_context([NAME]), version)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=theirs.cert_pem)
        return context

    return make


def no_common_cipher(theirs: Authority) -> ssl.SSLContext:
    """Wants a client certificate as well, and does not come to ask for it."""
    context = demanding(ssl.TLSVersion.TLSv1_2)(theirs)
    context.set_ciphers("NULL-SHA256:@SECLEVEL=0")
    return context


def unknown_name(theirs: Authority) -> ssl.SSLContext:
    context = theirs.server_context([NAME])
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    return context


def self_signed(_: Authority) -> ssl.SSLContext:
    return Authority(NAME).self_signed_context([NAME])


@contextlib.contextmanager
def blocking_server(context: ssl.SSLContext, reached: list[bytes]) -> Iterator[int]:
    """A TLS server in a thread: asyncio's sends no alert when a handshake fails."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is shut down
                while True:
                    sock, _ = listener.accept()
                    with context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as tls:
                        try:
                            tls.do_handshake()
                            reached.append(tls.recv(100))
                        except ssl.SSLError:  # closing at once would reset the connection, and its alert with it
                            with contextlib.suppress(OSError):
                                while socket.socket.recv(tls, 65_536):
                                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


CASES = {
    "not yet valid": (lambda theirs: theirs.server_context([NAME], since_days=0.5), "tls_certificate_not_yet_valid"),
    "expired": (lambda theirs: theirs.server_context([NAME], days=-1), "tls_certificate_expired"),
    "wrong host": (lambda theirs: theirs.server_context(["x.example.com"]), "tls_wrong_host"),
    "unknown CA": (lambda _: Authority("another").server_context([NAME]), "tls_unknown_ca"),
    "self-signed": (self_signed, "tls_self_signed"),
    "old TLS": (old, "tls_protocol_version"),
    "unknown name": (unknown_name, "tls_unrecognized_name"),
    "client certificate, TLS 1.3": (demanding(ssl.TLSVersion.TLSv1_3), "tls_client_certificate_required"),
    "client certificate, TLS 1.2": (demanding(ssl.TLSVersion.TLSv1_2), "tls_client_certificate_required"),
    "no cipher in common": (no_common_cipher, "tls_handshake"),
}
ADVICE = {
    "tls_unknown_ca": "upstreamTLS.caFile", "tls_self_signed": "upstreamTLS.caFile",
    "tls_client_certificate_required": "tls.passthroughHosts", "tls_handshake": "none of what TLS 1.2",
    "tls_protocol_version": "TLS 1.2", "tls_certificate_not_yet_valid": "clock",
}  # fmt: skip


async def ask(lab, method: str):
    wire = await lab.dial_tls(NAME)
    body = b"x" * 200_000 if method == "POST" else b""
    head = f"{method} / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {len(body)}\r\n\r\n"
    return await wire.ask(head.encode() + body), (await lab.recorder.wait())[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_upstream_errors_are_told_apart_in_the_502_and_the_span(case, method):
    make, error = CASES[case]
    theirs = Authority("upstream CA")
    reached: list[bytes] = []
    with blocking_server(make(theirs), reached) as port:
        async with laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab:
            raw, span = await ask(lab, method)
    problem = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert (problem["reason"], span.name, span.attributes["error.type"]) == (error, "egress.dial.failed", error)
    assert ADVICE.get(error, "") in problem["detail"]
    assert ADVICE.get(error, "") in span.status.message
    assert [data for data in reached if data] == []


async def test_a_demanding_upstream_works_by_passthrough(tmp_path):
    theirs = Authority("upstream CA")
    certificate, key = theirs.issue("agent", ExtendedKeyUsageOID.CLIENT_AUTH)
    (tmp_path / "agent.pem").write_bytes(key + certificate)
    spec = {"tls": {"passthroughHosts": [NAME]}}
    async with upstream(hello, demanding(ssl.TLSVersion.TLSv1_3)(theirs)) as port:
        async with laboratory(gateway=aliased(port, NAME) | spec, rules=ALLOW) as lab:
            context = theirs.client_context()
            context.load_cert_chain(tmp_path / "agent.pem")
            wire = await lab.dial_tls(NAME, context=context)
            assert (await wire.ask(GET)).endswith(b"secure")


@pytest.mark.parametrize("version", VERSIONS)
async def test_tls_1_2_and_1_3_are_spoken_and_http_1_1_is_negotiated(version):
    theirs = Authority("upstream CA")
    context = limited(theirs.server_context([NAME]), version)
    context.set_alpn_protocols(["h2", "http/1.1"])
    seen = []

    async def handle(reader, writer):
        tls = writer.get_extra_info("ssl_object")
        seen.append((tls.version(), tls.selected_alpn_protocol()))
        await hello(reader, writer)

    async with (
        upstream(handle, context) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        assert (await (await lab.dial_tls(NAME)).ask(GET)).endswith(b"secure")
    assert seen == [("TLSv1.2" if version is VERSIONS[0] else "TLSv1.3", "http/1.1")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("by_proxy", [False, True], ids=["direct", "proxy"])
async def test_a_session_with_an_upstream_is_resumed_once_each(version, by_proxy):
    """One exchange at a time, each over a connection of its own, so that each has a handshake."""
    theirs, reused = Authority("upstream CA"), []
    context = limited(theirs.server_context([NAME]), version)

    async def one_each(reader, writer):
        reused.append(writer.get_extra_info("ssl_object").session_reused)
        await hello(reader, writer)

    async def resolver(name, port):
        from ipaddress import ip_address

        return [ip_address("127.0.0.1" if name == "proxy" else "203.0.113.1")]

    async with upstream(one_each, context) as port, connect_proxy(hosts={f"{NAME}:443": port}) as proxy:
        spec = {"upstreamProxy": {"url": f"http://proxy:{proxy.port}"}} if by_proxy else aliased(port, NAME)
        async with laboratory(gateway=spec, rules=ALLOW, upstream_ca=theirs.cert_pem, resolver=resolver) as lab:
            for _ in range(3):
                assert (await (await lab.dial_tls(NAME)).ask(GET)).endswith(b"secure")
                async with asyncio.timeout(25):
                    while lab.egress._acceptor.way_out.upstream._idle:  # the upstream closes behind each answer
                        await asyncio.sleep(0.01)
    assert reused == [False, True, True]


async def test_an_upstream_that_forgot_a_session_gets_a_full_handshake_and_is_verified_again():
    theirs, reused = Authority("upstream CA"), []
    served = theirs.server_context([NAME])

    async def handle(reader, writer):
        reused.append(writer.get_extra_info("ssl_object").session_reused)
        await hello(reader, writer)

    async with upstream(handle, served) as first, upstream(handle, theirs.server_context([NAME])) as second:
        ports = [first]
        async with laboratory(gateway=aliased(first, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab:
            policy = lab.egress._acceptor.way_out.upstream._policy
            object.__setattr__(policy, "aliases", tuple((host, ip, ports[0]) for host, ip, _ in policy.aliases))
            for port in (first, second):
                object.__setattr__(policy, "aliases", tuple((host, ip, port) for host, ip, _ in policy.aliases))
                assert (await (await lab.dial_tls(NAME)).ask(GET)).endswith(b"secure")
                async with asyncio.timeout(25):
                    while lab.egress._acceptor.way_out.upstream._idle:
                        await asyncio.sleep(0.01)
    assert reused == [False, False]


async def test_sessions_belong_to_one_run():
    theirs, reused = Authority("upstream CA"), []

    async def handle(reader, writer):
        reused.append(writer.get_extra_info("ssl_object").session_reused)
        await hello(reader, writer)

    async with upstream(handle, theirs.server_context([NAME])) as port:
        for _ in range(2):
            async with laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab:
                assert (await (await lab.dial_tls(NAME)).ask(GET)).endswith(b"secure")
    assert reused == [False, False]
