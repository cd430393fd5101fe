"""The header that the kernel must have stamped, computed from what no agent can write (CONTRACT section 9)."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

from clrk.core import wire
from clrk.core.wire import FlowRecord, IPAddress
from clrk.gateway.proxyv2.errors import ProxyV2Error

_PORTS: Final = struct.Struct("!HH")
_CONNECTION_TLV: Final = struct.pack("!BH", wire.TLV_CONNECTION, wire.CONN_VALUE_SIZE)
_PREFIX_BYTES: Final = {
    wire.FAMILY_V4: (wire.PP2_VERSION_PROXY, wire.PP2_FAMILY_TCP4),
    wire.FAMILY_V6: (wire.PP2_VERSION_PROXY, wire.PP2_FAMILY_TCP6),
}
_TLV_OFFSET: Final = {wire.FAMILY_V4: wire.V4_TLV_OFFSET, wire.FAMILY_V6: wire.V6_TLV_OFFSET}


def expected_header(template_v4: bytes, template_v6: bytes, flow: FlowRecord, src: str, src_port: int) -> bytes:
    """Return the bytes that a connection must begin with.

    Shape: templates are the sandbox's, wire.HEADER_SIZE bytes, holes zeroed; flow is the record taken at accept; src is
        the peer address as accept() shows it, so ::ffff:a.b.c.d is welcome for a connection stamped as IPv4.
    Raises: ProxyV2Error(template | flow_family) when template, record and source do not fit together: close.
    """
    template = template_v4 if flow.family == wire.FAMILY_V4 else template_v6
    _check_template(template, flow.family)
    source = _packed(ip_address(src), flow.family)
    addresses = source + _packed(flow.dst, flow.family) + _PORTS.pack(src_port, flow.dst_port)
    value = wire.CONNECTION_VALUE.pack(flow.cookie, flow.connect_ns, flow.tgid, flow.uid, flow.comm)
    behind = _TLV_OFFSET[flow.family] + len(_CONNECTION_TLV) + len(value)
    return template[: wire.PP2_PREFIX_SIZE] + addresses + _CONNECTION_TLV + value + template[behind:]


def _check_template(template: bytes, family: int) -> None:
    if family not in _PREFIX_BYTES:
        raise ProxyV2Error("flow_family", f"flow record has family {family}")
    offset = _TLV_OFFSET[family]
    if (
        len(template) != wire.HEADER_SIZE
        or tuple(template[12:14]) != _PREFIX_BYTES[family]
        or template[offset : offset + len(_CONNECTION_TLV)] != _CONNECTION_TLV
    ):
        raise ProxyV2Error("template", f"header template does not fit family {family}: {len(template)} bytes")


def _packed(address: IPAddress, family: int) -> bytes:
    """Return the address in the size of the family; only a v4-mapped IPv6 address becomes IPv4."""
    if family == wire.FAMILY_V6:
        return wire.map_address(address)
    plain = wire.unmap(wire.map_address(address))
    if plain.version != 4:
        raise ProxyV2Error("flow_family", f"{address} can not stand in a stamp for IPv4")
    return plain.packed
