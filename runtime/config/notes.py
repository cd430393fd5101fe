"""What is valid, and is not what its author can have meant: told by check, at the start and at each reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from clrk.core.printable import printable
from clrk.runtime.config.budgets import shared_accounts
from clrk.runtime.config.credentials import missing_credentials
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.tools import idle_tool_policies
from clrk.runtime.config.unused import (
    dotted_paths,
    hostless_credentials,
    shadowed_aliases,
    shadowed_rules,
    unread_rules,
)

_KINDS: Final[tuple[Callable[[Resources], Iterator[str]], ...]] = (
    missing_credentials,
    hostless_credentials,
    shared_accounts,
    idle_tool_policies,
    shadowed_rules,
    unread_rules,
    dotted_paths,
    shadowed_aliases,
)


def notes_of(resources: Resources) -> list[str]:
    """Return what to tell, one line each; none has a value of a Secret."""
    return [printable(note) for notes in _KINDS for note in notes(resources)]
