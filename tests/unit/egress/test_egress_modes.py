"""EgressGateway.spec.mode: Shadow and Record let out what only lacks a rule, and say so; nothing else is relaxed."""

from __future__ import annotations

import asyncio
import json
import logging

import dns.asyncquery
import dns.message
import dns.rcode
import pytest
import yaml
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

from clrk.core.egress_resources import L4Rule
from clrk.gateway.telemetry.metrics import CLRK_EGRESS_DENIED, CLRK_EGRESS_WOULD_DENY, measure
from clrk.gateway.telemetry.spans import SpanRecord, StatusCode

NAME, OTHER = "tools.internal", "other.internal"
WATCHING = pytest.mark.parametrize("mode", ["Shadow", "Record"])
GET = b"GET /a?b=c HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"


def spec(port: int, mode: str, *names: str, **more) -> dict:
    return aliased(port, *(names or (NAME, OTHER))) | {"mode": mode} | more


async def serve(reader, writer) -> None:
    await read_request(reader)
    writer.write(answer(b"hello"))
    await writer.drain()


async def echo(reader, writer) -> None:
    while data := await reader.read(100):
        writer.write(data)


def measured(span) -> set[str]:
    record = SpanRecord(
        "0" * 32, "0" * 16, "", span.name, span.kind, span.start_ns, span.end_ns, span.status, dict(span.attributes)
    )  # fmt: skip
    return {one.instrument for one in measure(record)}


@WATCHING
async def test_a_request_without_a_rule_goes_out_and_its_span_says_so(mode: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    async with upstream(serve) as port, laboratory(gateway=spec(port, mode), rules=[{"hostnames": [NAME]}]) as lab:
        for _ in range(3):
            wire = await lab.dial(OTHER, 80)
            assert (await wire.ask(GET % OTHER.encode())).endswith(b"hello")
        allowed = await (await lab.dial(NAME, 80)).ask(GET % NAME.encode())
        assert allowed.endswith(b"hello")
        *spans, last = await lab.recorder.wait(4)
    for span in spans:
        assert (span.name, span.status.code) == ("GET other.internal", StatusCode.UNSET)
        assert span.attributes["clrk.egress.would_deny"] == "no_rule"
        assert span.attributes["clrk.egress.route"] == "EgressGateway default/default defaultPolicy"
        (rule,) = yaml.safe_load(span.attributes["clrk.egress.add_rule"])
        assert L4Rule.model_validate(rule).hostnames == [OTHER]
        assert "clrk.egress.deny_reason" not in span.attributes
        assert CLRK_EGRESS_WOULD_DENY in measured(span)
        assert CLRK_EGRESS_DENIED not in measured(span)
    assert not {key for key in last.attributes if key.startswith("clrk.egress")}
    assert CLRK_EGRESS_WOULD_DENY not in measured(last)
    told = [line.getMessage() for line in caplog.records if "would be denied" in line.getMessage()]
    assert told == ["default/agent: other.internal:80 would be denied (no_rule) if the EgressGateway enforced"]


async def test_the_log_has_no_secret_that_stands_in_a_name(caplog) -> None:
    caplog.set_level(logging.INFO)
    name = "glpat-ab3de5gh7jk9.other.internal"
    async with upstream(serve) as port, laboratory(gateway=spec(port, "Record", name), rules=[]) as lab:
        await (await lab.dial(name, 80)).ask(GET % name.encode())
        with pytest.raises(OSError):  # noqa: PT011 - the client does not trust the gateway
            await lab.dial_tls(name, 443, context=Authority("another").client_context())
        await lab.recorder.wait(2)
    assert caplog.text.count("[redacted].other.internal") == 3  # twice in the advice
    assert "glpat" not in caplog.text + repr(lab.spans)


@WATCHING
async def test_a_request_that_no_rule_narrows_to_goes_out(mode: str) -> None:
    rules = [{"hostnames": [NAME], "ports": [80], "http": {"methods": ["GET"], "paths": ["/open"]}}]
    async with upstream(serve) as port, laboratory(gateway=spec(port, mode), rules=rules) as lab:
        wire = await lab.dial(NAME, 80)
        assert (await wire.ask(GET % NAME.encode())).endswith(b"hello")
        (span,) = await lab.recorder.wait()
    assert span.attributes["clrk.egress.would_deny"] == "http_not_allowed"
    assert yaml.safe_load(span.attributes["clrk.egress.add_rule"])[0]["http"] == {"methods": ["GET"], "paths": ["/a"]}


@WATCHING
@pytest.mark.parametrize("rules", [[], [{"hostnames": [NAME], "http": {"methods": ["GET"]}}]])
async def test_a_tunnel_without_a_rule_goes_out(mode: str, rules: list[dict]) -> None:
    async with upstream(echo) as port, laboratory(gateway=spec(port, mode), rules=rules) as lab:
        wire = await lab.dial(NAME, 5432)
        wire.writer.write(b"\0\1binary")
        assert await asyncio.wait_for(wire.reader.readexactly(8), 10) == b"\0\1binary"
        wire.close()
        (span,) = await lab.recorder.wait()
    assert span.name == "egress.tcp"
    assert span.attributes["clrk.egress.would_deny"] == ("http_only" if rules else "no_rule")
    assert yaml.safe_load(span.attributes["clrk.egress.add_rule"]) == [{"hostnames": [NAME], "ports": [5432]}]


@pytest.mark.parametrize(("mode", "found"), [("Enforce", False), ("Shadow", True), ("Record", True)])
async def test_names(mode: str, found: bool) -> None:
    async with laboratory(gateway=spec(1, mode), rules=[]) as lab:
        host, port = lab.sockets.dns_udp.getsockname()
        reply = await dns.asyncquery.udp(dns.message.make_query("new.internal", "A"), host, port=port, timeout=5)
        assert (reply.rcode() == dns.rcode.NOERROR) is found
        assert bool(reply.answer) is found
        assert bool(lab.spans) is not found  # the connection says it, if there is one
        bad = await dns.asyncquery.udp(dns.message.make_query("127.0.1", "A"), host, port=port, timeout=5)
        assert bad.rcode() == dns.rcode.NXDOMAIN
    if not found:
        span = lab.spans[0]
        assert span.name == "egress.dns.denied"
        assert yaml.safe_load(span.attributes["clrk.egress.add_rule"]) == [{"hostnames": ["new.internal"]}]
        assert span.status.message == "new.internal is not allowed (name_not_allowed)"


# --- what no mode relaxes -------------------------------------------------------------------------------------------


@WATCHING
@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "169.254.3.4", "::1", "64:ff9b::7f00:1", "224.0.0.1"]
)
async def test_the_host_itself_stays_closed(mode: str, address: str) -> None:
    async with upstream(serve) as port, laboratory(gateway={"mode": mode}, rules=[]) as lab:
        wire = await lab.dial(address, port)
        raw = await wire.ask(GET % (b"[" + address.encode() + b"]" if ":" in address else address.encode()))
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 403")
    assert span.name == "egress.dial.denied"
    assert span.attributes["clrk.egress.deny_reason"].startswith("address_")
    assert CLRK_EGRESS_DENIED in measured(span)


