"""The synthetic resolver: what it answers, what it refuses, and that hostile packets get nothing out of it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import select
import socket
from typing import Any

import dns.flags
import dns.message
import dns.opcode
import dns.query
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.core.ids import InvocationId, SandboxId, SpanId, TraceId
from clrk.gateway.dns import DENIED_WINDOW_S, MAX_DENIED_SPANS, SandboxResolver, answer
from clrk.gateway.names import NameTable
from clrk.gateway.policy import Verdict
from clrk.gateway.telemetry.spans import Identity, StatusCode, TraceContext


class AllowExample:
    def name(self, name: str) -> Verdict:
        hint = f'- hostnames: ["{name}"]\n'
        return Verdict(name.endswith("example.com"), "name_not_allowed", "EgressGateway default/default", hint)

    def holds(self, verdict: Verdict) -> bool:
        return not verdict.allowed


class Spans:
    def __init__(self) -> None:
        self.recorded: list[dict[str, Any]] = []

    def record(self, identity: Identity, **span: Any) -> None:
        self.recorded.append(span | {"identity": identity})


IDENTITY = Identity(
    invocation_id=InvocationId("01a20405-7948-73dc-aec9-3683ce98518d"),
    agent_kind="TaskAgent",
    agent_namespace="default",
    agent_name="a",
    agent_uid="u",
    agent_revision="r",
    sandbox_id=SandboxId("00000000"),
    egress_gateway="default",
    context=TraceContext(TraceId("1" * 32), SpanId("2" * 16)),
)


def ask(name: str, rdtype: str = "A", names: NameTable | None = None, **kwargs: Any) -> dns.message.Message:
    query = dns.message.make_query(name, rdtype, **kwargs)
    result = answer(query.to_wire(), names=names or NameTable(), policy=AllowExample(), max_size=4096)
    assert result is not None
    reply = dns.message.from_wire(result.wire)
    assert reply.id == query.id
    assert reply.flags & dns.flags.QR
    return reply


def values(reply: dns.message.Message) -> list[str]:
    return [record.to_text() for rrset in reply.answer for record in rrset]


def test_allowed_names_get_synthetic_addresses_in_both_families() -> None:
    names = NameTable()
    assert values(ask("api.example.com", "A", names)) == ["198.18.0.1"]
    assert values(ask("API.Example.COM.", "AAAA", names)) == ["fd00:c1:0:1::1"]
    assert values(ask("other.example.com", "A", names)) == ["198.18.0.2"]


@pytest.mark.parametrize("rdtype", ["HTTPS", "SVCB", "MX", "TXT", "SRV"])
def test_other_types_are_nodata(rdtype: str) -> None:
    reply = ask("api.example.com", rdtype)
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


@pytest.mark.parametrize("rdtype", ["A", "AAAA", "HTTPS", "TXT"])
def test_names_without_a_rule_are_nxdomain_for_every_type(rdtype: str) -> None:
    names = NameTable()
    assert ask("exfil.attacker.net", rdtype, names).rcode() == dns.rcode.NXDOMAIN
    assert values(ask("api.example.com", "A", names)) == ["198.18.0.1"]  # the refused name took no address


def test_localhost_is_loopback() -> None:
    assert values(ask("localhost", "A")) == ["127.0.0.1"]
    assert values(ask("db.localhost", "AAAA")) == ["::1"]


def test_reverse_lookup_knows_only_this_sandbox_names() -> None:
    names = NameTable()
    ask("api.example.com", "A", names)
    assert values(ask("1.0.18.198.in-addr.arpa", "PTR", names)) == ["api.example.com."]
    for unknown in ("2.0.18.198.in-addr.arpa", "8.8.8.8.in-addr.arpa", "not-an-address.example.com"):
        assert ask(unknown, "PTR", names).rcode() == dns.rcode.NXDOMAIN


def test_a_full_table_is_servfail() -> None:
    names = NameTable(limit=1)
    ask("a.example.com", "A", names)
    assert ask("b.example.com", "A", names).rcode() == dns.rcode.SERVFAIL


def test_other_classes_and_opcodes_are_refused() -> None:
    assert ask("api.example.com", rdclass="CH").rcode() == dns.rcode.REFUSED
    update = dns.message.make_query("example.com", "A")
    update.set_opcode(dns.opcode.NOTIFY)
    result = answer(update.to_wire(), names=NameTable(), policy=AllowExample(), max_size=4096)
    assert result is not None
    assert dns.message.from_wire(result.wire).rcode() == dns.rcode.NOTIMP


def test_a_response_packet_gets_no_reply() -> None:
    packet = dns.message.make_response(dns.message.make_query("api.example.com", "A")).to_wire()
    assert answer(packet, names=NameTable(), policy=AllowExample(), max_size=4096) is None


@given(st.binary(max_size=600))
def test_garbage_never_raises(packet: bytes) -> None:
    result = answer(packet, names=NameTable(), policy=AllowExample(), max_size=4096)
    assert result is None or isinstance(result.wire, bytes)


@given(st.data())
def test_mutated_queries_never_raise(data: st.DataObject) -> None:
    packet = bytearray(dns.message.make_query("api.example.com", "A", use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    result = answer(bytes(packet), names=NameTable(), policy=AllowExample(), max_size=4096)
    assert result is None or len(result.wire) <= 4096


def listeners() -> tuple[socket.socket, socket.socket]:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    udp.setblocking(False)
    tcp.setblocking(False)
    return udp, tcp


async def test_serves_udp_and_tcp_and_records_one_span_per_denied_name() -> None:
    spans = Spans()
    udp, tcp = listeners()
    resolver = SandboxResolver(identity=IDENTITY, policy=AllowExample, names=NameTable(), recorder=spans)
    resolver.start(udp, tcp)
    try:
        allowed, denied = dns.message.make_query("x.example.com", "A"), dns.message.make_query("evil.net", "A")
        port, tcp_port = udp.getsockname()[1], tcp.getsockname()[1]
        first = await asyncio.to_thread(dns.query.udp, allowed, "127.0.0.1", 5, port)
        second = await asyncio.to_thread(dns.query.tcp, allowed, "127.0.0.1", 5, tcp_port)
        assert values(first) == values(second) == ["198.18.0.1"]
        for _ in range(3):
            reply = await asyncio.to_thread(dns.query.udp, denied, "127.0.0.1", 5, port)
            assert reply.rcode() == dns.rcode.NXDOMAIN
    finally:
        await resolver.close()
        udp.close()
        tcp.close()
    [span] = spans.recorded
    assert span["name"] == "egress.dns.denied"
    assert span["attributes"]["clrk.dst.name"] == "evil.net"
    assert span["status"].code is StatusCode.ERROR
    assert span["identity"] is IDENTITY


async def test_a_flood_of_denied_names_is_bounded() -> None:
    spans = Spans()
    resolver = SandboxResolver(identity=IDENTITY, policy=AllowExample, names=NameTable(), recorder=spans)
    for number in range(MAX_DENIED_SPANS + 50):
        query = dns.message.make_query(f"n{number}.evil.net", "A")
        assert resolver._answer(query.to_wire(), 4096) is not None
    assert len(spans.recorded) == MAX_DENIED_SPANS


async def test_a_name_that_is_denied_for_days_is_told_again() -> None:
    """A daemon's first denial is out of the store one day, while its program still asks."""
    spans, clock = Spans(), [0.0]
    resolver = SandboxResolver(
        identity=IDENTITY, policy=AllowExample, names=NameTable(), recorder=spans, clock=lambda: clock[0]
    )
    query = dns.message.make_query("evil.net", "A").to_wire()
    for second, told in ((0, 1), (DENIED_WINDOW_S - 1, 1), (DENIED_WINDOW_S, 2), (DENIED_WINDOW_S + 1, 2)):
        clock[0] = second
        assert resolver._answer(query, 4096) is not None
        assert len(spans.recorded) == told


