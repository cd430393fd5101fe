"""Credentials that calls get on their way out (CONTRACT section 12): which for which host, and how. Pure.

Theory of operation: which policies apply is fixed when a run begins, as all its rules are. Values are not: they are
read for each request from `SecretValues`, of which a gateway has one, so that a reload brings a rotated secret to runs
that are under way. What an agent sent under the same name never goes out beside the secret, in whatever spelling a
server may take for that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from clrk.core.errors import ClrkError
from clrk.core.route_resources import (
    AWS_KEYS,
    AWS_SESSION_KEY,
    AwsSigV4Target,
    CredentialInjectionPolicy,
    CredentialTarget,
    HeaderTarget,
    QueryParamTarget,
)
from clrk.gateway import sigv4
from clrk.gateway.header_names import fold_header
from clrk.gateway.secret_values import SecretValues

_CARRIED: Final = re.compile(r"[\x20-\x7e]+")  # what every server reads the same way in a header
_REGION: Final = re.compile(r"(?:^|\.)([a-z]{2}(?:-[a-z]+)+-[0-9]{1,2})(?:\.|$)")
_SEPARATORS: Final = re.compile("([&;])")

Headers = list[tuple[str, str]]


class CredentialError(ClrkError):
    """A credential is not there, or can not be used. Shape: code is stable; the message has no value of a Secret."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class OutgoingHead:
    """What credentials change of a request. host is the Host header as it goes out; query is without `?`."""

    method: str
    host: str
    path: str
    query: str
    headers: Headers


@dataclass(frozen=True, slots=True)
class Credential:
    """One policy, for the hosts that it was found for. secret is namespace/name."""

    policy: str
    secret: str
    keys: tuple[str, ...]
    optional_keys: tuple[str, ...]
    target: CredentialTarget

    @classmethod
    def compile(cls, policy: CredentialInjectionPolicy) -> Credential:
        """Compile a policy."""
        namespace, spec = policy.metadata.namespace, policy.spec
        name = f"{namespace}/{policy.metadata.name}"
        return cls(name, f"{namespace}/{spec.secret_ref.name}", spec.required_keys, spec.optional_keys, spec.target)

    @property
    def place(self) -> tuple[str, str]:
        """Return what it writes: of two policies for the same place, one can win only."""
        match self.target:
            case HeaderTarget(header_name=name):
                return "header", fold_header(name)
            case QueryParamTarget(query_param_name=name):
                return "parameter", _fold_parameter(name)
            case AwsSigV4Target():
                return "header", "authorization"

    @property
    def signs(self) -> bool:
        """Say whether it needs the whole body."""
        return isinstance(self.target, AwsSigV4Target)

    def refuses_payload(self, headers: Sequence[tuple[str, str]]) -> bool:
        """Say whether the agent's body is in frames that only who has the key can write."""
        return isinstance(self.target, AwsSigV4Target) and sigv4.is_signed_stream(self.target.service, headers)

    @property
    def header_names(self) -> frozenset[str]:
        """Return the headers, folded, that the agent has no say in."""
        match self.target:
            case HeaderTarget(header_name=name):
                return frozenset((fold_header(name),))
            case QueryParamTarget():
                return frozenset()
            case AwsSigV4Target():
                return frozenset(map(fold_header, sigv4.HEADERS))


@dataclass(frozen=True, slots=True)
class Filled:
    """A credential with its values, for one request."""

    credential: Credential
    values: Mapping[str, str] = field(repr=False)
    region: str = ""

    def apply(self, head: OutgoingHead, body: bytes) -> OutgoingHead:
        """Return the head with the credential in it."""
        match self.credential.target:
            case HeaderTarget(header_name=name, prefix=prefix):
                value = prefix + self.values[self.credential.keys[0]]
                return replace(head, headers=replace_header(head.headers, name, value))
            case QueryParamTarget(query_param_name=name):
                return replace(head, query=replace_parameter(head.query, name, self.values[self.credential.keys[0]]))
            case AwsSigV4Target() as target:
                return self._sign(target, head, body)

    def _sign(self, target: AwsSigV4Target, head: OutgoingHead, body: bytes) -> OutgoingHead:
        query = drop_parameters(head.query, sigv4.PARAMETERS)
        unsigned = drop_headers(head.headers, self.credential.header_names)
        key_id, secret_key = (self.values[key] for key in AWS_KEYS)
        keys = sigv4.AwsKeys(key_id, secret_key, self.values.get(AWS_SESSION_KEY, ""))
        whole = f"{head.path}?{query}" if query else head.path
        scope = (target.service, self.region)
        payload = body if sigv4.stream_of(head.headers) is None else None
        added = sigv4.sign(
            keys, scope, method=head.method, host=head.host, target=whole, headers=unsigned, body=payload
        )
        return replace(head, query=query, headers=[*unsigned, *added])


