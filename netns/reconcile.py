"""Removes the namespaces that a dead predecessor left, and no others."""

from __future__ import annotations

import logging
import re
from typing import Final

from clrk.core.errors import HostError
from clrk.core.ids import NetnsName

from .namespace import NETNS_DIR, remove

_LOG: Final = logging.getLogger(__name__)


def owned_names(prefix: str, names: list[str]) -> tuple[NetnsName, ...]:
    """Return the names that an instance with this prefix may remove: the prefix and exactly eight hex digits."""
    owned = re.compile(re.escape(prefix) + r"[0-9a-f]{8}")
    return tuple(NetnsName(name) for name in sorted(names) if owned.fullmatch(name))


def remove_leftovers(prefix: str) -> tuple[NetnsName, ...]:
    """Remove this instance's namespaces; call only while no sandbox of it lives.

    Returns: what was removed.
    Raises: ExceptionGroup of HostError, after trying each.
    """
    if not NETNS_DIR.is_dir():
        return ()
    failures: list[Exception] = []
    removed: list[NetnsName] = []
    for name in owned_names(prefix, [entry.name for entry in NETNS_DIR.iterdir()]):
        try:
            remove(name)
        except HostError as exc:
            failures.append(exc)
        else:
            _LOG.info("leftover namespace removed", extra={"netns": name})
            removed.append(name)
    if failures:
        raise ExceptionGroup(f"namespaces with prefix {prefix!r} that could not be removed", failures)
    return tuple(removed)
