"""The per-host certificate authority that signs the leaves of intercepted TLS connections.

Made once, kept in `<stateDir>/ca` for root alone. Only sandboxes trust it: its certificate is part of their CA bundle
and of nothing else. The private key leaves this process only inside the gateway's Configure memfd.

Theory of rotation. A sandbox's bundle is fixed when its view is built, so it trusts one CA for its whole life, and the
gateway signs for it with that one, by the id that comes with Started. `rotate` puts another CA on the disk; a reload
has the gateway know both; when it says so (Ready), views are built with the new one. Nothing of a former CA is on the
disk: no sandbox outlives the runtime.
"""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clrk.core.errors import HostError
from clrk.core.gateway_config import IssuingCa, ca_id

_VALIDITY: Final = datetime.timedelta(days=3650)
_CLOCK_SKEW: Final = datetime.timedelta(hours=24)
_MIN_REMAINING: Final = datetime.timedelta(days=2)  # a leaf must not outlive its issuer
_CERT_NAME: Final = "ca.crt"
_KEY_NAME: Final = "ca.key"
_ALWAYS_KEPT: Final = 2  # former ones that a sandbox may get until the gateway has confirmed the next


@dataclass(frozen=True, slots=True)
class HostCa:
    """The authority as PEM text."""

    cert_pem: str
    key_pem: str = field(repr=False)

    @property
    def id(self) -> str:
        """Return its name between runtime and gateway."""
        return ca_id(self.cert_pem)

    def describe(self) -> str:
        """Return what `openssl x509 -fingerprint -sha256` says of it, and until when it holds."""
        certificate = x509.load_pem_x509_certificate(self.cert_pem.encode())
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex(":").upper()
        return f"sha256 {fingerprint}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}"


class Authorities:
    """The CA of now, and the former ones that sandboxes may still trust."""

    def __init__(self, current: HostCa) -> None:
        self.current = current
        self._former: list[HostCa] = []

    def replace(self, current: HostCa, trusted: Collection[str]) -> bool:
        """Take what is on the disk now; say whether it is another one. trusted are the ids that sandboxes have."""
        if is_new := current.id != self.current.id:
            self._former = [one for one in self._former if one.id != current.id] + [self.current]
            self.current = current
        old, last = self._former[:-_ALWAYS_KEPT], self._former[-_ALWAYS_KEPT:]
        self._former = [one for one in old if one.id in trusted] + last
        return is_new

    def former(self) -> list[IssuingCa]:
        """Return the former ones, for the gateway."""
        return [IssuingCa(cert_pem=one.cert_pem, key_pem=one.key_pem) for one in self._former]


def load(state_dir: Path) -> HostCa:
    """Return the authority that there is. Raises: HostError, also when there is none yet."""
    folder = state_dir / "ca"
    try:
        return _load(folder)
    except OSError as exc:
        raise HostError(f"certificate authority in {folder}: {exc.strerror}: {exc.filename}") from exc


def rotate(state_dir: Path) -> HostCa:
    """Put a new authority in place of the one there is, usable or not, and forget that one.

    Raises: HostError. Side effects: as load_or_create; the new folder is synced before the old one is removed, and a
    crash between the two renames leaves no authority, so that the next start makes one.
    """
    folder = state_dir / "ca"
    try:
        if not state_dir.is_dir():
            raise HostError(f"no state in {state_dir}: the first start of clrk-runtime makes it, with a new CA")
        for leftover in state_dir.glob(".ca-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = _stage(state_dir)
        retired = Path(tempfile.mkdtemp(prefix=".ca-", dir=state_dir))
        if folder.exists():
            folder.rename(retired / "ca")
        staging.rename(folder)
        _sync_folder(state_dir)
        shutil.rmtree(retired)
        return _load(folder)
    except OSError as exc:
        raise HostError(f"certificate authority in {folder}: {exc.strerror}: {exc.filename}") from exc


def load_or_create(state_dir: Path) -> HostCa:
    """Return the host's authority, made now if there is none.

    Raises: HostError when it can not be made, or when what is there must not be used; the message says what to do.
    Side effects: creates `<state_dir>/ca` (0700) with both files (0600) in one rename, synced to disk.
    """
    folder = state_dir / "ca"
    try:
        if not folder.exists():
            _create(folder)
        return _load(folder)
    except OSError as exc:
        raise HostError(f"certificate authority in {folder}: {exc.strerror}: {exc.filename}") from exc


def _create(folder: Path) -> None:
    """Fill a temporary folder and rename it, so that a crash leaves either the whole authority or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _stage(folder.parent)
    try:
        try:
            staging.rename(folder)
        except OSError:
            if not folder.exists():  # else another runtime on the same stateDir was quicker; use its authority
                raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(parent: Path) -> Path:
    """Return a new authority in a folder of its own, synced."""
    staging = Path(tempfile.mkdtemp(prefix=".ca-", dir=parent))  # 0700
    try:
        key = ec.generate_private_key(ec.SECP256R1())
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(staging / _KEY_NAME, key_pem)
        _write(staging / _CERT_NAME, _self_sign(key).public_bytes(serialization.Encoding.PEM))
        _sync_folder(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _self_sign(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "clrk"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"clrk host CA {socket.gethostname()}"[:64]),
        ]
    )
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _load(folder: Path) -> HostCa:
    """Read and check both files: nobody else could have read the key, it fits the certificate, and that still holds."""
    for path in (folder, folder / _KEY_NAME, folder / _CERT_NAME):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            mode = "0700" if path == folder else "0600"
            raise _unusable(folder, f"{path} must be owned by root with mode {mode}: others may have read the key")
    cert_pem, key_pem = ((folder / name).read_bytes() for name in (_CERT_NAME, _KEY_NAME))
    try:
        certificate = x509.load_pem_x509_certificate(cert_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as exc:
        raise _unusable(folder, "its certificate or key can not be read") from exc
    if certificate.public_key() != key.public_key():
        raise _unusable(folder, "its key does not belong to its certificate")
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc - _MIN_REMAINING < now:
        raise _unusable(folder, f"it expires at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if certificate.not_valid_before_utc > now:
        raise _unusable(folder, f"it is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}: check the clock")
    return HostCa(cert_pem.decode("ascii"), key_pem.decode("ascii"))


def _unusable(folder: Path, why: str) -> HostError:
    fix = "`clrk-runtime ca rotate` makes a new one, which only sandboxes trust"
    return HostError(f"certificate authority in {folder}: {why}; to mend it, {fix}")
