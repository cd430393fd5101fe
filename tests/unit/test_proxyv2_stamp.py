"""What clrk writes into a PROXY v2 header, and the header that the gateway demands of a connection."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v2 import ProxyProtocolV2
from proxyv2_headers import V4, V6, complete, header, tlv

from clrk.core import wire
from clrk.core.wire import FlowRecord
from clrk.gateway.proxyv2 import Connection, Endpoint, ProxyV2Error, Stamp, expected_header

# --- The stamp ------------------------------------------------------------------------------------------------------

CONNECTION = wire.CONNECTION_VALUE.pack(0x1122334455667788, 99_000_000_001, 4321, 2_000_007, b"python3")
STAMP = {
    wire.TLV_CONNECTION: CONNECTION,
    wire.TLV_AGENT_KIND: b"\x01",
    wire.TLV_AGENT_NAMESPACE: b"default",
    wire.TLV_AGENT_NAME: b"triage",
    wire.TLV_AGENT_UID: b"0b54b1f2-0a3c-5a4f-9b0a-1a2b3c4d5e6f",
    wire.TLV_AGENT_REVISION: b"0123456789ab",
    wire.TLV_INVOCATION_ID: b"01930f2e-7c1b-7000-8000-000000000001",
    wire.TLV_SANDBOX_ID: b"0123abcd",
    wire.TLV_NETNS: b"clrk-0123abcd",
    wire.TLV_TRACEPARENT: b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}


def stamped(block: bytes = V4, family: int = 0x11, **changes: bytes | None) -> bytes:
    by_name = {name: value for name, value in vars(wire).items() if name.startswith("TLV_")}
    values = STAMP | {by_name[name]: value for name, value in changes.items()}
    body = block + b"".join(tlv(kind, value) for kind, value in values.items() if value is not None)
    return header(body + tlv(wire.TLV_NOOP, bytes(wire.HEADER_SIZE - 16 - len(body) - 3)), family=family)


def test_stamp_of_a_task_agent() -> None:
    assert Stamp.of(complete(stamped())) == Stamp(
        agent_kind="TaskAgent",
        agent_namespace="default",
        agent_name="triage",
        agent_uid="0b54b1f2-0a3c-5a4f-9b0a-1a2b3c4d5e6f",
        agent_revision="0123456789ab",
        invocation_id="01930f2e-7c1b-7000-8000-000000000001",
        sandbox_id="0123abcd",
        netns="clrk-0123abcd",
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        connection=Connection(0x1122334455667788, 99_000_000_001, 4321, 2_000_007, b"python3"),
    )


def test_stamp_of_a_daemon_has_no_invocation() -> None:
    stamp = Stamp.of(complete(stamped(TLV_AGENT_KIND=b"\0", TLV_INVOCATION_ID=None, TLV_TRACEPARENT=None)))
    assert (stamp.agent_kind, stamp.invocation_id, stamp.traceparent) == ("DaemonAgent", None, None)
    with_trace = Stamp.of(complete(stamped(TLV_AGENT_KIND=b"\0", TLV_INVOCATION_ID=None)))
    assert with_trace.traceparent is not None


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("stamp_value", {"TLV_AGENT_KIND": b"\0"}),
        ("stamp_value", {"TLV_AGENT_KIND": b"\2"}),
        ("stamp_value", {"TLV_AGENT_KIND": b""}),
        ("stamp_value", {"TLV_AGENT_KIND": b"\1\1"}),
        ("stamp_value", {"TLV_AGENT_NAME": b"\xff"}),
        ("stamp_value", {"TLV_AGENT_NAME": b""}),
        ("stamp_value", {"TLV_AGENT_NAME": b"a\nb"}),
        ("stamp_value", {"TLV_CONNECTION": CONNECTION[:-1]}),
        ("stamp_value", {"TLV_CONNECTION": CONNECTION + b"\0"}),
        *(
            ("stamp_missing", {name: None})
            for name, kind in vars(wire).items()
            if name.startswith("TLV_") and kind in STAMP
        ),
    ],
)
def test_stamps_that_are_refused(code: str, changes: dict[str, bytes | None]) -> None:
    with pytest.raises(ProxyV2Error) as caught:
        Stamp.of(complete(stamped(**changes)))
    assert caught.value.code == code


def test_a_stamp_says_nothing_twice() -> None:
    body = V4 + b"".join(tlv(kind, value) for kind, value in STAMP.items())
    with pytest.raises(ProxyV2Error) as caught:
        Stamp.of(complete(header(body + tlv(wire.TLV_AGENT_NAME, b"other"))))
    assert (caught.value.code, caught.value.offset) == ("stamp_repeated", 16 + len(body))
    # Padding may come in pieces.
    assert Stamp.of(complete(header(body + tlv(wire.TLV_NOOP, b"") * 2))).agent_name == "triage"


# --- The header that we demand --------------------------------------------------------------------------------------

HOLE = {"TLV_CONNECTION": bytes(wire.CONN_VALUE_SIZE)}
TEMPLATE_V4 = stamped(bytes(12), 0x11, **HOLE)
TEMPLATE_V6 = stamped(bytes(36), 0x21, **HOLE)
FLOW = FlowRecord(
    dst=ip_address("198.51.100.2"),
    dst_port=443,
    family=wire.FAMILY_V4,
    cookie=0x1122334455667788,
    connect_ns=99_000_000_001,
    tgid=4321,
    uid=2_000_007,
    comm=b"python3",
)
FLOW_V6 = replace(FLOW, dst=ip_address("2001:db8::2"), family=wire.FAMILY_V6)


def expect(flow: FlowRecord, src: str, v4: bytes = TEMPLATE_V4, v6: bytes = TEMPLATE_V6) -> bytes:
    return expected_header(v4, v6, flow, src, 40000)


def test_expected_header_is_the_stamped_one() -> None:
    assert expect(FLOW, "192.0.2.1") == stamped()
    assert expect(FLOW_V6, "2001:db8::1") == stamped(V6, 0x21)
    assert len(expect(FLOW, "192.0.2.1")) == wire.HEADER_SIZE


def test_expected_header_of_a_v4_mapped_connection_is_v4() -> None:
    assert expect(FLOW, "::ffff:192.0.2.1") == stamped()
    assert expect(replace(FLOW, dst=ip_address("::ffff:198.51.100.2")), "::ffff:192.0.2.1") == stamped()


def test_expected_header_survives_the_flow_record_on_the_wire() -> None:
    for flow, src in ((FLOW, "192.0.2.1"), (FLOW_V6, "2001:db8::1"), (replace(FLOW, comm=b"x" * 16), "192.0.2.1")):
        assert expect(FlowRecord.unpack(flow.pack()), src) == expect(flow, src)


@given(
    dst=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    dst_port=st.integers(1, 65535),
    cookie=st.integers(0, 2**64 - 1),
    connect_ns=st.integers(0, 2**64 - 1),
    tgid=st.integers(0, 2**32 - 1),
    uid=st.integers(0, 2**32 - 1),
    comm=st.binary(max_size=16).map(lambda comm: comm.rstrip(b"\0")),
)
def test_expected_header_reads_back(
    dst: IPv4Address | IPv6Address, dst_port: int, cookie: int, connect_ns: int, tgid: int, uid: int, comm: bytes
) -> None:
    plain = wire.unmap(wire.map_address(dst))
    family = wire.FAMILY_V4 if plain.version == 4 else wire.FAMILY_V6
    src = "169.254.0.1" if plain.version == 4 else "fd00:c1::1"
    parsed = complete(expect(FlowRecord(dst, dst_port, family, cookie, connect_ns, tgid, uid, comm), src))
    assert parsed.destination == Endpoint(plain, dst_port)
    assert parsed.source == Endpoint(ip_address(src), 40000)
    assert Stamp.of(parsed).connection == Connection(cookie, connect_ns, tgid, uid, comm)
    # The oracle reads the same header.
    assert ProxyProtocolV2().unpack(expect(replace(FLOW, dst_port=dst_port), "192.0.2.1")).dest[1] == dst_port


@pytest.mark.parametrize(
    ("code", "flow", "src", "templates"),
    [
        ("flow_family", replace(FLOW, dst=ip_address("2001:db8::2")), "192.0.2.1", {}),
        ("flow_family", FLOW, "2001:db8::1", {}),
        ("flow_family", replace(FLOW, family=0), "192.0.2.1", {}),
        ("template", FLOW, "192.0.2.1", {"v4": TEMPLATE_V4[:-1]}),
        ("template", FLOW, "192.0.2.1", {"v4": TEMPLATE_V6}),
        ("template", FLOW_V6, "2001:db8::1", {"v6": TEMPLATE_V4}),
        ("template", FLOW, "192.0.2.1", {"v4": TEMPLATE_V4[:28] + b"\xe1" + TEMPLATE_V4[29:]}),
        ("template", FLOW, "192.0.2.1", {"v4": b""}),
    ],
)
def test_expected_header_fails_closed(code: str, flow: FlowRecord, src: str, templates: dict[str, bytes]) -> None:
    with pytest.raises(ProxyV2Error) as caught:
        expect(flow, src, **templates)
    assert caught.value.code == code
