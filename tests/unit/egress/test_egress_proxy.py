"""Upstreams behind a corporate proxy: a real CONNECT proxy, real TLS inside and around it."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest
from connect_proxy import connect_proxy
from egress_lab import aliased, answer, laboratory, read_request, upstream
from proxied_lab import ALLOW, GET, NAME, PROXY, SECRET, ask, failure, hello, only_the_proxy, signed_in, through
from tls_material import Authority

from clrk.gateway.egress import upstream as upstream_module


async def test_https_goes_through_the_proxy_with_its_name_and_credentials():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        connect_proxy(hosts={f"{NAME}:443": port}, credentials="corp-user:S3cret:pass word") as proxy,
        laboratory(
            gateway=signed_in(proxy), rules=ALLOW, upstream_ca=theirs.cert_pem, resolver=only_the_proxy, secrets=SECRET
        ) as lab,
    ):
        raw, span = await ask(lab)
    assert raw.endswith(b"secure")
    assert span.name == f"GET {NAME}"
    assert (span.attributes["network.peer.address"], span.attributes["network.peer.port"]) == ("127.0.0.1", proxy.port)
    assert proxy.heads[0].startswith(f"CONNECT {NAME}:443 HTTP/1.1\r\nHost: {NAME}:443\r\n".encode())


async def test_a_tls_proxy_carries_tls_inside_tls_and_has_to_prove_its_name():
    theirs = Authority("upstream and proxy CA")
    spec = {"upstreamProxy": {"url": ""}}
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        connect_proxy(theirs.server_context([PROXY]), hosts={f"{NAME}:443": port}) as proxy,
    ):
        for host, good in ((PROXY, True), ("wrong.corp.example", False)):

            async def resolver(name, port, host=host):
                return await only_the_proxy(PROXY if name == host else name, port)

            spec["upstreamProxy"]["url"] = f"https://{host}:{proxy.port}"
            async with laboratory(gateway=spec, rules=ALLOW, upstream_ca=theirs.cert_pem, resolver=resolver) as lab:
                if good:
                    assert (await ask(lab))[0].endswith(b"secure")
                else:
                    assert (await failure(lab))[0] == "proxy_tls_wrong_host"
        async with laboratory(
            gateway={"upstreamProxy": {"url": f"https://{PROXY}:{proxy.port}"}}, rules=ALLOW, resolver=only_the_proxy
        ) as lab:
            assert (await failure(lab))[0] == "proxy_tls_unknown_ca"
    assert len(proxy.heads) == 1


async def test_plain_http_and_big_bodies_go_through_a_tunnel_too():
    body = bytes(range(256)) * 8192

    async def echo(reader, writer):
        _, got = await read_request(reader)
        writer.write(answer(got))

    async with (
        upstream(echo) as port,
        connect_proxy(hosts={f"{NAME}:80": port}) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=only_the_proxy) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        head = f"POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        raw = await wire.ask(head.encode() + body)
        span = (await lab.recorder.wait())[0]
    assert raw.endswith(body)
    assert span.attributes["clrk.req.bytes"] == span.attributes["clrk.resp.bytes"] == len(body)


async def test_a_server_that_speaks_first_is_heard_behind_the_proxys_answer_and_only_the_tunnel_is_counted():
    async def banner(reader, writer):
        assert await reader.readexactly(4) == b"quit"
        writer.write(b"bye")

    async with (
        upstream(banner) as port,
        connect_proxy(hosts={f"{NAME}:22": port}, glued=b"SSH-2.0-hello\r\n") as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=only_the_proxy) as lab,
    ):
        wire = await lab.dial(NAME, 22)
        assert await wire.reader.readexactly(15) == b"SSH-2.0-hello\r\n"
        wire.writer.write(b"quit")
        assert await wire.reader.read() == b"bye"
        wire.writer.close()
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["clrk.req.bytes"], span.attributes["clrk.resp.bytes"]) == ("egress.tcp", 4, 18)


async def test_passthrough_goes_through_the_proxy():
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        connect_proxy(hosts={f"{NAME}:443": port}) as proxy,
        laboratory(
            gateway=through(proxy) | {"tls": {"passthroughHosts": [NAME]}}, rules=ALLOW, resolver=only_the_proxy
        ) as lab,
    ):
        wire = await lab.dial_tls(NAME, context=theirs.client_context())
        assert (await wire.ask(GET)).endswith(b"secure")
    assert len(proxy.heads) == 1


async def test_kept_connections_ask_the_proxy_once():
    async def twice(reader, writer):
        for word in (b"one", b"two"):
            await read_request(reader)
            writer.write(answer(word))

    async with (
        upstream(twice) as port,
        connect_proxy(hosts={f"{NAME}:80": port}) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=only_the_proxy) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        for word in (b"one", b"two"):
            wire.writer.write(f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
            assert (await wire.response())[1] == word
    assert len(proxy.heads) == 1


@pytest.mark.parametrize(
    ("spec", "name"),
    [({"noProxy": [NAME]}, "noProxy"), ({"noProxy": ["*.example.com"]}, "pattern"), ({}, "alias")],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_dialled_directly_never_meets_the_proxy(spec, name):
    async def resolver(host, port):
        return [ip_address("127.0.0.1")]

    async with upstream(hello) as port, connect_proxy() as proxy:
        gateway = through(proxy, **spec) | (aliased(port, NAME) if name == "alias" else {})
        rules = [*ALLOW, {"cidrs": ["127.0.0.1/32"]}]
        async with laboratory(gateway=gateway, rules=rules, resolver=resolver) as lab:
            wire = await lab.dial(NAME, port)
            raw = await wire.ask(f"GET / HTTP/1.1\r\nHost: {NAME}:{port}\r\nConnection: close\r\n\r\n".encode())
    assert raw.endswith(b"secure")
    assert proxy.heads == []


async def test_addresses_go_by_the_networks_of_no_proxy():
    rules = [{"cidrs": ["203.0.113.0/24", "127.0.0.0/8"]}]
    async with upstream(hello) as port:
        async with connect_proxy(hosts={f"203.0.113.7:{port}": port}) as proxy:
            gateway = through(proxy, noProxy=["127.0.0.0/8"])
            async with laboratory(gateway=gateway, rules=rules, resolver=only_the_proxy) as lab:
                for address in ("203.0.113.7", "127.0.0.1"):
                    wire = await lab.dial(address, port)
                    request = f"GET / HTTP/1.1\r\nHost: {address}:{port}\r\nConnection: close\r\n\r\n"
                    raw = await wire.ask(request.encode())
                    assert raw.endswith(b"secure")
        assert [head.split()[1] for head in proxy.heads] == [f"203.0.113.7:{port}".encode()]


@pytest.mark.parametrize(
    ("found", "port"), [(["169.254.169.254"], 80), (["198.51.100.1", "127.0.0.1"], 80)], ids=["metadata", "one-of-two"]
)
async def test_a_name_that_this_host_resolves_to_a_refused_address_is_not_asked_for(found, port):
    async def resolver(name, _):
        return [ip_address("127.0.0.1")] if name == PROXY else [ip_address(text) for text in found]

    async with connect_proxy() as proxy, laboratory(gateway=through(proxy), rules=ALLOW, resolver=resolver) as lab:
        wire = await lab.dial(NAME, port)
        raw = await wire.ask(f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.attributes["clrk.egress.deny_reason"] in ("address_metadata", "address_loopback")
    assert proxy.heads == []


@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_a_refused_address_is_not_asked_for(address):
    rules = [{"cidrs": ["0.0.0.0/0", "::/0"]}]
    async with (
        connect_proxy() as proxy,
        laboratory(gateway=through(proxy), rules=rules, resolver=only_the_proxy) as lab,
    ):
        wire = await lab.dial(address, 9000)
        wire.writer.write(b"\x00\x01\x02")
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        span = (await lab.recorder.wait())[0]
    assert span.attributes["clrk.egress.deny_reason"].startswith("address_")
    assert proxy.heads == []


REFUSALS = {
    "407": (b"HTTP/1.1 407 No corp-user:S3cret\r\n\r\n", "proxy_authentication_required"),
    "403": (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n", "proxy_forbidden"),
    "502": (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "proxy_bad_gateway"),
    "504": (b"HTTP/1.1 504 Gateway Timeout\r\n\r\n", "proxy_bad_gateway"),
    "302": (b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\n\r\n", "proxy_refused"),
    "799": (b"HTTP/1.1 799 What\r\n\r\n", "proxy_refused"),
    "100": (b"HTTP/1.1 100 Continue\r\n\r\n", "proxy_refused"),
    "not-http": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n\r\n", "proxy_bad_response"),
    "http-2": (b"HTTP/2 200\r\n\r\n", "proxy_bad_response"),
    "endless": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "proxy_bad_response"),
    "glued": (b"HTTP/1.1 200 OK\r\n\r\n\x15\x03\x03\x00\x02\x02\x28", "proxy_bad_response"),
    "cut": (b"HTTP/1.1 200 OK\r\nX: y", "proxy_connection_reset"),
    "nothing": (b"", "proxy_connection_reset"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_what_the_proxy_answers_is_told_apart_and_no_credential_is_repeated(case):
    reply, error = REFUSALS[case]
    async with (
        connect_proxy(reply=reply) as proxy,
        laboratory(gateway=signed_in(proxy), rules=ALLOW, resolver=only_the_proxy, secrets=SECRET) as lab,
    ):
        reason, detail = await failure(lab)
        everything = repr(lab.spans) + repr(lab.recorder.begun)
    assert reason == error
    assert PROXY in detail
    for word in ("corp-user", "S3cret", "Basic", "evil", "Proxy-Authorization"):
        assert word not in detail
        assert word not in everything


async def test_the_upstreams_certificate_is_verified_inside_the_tunnel():
    """A proxy that opens TLS itself shows its own certificate, which nobody has vouched for."""
    theirs, proxys = Authority("upstream CA"), Authority("proxy CA")
    async with (
        upstream(hello, proxys.server_context([NAME])) as port,
        connect_proxy(hosts={f"{NAME}:443": port}) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, upstream_ca=theirs.cert_pem, resolver=only_the_proxy) as lab,
    ):
        reason, detail = await failure(lab)
    assert reason == "tls_unknown_ca"
    assert "upstreamTLS.caFile" in detail
    assert PROXY in detail


async def test_a_proxy_that_can_not_be_reached():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://{PROXY}:{closed.getsockname()[1]}"
        async with laboratory(gateway={"upstreamProxy": {"url": url}}, rules=ALLOW, resolver=only_the_proxy) as lab:
            assert (await failure(lab))[0] == "proxy_connection_refused"
    gateway = {"upstreamProxy": {"url": "http://nowhere.corp.example:3128"}}
    async with laboratory(gateway=gateway, rules=ALLOW, resolver=only_the_proxy) as lab:
        assert (await failure(lab))[0] == "proxy_dns"


async def test_a_proxy_that_never_answers(monkeypatch):
    monkeypatch.setattr(upstream_module, "PROXY_ANSWER_S", 0.2)
    async with (
        connect_proxy(reply=None) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=only_the_proxy) as lab,
    ):
        assert (await failure(lab))[0] == "proxy_timeout"


async def test_a_name_server_that_never_answers_holds_up_a_name_once(monkeypatch):
    monkeypatch.setattr(upstream_module, "LOCAL_LOOKUP_S", 0.2)
    asked = []

    async def silent(name, port):
        if name == PROXY:
            return [ip_address("127.0.0.1")]
        asked.append(name)
        await asyncio.sleep(30)
        return []

    async with (
        upstream(hello) as port,
        connect_proxy(hosts={f"{NAME}:80": port}) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=silent) as lab,
    ):
        for _ in range(2):
            wire = await lab.dial(NAME, 80)
            assert (await wire.ask(GET)).endswith(b"secure")
    assert asked == [NAME]


@pytest.mark.parametrize(
    "secrets",
    [
        {},
        {"default/proxy": {"username": "u"}},
        {"other/proxy": {"username": "u", "password": "p"}},
        {"default/proxy": {"username": "u:v", "password": "p"}},
        {"default/proxy": {"username": "u", "password": "p\r\nX: y"}},
    ],
    ids=["none", "half", "foreign", "colon", "newline"],
)
async def test_without_usable_credentials_nothing_goes_out(secrets):
    async with (
        connect_proxy() as proxy,
        laboratory(gateway=signed_in(proxy), rules=ALLOW, resolver=only_the_proxy, secrets=secrets) as lab,
    ):
        reason, detail = await failure(lab)
    assert reason == "proxy_credentials_missing"
    assert "default/proxy" in detail
    assert proxy.heads == []


async def test_new_credentials_are_used_by_running_sandboxes():
    async with (
        upstream(hello) as port,
        connect_proxy(hosts={f"{NAME}:80": port}, credentials="corp-user:new") as proxy,
        laboratory(gateway=signed_in(proxy), rules=ALLOW, resolver=only_the_proxy, secrets=SECRET) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        assert (await wire.ask(GET)).startswith(b"HTTP/1.1 502 ")
        new = {"default/proxy": {"username": "corp-user", "password": "new"}}
        lab.service.reconfigure(lab.config.model_copy(update={"secrets": new}))
        wire = await lab.dial(NAME, 80)
        assert (await wire.ask(GET)).endswith(b"secure")


async def test_a_proxy_that_refuses_resets_a_tunnel():
    async with (
        connect_proxy(reply=REFUSALS["403"][0]) as proxy,
        laboratory(gateway=through(proxy), rules=ALLOW, resolver=only_the_proxy) as lab,
    ):
        wire = await lab.dial(NAME, 9000)
        wire.writer.write(b"\x00\x01\x02")
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        span = (await lab.recorder.wait())[0]
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "proxy_forbidden")
