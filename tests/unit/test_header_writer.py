"""The C writer of header templates, against a construction of our own and against the proxy-protocol package."""

from __future__ import annotations

import dataclasses
import errno
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v2 import ProxyProtocolV2

from clrk.core.errors import HostError
from clrk.ebpf.header import HeaderFields, build_headers, load_extension

# CONTRACT section 9, written down a second time on purpose.
SIZE = 512
MAXIMA = {
    "namespace": 63,
    "name": 63,
    "uid": 36,
    "revision": 40,
    "invocation_id": 36,
    "sandbox_id": 16,
    "netns_name": 32,
    "traceparent": 55,
}
TLVS = {
    "namespace": 0xE1,
    "name": 0xE2,
    "uid": 0xE3,
    "revision": 0xE4,
    "invocation_id": 0xE5,
    "sandbox_id": 0xE7,
    "traceparent": 0xE9,
    "netns_name": 0x30,
}
OPTIONAL = ("invocation_id", "traceparent")

TYPICAL = HeaderFields(
    kind=1,
    namespace="default",
    name="hello",
    uid="7f9d3a34-6c0e-5d0a-9f0c-0d7b8a2f5c11",
    revision="0123456789ab",
    invocation_id="01987654-3210-7abc-8def-0123456789ab",
    sandbox_id="1a2b3c4d",
    netns_name="clrk-1a2b3c4d",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def construct(fields: HeaderFields, address_size: int, family: int) -> bytes:
    """Build the header from the contract's text, without any of the product's code."""
    body = bytes(address_size) + tlv(0xEB, bytes(40)) + tlv(0xE0, bytes([fields.kind]))
    for name, kind in TLVS.items():
        value = getattr(fields, name)
        if value is not None:
            body += tlv(kind, value.encode())
    body += tlv(0x04, bytes(SIZE - 16 - len(body) - 3))
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x21, family]) + struct.pack("!H", len(body)) + body


def both(fields: HeaderFields) -> tuple[bytes, bytes]:
    return construct(fields, 12, 0x11), construct(fields, 36, 0x21)


def longest() -> HeaderFields:
    return HeaderFields(kind=0, **{name: "x" * size for name, size in MAXIMA.items()})


def replaced(name: str, value: str | None) -> HeaderFields:
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(TYPICAL, **changes)


@pytest.mark.parametrize(
    "fields",
    [TYPICAL, longest(), replaced("invocation_id", None), dataclasses.replace(longest(), invocation_id=None, kind=1)],
    ids=["typical", "longest", "daemon", "longest-daemon"],
)
def test_byte_for_byte(fields: HeaderFields) -> None:
    assert build_headers(fields) == both(fields)


@pytest.mark.parametrize("name", MAXIMA)
def test_each_field_one_byte_and_maximum(name: str) -> None:
    for value in ("x", "x" * MAXIMA[name]):
        fields = replaced(name, value)
        assert build_headers(fields) == both(fields)


@pytest.mark.parametrize("name", MAXIMA)
@pytest.mark.parametrize("size", [1, 1000, 70_000], ids=["max+1", "more", "over-u16"])
def test_one_byte_too_long_is_an_error_that_names_the_field(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"^header: {name} is too long"):
        build_headers(replaced(name, "x" * (MAXIMA[name] + size)))


def test_length_counts_bytes_not_characters() -> None:
    assert build_headers(replaced("name", "é" * 31)) == both(replaced("name", "é" * 31))
    with pytest.raises(ValueError, match="name is too long"):
        build_headers(replaced("name", "é" * 32))


@pytest.mark.parametrize("name", MAXIMA)
def test_an_empty_value_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"header: {name} is missing, empty"):
        build_headers(replaced(name, ""))


@pytest.mark.parametrize("name", [name for name in MAXIMA if name not in OPTIONAL])
def test_a_required_value_can_not_be_absent(name: str) -> None:
    with pytest.raises(ValueError, match=f"header: {name} is missing"):
        build_headers(replaced(name, None))


@pytest.mark.parametrize("kind", [2, 255, 256, -1])
def test_an_unknown_kind_is_an_error(kind: int) -> None:
    with pytest.raises(ValueError, match="kind"):
        build_headers(dataclasses.replace(TYPICAL, kind=kind))


