"""A strict parser of PROXY protocol v2 headers, for headers from anybody.

Theory of operation: parse() is given everything received so far and answers with a Header, with NEED_DATA, or raises.
It keeps no state, so a caller appends and asks again; a header is at most a few KiB, so asking again costs nothing that
matters. Every byte is judged as soon as it is there: a wrong version is refused with 13 bytes, a TLV that leaves the
header with its length field. Nothing behind the header's declared length is ever looked at: a payload that looks like
TLVs must not become identity.
Source: haproxy doc/proxy-protocol.txt, 2026/04/27, section 2.2.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from clrk.core import wire
from clrk.core.wire import IPAddress
from clrk.gateway.proxyv2.crc32c import crc32c
from clrk.gateway.proxyv2.errors import ProxyV2Error

_PORTS: Final = struct.Struct("!HH")
_VERSION: Final = 2
_TLV_CRC32C: Final = 0x03
_TLV_UNIQUE_ID: Final = 0x05
_TLV_SSL: Final = 0x20
_UNIQUE_ID_MAX: Final = 128
_SSL_FIXED: Final = 5  # client flags u8, verify u32
_UNIX_PATH: Final = 108

# Family and transport to the size of the address block; other values are to be dropped (2.2, "other values").
_ADDRESS_SIZE: Final = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}


class Command(enum.IntEnum):
    """Low nibble of byte 12."""

    LOCAL = 0
    PROXY = 1


class NeedData(enum.Enum):
    """Type of NEED_DATA."""

    NEED_DATA = "need data"


NEED_DATA: Final = NeedData.NEED_DATA


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of the proxied connection."""

    address: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class Tlv:
    """One type-length-value; offset is the index of its type byte in the header."""

    type: int
    value: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A complete header.

    Shape: size is its length on the wire; bytes behind it are payload. LOCAL and UNSPEC carry neither endpoints nor
    TLVs, whatever the sender put there. family is byte 13. UNIX paths are raw, up to the first NUL.
    """

    command: Command
    family: int
    source: Endpoint | bytes | None
    destination: Endpoint | bytes | None
    tlvs: tuple[Tlv, ...]
    size: int


def parse(received: bytes | bytearray | memoryview, *, max_size: int = wire.PP2_MAX_SIZE) -> Header | NeedData:
    """Parse the header at the beginning of received.

    Returns: the header, or NEED_DATA while it is incomplete and nothing is wrong with it yet.
    Raises:  ProxyV2Error as early as the bytes show it; terminal for the connection. max_size bounds the whole header.
    Cost:    O(header).
    """
    raw = bytes(received[:max_size])
    _check_prefix(raw)
    if len(raw) < wire.PP2_PREFIX_SIZE:
        return NEED_DATA
    command, family = Command(raw[12] & 0x0F), raw[13]
    size = wire.PP2_PREFIX_SIZE + int.from_bytes(raw[14:16], "big")
    if size > max_size:
        raise ProxyV2Error("length_over_cap", f"header of {size} bytes, at most {max_size} are accepted", 14)
    if command is Command.LOCAL or family == 0:
        return Header(command, family, None, None, (), size) if len(raw) >= size else NEED_DATA
    tlv_offset = wire.PP2_PREFIX_SIZE + _ADDRESS_SIZE[family]
    if size < tlv_offset:
        raise ProxyV2Error("address_short", f"length {size - 16} is less than the address block of {family:#04x}", 14)
    tlvs = tuple(_tlvs(raw[:size], tlv_offset, size))
    if len(raw) < size:
        return NEED_DATA
    _check_crc32c(raw[:size], tlvs)
    source, destination = _endpoints(raw[wire.PP2_PREFIX_SIZE : tlv_offset])
    return Header(command, family, source, destination, tlvs, size)


def _check_prefix(raw: bytes) -> None:
    """Judge signature, version, command and family, as far as they are there."""
    signature = raw[: len(wire.SIGNATURE)]
    if signature != wire.SIGNATURE[: len(signature)]:
        offset = next(i for i, (got, want) in enumerate(zip(signature, wire.SIGNATURE, strict=False)) if got != want)
        raise ProxyV2Error("signature", "not a PROXY v2 header", offset)
    if len(raw) < 13:
        return
    if raw[12] >> 4 != _VERSION:
        raise ProxyV2Error("version", f"version {raw[12] >> 4}", 12)
    if raw[12] & 0x0F not in (Command.LOCAL, Command.PROXY):
        raise ProxyV2Error("command", f"command {raw[12] & 0x0F}", 12)
    # With LOCAL the family is ignored too (2.2, \x0: LOCAL).
    if len(raw) > 13 and raw[12] & 0x0F == Command.PROXY and raw[13] not in _ADDRESS_SIZE:
        raise ProxyV2Error("family", f"family and transport {raw[13]:#04x}", 13)


def _tlvs(raw: bytes, start: int, end: int, code: str = "tlv_overrun") -> Iterator[Tlv]:
    """Yield the TLVs whose bytes are all there; end is where the area ends, even if raw is shorter."""
    offset = start
    while offset < end:
        value_offset = offset + wire.PP2_TLV_HEADER_SIZE
        if value_offset > end:
            raise ProxyV2Error(code, f"{end - offset} bytes can not hold a TLV", offset)
        if value_offset > len(raw):
            return
        after = value_offset + int.from_bytes(raw[offset + 1 : value_offset], "big")
        if after > end:
            raise ProxyV2Error(code, f"TLV {raw[offset]:#04x} ends {after - end} bytes too late", offset + 1)
        _check_known(raw, offset, value_offset, after)
        if after > len(raw):
            return
        yield Tlv(raw[offset], raw[value_offset:after], offset)
        offset = after


def _check_known(raw: bytes, offset: int, start: int, end: int) -> None:
    """Judge the size of TLVs that the specification bounds, and the inside of the SSL one."""
    kind, size = raw[offset], end - start
    if kind == _TLV_CRC32C and size != 4:
        raise ProxyV2Error("crc32c_length", f"checksum of {size} bytes", offset + 1)
    if kind == _TLV_UNIQUE_ID and size > _UNIQUE_ID_MAX:
        raise ProxyV2Error("unique_id_length", f"unique id of {size} bytes", offset + 1)
    if kind == _TLV_SSL:
        if size < _SSL_FIXED:
            raise ProxyV2Error("ssl_short", f"SSL TLV of {size} bytes", offset + 1)
        _check_sub_tlvs(raw, start + _SSL_FIXED, end)


def _check_sub_tlvs(raw: bytes, start: int, end: int) -> None:
    """Judge where the SSL sub-TLVs end. One level only: a sub-TLV is opaque, so nesting can not recurse."""
    offset = start
    while offset < end:
        value_offset = offset + wire.PP2_TLV_HEADER_SIZE
        if end >= value_offset > len(raw):
            return
        after = value_offset + int.from_bytes(raw[offset + 1 : value_offset], "big")
        if after > end:
            raise ProxyV2Error("ssl_overrun", f"SSL sub-TLV ends {after - end} bytes too late", offset)
        offset = after


def _check_crc32c(raw: bytes, tlvs: tuple[Tlv, ...]) -> None:
    """Verify the checksum, if there is one: over the whole header with its own four bytes as zero (2.2.3)."""
    sums = [tlv for tlv in tlvs if tlv.type == _TLV_CRC32C]
    if not sums:
        return
    if len(sums) > 1:
        raise ProxyV2Error("crc32c_repeated", "more than one checksum", sums[1].offset)
    start = sums[0].offset + wire.PP2_TLV_HEADER_SIZE
    if crc32c(raw[:start] + bytes(4) + raw[start + 4 :]) != int.from_bytes(sums[0].value, "big"):
        raise ProxyV2Error("crc32c_mismatch", "the checksum is wrong", sums[0].offset)


def _endpoints(block: bytes) -> tuple[Endpoint | bytes, Endpoint | bytes]:
    """Read source and destination from an address block, whose size tells its family."""
    if len(block) == 2 * _UNIX_PATH:
        return block[:_UNIX_PATH].partition(b"\0")[0], block[_UNIX_PATH:].partition(b"\0")[0]
    size = (len(block) - _PORTS.size) // 2
    first, second = block[:size], block[size : 2 * size]
    src_port, dst_port = _PORTS.unpack_from(block, 2 * size)
    if size == 4:
        return Endpoint(IPv4Address(first), src_port), Endpoint(IPv4Address(second), dst_port)
    return Endpoint(IPv6Address(first), src_port), Endpoint(IPv6Address(second), dst_port)
