"""PROXY v2: the parser against malformed headers, and against an independent parser."""

from __future__ import annotations

import json
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v2 import ProxyProtocolV2
from proxyv2_headers import V4, V6, complete, header, tlv

from clrk.core import wire
from clrk.gateway.proxyv2 import NEED_DATA, Command, Endpoint, Header, ProxyV2Error, Tlv, parse
from clrk.gateway.proxyv2.crc32c import crc32c

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/proxyv2/malformed.json").read_text(encoding="utf-8"))


def checksummed(body: bytes) -> bytes:
    raw = header(body + tlv(0x03, bytes(4)))
    return raw[:-4] + crc32c(raw).to_bytes(4, "big")


def refused(raw: bytes, **options: int) -> tuple[str, int]:
    with pytest.raises(ProxyV2Error) as caught:
        parse(raw, **options)
    return caught.value.code, caught.value.offset


GOOD = {
    "v4": header(V4),
    "v4 datagram": header(V4, family=0x12),
    "v6 with tlvs": header(V6 + tlv(0x01, b"h2") + tlv(0xE7, b"0123abcd") + tlv(0x04, bytes(30)), family=0x21),
    "empty tlv": header(V4 + tlv(0xE1, b"")),
    "crc32c": checksummed(V4 + tlv(0xE1, b"x")),
    "unix": header(b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0") + tlv(0x02, b"host"), family=0x31),
    "unspec": header(b"", family=0x00),
    "unspec with rubbish": header(b"\xff" * 9, family=0x00),
    "local": header(b"", command=0x20, family=0x00),
    "local, tlvs that would overrun, unknown family": header(b"\x03\xff\xff" * 7, command=0x20, family=0xFF),
    "unique id at its bound": header(V4 + tlv(0x05, bytes(128))),
    "ssl": header(V4 + tlv(0x20, b"\x01" + bytes(4) + tlv(0x21, b"TLSv1.3") + tlv(0x22, b""))),
    "ssl without sub-tlvs": header(V4 + tlv(0x20, bytes(5))),
}


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD.keys())
def test_a_good_header_byte_by_byte_and_with_trailing_bytes(raw: bytes) -> None:
    whole = complete(raw)
    assert whole.size == len(raw)
    for cut in range(len(raw)):
        assert parse(raw[:cut]) is NEED_DATA
    # What follows is payload, even if it looks like TLVs or like another header.
    for trailing in (b"GET / HTTP/1.1\r\n", tlv(0xE2, b"somebody-else"), raw):
        assert complete(raw + trailing) == whole
    assert complete(bytearray(raw)) == complete(memoryview(raw)) == whole


def test_fields_of_v4_v6_and_unix() -> None:
    assert complete(GOOD["v4"]) == Header(
        Command.PROXY,
        0x11,
        Endpoint(IPv4Address("192.0.2.1"), 40000),
        Endpoint(IPv4Address("198.51.100.2"), 443),
        (),
        28,
    )
    v6 = complete(GOOD["v6 with tlvs"])
    assert v6.destination == Endpoint(IPv6Address("2001:db8::2"), 443)
    assert v6.tlvs == (Tlv(0x01, b"h2", 52), Tlv(0xE7, b"0123abcd", 57), Tlv(0x04, bytes(30), 68))
    unix = complete(GOOD["unix"])
    assert (unix.source, unix.destination, unix.tlvs) == (b"/a", b"/b", (Tlv(0x02, b"host", 232),))


@pytest.mark.parametrize("name", ["local", "local, tlvs that would overrun, unknown family", "unspec with rubbish"])
def test_local_and_unspec_carry_nothing(name: str) -> None:
    parsed = complete(GOOD[name])
    assert (parsed.source, parsed.destination, parsed.tlvs) == (None, None, ())


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_malformed_as_early_as_its_bytes_allow(vector: dict[str, str | int]) -> None:
    raw = bytes.fromhex(str(vector["hex"]))
    early = int(vector["refused_with"])
    want = (vector["code"], vector["offset"])
    for cut in range(early):
        assert parse(raw[:cut]) is NEED_DATA, cut
    for cut in range(early, len(raw) + 1):
        assert refused(raw[:cut]) == want, cut
    assert refused(raw + b"\0" * 64) == want


@pytest.mark.parametrize("position", range(12))
def test_signature_is_refused_at_its_first_wrong_byte(position: int) -> None:
    raw = bytearray(GOOD["v4"])
    raw[position] ^= 0x20
    assert parse(raw[:position]) is NEED_DATA
    assert refused(bytes(raw[: position + 1])) == ("signature", position)


@pytest.mark.parametrize("byte", [byte for byte in range(256) if byte not in (0x20, 0x21)])
def test_no_other_version_or_command(byte: int) -> None:
    code, offset = refused(wire.SIGNATURE + bytes([byte]))
    assert (code, offset) == ("version" if byte >> 4 != 2 else "command", 12)


