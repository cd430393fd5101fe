"""Synthetic addresses of one sandbox: which name the agent meant when it dialled 198.18.x.y or fd00:c1:0:1::n. Pure."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.wire import IPAddress

SYNTHETIC_V4: Final = IPv4Network("198.18.0.0/15")  # RFC 2544: benchmarking, never on a real network
SYNTHETIC_V6: Final = IPv6Network("fd00:c1:0:1::/64")
MAX_NAMES: Final = 8192  # of one sandbox; an agent that asks for more gets SERVFAIL
TOO_MANY_NAMES: Final = "too_many_names"  # clrk.egress.deny_reason


class NameTableFullError(ClrkError):
    """The sandbox asked for more names than one run may bind."""


class NameTable:
    """Binds names to synthetic addresses, for ever within one sandbox: an address never changes its meaning."""

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = limit
        self._index: dict[str, int] = {}
        self._names: list[str] = []

    def bind(self, name: str) -> tuple[IPv4Address, IPv6Address]:
        """Return the addresses of a name (lower-case, no trailing dot), the same ones at every call.

        Raises: NameTableFullError at the limit; names bound before still work.
        """
        index = self._index.get(name)
        if index is None:
            if len(self._names) >= self._limit:
                raise NameTableFullError(f"over {self._limit} names in one run")
            self._names.append(name)
            index = self._index[name] = len(self._names)  # 1-based: the network address is nobody
        return SYNTHETIC_V4[index], SYNTHETIC_V6[index]

    def name_of(self, address: IPAddress) -> str | None:
        """Return the name bound to an address; None for real addresses and for synthetic ones never handed out."""
        if not is_synthetic(address):
            return None
        network = SYNTHETIC_V4 if address.version == 4 else SYNTHETIC_V6
        index = int(address) - int(network.network_address)
        return self._names[index - 1] if 0 < index <= len(self._names) else None


def is_synthetic(address: IPAddress) -> bool:
    """Say whether the address is of the synthetic ranges, bound or not."""
    return address in (SYNTHETIC_V4 if address.version == 4 else SYNTHETIC_V6)
