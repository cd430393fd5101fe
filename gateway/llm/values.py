"""Reading single values out of bodies that strangers wrote: the wrong type or an absurd size is simply absent."""

from __future__ import annotations

import math
import re
from typing import Final

from clrk.gateway.telemetry.spans import AttributeValue

MAX_TEXT: Final = 256
MAX_ITEMS: Final = 128
_MAX_INT: Final = 2**63 - 1  # OTLP integers are signed 64 bit
_CODE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_WORD: Final = re.compile(r"[\w.~+=%-]+")
# What providers quote back in their messages about wrong keys.
_SECRET: Final = re.compile(r"\b(?:sk|pk|rk|key|xox[a-z]|gh[a-z])[-_][\w*.-]{6,}|\bBearer\s+\S+", re.IGNORECASE)


def text(value: object, limit: int = MAX_TEXT) -> str | None:
    """Return a non-empty string, bounded, with runs of control characters as one space."""
    if not isinstance(value, str) or not value:
        return None
    found = clip(value, limit)
    return (found if found.isprintable() else _CONTROL.sub(" ", found)).strip() or None


def message(value: object) -> str:
    """Return an error message for people, bounded and without what looks like a key."""
    found = text(value, 4 * MAX_TEXT)
    return clip(_SECRET.sub("[redacted]", found), MAX_TEXT) if found else ""


def clip(text: str, limit: int) -> str:
    """Return at most limit characters, without the word that would be cut: half a secret is none that anybody knows.

    Shape: a text that is one word is cut in it.
    """
    kept = text[:limit]
    if kept == text or _WORD.match(text, limit, limit + 1) is None:
        return kept
    word = _WORD.match(kept[::-1])
    return kept[: limit - word.end()] or kept if word is not None else kept


def code(value: object) -> str | None:
    """Return a low-cardinality word such as an error type, or None."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else None


def integer(value: object) -> int | None:
    """Return an int that fits 64 bits; bool is no int."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MAX_INT:
        return None
    return value


def count(value: object) -> int | None:
    """Return an int that counts something."""
    found = integer(value)
    return found if found is not None and found >= 0 else None


def number(value: object) -> float | None:
    """Return a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def texts(value: object) -> list[str] | None:
    """Return the strings of a list, or of one string; bounded in number and length."""
    items = value if isinstance(value, list) else [value]
    found = [item for item in map(text, items[:MAX_ITEMS]) if item is not None]
    return found or None


def member(value: object, key: str) -> object:
    """Return one member of an object, None when it is no object."""
    return value.get(key) if isinstance(value, dict) else None


def known(found: dict[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    """Return the attributes that have a value."""
    return {key: value for key, value in found.items() if value is not None}
