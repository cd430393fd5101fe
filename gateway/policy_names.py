"""Host names and host patterns of the egress policy, compared in one spelling: lower-case A-labels, no trailing dot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

import idna

from clrk.core.values import NUMERIC_LABEL
from clrk.core.wire import IPAddress

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def normalise_name(name: str) -> str | None:
    """Return the name in the one spelling that is compared, or None when it is no host name: that fits nothing."""
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError:
            return None
    plain = name.lower().removesuffix(".")
    labels = plain.split(".")
    if len(plain) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or NUMERIC_LABEL.fullmatch(labels[-1]):
        return None
    return plain


def parse_ip(text: str) -> IPAddress | None:
    """Return the address that a name spells out, `[::1]` included; v4-mapped becomes IPv4."""
    if ":" not in text and not text.rstrip(".]")[-1:].isdigit():
        return None  # as almost every name
    try:
        address = ip_address(text.removeprefix("[").removesuffix("]").removesuffix("."))
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if address.version == 6 else address


def plain_host(host: str) -> str | None:
    """Return a name or an address in the one spelling that is compared; None for what is neither."""
    address = parse_ip(host)
    return str(address) if address is not None else normalise_name(host)


@dataclass(frozen=True, slots=True)
class HostPattern:
    """`x`, `*.x` (one label before x) or `**.x` (one or more). suffix starts with a dot unless exact."""

    suffix: str
    stars: int

    @classmethod
    def compile(cls, pattern: str) -> HostPattern:
        """Compile a pattern that core.resources has checked."""
        plain = pattern.lower()
        stars = len(plain) - len(plain.lstrip("*"))
        return cls(plain[stars:], stars)

    def matches(self, name: str) -> bool:
        """Say whether a normalised name fits, or an address as text: one that the pattern spells out."""
        if self.stars == 0:
            return name == self.suffix
        if not name.endswith(self.suffix) or len(name) == len(self.suffix):
            return False
        return self.stars == 2 or "." not in name[: -len(self.suffix)]
