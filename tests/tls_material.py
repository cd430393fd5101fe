"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK = ("127.0.0.1", "localhost")


class Authority:
    """A CA, and what it signs."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
                  "decipher_only")  # fmt: skip
        self._certificate = (
            self._builder(self._name, self._key, days=1)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage, **dict.fromkeys(others, False)), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def cert_pem(self) -> str:
        return self.pem.decode()

    @property
    def key_pem(self) -> str:
        return _key_pem(self._key).decode()

    def issue(
        self,
        name: str = "test",
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
        names: Sequence[str] = LOOPBACK,
        days: int = 1,
        since_days: float = -3,
    ) -> tuple[bytes, bytes]:
        """Return (certificate PEM, key PEM), valid from since_days to days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, days, since_days)
            .add_extension(x509.SubjectAlternativeName([_san(each) for each in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)

    def server_context(self, names: Sequence[str], days: int = 1, since_days: float = -3) -> ssl.SSLContext:
        return _context(*self.issue(names[0], names=names, days=days, since_days=since_days))

    def self_signed_context(self, names: Sequence[str]) -> ssl.SSLContext:
        """A server that vouches for itself: its certificate is no authority's."""
        san = x509.SubjectAlternativeName([_san(name) for name in names])
        certificate = self._builder(self._name, self._key, days=1).add_extension(san, critical=False)
        return _context(
            certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _key_pem(self._key)
        )

    def client_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.cert_pem)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, since_days: float = -3
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        public = key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=since_days))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def _context(certificate: bytes, key: bytes) -> ssl.SSLContext:
    fd = os.memfd_create("test-leaf")
    try:
        os.write(fd, key + certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
