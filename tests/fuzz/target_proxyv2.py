"""The PROXY v2 parser: a header, the wish for more, or an error, and the same one however the bytes arrive."""

from __future__ import annotations

from splits import ways_to_arrive

from clrk.gateway.proxyv2.errors import ProxyV2Error
from clrk.gateway.proxyv2.parser import NEED_DATA, Header, parse


def proxyv2(data: bytes) -> None:
    """Every way to arrive ends in the verdict of the whole."""
    verdicts = {_verdict(pieces) for pieces in ways_to_arrive(data)}
    assert len(verdicts) == 1, verdicts


def _verdict(pieces: list[bytes]) -> str:
    received = b""
    for piece in pieces:
        received += piece
        try:
            found = parse(received)
        except ProxyV2Error as exc:
            return exc.code
        if isinstance(found, Header):
            assert found.size <= len(received)
            assert all(tlv.offset + 3 + len(tlv.value) <= found.size for tlv in found.tlvs)
            return repr(found)
    return repr(NEED_DATA)


TARGETS = {"proxyv2": proxyv2}
