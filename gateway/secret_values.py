"""The values of Secrets that go out in calls: the newest ones for requests, all known ones for redaction. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

from clrk.gateway.redact import REDACTED
from clrk.gateway.telemetry.spans import Attributes

MIN_SIZE: Final = 4  # shorter values stand in every text by chance
MAX_FORMER: Final = 256  # values that were rotated away; answers to calls that began before may still show them


class SecretValues:
    """One for the gateway; `replace` is a reload."""

    def __init__(self) -> None:
        self._current: Mapping[str, Mapping[str, str]] = {}
        self._former: dict[str, None] = {}
        self._known: tuple[str, ...] = ()

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
        self._known = tuple(sorted(_spellings((*self._former, *self._values())), key=len, reverse=True))

    def get(self, secret: str, key: str) -> str | None:
        """Return a value as it is now; None when it is not declared."""
        return self._current.get(secret, {}).get(key)

    def redact(self, text: str) -> str:
        """Return text without any known value, whatever surrounds it."""
        for value in self._known:
            if value in text:
                text = text.replace(value, REDACTED)
        return text

    def redact_attributes(self, attributes: Attributes) -> Attributes:
        """Return attributes without any known value: what an upstream answers may stand in them."""
        if not self._known:
            return attributes
        return {
            name: self.redact(value)
            if isinstance(value, str)
            else tuple(map(self.redact, value))
            if isinstance(value, Sequence)
            else value
            for name, value in attributes.items()
        }

    def _values(self) -> Iterable[str]:
        return [value for values in self._current.values() for value in values.values()]


def _spellings(values: Iterable[str]) -> set[str]:
    """Return the values as they are, in a URL and in JSON."""
    found: set[str] = set()
    for value in values:
        if len(value) >= MIN_SIZE:
            found |= {value, quote(value, safe=""), quote(value, safe="-._~/"), json.dumps(value)[1:-1]}
    return found
