"""Public keys of token issuers (RFC 7517), and where they may be read from. Pure.

Only keys that can verify a signature of the algorithms in ALGORITHMS are taken; the rest of a set is passed over, since
issuers publish keys for other purposes in the same set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWTError

MAX_KEYS: Final = 64
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192  # a larger one makes every verification slow
_PRIVATE: Final = "d"  # RFC 7518, sections 6.2.2 and 6.3.2; RFC 8037, section 2

# RFC 7518, section 3.1, and RFC 8037: algorithm → (kty, crv). No HMAC and no `none`: whoever can verify could sign.
ALGORITHMS: Final[Mapping[str, tuple[str, str | None]]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", None)),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One key. Shape: key is what `cryptography` made of it; algorithm None: any that fits the key's kind."""

    kid: str | None
    kind: tuple[str, str | None]
    algorithm: str | None
    key: Any

    def fits(self, algorithm: str) -> bool:
        """Say whether a signature of the algorithm can be the key's."""
        return ALGORITHMS.get(algorithm) == self.kind and self.algorithm in (None, algorithm)


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys of an issuer."""

    keys: tuple[PublicKey, ...]

    def knows(self, kid: str | None) -> bool:
        """Say whether a token that names this key can be looked up; one without a name always can."""
        return kid is None or any(key.kid == kid for key in self.keys)

    def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key that must have signed; None when there is none, or more than one without a name."""
        if kid is None:
            return self.keys[0] if len(self.keys) == 1 and self.keys[0].fits(algorithm) else None
        return next((key for key in self.keys if key.kid == kid and key.fits(algorithm)), None)


def is_url(location: str) -> bool:
    """Say whether the keys are fetched; otherwise they are in a file."""
    return "://" in location


def check_url(location: str) -> str | None:
    """Return what is wrong with a key set's URL: what it answers decides who may call."""
    try:
        url = urlsplit(location)
        host, _ = url.hostname or "", url.port
    except ValueError:
        return "is not a URL"
    if url.scheme not in ("https", "http") or not host:
        return "is not a URL; write https://… or a file"
    if url.username is not None or url.password is not None or url.fragment:
        return "holds credentials or a fragment"
    if url.scheme == "http" and not _is_loopback(host):
        return "must be https: over http, anybody on the way could put in a key of their own"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_jwks(text: str | bytes) -> KeySet:
    """Read a JWK set.

    Raises: ValueError, without any of its content, when it is none or holds no usable key.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    listed = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise ValueError('not a JWK set: write {"keys": [...]}')
    if len(listed) > MAX_KEYS:
        raise ValueError(f"over {MAX_KEYS} keys")
    keys = tuple(key for entry in listed if (key := _read_key(entry)) is not None)
    if not keys:
        kinds = ", ".join(ALGORITHMS)
        raise ValueError(f"no public key in it that verifies one of {kinds}")
    return KeySet(keys)


def holds_private_key(text: str) -> bool:
    """Say whether a JWK set that parse_jwks took gives away how to sign."""
    listed = json.loads(text)["keys"]
    return any(isinstance(entry, dict) and (_PRIVATE in entry or entry.get("kty") == "oct") for entry in listed)


def _read_key(entry: object) -> PublicKey | None:
    if not isinstance(entry, dict) or _PRIVATE in entry or entry.get("use", "sig") != "sig":
        return None
    operations, kid, algorithm = entry.get("key_ops", ["verify"]), entry.get("kid"), entry.get("alg")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    kind = (entry.get("kty"), None if entry.get("kty") == "RSA" else entry.get("crv"))
    fitting = [name for name, wanted in ALGORITHMS.items() if wanted == kind and algorithm in (None, name)]
    if not fitting:
        return None
    try:
        key = PyJWK(entry, fitting[0]).key
    except (PyJWTError, ValueError, TypeError, KeyError, OverflowError):  # what is no key is passed over
        return None
    if isinstance(key, RSAPublicKey) and not _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
        return None
    return PublicKey(kid, ALGORITHMS[fitting[0]], algorithm, key)
