"""Decoding JSON that strangers wrote within a bounded time: an object with only the members that somebody asks for.

To skip what nobody asks for costs a millisecond for some hundred kilobytes; to make objects of it costs a hundred times
that, and the event loop is everybody's. So a large body is taken apart first, and of its members only those are decoded
that are small, or that hold few brackets for a list of known things (`choices` with one long text).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, get_type_hints

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

ABSENT: Final = msgspec.Raw(b"")  # msgspec knows no Raw | None
MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
SMALL_BYTES: Final = 64 << 10
_MAX_BRACKETS: Final = 100_000  # about 0.1 s, when each of them begins an object


def reader(kind: type[T]) -> Callable[[bytes], T | None]:
    """Return what decodes a JSON object into kind; it returns None for everything else.

    Shape: the members of kind have defaults, and are Any, msgspec.Raw or lists of structs.
    """
    hints = get_type_hints(kind)
    whole = msgspec.json.Decoder(kind)
    on_the_wire = {field.name: field.encode_name for field in msgspec.structs.fields(kind)}
    apart = msgspec.json.Decoder(
        msgspec.defstruct(f"_Raw{kind.__name__}", [(name, msgspec.Raw, ABSENT) for name in hints], rename=on_the_wire)
    )
    members = {name: _member(hint) for name, hint in hints.items()}

    def read(body: bytes) -> T | None:
        try:
            if len(body) <= SMALL_BYTES:
                return whole.decode(body)
            parts = apart.decode(body)
        except MALFORMED:
            return None
        found = {name: decode(raw) for name, decode in members.items() if (raw := bytes(getattr(parts, name)))}
        return kind(**{name: value for name, value in found.items() if value is not None})

    return read


def _member(hint: Any) -> Callable[[bytes], object]:
    """Return what decodes one member, to None where that is too much or no such thing."""
    if hint is msgspec.Raw:
        return msgspec.Raw
    decoder = msgspec.json.Decoder(hint)
    is_known = hint is not Any

    def decode(raw: bytes) -> object:
        if len(raw) > SMALL_BYTES and not (is_known and raw.count(b"{") + raw.count(b"[") <= _MAX_BRACKETS):
            return None
        try:
            return decoder.decode(raw)
        except MALFORMED:
            return None

    return decode
