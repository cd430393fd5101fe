"""Bearer tokens (RFC 6750) that are JWTs (RFC 7519, with the advice of RFC 8725): is this one to be believed? Pure.

The algorithm is the key's to decide, never the token's alone: it has to be one of ALGORITHMS and fit the key that the
issuer published. Nothing of a token is echoed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt

from clrk.core.jwks import ALGORITHMS, KeySet
from clrk.core.resources import JwtExtractor
from clrk.gateway.problem import Problem

LEEWAY_S: Final = 30.0  # between our clock and the issuer's
MAX_TOKEN_CHARS: Final = 8192
_BEARER: Final = re.compile(r"bearer +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)", re.IGNORECASE)
_REASONS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (jwt.ExpiredSignatureError, "the token has expired"),
    (jwt.ImmatureSignatureError, "the token is not valid yet"),
    (jwt.InvalidAudienceError, "the token is for another audience"),
    (jwt.InvalidIssuerError, "the token is from another issuer"),
    (jwt.MissingRequiredClaimError, "the token lacks exp, iss or aud"),
    (jwt.InvalidSignatureError, "the token's signature does not verify"),
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token that has the shape of one; nothing in it is verified yet."""

    text: str
    algorithm: str
    kid: str | None


def refused(reason: str) -> Problem:
    """Return the answer to a bad token."""
    return Problem(401, reason, {"WWW-Authenticate": 'Bearer error="invalid_token"'})


def read_token(authorization: Sequence[str]) -> Token:
    """Return the bearer token of the Authorization headers.

    Raises: Problem 401.
    """
    if not authorization:  # RFC 6750, section 3.1: without a token, no error code
        raise Problem(401, "this agent wants a bearer token", {"WWW-Authenticate": "Bearer"})
    if len(authorization) > 1:
        raise refused("Authorization: given more than once")
    if len(authorization[0]) > MAX_TOKEN_CHARS:
        raise refused(f"the token is over {MAX_TOKEN_CHARS} characters")
    found = _BEARER.fullmatch(authorization[0].strip(" \t"))
    if found is None:
        raise refused("Authorization: not a bearer token of three parts")
    try:
        header = jwt.get_unverified_header(found[1])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise refused("the token's header can not be read") from None
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise refused(f"the token's algorithm is none of {', '.join(ALGORITHMS)}")
    if "crit" in header or header.get("b64", True) is not True:
        raise refused("the token asks for an extension that is not known here")
    return Token(found[1], algorithm, kid)


def verify(token: Token, keys: KeySet, extractor: JwtExtractor) -> Mapping[str, Any]:
    """Return the token's claims once everything about it holds.

    Raises: Problem 401.
    """
    key = keys.find(token.algorithm, token.kid)
    if key is None:
        raise refused("the token names no key of its issuer that fits its algorithm")
    try:
        return jwt.decode(
            token.text,
            key=key.key,
            algorithms=[token.algorithm],
            audience=extractor.audience,
            issuer=extractor.issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.PyJWTError as exc:
        reason = next((text for kind, text in _REASONS if isinstance(exc, kind)), "the token can not be used")
    except (ValueError, TypeError, OverflowError, RecursionError):  # claims that nobody can compare
        reason = "the token can not be used"
    raise refused(reason)
