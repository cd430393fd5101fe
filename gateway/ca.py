"""Issue the leaf certificates that agents see, signed by the per-host CA (CONTRACT section 10, TLS).

One P-256 key serves every leaf of this process: issuing then costs one signature, well below a millisecond. The key
lives in memory only; a leaf is worth nothing outside sandboxes, since only they trust the CA.
"""

from __future__ import annotations

import datetime
import logging
import os
import ssl
from collections import OrderedDict
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clrk.core.errors import HostError
from clrk.core.gateway_config import GatewayConfig, ca_id
from clrk.gateway.egress.channel import RaggedlyEnding

_LOG: Final = logging.getLogger(__name__)
MAX_CONTEXTS: Final = 1024  # 26 KiB each
MAX_SESSIONS: Final = 64  # that a context keeps for clients without tickets (TLS 1.2); OpenSSL would keep 20,480
_BACKDATE: Final = datetime.timedelta(hours=1)  # clocks of agents that set their own
_LIFETIME: Final = datetime.timedelta(days=7)
_RENEW_BEFORE: Final = datetime.timedelta(days=1)


class LeafIssuer:
    """Makes server contexts by name; keeps the last ones used.

    Each name has a leaf of its own: a wildcard would save a signature, and vouch for names that no rule allows. Tickets
    are a context's own, so a session is resumed while its context is kept; after that the handshake is a full one.
    """

    def __init__(self, ca_cert_pem: str, ca_key_pem: str) -> None:
        self._ca = x509.load_pem_x509_certificate(ca_cert_pem.encode())
        key = serialization.load_pem_private_key(ca_key_pem.encode(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise HostError("load the CA key: not an elliptic-curve key")
        if key.public_key() != self._ca.public_key():
            raise HostError("load the CA: key and certificate do not belong together")
        self._ca_key = key
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key_pem = self._leaf_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._contexts: OrderedDict[str, tuple[ssl.SSLContext, datetime.datetime]] = OrderedDict()

    def context(self, name: str) -> ssl.SSLContext:
        """Return a server context for a host name or an IP literal. Cost: about a millisecond the first time."""
        now = datetime.datetime.now(datetime.UTC)
        held = self._contexts.get(name)
        if held is not None and now < held[1] and held[0].session_stats()["number"] < MAX_SESSIONS:
            self._contexts.move_to_end(name)
            return held[0]
        context = self._make_context(self.issue(name, now))
        self._contexts[name] = (context, now + _LIFETIME - _RENEW_BEFORE)
        self._contexts.move_to_end(name)
        while len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def issue(self, name: str, now: datetime.datetime) -> x509.Certificate:
        """Return a leaf for a name, valid from an hour before now and never longer than the CA itself."""
        try:
            san: x509.GeneralName = x509.IPAddress(ip_address(name))
        except ValueError:
            san = x509.DNSName(name)
        issuer_key = self._ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        common_name = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= 64 else []  # X.520 upper bound
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(common_name))
            .issuer_name(self._ca.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _BACKDATE, self._ca.not_valid_before_utc))
            .not_valid_after(min(now + _LIFETIME, self._ca.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([san]), critical=not common_name)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_LEAF_USAGE, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._leaf_key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
            .sign(self._ca_key, hashes.SHA256())
        )

    def _make_context(self, leaf: x509.Certificate) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslobject_class = RaggedlyEnding
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        pem = self._leaf_key_pem + leaf.public_bytes(serialization.Encoding.PEM)
        pem += self._ca.public_bytes(serialization.Encoding.PEM)
        # The ssl module loads from paths only: an anonymous file keeps the key off every disk.
        fd = os.memfd_create("clrk-leaf", os.MFD_CLOEXEC)
        try:
            os.write(fd, pem)
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        return context


class Issuers:
    """The issuers by the CA that they sign with: each run sees leaves of the one that its sandbox's bundle has."""

    def __init__(self) -> None:
        self._by_id: dict[str, LeafIssuer] = {}
        self._current = ""

    def reconfigure(self, config: GatewayConfig) -> None:
        """Know the CAs of a configuration; an issuer that stays keeps its leaves. Raises: HostError."""
        authorities = [(config.ca_cert_pem, config.ca_key_pem)]
        authorities += [(former.cert_pem, former.key_pem) for former in config.former_cas]
        self._by_id = {ca_id(cert): self._by_id.get(ca_id(cert)) or LeafIssuer(cert, key) for cert, key in authorities}
        self._current = ca_id(config.ca_cert_pem)

    def of(self, name: str) -> LeafIssuer:
        """Return the issuer of a CA, "" for that of now, and for one that is not known one that nobody there trusts."""
        if name and name not in self._by_id:
            _LOG.error("CA %s is not known: TLS of that sandbox will fail", name)
        return self._by_id.get(name) or self._by_id[self._current]


_LEAF_USAGE: Final = x509.KeyUsage(
    digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
)  # fmt: skip
