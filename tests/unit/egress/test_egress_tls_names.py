"""What was dialled, SNI and Host agree, or the call goes nowhere (CONTRACT section 10)."""

from __future__ import annotations

import json

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

pytestmark = pytest.mark.usefixtures("brief_linger")

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}, {"cidrs": ["127.0.0.0/8"]}]
GET = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode()


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"secure"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (NAME, 200),
        ("API.Example.COM", 200),
        (f"{NAME}.", 200),
        (f"{NAME}:443", 200),
        ("other.example.com", 421),
        (f"{NAME}..", 421),
        (f"x.{NAME}", 421),
        (f"{NAME}:8443", 421),
        ("127.0.0.1", 421),
        ("[::1]", 421),
        ("xn--pi-7ka.example.com", 421),
        (f"{NAME}:0", 400),
        (f"user@{NAME}", 400),
        (f"{NAME}@other.example.com", 400),
        (f"{NAME}, other.example.com", 400),
        (f"{NAME} other.example.com", 400),
        (f"{NAME}/", 400),
        (f"{NAME}:443:443", 400),
        ("\u0430pi.example.com".encode().decode("latin-1"), 400),  # a Cyrillic letter
        ("ap\u00ed.example.com", 400),
        (f"{NAME}%2eevil", 400),
        ("", 400),
    ],
)
async def test_hosts_that_disagree_with_the_connection(host, status):
    theirs = Authority("upstream CA")
    seen = []

    async def handle(reader, writer):
        seen.append(await read_request(reader))
        writer.write(answer(b"secure"))

    async with (
        upstream(handle, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        raw = await wire.ask(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        await lab.recorder.wait()
    assert int(raw.split(b" ")[1]) == status
    assert len(seen) == (status == 200)


async def test_the_second_request_of_a_connection_can_not_change_the_host():
    theirs, seen = Authority("upstream CA"), []

    async def handle(reader, writer):
        while True:
            seen.append(await read_request(reader))
            writer.write(answer(b"secure"))

    async with (
        upstream(handle, theirs.server_context([NAME, "other.example.com"])) as port,
        laboratory(gateway=aliased(port, NAME, "other.example.com"), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        wire.writer.write(f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
        assert (await wire.response())[0].startswith(b"HTTP/1.1 200 ")
        raw = await wire.ask(b"GET / HTTP/1.1\r\nHost: other.example.com\r\n\r\n")
        spans = await lab.recorder.wait(2)
    assert raw.startswith(b"HTTP/1.1 421 ")
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["reason"] == "host_mismatch"
    assert spans[1].attributes["clrk.egress.deny_reason"] == "host_mismatch"
    assert len(seen) == 1


async def test_without_sni_the_host_has_to_be_the_dialled_name():
    async with laboratory(gateway=aliased(9, NAME), rules=ALLOW) as lab:
        context = lab.ca.client_context()
        context.check_hostname = False
        wire = await lab.dial(NAME, 443)
        await wire.writer.start_tls(context, server_hostname="")
        raw = await wire.ask(b"GET / HTTP/1.1\r\nHost: other.example.com\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("sni", ["API.EXAMPLE.COM", f"{NAME}."])
async def test_a_name_in_another_spelling_is_the_same_name(sni):
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, upstream_ca=theirs.cert_pem) as lab,
    ):
        context = lab.ca.client_context()
        context.check_hostname = False
        wire = await lab.dial_tls(NAME, sni=sni, context=context)
        assert (await wire.ask(GET)).endswith(b"secure")


async def test_a_name_in_sni_does_not_vouch_for_a_dialled_address_and_binds_the_host():
    """The agent dials an address by its CIDR rule: what it says by SNI then has to be what it says by Host."""
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire = await lab.dial_tls("127.0.0.1", 9443, sni=NAME)
        raw = await wire.ask(b"GET / HTTP/1.1\r\nHost: other.example.com:9443\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    ("host", "status"), [("[::1]", 200), ("[0:0::0:1]", 200), ("[::0001]", 200), ("[::2]", 421), ("[::ffff:0:1]", 421)]
)
async def test_an_ipv6_address_may_be_spelt_as_it_likes(host, status):
    theirs = Authority("upstream CA")
    rules = [{"cidrs": ["::1/128"]}]
    async with (
        upstream(hello, theirs.server_context(["::1"]), host="::1") as port,
        laboratory(gateway={}, rules=rules, upstream_ca=theirs.cert_pem) as lab,
    ):
        wire = await lab.dial_tls("::1", port)
        raw = await wire.ask(f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
    assert int(raw.split(b" ")[1]) == status
