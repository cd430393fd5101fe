"""Why an upstream could not be reached, in stable words: the error.type, the reason of the 502, and what to do."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Final

from clrk.core.errors import ClrkError
from clrk.gateway.egress.server_flight import CertificateDemandedError
from clrk.gateway.egress.tunnels import TunnelRevokedError

# X509_V_ERR_*: openssl/x509_vfy.h
_VERIFY_ERRORS: Final = {
    9: "tls_certificate_not_yet_valid",
    10: "tls_certificate_expired",
    18: "tls_self_signed",
    19: "tls_unknown_ca",
    20: "tls_unknown_ca",
    21: "tls_unknown_ca",
    62: "tls_wrong_host",
    64: "tls_wrong_host",
}
# The names of OpenSSL's reasons (openssl/sslerr.h); the alerts among them are RFC 8446, section 6.2.
_TLS_REASONS: Final = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "tls_client_certificate_required",
    "SSLV3_ALERT_BAD_CERTIFICATE": "tls_client_certificate_required",  # TLS 1.2: we showed none, and that was bad
    "TLSV1_ALERT_PROTOCOL_VERSION": "tls_protocol_version",
    "UNSUPPORTED_PROTOCOL": "tls_protocol_version",
    "WRONG_SSL_VERSION": "tls_protocol_version",
    "TLSV1_UNRECOGNIZED_NAME": "tls_unrecognized_name",
    "WRONG_VERSION_NUMBER": "tls_not_spoken",  # what came is no TLS record
    "HTTP_REQUEST": "tls_not_spoken",
}
_ADVICE: Final = {
    "tls_certificate_expired": "the upstream has to renew its certificate",
    "tls_certificate_not_yet_valid": "compare this host's clock with the upstream's",
    "tls_self_signed": "add the certificate to upstreamTLS.caFile of the EgressGateway if you trust it",
    "tls_unknown_ca": "add the authority that signed it to upstreamTLS.caFile of the EgressGateway if you trust it",
    "tls_wrong_host": "the certificate is for other names; dial one of those, or have it issued for this one",
    "tls_client_certificate_required": (
        "it asks for a client certificate, which clrk can not present for an agent; "
        "add the host to tls.passthroughHosts, so that the agent presents its own"
    ),
    "tls_protocol_version": "clrk speaks TLS 1.2 and 1.3",
    "tls_unrecognized_name": "it serves no such name",
    "tls_not_spoken": "what answers on this port is no TLS; dial it without",
    "tls_handshake": "it accepted none of what TLS 1.2 and 1.3 offer",
    "dns": "this host can not resolve the name",
}


class DialDeniedError(ClrkError):
    """Policy, or the gateway's own rules, forbid the destination.

    Shape: reason is stable; rule decided; hint is a rule that would allow it.
    """

    status: Final = 403

    def __init__(self, reason: str, message: str, hint: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint
        self.rule = rule


class DialFailedError(ClrkError):
    """The upstream can not be reached. Shape: error_type is stable and low-cardinality."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


def error_type_of(exc: BaseException) -> str:
    """Return the error.type of a failed connection or exchange."""
    match exc:
        case ssl.SSLCertVerificationError():
            return _VERIFY_ERRORS.get(exc.verify_code, "tls_certificate_invalid")
        case CertificateDemandedError():
            return "tls_client_certificate_required"
        case ssl.SSLError():
            return _TLS_REASONS.get(exc.reason or "", "tls_handshake")
        case socket.gaierror() | UnicodeError():  # what can not be written as a DNS name
            return "dns"
        case ConnectionRefusedError():
            return "connection_refused"
        case TimeoutError():
            return "timeout"
        case TunnelRevokedError():
            return "policy_changed"
        case ConnectionError():
            return "connection_reset"
        case OSError() if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
            return "unreachable"
        case _:
            return "_OTHER"


def explain(exc: BaseException) -> str:
    """Return what went wrong and, where somebody can mend it, how: for the span's status and the 502's detail."""
    said = str(exc) or type(exc).__name__
    advice = _ADVICE.get(error_type_of(exc))
    return f"{said}; {advice}" if advice else said
