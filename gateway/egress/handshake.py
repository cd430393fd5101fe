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
_LEFT: Final = (ConnectionResetError, BrokenPipeError, ssl.SSLZeroReturnError, ssl.SSLEOFError)
_OUTDATED: Final = ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW")


@dataclass(frozen=True, slots=True)
class HandshakeFailure:
    """error_type is stable. rejected_ca: the client does not trust us; None: perhaps it does not, and did not say."""

    error_type: str
    message: str
    rejected_ca: bool | None = False


def passthrough(host: str) -> str:
    """Return what the operator can do for a client that has to see the upstream's own certificate."""
    return f"or add {host} to tls.passthroughHosts of the EgressGateway (calls are then counted, not read)"


def judge_handshake(exc: OSError, host: str) -> HandshakeFailure:
    """Judge a handshake that failed. A client that leaves inside it has seen our certificate, and nothing else."""
    reason = getattr(exc, "reason", None) or ""
    if isinstance(exc, _LEFT):  # Node.js and apt do not say why
        return _rejected(host, "the client left the handshake on seeing our certificate, and did not say why")
    if any(word in reason for word in _REJECTIONS):
        said = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return _rejected(host, f"the client refused our certificate ({said})")
    if any(word in reason for word in _OUTDATED):
        message = f"TLS for {host}: the client speaks no TLS 1.2 or 1.3; clrk and every current upstream do"
        return HandshakeFailure("tls_client_protocol_version", message)
    return HandshakeFailure("tls_client_handshake", f"TLS with the agent for {host}: {exc}")


def judge_early_end(problem: OSError | None, host: str) -> HandshakeFailure:
    """Judge a connection that ended behind its handshake without a word; problem: how, None for an orderly end.

    In TLS 1.3 a client's alert about our certificate comes here. git and wget (GnuTLS) look at a certificate when the
    handshake is over, and then just close; but so does whoever only wanted to know whether somebody listens.
    """
    if isinstance(problem, ssl.SSLError):
        return judge_handshake(problem, host)
    message = (
        f"TLS for {host}: the client closed behind the handshake without a word; if it did not trust our certificate "
        f"(git and wget do just that): {_mend(host)}"
    )
    return HandshakeFailure("tls_client_closed", message, rejected_ca=None)


def _rejected(host: str, what: str) -> HandshakeFailure:
    return HandshakeFailure("tls_client_rejected_ca", f"TLS for {host}: {what}: {_mend(host)}", rejected_ca=True)


def _mend(host: str) -> str:
    return f"have it trust the CA bundle of its sandbox (SSL_CERT_FILE and so on), {passthrough(host)}"
