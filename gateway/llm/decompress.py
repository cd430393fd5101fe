"""Undoing Content-Encoding for understanding only: the agent gets the bytes as they came.

Nothing is unpacked at once: gzip, deflate and brotli are asked for 64 KiB at a time, zstd (which can not be asked) gets
its input in slices so small that no block in them unpacks to more than 8 MiB.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, Protocol

import brotli
import zstandard

MAX_OUTPUT_BYTES: Final = 64 << 20
MAX_UNPACKED_BYTES: Final = 32 << 20  # of a whole body in memory
_SLICE: Final = 64 << 10
_GZIP: Final = 16 + zlib.MAX_WBITS
_ZSTD_SLICE: Final = 256  # a block of 4 bytes may stand for 128 KiB (RFC 8878, section 3.1.1.2.2)
_BROTLI_WINDOW: Final = 16 << 20  # RFC 7932, section 9.1
_ZSTD_WINDOW: Final = 8 << 20  # RFC 9659: what a content coding may ask for
_MAX_CODINGS: Final = 3


class Decoder(Protocol):
    """Turns encoded bytes into plain ones, piece by piece; sets failed and goes quiet instead of raising.

    Shape: window_bytes is how much of its output the decoder itself keeps in memory, at most.
    """

    window_bytes: int

    @property
    def failed(self) -> bool:
        """True when the rest can not be decoded."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes in bounded pieces."""


class Identity:
    """No encoding."""

    window_bytes = 0
    failed = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the chunk."""
        yield chunk


class Inflate:
    """gzip (RFC 1952, several members too) and deflate (RFC 1950, and the raw RFC 1951 that some servers send)."""

    window_bytes = 0  # 32 KiB: not worth counting

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
        pending, more = chunk, bool(chunk)
        while more and not self.failed and not self._ended:
            if (inner := self._inner) is None:
                self._head, pending = self._head + pending, b""
                if not self._begin():
                    return
                self._head, pending = b"", self._head
                continue
            piece, pending = self._step(inner, pending)
            # zlib may hold output when it has taken all its input.
            more = bool(pending) or (self._inner is inner and len(piece) == _SLICE)
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


class Brotli:
    """br (RFC 7932). Bytes behind the stream's end are an error: the library can not tell where they begin."""

    window_bytes = _BROTLI_WINDOW

    def __init__(self, max_output: int = MAX_OUTPUT_BYTES) -> None:
        self.failed = False
        self._left = max_output
        self._inner = brotli.Decompressor()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes; a bomb is given up after max_output bytes."""
        pending, more = chunk, bool(chunk)
        while more and not self.failed:
            try:
                piece = self._inner.process(pending, output_buffer_limit=_SLICE)
                more = bool(piece) and not self._inner.is_finished()  # there may be more, all input taken or not
            except brotli.error:
                self.failed = True
                return
            pending = b""
            self._left -= len(piece)
            if self._left < 0:
                self.failed = True
            elif piece:
                yield piece


class Zstd:
    """zstd (RFC 8878, RFC 9659), several frames too."""

    window_bytes = _ZSTD_WINDOW

    def __init__(self, max_output: int = MAX_OUTPUT_BYTES) -> None:
        self.failed = False
        self._left = max_output
        self._inner = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(read_across_frames=True)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes; a bomb is given up after max_output bytes."""
        for at in range(0, len(chunk), _ZSTD_SLICE):
            if self.failed:
                return
            try:
                piece = self._inner.decompress(chunk[at : at + _ZSTD_SLICE])
            except zstandard.ZstdError:
                self.failed = True
                return
            self._left -= len(piece)
            if self._left < 0:
                self.failed = True
            elif piece:
                yield piece


class Chain:
    """Several codings, in the order in which they are to be undone."""

    def __init__(self, stages: list[Decoder]) -> None:
        self._stages = stages
        self.window_bytes = sum(stage.window_bytes for stage in stages)

    @property
    def failed(self) -> bool:
        """True when any of them is."""
        return any(stage.failed for stage in self._stages)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield plain bytes."""
        yield from self._through(0, chunk)

    def _through(self, stage: int, chunk: bytes) -> Iterator[bytes]:
        if stage == len(self._stages):
            yield chunk
            return
        for piece in self._stages[stage].feed(chunk):
            yield from self._through(stage + 1, piece)


def decoder(content_encoding: str | None) -> Decoder | None:
    """Return the decoder of a Content-Encoding header, None for one that we do not read (RFC 9110, section 8.4)."""
    codings = [coding for item in (content_encoding or "").split(",") if (coding := item.strip().lower())]
    stages = [stage for coding in reversed(codings) if (stage := _stage(coding)) is not None]
    if len(stages) < len(codings) or len(stages) > _MAX_CODINGS:
        return None
    stages = [stage for stage in stages if not isinstance(stage, Identity)]
    if len(stages) < 2:
        return stages[0] if stages else Identity()
    return Chain(stages)


def _stage(coding: str) -> Decoder | None:
    match coding:
        case "identity":
            return Identity()
        case "gzip" | "x-gzip":
            return Inflate(gzip=True)
        case "deflate":
            return Inflate(gzip=False)
        case "br":
            return Brotli()
        case "zstd":
            return Zstd()
        case _:
            return None


def unpack(content_encoding: str | None, body: bytes, max_output: int = MAX_UNPACKED_BYTES) -> bytes | None:
    """Return a whole body without its content coding, None when that can not be undone or is over max_output."""
    undo = decoder(content_encoding)
    if undo is None:
        return None
    if isinstance(undo, Identity):
        return body
    plain = unpack_chunk(undo, body, max_output)
    return None if undo.failed else plain


def unpack_chunk(undo: Decoder, chunk: bytes, max_output: int) -> bytes | None:
    """Return what a chunk unpacks to, up to where undo failed; None when that is over max_output."""
    pieces: list[bytes] = []
    size = 0
    for piece in undo.feed(chunk):
        size += len(piece)
        if size > max_output:
            return None
        pieces.append(piece)
    return b"".join(pieces)
