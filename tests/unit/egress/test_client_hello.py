"""The ClientHello peek: real hellos at every cut, and what a hostile one may look like."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.client_hello import parse_client_hello


def real_hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    out = ssl.MemoryBIO()
    side = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        side.do_handshake()
    return out.read()


def record(body: bytes, kind: int = 22) -> bytes:
    return struct.pack("!BHH", kind, 0x0301, len(body)) + body


def hello(extensions: bytes) -> bytes:
    body = (
        b"\x03\x03"
        + bytes(32)
        + b"\0"
        + b"\0\x02\x13\x01"
        + b"\x01\0"
        + struct.pack("!H", len(extensions))
        + extensions
    )
    return b"\x01" + len(body).to_bytes(3, "big") + body


def sni(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(struct.pack("!BH", kind, len(name)) + name for name in names)
    return struct.pack("!HHH", 0, len(listed) + 2, len(listed)) + listed


@pytest.mark.parametrize("name", ["api.example.com", "a", None])
def test_a_real_hello_at_every_cut(name):
    raw = real_hello(name)
    for cut in range(len(raw)):
        assert parse_client_hello(raw[:cut]) is None
    assert parse_client_hello(raw).server_name == name
    assert parse_client_hello(raw + b"\x14\x03\x03\x00\x01\x01\x17\x03\x03").server_name == name  # early data


def test_case_and_trailing_dot():
    assert parse_client_hello(record(hello(sni(b"API.Example.COM.")))).server_name == "api.example.com"


def test_a_hello_over_several_records():
    raw = hello(sni(b"api.example.com"))
    split = b"".join(record(raw[index : index + 7]) for index in range(0, len(raw), 7))
    assert parse_client_hello(split).server_name == "api.example.com"


@pytest.mark.parametrize(
    "raw",
    [
        record(b"\x02\0\0\0"),
        record(hello(b""), kind=23),
        b"\x16\x02\x01",
        record(b""),
        b"\x16\x03\x01\x40\x01" + bytes(10),
        record(b"\x01\xff\xff\xff"),
        record(hello(sni())),
        record(hello(sni(b"a", b"b"))),
        record(hello(sni(b"a") + sni(b"b"))),
        record(hello(sni(b"a", kind=1))),
        record(hello(sni(b""))),
        record(hello(sni(b"a b"))),
        record(hello(sni(b"a\0b"))),
        record(hello(sni(b"-a"))),
        record(hello(sni("ä".encode()))),
        record(hello(sni(b"a" * 256))),
        record(hello(b"\0\0\0\xff")),
    ],
    ids=range(17),
)
def test_hostile_hellos_are_refused(raw):
    with pytest.raises(ProtocolError) as caught:
        parse_client_hello(raw)
    assert caught.value.code == "client_hello"


@given(st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=400, deadline=None)
def test_one_changed_byte_is_understood_or_refused_with_a_code(at, value):
    raw = bytearray(real_hello("api.example.com"))
    raw[at] = value
    assert outcome(bytes(raw)) in ("hello", "more", "client_hello")


def outcome(raw: bytes) -> str:
    try:
        return "more" if parse_client_hello(raw) is None else "hello"
    except ProtocolError as exc:
        return exc.code