async def test_a_run_that_asks_for_too_many_names_is_told_so() -> None:
    spans = Spans()
    resolver = SandboxResolver(identity=IDENTITY, policy=AllowExample, names=NameTable(limit=1), recorder=spans)
    for name, rcode in (("a.example.com", "NOERROR"), ("b.example.com", "SERVFAIL"), ("a.example.com", "NOERROR")):
        reply = resolver._answer(dns.message.make_query(name, "A").to_wire(), 4096)
        assert dns.message.from_wire(reply).rcode() == dns.rcode.from_text(rcode)
    [span] = spans.recorded
    assert span["name"] == "egress.dns.denied"
    assert span["attributes"]["clrk.egress.deny_reason"] == "too_many_names"
    assert "clrk.egress.add_rule" not in span["attributes"]
    assert "b.example.com" in span["status"].message


async def test_close_ends_idle_tcp_clients() -> None:
    udp, tcp = listeners()
    resolver = SandboxResolver(identity=IDENTITY, policy=AllowExample, names=NameTable(), recorder=Spans())
    resolver.start(udp, tcp)
    reader, writer = await asyncio.open_connection(*tcp.getsockname())
    query = dns.message.make_query("x.example.com", "A").to_wire()
    writer.write(len(query).to_bytes(2, "big") + query)
    assert int.from_bytes(await reader.readexactly(2), "big") > 12
    await resolver.close()
    await resolver.close()
    rest = await asyncio.wait_for(reader.read(), 5)
    assert len(rest) < 512
    writer.close()
    udp.close()
    tcp.close()


async def test_out_of_descriptors_is_waited_out() -> None:
    """A busy gateway may fail to accept for a moment; the resolver must still be there afterwards."""
    udp, tcp = listeners()
    resolver = SandboxResolver(identity=IDENTITY, policy=AllowExample, names=NameTable(), recorder=Spans())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    client.setblocking(False)
    resolver.start(udp, tcp)
    resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
    try:
        with contextlib.suppress(BlockingIOError):
            client.connect(tcp.getsockname())
        for _ in range(10):  # turns of the loop, in which the accept is tried and fails
            await asyncio.sleep(0)
        assert select.select([tcp], [], [], 0)[0], "accepted: the limit did not bind"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        query = dns.message.make_query("x.example.com", "A")
        reply = await asyncio.to_thread(dns.query.tcp, query, "127.0.0.1", 5, tcp.getsockname()[1])
        assert values(reply) == ["198.18.0.1"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await resolver.close()
        for sock in (client, udp, tcp):
            sock.close()
