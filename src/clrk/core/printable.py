"""Text of agents, callers and upstreams for people's eyes: what can not be seen is shown. Pure."""

from __future__ import annotations

import unicodedata
from typing import Final

# Cc control, Cf format (bidi overrides, zero width), Cs surrogates, Co private use, Zl and Zp line ends.
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(value: object, keep: str = "") -> str:
    """Return text without control characters, escape sequences, bidi overrides or line ends: they show as `\\x1b`.

    Shape: the characters of `keep` stay as they are.
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if character in keep or unicodedata.category(character) not in _UNPRINTABLE else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
