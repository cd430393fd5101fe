"""What is valid, and is not what its author can have meant: told by check, at the start and at each reload."""

from __future__ import annotations

from clrk.runtime.config.budgets import shared_accounts
from clrk.runtime.config.credentials import missing_credentials
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.tools import idle_tool_policies


def notes_of(resources: Resources) -> list[str]:
    """Return what to tell, one line each; none has a value of a Secret."""
    return [*missing_credentials(resources), *shared_accounts(resources), *idle_tool_policies(resources)]