@WATCHING
async def test_smuggling_and_a_foreign_host_are_refused(mode: str) -> None:
    async with upstream(serve) as port, laboratory(gateway=spec(port, mode), rules=[]) as lab:
        twice = b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        assert (await (await lab.dial(NAME, 80)).ask(twice % NAME.encode())).startswith(b"HTTP/1.1 400")
        assert (await (await lab.dial(NAME, 80)).ask(GET % OTHER.encode())).startswith(b"HTTP/1.1 421")
        spans = await lab.recorder.wait(2)
    assert all(span.name == "egress.dial.denied" for span in spans)


@WATCHING
async def test_tls_of_the_upstream_is_verified(mode: str) -> None:
    unknown = Authority("nobody's CA")
    async with (
        upstream(serve, unknown.server_context([NAME])) as port,
        laboratory(gateway=spec(port, mode), rules=[]) as lab,
    ):
        wire = await lab.dial_tls(NAME)
        raw = await wire.ask(GET % NAME.encode())
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 502")
    assert span.attributes["clrk.egress.would_deny"] == "no_rule"
    assert span.attributes["error.type"] == "tls_unknown_ca"


async def test_without_a_gateway_there_is_no_mode() -> None:
    async with laboratory(gateway=None, rules=[]) as lab:
        raw = await (await lab.dial("198.51.100.7", 80)).ask(GET % b"198.51.100.7")
        (span,) = await lab.recorder.wait()
    assert raw.startswith(b"HTTP/1.1 403")
    assert "EgressGateway" in json.loads(raw.partition(b"\r\n\r\n")[2])["add_rule"]
    assert "EgressGateway" in span.attributes["clrk.egress.add_rule"]