def test_text_that_is_no_utf8_is_an_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        build_headers(replaced("name", "\udc80"))


texts = {
    name: st.text(min_size=1, max_size=size).filter(lambda text, size=size: len(text.encode()) <= size)
    for name, size in MAXIMA.items()
}


@given(
    st.builds(
        HeaderFields,
        kind=st.sampled_from([0, 1]),
        **{name: st.none() | text if name in OPTIONAL else text for name, text in texts.items()},
    )
)
def test_any_valid_fields(fields: HeaderFields) -> None:
    written = build_headers(fields)
    assert written == both(fields)
    for header in written:
        parsed = ProxyProtocolV2().unpack(header)
        assert parsed.tlv[0xE0] == bytes([fields.kind])
        assert parsed.tlv[0xEB] == bytes(40)
        for name, kind in TLVS.items():
            value = getattr(fields, name)
            assert parsed.tlv.get(kind) == (None if value is None else value.encode())


@given(st.sampled_from(sorted(MAXIMA)), st.text(max_size=300))
def test_any_single_text_fits_or_is_refused(name: str, text: str) -> None:
    fields = replaced(name, text)
    if 0 < len(text.encode()) <= MAXIMA[name]:
        assert build_headers(fields) == both(fields)
    else:
        with pytest.raises(ValueError, match=f"header: {name}"):
            build_headers(fields)


def test_the_oracle_reads_addresses_of_both_families() -> None:
    v4, v6 = (ProxyProtocolV2().unpack(header) for header in build_headers(TYPICAL))
    assert (str(v4.source[0]), v4.dest[1]) == ("0.0.0.0", 0)
    assert (str(v6.dest[0]), v6.source[1]) == ("::", 0)


@pytest.fixture
def write() -> Callable[[int, int, int], tuple[int, int, bytes]]:
    """The C function itself: (cap, pos, family) -> result, pos afterwards, buffer."""
    extension = load_extension()
    ffi, lib = extension.ffi, extension.lib

    def call(cap: int, start: int, family: int) -> tuple[int, int, bytes]:
        texts = {name: ffi.new("char[]", b"x") for name in MAXIMA}
        fields = ffi.new("struct clrk_header_fields *")
        for name, text in texts.items():
            target = getattr(fields, "agent_namespace" if name == "namespace" else name)
            target.data, target.size = text, 1
        buf = ffi.new("__u8[]", b"\xaa" * 2000)
        pos = ffi.new("size_t *", start)
        result = lib.clrk_header_write(buf, cap, pos, family, fields, ffi.NULL)
        return result, pos[0], bytes(ffi.buffer(buf))

    return call


@pytest.mark.parametrize("start", [0, 1, 16, 700])
def test_the_writer_appends_and_stays_inside(
    write: Callable[[int, int, int], tuple[int, int, bytes]], start: int
) -> None:
    result, pos, buf = write(start + SIZE, start, 10)
    assert (result, pos) == (0, start + SIZE)
    assert buf[:start] == b"\xaa" * start
    assert buf[start : start + 12] == b"\r\n\r\n\0\r\nQUIT\n"
    assert set(buf[start + SIZE : 2000]) == {0xAA}


@pytest.mark.parametrize(("cap", "start"), [(SIZE - 1, 0), (SIZE, 1), (0, 0), (100, 101), (100, 2**64 - 1)])
def test_no_room_is_an_error_and_writes_nothing(
    write: Callable[[int, int, int], tuple[int, int, bytes]], cap: int, start: int
) -> None:
    result, pos, buf = write(cap, start, 2)
    assert (result, pos) == (-errno.ENOSPC, start)
    assert set(buf[:2000]) == {0xAA}


@pytest.mark.parametrize("family", [0, 1, 3, 6, -1])
def test_an_unknown_family_is_an_error(write: Callable[[int, int, int], tuple[int, int, bytes]], family: int) -> None:
    assert write(SIZE, 0, family)[:2] == (-errno.EINVAL, 0)


def test_without_the_extension_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clrk.ebpf._stamp", None)
    with pytest.raises(HostError, match="pip install -e"):
        build_headers(TYPICAL)
