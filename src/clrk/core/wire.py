"""The stamp's constants and record layouts, read from wire.h so that C, BPF C and Python can not disagree."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from importlib import resources
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"


def _read_defines(text: str) -> dict[str, int]:
    pattern = re.compile(r"^#define CLRK_(\w+) (0x[0-9A-Fa-f]+|\d+)\b", re.MULTILINE)
    return {name: int(value, 0) for name, value in pattern.findall(text)}


_D: Final = _read_defines(resources.files(__package__).joinpath("wire.h").read_text(encoding="ascii"))

PP2_PREFIX_SIZE: Final = _D["PP2_PREFIX_SIZE"]
PP2_VERSION_PROXY: Final = _D["PP2_VERSION_PROXY"]
PP2_FAMILY_TCP4: Final = _D["PP2_FAMILY_TCP4"]
PP2_FAMILY_TCP6: Final = _D["PP2_FAMILY_TCP6"]
PP2_TLV_HEADER_SIZE: Final = _D["PP2_TLV_HEADER_SIZE"]
PP2_MAX_SIZE: Final = _D["PP2_MAX_SIZE"]
HEADER_SIZE: Final = _D["HEADER_SIZE"]
V4_SRC_OFFSET: Final = _D["V4_SRC_OFFSET"]
V4_DST_OFFSET: Final = _D["V4_DST_OFFSET"]
V4_SRC_PORT_OFFSET: Final = _D["V4_SRC_PORT_OFFSET"]
V4_DST_PORT_OFFSET: Final = _D["V4_DST_PORT_OFFSET"]
V4_TLV_OFFSET: Final = _D["V4_TLV_OFFSET"]
V6_SRC_OFFSET: Final = _D["V6_SRC_OFFSET"]
V6_DST_OFFSET: Final = _D["V6_DST_OFFSET"]
V6_SRC_PORT_OFFSET: Final = _D["V6_SRC_PORT_OFFSET"]
V6_DST_PORT_OFFSET: Final = _D["V6_DST_PORT_OFFSET"]
V6_TLV_OFFSET: Final = _D["V6_TLV_OFFSET"]
CONN_VALUE_SIZE: Final = _D["CONN_VALUE_SIZE"]
COMM_SIZE: Final = _D["COMM_SIZE"]
TLV_NOOP: Final = _D["TLV_NOOP"]
TLV_NETNS: Final = _D["TLV_NETNS"]
TLV_AGENT_KIND: Final = _D["TLV_AGENT_KIND"]
TLV_AGENT_NAMESPACE: Final = _D["TLV_AGENT_NAMESPACE"]
TLV_AGENT_NAME: Final = _D["TLV_AGENT_NAME"]
TLV_AGENT_UID: Final = _D["TLV_AGENT_UID"]
TLV_AGENT_REVISION: Final = _D["TLV_AGENT_REVISION"]
TLV_INVOCATION_ID: Final = _D["TLV_INVOCATION_ID"]
TLV_DST_NAME: Final = _D["TLV_DST_NAME"]
TLV_SANDBOX_ID: Final = _D["TLV_SANDBOX_ID"]
TLV_TRACEPARENT: Final = _D["TLV_TRACEPARENT"]
TLV_CONNECTION: Final = _D["TLV_CONNECTION"]
KIND_DAEMON_AGENT: Final = _D["KIND_DAEMON_AGENT"]
KIND_TASK_AGENT: Final = _D["KIND_TASK_AGENT"]
PORT_EGRESS: Final = _D["PORT_EGRESS"]
PORT_METADATA: Final = _D["PORT_METADATA"]
PORT_DNS: Final = _D["PORT_DNS"]
PORT_OTLP: Final = _D["PORT_OTLP"]
FAMILY_V4: Final = _D["FAMILY_V4"]
FAMILY_V6: Final = _D["FAMILY_V6"]

# Layouts of the structs in wire.h, native byte order; tests/unit/test_wire.py holds them against the C compiler's.
FLOW_KEY: Final = struct.Struct("=Q16sII")
FLOW: Final = struct.Struct(f"=16sQQIIII{COMM_SIZE}s")
SANDBOX: Final = struct.Struct(f"=4s16s4s16s{HEADER_SIZE}s{HEADER_SIZE}s")
# The 0xEB value on the wire.
CONNECTION_VALUE: Final = struct.Struct(f"!QQII{COMM_SIZE}s")

IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One connection as the kernel saw it: the authority for attribution (CONTRACT section 9).

    Units: connect_ns is CLOCK_BOOTTIME in ns. Ports are host order. comm is raw bytes without trailing NULs.
    """

    dst: IPAddress
    dst_port: int
    family: int
    cookie: int
    connect_ns: int
    tgid: int
    uid: int
    comm: bytes

    @classmethod
    def unpack(cls, raw: bytes) -> FlowRecord:
        """Read `struct clrk_flow`; raw is exactly FLOW.size bytes as the map holds them."""
        dst, cookie, connect_ns, tgid, uid, dst_port, family, comm = FLOW.unpack(raw)
        return cls(unmap(dst), dst_port, family, cookie, connect_ns, tgid, uid, comm.rstrip(b"\0"))

    def pack(self) -> bytes:
        """Write `struct clrk_flow`."""
        return FLOW.pack(
            map_address(self.dst),
            self.cookie,
            self.connect_ns,
            self.tgid,
            self.uid,
            self.dst_port,
            self.family,
            self.comm,
        )


def map_address(address: IPAddress) -> bytes:
    """Return 16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def unmap(raw: bytes) -> IPAddress:
    """Return the address of 16 bytes in network order; ::ffff:a.b.c.d becomes IPv4."""
    address = IPv6Address(raw)
    return address.ipv4_mapped or address


def pack_flow_key(netns_cookie: int, src: str, src_port: int, family: int) -> bytes:
    """Return `struct clrk_flow_key` for a connection accepted from (src, src_port)."""
    return FLOW_KEY.pack(netns_cookie, map_address(ip_address(src)), src_port, family)