@pytest.mark.parametrize("byte", range(256))
def test_family_switch_is_total(byte: int) -> None:
    raw = wire.SIGNATURE + bytes([0x21, byte])
    if byte in (0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32):
        assert parse(raw) is NEED_DATA
    else:
        assert refused(raw) == ("family", 13)


@pytest.mark.parametrize(("family", "size"), [(0x11, 12), (0x21, 36), (0x31, 216)])
def test_length_against_the_address_block(family: int, size: int) -> None:
    assert refused(header(b"", family=family, length=size - 1)) == ("address_short", 14)
    assert refused(header(b"", family=family, length=0)) == ("address_short", 14)
    assert complete(header(bytes(size), family=family)).size == 16 + size
    # One byte or two behind the addresses can be no TLV.
    for spare in (1, 2):
        assert refused(header(bytes(size + spare), family=family)) == ("tlv_overrun", 16 + size)
    assert complete(header(bytes(size + 3), family=family)).tlvs == (Tlv(0, b"", 16 + size),)


def test_length_against_the_cap() -> None:
    raw = header(V4 + tlv(0x04, bytes(100)))
    assert complete(raw, max_size=len(raw)).size == len(raw)
    assert refused(raw, max_size=len(raw) - 1) == ("length_over_cap", 14)
    assert refused(header(b"", length=0xFFFF)) == ("length_over_cap", 14)
    assert refused(header(b"", command=0x20, length=0xFFFF)) == ("length_over_cap", 14)
    assert parse(header(b"", length=wire.PP2_MAX_SIZE - 16)) is NEED_DATA
    assert refused(header(b"", length=wire.PP2_MAX_SIZE - 15)) == ("length_over_cap", 14)


def test_every_changed_bit_breaks_the_checksum() -> None:
    raw = GOOD["crc32c"]
    for position in range(16, 28):  # the addresses: everything else changes the structure
        changed = bytearray(raw)
        changed[position] ^= 1
        assert refused(bytes(changed))[0] == "crc32c_mismatch"


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_of_rfc_3720_appendix_b_4(raw: bytes, want: int) -> None:
    assert crc32c(raw) == want


def test_nested_ssl_is_opaque() -> None:
    inner = tlv(0x20, b"\xff\xff")  # shorter than an SSL TLV may be, but inside one it is only bytes
    assert complete(header(V4 + tlv(0x20, bytes(5) + inner))).tlvs[0].value.endswith(inner)


# --- An independent parser -------------------------------------------------------------------------------------------

TLVS = st.lists(st.tuples(st.sampled_from([0x01, 0x02, 0xE0, 0xE7, 0xEB, 0xFF]), st.binary(max_size=40)), max_size=6)


@given(
    addresses=st.one_of(
        st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
    ),
    ports=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    tlvs=TLVS,
)
def test_agrees_with_the_proxy_protocol_package(
    addresses: tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address],
    ports: tuple[int, int],
    tlvs: list[tuple[int, bytes]],
) -> None:
    block = addresses[0].packed + addresses[1].packed + struct.pack("!HH", *ports)
    raw = header(block + b"".join(tlv(*item) for item in tlvs), family=0x11 if len(block) == 12 else 0x21)
    ours, theirs = complete(raw), ProxyProtocolV2().unpack(raw)
    assert isinstance(ours.source, Endpoint)
    assert isinstance(ours.destination, Endpoint)
    assert (ours.source.address, ours.source.port) == theirs.source
    assert (ours.destination.address, ours.destination.port) == theirs.dest
    assert dict(theirs.tlv) == {item.type: item.value for item in ours.tlvs}


@given(tlvs=TLVS, position=st.integers(16, 27), bit=st.integers(0, 7))
def test_a_checksum_anywhere_is_verified(tlvs: list[tuple[int, bytes]], position: int, bit: int) -> None:
    zeroed = header(V4 + tlv(0x03, bytes(4)) + b"".join(tlv(*item) for item in tlvs))
    raw = bytearray(zeroed[:31] + crc32c(zeroed).to_bytes(4, "big") + zeroed[35:])
    assert complete(bytes(raw)).size == len(raw)
    raw[position] ^= 1 << bit
    assert refused(bytes(raw)) == ("crc32c_mismatch", 28)


@given(st.binary(max_size=600))
def test_anything_behind_the_signature_is_answered(body: bytes) -> None:
    raw = wire.SIGNATURE + body
    try:
        parsed = parse(raw)
    except ProxyV2Error as error:
        offset = error.offset
        parsed = NEED_DATA
    else:
        offset = 0
    assert 0 <= offset < len(raw)
    if isinstance(parsed, Header):
        assert parsed.size <= len(raw)
        assert parse(raw[: parsed.size]) == parsed
