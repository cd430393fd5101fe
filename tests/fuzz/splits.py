"""The ways in which a stream may arrive: whole, byte by byte, cut in two anywhere. A result never tells which."""

from __future__ import annotations

from collections.abc import Iterator

_EVERY_CUT = 96  # bytes: longer inputs are cut at this many places, spread over them


def ways_to_arrive(data: bytes) -> Iterator[list[bytes]]:
    """Yield lists of non-empty pieces that join to data; the first one is the whole."""
    yield [data] if data else []
    if len(data) > 1:
        yield [data[at : at + 1] for at in range(len(data))]
    step = max(1, len(data) // _EVERY_CUT)
    for at in range(1, len(data), step):
        yield [data[:at], data[at:]]