def fill(credentials: Sequence[Credential], values: SecretValues, host: str) -> tuple[Filled, ...]:
    """Take the values of now; signatures last, since they cover the rest.

    Raises: CredentialError: nothing may go out without what it needs.
    """
    ordered = sorted(credentials, key=lambda credential: credential.signs)
    return tuple(Filled(one, _values_of(one, values), _region_of(one, host)) for one in ordered)


def apply_all(filled: Sequence[Filled], head: OutgoingHead, body: bytes) -> OutgoingHead:
    """Return the head with every credential in it."""
    for one in filled:
        head = one.apply(head, body)
    return head


def _values_of(credential: Credential, values: SecretValues) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for key in (*credential.keys, *credential.optional_keys):
        value = values.get(credential.secret, key)
        if value is None and key in credential.optional_keys:
            continue
        if not value:
            what = "has no value" if value is None else "is empty"
            message = f"Secret {credential.secret}, key {key!r}, {what}; declare it, or mend its source, and reload"
            raise CredentialError("credential_missing", f"{_who(credential)}: {message}")
        if not isinstance(credential.target, QueryParamTarget) and _CARRIED.fullmatch(value) is None:
            message = f"Secret {credential.secret}, key {key!r}, holds what no header can carry, such as a line break"
            raise CredentialError("credential_unusable", f"{_who(credential)}: {message}")
        found[key] = value
    return found


def _who(credential: Credential) -> str:
    return f"CredentialInjectionPolicy {credential.policy}"


def _region_of(credential: Credential, host: str) -> str:
    if not isinstance(credential.target, AwsSigV4Target):
        return ""
    if credential.target.region:
        return credential.target.region
    found = _REGION.search(host.lower())
    if found is None:
        message = f"there is no region in the host name {host}: give spec.target.region"
        raise CredentialError("credential_unusable", f"{_who(credential)}: {message}")
    return found[1]


# --- one name, in every spelling ------------------------------------------------------------------------------------


def replace_header(headers: Headers, name: str, value: str) -> Headers:
    """Return the headers with one value, where the first of that name stood, else at the end."""
    wanted, kept, placed = fold_header(name), Headers(), False
    for other, old in headers:
        if fold_header(other) != wanted:
            kept.append((other, old))
        elif not placed:
            kept.append((other if other.lower() == name.lower() else name, value))
            placed = True
    if not placed:
        kept.append((name, value))
    return kept


def drop_headers(headers: Sequence[tuple[str, str]], folded: frozenset[str]) -> Headers:
    """Return the headers without those names (folded)."""
    return [(name, value) for name, value in headers if fold_header(name) not in folded]


def replace_parameter(query: str, name: str, value: str) -> str:
    """Return the query with one value, at its end: the others of that name are gone."""
    rest = drop_parameters(query, (name,))
    return f"{rest}{'&' if rest else ''}{name}={quote(value, safe='-._~')}"


def drop_parameters(query: str, names: Sequence[str]) -> str:
    """Return the query without those parameters; what is left keeps its bytes and its order."""
    unwanted = frozenset(map(_fold_parameter, names))
    pieces = _SEPARATORS.split(query)  # parameter, separator, parameter, …
    kept: list[str] = []
    for at in range(0, len(pieces), 2):
        raw_name = pieces[at].partition("=")[0]
        if _fold_parameter(raw_name) in unwanted:
            continue
        kept += (pieces[at - 1] if at and kept else "", pieces[at])
    return "".join(kept)


def _fold_parameter(raw: str) -> str:
    """Return what two parameter names have in common: PHP takes `a.b`, `a b` and `a[b` for a_b, C stops at a NUL."""
    name = unquote_to_bytes(raw.replace("+", " ").encode("latin-1", "replace")).decode("latin-1")
    plain = name.partition("\0")[0].strip().lower()
    return re.sub(r"[.\s]", "_", plain).partition("[")[0]
