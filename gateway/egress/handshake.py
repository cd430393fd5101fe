"""Why a TLS handshake with an agent failed, as far as its end of the connection tells. Pure.

Source: RFC 8446, section 6.2 (alerts); the names of OpenSSL's reasons are in openssl/sslerr.h.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Final

NO_APPLICATION_PROTOCOL: Final = bytes((21, 3, 3, 0, 2, 2, 120))  # a record with one fatal alert
# Alerts that clients send about a certificate; which of them is a matter of their library.
_REJECTIONS: Final = (
    "UNKNOWN_CA", "CERTIFICATE_UNKNOWN", "BAD_CERTIFICATE", "UNSUPPORTED_CERTIFICATE", "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED", "ACCESS_DENIED",
)  # fmt: skip
_OUTDATED: Final = ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW")


@dataclass(frozen=True, slots=True)
class HandshakeFailure:
    """error_type is stable; rejected_ca: the client does not trust us, or left as clients do that do not."""

    error_type: str
    message: str
    rejected_ca: bool = False


def passthrough(host: str) -> str:
    """Return what the operator can do for a client that has to see the upstream's own certificate."""
    return f"or add {host} to tls.passthroughHosts of the EgressGateway (calls are then counted, not read)"


def judge_handshake(exc: OSError, host: str) -> HandshakeFailure:
    """Judge a handshake that failed, or that was over when the client left without a word (ConnectionResetError).

    A client that closes tells no reason: Node.js and GnuTLS (git, wget, apt) do just that when they do not trust a
    certificate, and hardly any client does it for another reason.
    """
    reason = getattr(exc, "reason", None) or ""
    mend = f"have it trust the CA bundle of its sandbox (SSL_CERT_FILE and so on), {passthrough(host)}"
    if isinstance(exc, ssl.SSLError):
        if any(word in reason for word in _REJECTIONS):
            said = reason.partition("ALERT_")[2].replace("_", " ").lower()
            message = f"TLS for {host}: the client refused our certificate ({said}): {mend}"
            return HandshakeFailure("tls_client_rejected_ca", message, rejected_ca=True)
        if any(word in reason for word in _OUTDATED):
            message = f"TLS for {host}: the client speaks no TLS 1.2 or 1.3; clrk and every current upstream do"
            return HandshakeFailure("tls_client_protocol_version", message)
    elif isinstance(exc, ConnectionResetError | BrokenPipeError):
        message = (
            f"TLS for {host}: the client closed on seeing our certificate, as one does that does not trust it: {mend}"
        )
        return HandshakeFailure("tls_client_rejected_ca", message, rejected_ca=True)
    return HandshakeFailure("tls_client_handshake", f"TLS with the agent for {host}: {exc}")
