"""A JSON object read member by member, with the place of each in its text: for those who judge or rewrite a request.

Strict where parsers differ: a name that stands there twice is read one way by one server and another way by the next.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_TOKEN: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_MAX_TOKENS: Final = 250_000
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Member:
    """A member's value, and where it stands in the text: [start, end)."""

    start: int
    end: int
    value: object


def read_members(text: str, at: int = 0, wanted: frozenset[str] | None = None) -> tuple[int, dict[str, Member]]:
    """Return where the object at `at` has its first member, and its members by name. An empty object has none.

    Shape: wanted names the members whose values are of interest. Objects and arrays of others are walked over: they
        have no value, and are not known to be well-formed. That costs a tenth, and never more than about 0.1 s.
    Raises: ValueError when there is no object with distinct names, or something but space behind it at the text's end;
        RecursionError when it is too deep.
    """
    first, end, found = _read(text, at, wanted)
    if _skip(text, end) != len(text):
        raise ValueError("something behind the object")
    return first, found


def read_inner_members(text: str, member: Member) -> tuple[int, dict[str, Member]]:
    """Return the same of an object that is a member's value. Raises: as above."""
    first, _, found = _read(text, member.start, None)
    return first, found


def _read(text: str, at: int, wanted: frozenset[str] | None) -> tuple[int, int, dict[str, Member]]:
    found: dict[str, Member] = {}
    at = first = _expect(text, _skip(text, at), "{")
    if text[(close := _skip(text, at)) : close + 1] == "}":
        return first, close + 1, found
    while True:
        name, at = _DECODER.raw_decode(text, _skip(text, at))
        if not isinstance(name, str) or name in found:
            raise ValueError("not a name, or one that stands there twice")
        start = _skip(text, _expect(text, _skip(text, at), ":"))
        if wanted is None or name in wanted or text[start : start + 1] not in ("[", "{"):
            value, end = _DECODER.raw_decode(text, start)
        else:
            value, end = None, _walk_over(text, start)
        found[name] = Member(start, end, value)
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            break
        at += 1
    return first, _expect(text, at, "}"), found


def _walk_over(text: str, at: int) -> int:
    """Return where an object or array ends. Raises: ValueError when that has no end, or is too far away."""
    depth = 0
    for seen, token in enumerate(_TOKEN.finditer(text, at)):
        mark = token.group()
        if seen > _MAX_TOKENS or mark == '"':  # a string without end
            break
        depth += (mark in "[{") - (mark in "]}")
        if depth == 0:
            return token.end()
    raise ValueError("no end, or too far away")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _expect(text: str, at: int, char: str) -> int:
    if text[at : at + 1] != char:
        raise ValueError(f"no {char} at {at}")
    return at + 1
