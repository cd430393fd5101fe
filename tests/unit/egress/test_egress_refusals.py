"""What must not go out: denied destinations, dangerous addresses, requests that two servers could read differently."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest
import yaml
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.core.egress_resources import L4Rule

NAME = "tools.internal"
ALLOW = [{"hostnames": [NAME]}]
HEAD = b"GET / HTTP/1.1\r\nHost: tools.internal\r\n"


async def refused(request: bytes, *, rules=ALLOW, port: int = 80, gateway: dict | None = None):
    """Send a request that must not reach the upstream; return (status, problem, span)."""
    reached = []

    async def handle(reader, writer):
        reached.append(await read_request(reader))
        writer.write(answer(b""))

    async with (
        upstream(handle) as upstream_port,
        laboratory(gateway=aliased(upstream_port, NAME) | (gateway or {}), rules=rules) as lab,
    ):
        wire = await lab.dial(NAME, port)
        raw = await wire.ask(request)
        spans = await lab.recorder.wait()
    assert reached == []
    assert len(spans) == 1
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    return int(head.split()[1]), json.loads(body), spans[0]


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b" Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X: a\r\n b\r\n\r\n",
        HEAD + b"X: a\rb\r\n\r\n",
        HEAD + b"X: a\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"X: a\x00b\r\n\r\n",
        HEAD + b"no-colon\r\n\r\n",
        HEAD + b": empty\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
        HEAD + b"Content-Length: +3\r\n\r\nabc",
        HEAD + b"Content-Length: 0x3\r\n\r\nabc",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: \r\n\r\n",
        HEAD + b"Host: other.internal\r\n\r\n",
        HEAD + b"Host: tools.internal\r\n\r\n",
        HEAD + b"Connection: close, Host\r\n\r\n",
        HEAD + b"Connection: Content-Length\r\nContent-Length: 3\r\n\r\nabc",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: user@tools.internal\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: tools.internal:0\r\n\r\n",
        b"GET http://evil.internal/ HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET https://tools.internal/ HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET http://user:pw@tools.internal/ HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"GET /\tHTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: tools.internal\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\r\nGET / HTTP/1.1\r\nHost: tools.internal\r\n\r\n",
        HEAD + b"X: " + b"a" * 90_000 + b"\r\n\r\n",
        HEAD + b"X: a\r\n" * 1100 + b"\r\n",
        b"GET / HTTP/3.0\r\nHost: tools.internal\r\n\r\n",
    ],
)  # fmt: skip
async def test_ambiguous_requests_are_refused_and_nothing_goes_up(request_bytes):
    status, body, span = await refused(request_bytes)
    assert status in (400, 431, 505)
    assert body["reason"].startswith("bad_request_")
    assert span.name == "egress.dial.denied"
    assert span.attributes["clrk.egress.deny_reason"] == body["reason"]
    assert span.status.code == "STATUS_CODE_ERROR"


@pytest.mark.parametrize(
    "tail",
    [
        b"zz\r\nabc\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\nabc\n0\n\n",
        b"-1\r\n\r\n",
        b"1 1\r\na\r\n",
        b"3;a=b\r\nabc\r\n0\r\n\r\n",
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"10000000000000003\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3;\nabc\r\n0\r\n\r\n",
        b"\r\n3\r\nabc\r\n0\r\n\r\n",
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"3\x0b\r\nabc\r\n0\r\n\r\n",
    ],
)
async def test_a_broken_chunk_is_400(tail):
    """The head may have gone up by then; the rest must not follow, and the connection ends."""
    calls = []

    async def handle(reader, writer):
        calls.append(await reader.read())

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tail)
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert span.attributes["clrk.egress.deny_reason"] == "bad_request_chunk"
    assert all(b"0\r\n\r\n" not in call for call in calls)


@pytest.mark.parametrize(
    ("host", "reason"),
    [("other.internal", "host_mismatch"), ("tools.internal:81", "port_mismatch"),
     ("tools.internal.evil.com", "host_mismatch")],
)  # fmt: skip
async def test_another_host_than_was_dialled_is_421(host, reason):
    status, body, _ = await refused(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert (status, body["reason"]) == (421, reason)


@pytest.mark.parametrize("host", ["TOOLS.internal", "tools.internal.", "tools.internal:80"])
async def test_other_spellings_of_the_same_host_pass(host):
    async def handle(reader, writer):
        head, _ = await read_request(reader)
        writer.write(answer(head.split(b"\r\n")[1]))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (await wire.response())[1] == f"Host: {host}".encode()


async def test_a_denied_request_names_the_rule_to_add():
    rules = [{"hostnames": [NAME], "http": {"methods": ["GET"], "paths": ["/v1"]}}]
    request = b"POST /v1/x HTTP/1.1\r\nHost: tools.internal\r\nContent-Length: 3\r\n\r\nabc"
    status, body, span = await refused(request, rules=rules)
    assert status == 403
    assert body["title"] == "Forbidden"
    added = L4Rule.model_validate(yaml.safe_load(body["add_rule"])[0])
    assert (added.hostnames, added.http.methods, added.http.paths) == ([NAME], ["POST"], ["/v1/x"])
    assert span.name == "egress.dial.denied"
    assert span.attributes["clrk.egress.deny_reason"] == body["reason"] == "http_not_allowed"


async def test_a_port_without_a_rule_is_403():
    status, body, _ = await refused(HEAD + b"\r\n", rules=[{"hostnames": [NAME], "ports": [443]}])
    assert (status, body["reason"]) == (403, "port_not_allowed")


async def test_connect_is_no_way_out():
    status, _, _ = await refused(b"CONNECT tools.internal:80 HTTP/1.1\r\nHost: tools.internal\r\n\r\n")
    assert status == 400  # its target is no path


async def test_without_a_gateway_everything_is_denied():
    async with laboratory(gateway=None, rules=[]) as lab:
        wire = await lab.dial("93.184.216.34", 80)
        raw = await wire.ask(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.attributes["clrk.egress.deny_reason"] == "no_gateway"


async def test_the_name_an_agent_presents_does_not_vouch_for_an_address_it_chose():
    """A hostname rule allows the name, resolved by us; not any address with that Host header."""
    async with laboratory(gateway={}, rules=ALLOW) as lab:
        wire = await lab.dial("93.184.216.34", 80)
        raw = await wire.ask(HEAD + b"\r\n")
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.attributes["clrk.egress.deny_reason"] == "no_rule"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "loopback"), ("127.8.9.10", "loopback"), ("0.0.0.0", "unspecified"),
        ("169.254.1.2", "link_local"),
        ("169.254.169.254", "metadata"), ("100.100.100.200", "metadata"), ("224.0.0.1", "multicast"),
        ("198.18.0.1", "synthetic"), ("255.255.255.255", "reserved"), ("::1", "loopback"), ("::", "unspecified"),
        ("fe80::1", "link_local"), ("ff02::1", "multicast"), ("fd00:ec2::254", "metadata"), ("fd00:c1::1", "synthetic"),
        ("::ffff:127.0.0.1", "loopback"), ("::ffff:169.254.169.254", "metadata"), ("64:ff9b::7f00:1", "loopback"),
        ("2002:7f00:1::", "loopback"), ("::127.0.0.1", "loopback"), ("2001:db8::5efe:7f00:1", "loopback"),
        ("192.0.2.77", "host"),
    ],
)  # fmt: skip
async def test_a_name_that_resolves_to_a_forbidden_address_is_refused(address, reason):
    async def resolver(name, port):
        return [ip_address(address)]

    async with laboratory(gateway={}, rules=ALLOW, resolver=resolver, host_addresses=["192.0.2.77"]) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(HEAD + b"\r\n")
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 403 ")
    assert span.name == "egress.dial.denied"
    assert span.attributes["clrk.egress.deny_reason"] == f"address_{reason}"


async def test_a_cidr_rule_names_the_address_and_lifts_the_refusal():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(b"local"))

    async with upstream(handle) as port:
        rules = [{"hostnames": [NAME]}, {"cidrs": ["127.0.0.0/8"], "ports": [port]}]

        async def resolver(name, at):
            return [ip_address("127.0.0.1")]

        async with laboratory(gateway={}, rules=rules, resolver=resolver) as lab:
            wire = await lab.dial(NAME, port)
            wire.writer.write(f"GET / HTTP/1.1\r\nHost: tools.internal:{port}\r\n\r\n".encode())
            assert (await wire.response())[1] == b"local"
            literal = await lab.dial("127.0.0.1", port)
            literal.writer.write(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            assert (await literal.response())[1] == b"local"


async def test_rebinding_reaches_nothing():
    """The name is good when first resolved and loopback afterwards: every dial judges what it dials."""
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    async def resolver(name, port):
        return [ip_address(text) for text in answers.pop(0)]

    async with laboratory(gateway={}, rules=ALLOW, resolver=resolver) as lab:
        for _ in range(2):
            wire = await lab.dial(NAME, 80)
            assert (await wire.ask(HEAD + b"\r\n")).startswith(b"HTTP/1.1 403 ")
    assert answers == []


async def test_a_forbidden_address_beside_a_good_one_is_not_dialled():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(b"good"))

    async with upstream(handle, host="127.0.0.1") as port:

        async def resolver(name, at):
            return [ip_address("127.0.0.2"), ip_address("127.0.0.1")]

        rules = [{"hostnames": [NAME]}, {"cidrs": ["127.0.0.1/32"]}]
        async with laboratory(gateway={}, rules=rules, resolver=resolver) as lab:
            wire = await lab.dial(NAME, port)
            wire.writer.write(f"GET / HTTP/1.1\r\nHost: tools.internal:{port}\r\n\r\n".encode())
            assert (await wire.response())[1] == b"good"
            assert (await lab.recorder.wait())[0].attributes["network.peer.address"] == "127.0.0.1"


async def test_a_name_that_does_not_resolve_is_502():
    import socket

    async def resolver(name, port):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    async with laboratory(gateway={}, rules=ALLOW, resolver=resolver) as lab:
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(HEAD + b"\r\n")
        span = (await lab.recorder.wait())[0]
    assert raw.startswith(b"HTTP/1.1 502 ")
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", "dns")


async def test_secrets_in_the_query_are_not_recorded():
    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(b""))

    async with upstream(handle) as port, laboratory(gateway=aliased(port, NAME), rules=ALLOW) as lab:
        wire = await lab.dial(NAME, 80)
        wire.writer.write(
            b"GET /x?key=SECRET1&a=1&X-Amz-Signature=SECRET2&api_key=SECRET3 HTTP/1.1\r\nHost: tools.internal\r\n\r\n"
        )
        await wire.response()
        span = (await lab.recorder.wait())[0]
    assert "SECRET" not in str(span)
    assert "a=1" in span.attributes["url.full"]


@pytest.mark.parametrize(
    "line", [b"X-HTTP-Method-Override: DELETE\r\n", b"X-Original-URL: /closed\r\n", b"X_HTTP_METHOD: put\r\n"]
)
async def test_a_header_that_changes_what_the_request_means_needs_a_rule_for_that_too(line):
    rules = [{"hostnames": [NAME], "http": {"methods": ["GET"], "paths": ["/open"]}}]
    request = HEAD.replace(b"GET /", b"GET /open") + line + b"\r\n"
    status, problem, span = await refused(request, rules=rules)
    assert (status, span.attributes["clrk.egress.deny_reason"]) == (403, "http_not_allowed")
    (rule,) = yaml.safe_load(problem["add_rule"])
    assert "GET" not in rule["http"]["methods"] or rule["http"]["paths"] == ["/closed"]
