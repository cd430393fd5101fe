"""What a server says before it refuses a handshake: real TLS 1.2 flights, whole and cut, and others."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tls_material import Authority

from clrk.gateway.egress.server_flight import asks_for_certificate

NAME = "api.example.com"


def first_flight(verify_mode: ssl.VerifyMode) -> bytes:
    """Return what a real server answers to a ClientHello of TLS 1.2."""
    theirs = Authority("upstream CA")
    served, asking = theirs.server_context([NAME]), theirs.client_context()
    served.maximum_version = ssl.TLSVersion.TLSv1_2
    served.verify_mode = verify_mode
    served.load_verify_locations(cadata=theirs.cert_pem)
    hello, flight = ssl.MemoryBIO(), ssl.MemoryBIO()
    for side in (
        asking.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=NAME),
        served.wrap_bio(hello, flight, server_side=True),
    ):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    return flight.read()


@pytest.mark.parametrize("mode", [ssl.CERT_REQUIRED, ssl.CERT_OPTIONAL])
def test_a_certificate_request_is_seen_from_its_first_byte_on(mode):
    flight = first_flight(mode)
    seen = [asks_for_certificate(flight[:end]) for end in range(len(flight) + 1)]
    assert seen == sorted(seen)
    assert seen[-1] is True
    assert seen[100] is False


def test_a_server_that_asks_for_nothing_is_not_said_to():
    flight = first_flight(ssl.CERT_NONE)
    assert not any(asks_for_certificate(flight[:end]) for end in range(len(flight) + 1))


def test_a_request_that_is_split_over_records_is_seen():
    message = b"\x02\0\0\x02ab" + b"\x0d\0\0\x04abcd"
    for cut in range(1, len(message)):
        records = [b"\x16\x03\x03" + len(part).to_bytes(2, "big") + part for part in (message[:cut], message[cut:])]
        assert asks_for_certificate(b"".join(records))


def test_what_follows_the_handshake_is_not_looked_at():
    assert not asks_for_certificate(b"\x15\x03\x03\x00\x02\x02\x28" + b"\x16\x03\x03\x00\x04\x0d\0\0\0")


@given(st.binary(max_size=400))
def test_no_bytes_upset_it(raw):
    assert asks_for_certificate(raw) in (True, False)
    assert asks_for_certificate(b"\x16\x03\x03\0\0" * 3 + raw) in (True, False)
