"""PROXY v2 headers, built from their parts without the product's writer."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address

from clrk.core import wire
from clrk.gateway.proxyv2 import Header, parse

V4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 40000, 443)
V6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack("!HH", 40000, 443)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def header(body: bytes, *, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return wire.SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


def complete(raw: bytes, **options: int) -> Header:
    parsed = parse(raw, **options)
    assert isinstance(parsed, Header)
    return parsed
