"""Undoing Content-Encoding for understanding only: the agent gets the bytes as they came."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, Protocol

MAX_OUTPUT_BYTES: Final = 64 << 20
MAX_UNPACKED_BYTES: Final = 32 << 20  # of a whole body in memory
_SLICE: Final = 64 << 10
_GZIP: Final = 16 + zlib.MAX_WBITS


class Decoder(Protocol):
    """Turns encoded bytes into plain ones, piece by piece; sets failed and goes quiet instead of raising."""

    failed: bool

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes in bounded pieces."""


class Identity:
    """No encoding."""

    failed = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the chunk."""
        yield chunk


class Inflate:
    """gzip (RFC 1952, several members too) and deflate (RFC 1950, and the raw RFC 1951 that some servers send)."""

    def __init__(self, *, gzip: bool, max_output: int = MAX_OUTPUT_BYTES) -> None:
        self.failed = False
        self._gzip = gzip
        self._left = max_output
        self._head = b""
        # None: before a gzip member, or before the two bytes that tell zlib from raw deflate.
        self._inner = zlib.decompressobj(_GZIP) if gzip else None
        self._ended = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes; a bomb is given up after max_output bytes."""
        pending = chunk
        while pending and not self.failed and not self._ended:
            if self._inner is None:
                self._head, pending = self._head + pending, b""
                if not self._begin():
                    return
                self._head, pending = b"", self._head
                continue
            piece, pending = self._step(self._inner, pending)
            self._left -= len(piece)
            if self._left < 0:
                self.failed = True
            elif piece:
                yield piece

    def _begin(self) -> bool:
        """Choose how to read what begins with _head; False while that is open, or when nothing more is to be read."""
        if self._gzip:
            # Padding behind the last member is common and harmless.
            self._ended = not self._head.startswith(b"\x1f")
            self._inner = zlib.decompressobj(_GZIP)
            return not self._ended
        if len(self._head) < 2:
            return False
        is_zlib = self._head[0] & 0x0F == zlib.DEFLATED and int.from_bytes(self._head[:2], "big") % 31 == 0
        self._inner = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
        return True

    def _step(self, inner: zlib._Decompress, pending: bytes) -> tuple[bytes, bytes]:
        try:
            piece = inner.decompress(pending, _SLICE)
        except zlib.error:
            self.failed = True
            return b"", b""
        if not inner.eof:
            return piece, inner.unconsumed_tail
        self._inner, self._ended = None, not self._gzip
        return piece, inner.unused_data


def decoder(content_encoding: str | None) -> Decoder | None:
    """Return the decoder of a Content-Encoding header, None for one that we do not read (br, zstd, several)."""
    match (content_encoding or "").strip().lower():
        case "" | "identity":
            return Identity()
        case "gzip" | "x-gzip":
            return Inflate(gzip=True)
        case "deflate":
            return Inflate(gzip=False)
        case _:
            return None


def unpack(content_encoding: str | None, body: bytes, max_output: int = MAX_UNPACKED_BYTES) -> bytes | None:
    """Return a whole body without its content coding, None when that can not be undone or is over max_output."""
    undo = decoder(content_encoding)
    if undo is None:
        return None
    if isinstance(undo, Identity):
        return body
    pieces: list[bytes] = []
    size = 0
    for piece in undo.feed(body):
        size += len(piece)
        if size > max_output:
            return None
        pieces.append(piece)
    return None if undo.failed else b"".join(pieces)
