"""Which upstream addresses are nobody's business (CONTRACT section 10): the host itself and what only it can reach.

IPv4 hides in many IPv6 forms; each is unwrapped and judged by what is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from typing import Final

from clrk.core.wire import IPAddress

_NAT64: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))  # RFC 6052, RFC 8215
_V4_COMPATIBLE: Final = IPv6Network("::/96")  # RFC 4291, section 2.5.5.1, deprecated
_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)  # RFC 5214, section 6.1

# Refused whatever they resolve from. Sandbox-internal addresses (DESIGN section 3) mean nothing outside.
_REFUSED: Final[tuple[tuple[str, IPv4Network | IPv6Network], ...]] = (
    ("unspecified", IPv4Network("0.0.0.0/8")),
    ("loopback", IPv4Network("127.0.0.0/8")),
    ("metadata", IPv4Network("169.254.169.254/32")),
    ("metadata", IPv4Network("169.254.170.2/32")),  # AWS ECS task credentials
    ("link_local", IPv4Network("169.254.0.0/16")),
    ("metadata", IPv4Network("100.100.100.200/32")),  # Alibaba Cloud
    ("metadata", IPv4Network("168.63.129.16/32")),  # Azure wire server
    ("metadata", IPv4Network("192.0.0.192/32")),  # Oracle Cloud
    ("synthetic", IPv4Network("198.18.0.0/15")),
    ("multicast", IPv4Network("224.0.0.0/4")),
    ("reserved", IPv4Network("240.0.0.0/4")),
    ("unspecified", IPv6Network("::/128")),
    ("loopback", IPv6Network("::1/128")),
    ("link_local", IPv6Network("fe80::/10")),
    ("site_local", IPv6Network("fec0::/10")),
    ("multicast", IPv6Network("ff00::/8")),
    ("metadata", IPv6Network("fd00:ec2::254/128")),  # AWS
    ("metadata", IPv6Network("fd20:ce::254/128")),  # Google Cloud
    ("synthetic", IPv6Network("fd00:c1::/48")),
)


def unwrap(address: IPAddress) -> IPAddress:
    """Return the IPv4 address inside a mapped, compatible, NAT64, 6to4, Teredo or ISATAP form, else the address."""
    if isinstance(address, IPv4Address):
        return address
    number = int(address)
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _NAT64) or (number > 1 and address in _V4_COMPATIBLE):
        return IPv4Address(number & 0xFFFF_FFFF)
    if (number >> 32) & 0xFFFF_FFFF in _ISATAP:
        return IPv4Address(number & 0xFFFF_FFFF)
    return address


class AddressGuard:
    """Says why an address must not be dialled."""

    def __init__(self, host_addresses: Iterable[str], is_local: Callable[[IPAddress], bool]) -> None:
        self._host = frozenset(ip_address(text.partition("%")[0]) for text in host_addresses)
        self._is_local = is_local  # interfaces come and go; the configured list is from the start

    def refusal(self, address: IPAddress) -> tuple[str, IPv4Network | IPv6Network | None] | None:
        """Return a stable word for the reason and the refused range, or None when the address may be dialled.

        Shape: without a range the address is one of the host's interfaces.
        """
        # The inner address first, and what a table names before what the host happens to have: one reason, always.
        forms = (unwrap(address), address)
        for form in forms:
            for reason, network in _REFUSED:
                if form in network:
                    return reason, network
        return ("host", None) if any(form in self._host or self._is_local(form) for form in forms) else None
