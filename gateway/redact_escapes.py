"""Text as a reader behind one or more decoders sees it, and where that stands in the text as it was written. Pure.

`sk%2Dant%2D…` and `sk\\u002dant…` are the same secret to whoever decodes them. Only printable ASCII is decoded: other
characters are in no secret that is known by its shape or its name.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from clrk.gateway.redact_shapes import Span

MAX_LAYERS: Final = 3
_MAX_ESCAPES: Final = 50_000  # of one text and layer: about 50 ms
_ESCAPE: Final = re.compile(
    rb"%([2-7][0-9A-Fa-f])|\\{1,8}u00([2-7][0-9A-Fa-f])|&#(?:x([2-7][0-9A-Fa-f])|([3-9][0-9]|1[01][0-9]|12[0-6]));"
)
_MARKS: Final = (b"%", b"\\u00", b"&#")


@dataclass(frozen=True, slots=True)
class View:
    """Decoded text.

    Shape: piece i begins at decoded[i] of raw and at origin[i] of what was decoded; it has one length in both, unless
    it is an escape, which is one byte here. seen says how much of it was decoded, where that was not all.
    """

    raw: bytes
    decoded: list[int]
    origin: list[int]
    escapes: frozenset[int]
    seen: int | None

    def back(self, span: Span) -> Span:
        """Return where a non-empty span stands in what was decoded."""
        first, last = span[0], span[1] - 1
        at = bisect_right(self.decoded, first) - 1
        start = self.origin[at] + first - self.decoded[at]
        at = bisect_right(self.decoded, last) - 1
        if at in self.escapes:
            return start, self.origin[at + 1]
        return start, self.origin[at] + last - self.decoded[at] + 1


def layers(raw: bytes) -> Iterator[list[View]]:
    """Yield the ways to decode a text: once, twice, … while something changes. The first view of a way is outermost."""
    way: list[View] = []
    while len(way) < MAX_LAYERS and (view := _decode(way[-1].raw if way else raw)) is not None:
        way.append(view)
        yield way


def _decode(raw: bytes) -> View | None:
    if not any(mark in raw for mark in _MARKS):
        return None
    pieces: list[bytes] = []
    decoded, origin, escapes = [0], [0], set()
    at = size = 0
    seen = None
    for count, found in enumerate(_ESCAPE.finditer(raw)):
        if count == _MAX_ESCAPES:
            seen = found.start()
            break
        start = found.start()
        if start > at:
            pieces.append(raw[at:start])
            size += start - at
        _set(decoded, origin, size, start)
        escapes.add(len(decoded) - 1)
        pieces.append(bytes((_code(found),)))
        size, at = size + 1, found.end()
        decoded.append(size)
        origin.append(at)
    if not escapes:
        return None
    pieces.append(raw[at:seen])
    return View(b"".join(pieces), decoded, origin, frozenset(escapes), seen)


def _set(decoded: list[int], origin: list[int], size: int, start: int) -> None:
    """Begin a piece; one that is empty so far begins again."""
    if decoded[-1] == size:
        decoded[-1], origin[-1] = size, start
    else:
        decoded.append(size)
        origin.append(start)


def _code(found: re.Match[bytes]) -> int:
    return int(found[4]) if found[4] else int(found[1] or found[2] or found[3], 16)
