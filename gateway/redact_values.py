"""Values that are secret wherever they stand, in every form in which somebody may write them down again. Pure."""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote

import re2

from clrk.gateway.redact_shapes import Span, any_of

MIN_VALUE_BYTES: Final = 4  # of a value that is looked for: a shorter one stands everywhere
EDGE_BYTES: Final = 4096  # at a cut, that may be half of a secret
_GATE_BYTES: Final = 8  # of a value that show whether it is worth looking for it
_GATE_MEMORY: Final = 64 << 20  # at most, for thousands of values
_MIN_ENCODED: Final = 8  # characters of base64: a value of 6 or 7 bytes


class HiddenValues:
    """Some values as they are, in JSON, in JSON inside JSON, in HTML, in a query and in base64. Immutable."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._forms = tuple(dict.fromkeys(form for value in values for form in _forms(value)))
        self._gate: re2._Regexp | None = None
        try:
            ends = {form[-_GATE_BYTES:] for form in self._forms}  # beginnings are alike: `sk-`, `eyJ`
            self._gate = any_of(ends, max_mem=_GATE_MEMORY) if ends else None
        except re2.error:  # too much for one automaton: each form is looked for by itself
            self._gate = None

    def may_stand_in(self, raw: bytes) -> bool:
        """Say whether it is worth looking for them: in one pass, whatever their number."""
        return bool(self._forms) and (self._gate is None or self._gate.search(raw) is not None)

    def find(self, raw: bytes) -> Iterator[Span]:
        """Yield where values stand."""
        for form in self._forms if self.may_stand_in(raw) else ():
            yield from ((at, at + len(form)) for at in _places(raw, form, len(form)))

    def rest_at_start(self, raw: bytes) -> int:
        """Return where the rest of a value ends that the text may begin with; values may hold what ends a word."""
        ends = (
            len(form) - at
            for form in (form[-EDGE_BYTES:] for form in self._forms)
            for at in _places(form, raw[:MIN_VALUE_BYTES], 1)
            if raw.startswith(form[at:])
        )
        return max(ends, default=0)

    def rest_at_end(self, raw: bytes) -> int:
        """Return where the beginning of a value begins that the text may end with."""
        starts = (
            len(raw) - at - MIN_VALUE_BYTES
            for form in (form[:EDGE_BYTES] for form in self._forms)
            for at in _places(form, raw[-MIN_VALUE_BYTES:], 1)
            if raw.endswith(form[: at + MIN_VALUE_BYTES])
        )
        return min(starts, default=len(raw))


def _places(text: bytes, word: bytes, step: int) -> Iterator[int]:
    """Yield where a word stands in a text, at least step bytes apart; an empty one stands nowhere."""
    at = text.find(word) if word else -1
    while at >= 0:
        yield at
        at = text.find(word, at + step)


def _forms(value: str) -> Iterator[bytes]:
    """Yield the ways in which a value may be written; percent and \\u escapes of ASCII are decoded before."""
    raw = value.encode("utf-8", "surrogateescape")
    if len(raw) < MIN_VALUE_BYTES:
        return
    yield raw
    for ascii_only in (False, True):
        once = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        for text in (once, once.replace("/", "\\/"), json.dumps(once, ensure_ascii=ascii_only)[1:-1]):
            yield text.encode("utf-8", "replace")
    if not raw.isascii():
        escaped = quote(raw, safe="")
        yield from (escaped.encode(), re.sub("%..", lambda found: found[0].lower(), escaped).encode())
    spoken = (html.escape(value), html.escape(value, quote=False), value.replace(" ", "+"))
    yield from (text.encode("utf-8", "surrogateescape") for text in spoken)
    for skipped in range(3):  # where the value begins in a group of three bytes
        for encode in (b64encode, urlsafe_b64encode):
            whole = encode(bytes(skipped) + raw)[(skipped * 8 + 5) // 6 : (skipped + len(raw)) * 8 // 6]
            if len(whole) >= _MIN_ENCODED:
                yield whole
