"""The members of a JSON object as they stand in it, at the speed of msgspec: values are checked, and not built. Pure.

An object that somebody sends to cost time (millions of small values) costs a few hundredths of a second here, and more
than a second as Python objects.
"""

from __future__ import annotations

import json
import re
from typing import Final

import msgspec

MAX_MEMBERS: Final = 4096  # of an object that is read member by member
MAX_NAMES: Final = 500_000  # of all objects in it: to tell them apart takes a quarter of a second
MAX_ARRAY_BYTES: Final = 2 << 20  # of an array that is read item by item, for the same reason
MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ARRAY: Final = msgspec.json.Decoder(list[msgspec.Raw])
_BEFORE: Final = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_NAME: Final = re.compile(rb'[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\r\n]*:[ \t\r\n]*')
_AFTER: Final = re.compile(rb"[ \t\r\n]*([,}])")


class SameNameError(ValueError):
    """Two members of one object have the same name."""


def read_items(raw: bytes, limit: int) -> list[bytes]:
    """Return the items of a JSON array. Raises: MALFORMED; ValueError for over limit or MAX_ARRAY_BYTES."""
    if len(raw) > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of over {MAX_ARRAY_BYTES >> 20} MiB")
    items = _ARRAY.decode(raw)
    if len(items) > limit:
        raise ValueError(f"an array of over {limit} items")
    return [bytes(item) for item in items]


def read_members(raw: bytes) -> dict[str, bytes]:
    """Return the members of a JSON object, in their order.

    Raises: MALFORMED for what is no object of well-formed JSON; SameNameError; ValueError for over MAX_MEMBERS or
        MAX_NAMES.
    """
    if raw.count(b'":') > MAX_NAMES:
        raise ValueError(f"an object with over {MAX_NAMES} names in it")
    decoded = _OBJECT.decode(raw)
    if len(decoded) > MAX_MEMBERS:
        raise ValueError(f"an object with over {MAX_MEMBERS} members")
    found = {name: bytes(value) for name, value in decoded.items()}
    before = _BEFORE.match(raw)
    at = before.end() if before is not None else 0
    for number in range(len(found)):
        # Of members with one name the decoder has the last one's value: an earlier one is not followed by what it says.
        name = _NAME.match(raw, at)
        value = found.get(json.loads(name[1])) if name is not None else None
        if name is None or value is None or not raw.startswith(value, name.end()):
            raise SameNameError
        after = _AFTER.match(raw, name.end() + len(value))
        if after is None or (after[1] == b"}") != (number == len(found) - 1):
            raise SameNameError
        at = after.end()
    return found


def write_members(members: dict[str, bytes]) -> bytes:
    """Return an object with these members."""
    return b"{" + b",".join(json.dumps(name).encode() + b":" + value for name, value in members.items()) + b"}"
