"""The values of Secrets that go out in calls: the newest ones for requests, all known ones for redaction. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from clrk.gateway.redact_values import HiddenValues

MAX_FORMER: Final = 256  # values that were rotated away; answers to calls that began before may still show them


class SecretValues:
    """One for the gateway; `replace` is a reload."""

    def __init__(self) -> None:
        self._current: Mapping[str, Mapping[str, str]] = {}
        self._former: dict[str, None] = {}
        self.known = HiddenValues()  # what no span may show

    def replace(self, secrets: Mapping[str, Mapping[str, str]], used: Iterable[tuple[str, str]]) -> None:
        """Use other values from now on.

        Shape: secrets by namespace/name and key; used are the (namespace/name, key) that may go out, and are redacted.
        """
        self._former |= dict.fromkeys(self._values())
        while len(self._former) > MAX_FORMER:
            del self._former[next(iter(self._former))]
        current: dict[str, dict[str, str]] = {}
        for secret, key in used:
            if (value := secrets.get(secret, {}).get(key)) is not None:
                current.setdefault(secret, {})[key] = value
        self._current = current
        self.known = HiddenValues((*self._former, *self._values()))

    def get(self, secret: str, key: str) -> str | None:
        """Return a value as it is now; None when it is not declared."""
        return self._current.get(secret, {}).get(key)

    def _values(self) -> Iterable[str]:
        return [value for values in self._current.values() for value in values.values()]
