"""A JSON object read member by member, with the place of each in its text: for those who judge or rewrite a request.

Strict where parsers differ: a name that stands there twice is read one way by one server and another way by the next.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Member:
    """A member's value, and where it stands in the text: [start, end)."""

    start: int
    end: int
    value: object


def read_members(text: str, at: int = 0) -> tuple[int, dict[str, Member]]:
    """Return where the object at `at` has its first member, and its members by name. An empty object has none.

    Raises: ValueError when there is no object with distinct names, or something but space behind it at the text's end;
        RecursionError when it is too deep.
    """
    first, end, found = _read(text, at)
    if _skip(text, end) != len(text):
        raise ValueError("something behind the object")
    return first, found


def read_inner_members(text: str, member: Member) -> tuple[int, dict[str, Member]]:
    """Return the same of an object that is a member's value. Raises: as above."""
    first, _, found = _read(text, member.start)
    return first, found


def _read(text: str, at: int) -> tuple[int, int, dict[str, Member]]:
    found: dict[str, Member] = {}
    at = first = _expect(text, _skip(text, at), "{")
    if text[(close := _skip(text, at)) : close + 1] == "}":
        return first, close + 1, found
    while True:
        name, at = _DECODER.raw_decode(text, _skip(text, at))
        if not isinstance(name, str) or name in found:
            raise ValueError("not a name, or one that stands there twice")
        start = _skip(text, _expect(text, _skip(text, at), ":"))
        value, end = _DECODER.raw_decode(text, start)
        found[name] = Member(start, end, value)
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            break
        at += 1
    return first, _expect(text, at, "}"), found


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _expect(text: str, at: int, char: str) -> int:
    if text[at : at + 1] != char:
        raise ValueError(f"no {char} at {at}")
    return at + 1
