"""What a TLS 1.2 server said before it refused our handshake: in TLS 1.3 nobody could read it. Pure.

Source: RFC 5246, sections 6.2.1 (records), 7.4 (handshake messages) and 7.4.4 (CertificateRequest).
"""

from __future__ import annotations

import ssl
from typing import Final

MAX_FLIGHT_SIZE: Final = 64 * 1024  # certificate chains are a few KiB
_HANDSHAKE: Final = 22
_CERTIFICATE_REQUEST: Final = 13


class CertificateDemandedError(ssl.SSLError):
    """The upstream asked for a client certificate, and broke the handshake off without one."""


def asks_for_certificate(flight: bytes) -> bool:
    """Say whether a CertificateRequest is among the handshake messages that a server's first bytes hold."""
    messages, at = b"", 0
    while flight[at : at + 1] == bytes((_HANDSHAKE,)):
        length = int.from_bytes(flight[at + 3 : at + 5], "big")
        messages += flight[at + 5 : at + 5 + length]
        at += 5 + length
    at = 0
    while at < len(messages):
        if messages[at] == _CERTIFICATE_REQUEST:
            return True
        at += 4 + int.from_bytes(messages[at + 1 : at + 4], "big")
    return False
