"""The journal: what was accepted and may not be in the store yet, in files that outlive this process.

Theory of operation. Payloads are appended to a segment, `<folder>/<number>`, each as a frame (length, CRC-32, payload)
by one write: the page cache keeps it when the process is killed, so nothing waits for the disk. A frame's end is its
Position. The store commits, together with what it writes, up to which position that was; the next process reads on from
there, so everything is applied once. A segment that is full is followed by the next one, which begins with the spans
that have begun and not ended: then no older segment is needed once it is applied, and it is deleted. What a cut write
or a damaged disk left behind ends its segment at the last whole frame; a frame's CRC begins with the segment's own
salt, so that text which an agent wrote can never pass for a frame.

Nothing here raises for a disk that is full or broken: `append` says None, and counts. Not thread-safe but for `frames`.
"""

from __future__ import annotations

import collections
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_log = logging.getLogger(__name__)

SEGMENT_BYTES: Final = 16 * 2**20
MAX_BYTES: Final = 256 * 2**20
MAX_PAYLOAD: Final = 32 * 2**20
MAX_OPEN_BYTES: Final = 16 * 2**20  # of spans that have begun and not ended
_RETRY_S: Final = 1.0
_MAGIC: Final = b"clrkjnl1"
_HEADER: Final = struct.Struct("<8sQI")  # magic, number, salt
_FRAME: Final = struct.Struct("<II")  # length of the payload, CRC-32 of salt and payload
_NAME_DIGITS: Final = 16


class Position(NamedTuple):
    """Where a frame ends. Positions grow, also from one process to the next."""

    segment: int
    offset: int


class Journal:
    """The segments of one store. Side effects: makes folder (0700) and its files (0600) at the first append."""

    def __init__(
        self,
        folder: Path,
        counters: collections.Counter[str],
        *,
        above: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Take stock of the folder. above: the highest segment number that was ever applied."""
        self._folder = folder
        self._counters = counters
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._sizes = _stock(folder)
        self.inherited = tuple(sorted(self._sizes))
        self.start = Position(max((above, *self.inherited)) + 1, _HEADER.size)
        self._number = self.start.segment - 1  # of the segment that is written; none yet
        self._fd = -1
        self._salt = 0
        self._offset = 0
        self._carried = 0
        self._total = sum(self._sizes.values())
        self._open: dict[str, bytes] = {}
        self._open_bytes = 0
        self._next_try_s = 0.0

    # --- writing ----------------------------------------------------------------------------------------------------

    @property
    def end(self) -> Position:
        """Behind the last frame of this process."""
        return Position(self._number, self._offset) if self._number >= self.start.segment else self.start

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""
        return self._total

    def append(self, payload: bytes) -> Position | None:
        """Add a payload; None when the disk did not take it, or the journal is at its limit."""
        if self._fd < 0 or self._offset - self._carried + len(payload) > self._segment_bytes:
            self._rotate()
        if len(payload) > MAX_PAYLOAD or self._total + len(payload) > self._max_bytes:
            self._counters["journal_refused"] += 1
            return None
        return self._write(_FRAME.pack(len(payload), zlib.crc32(payload, self._salt)) + payload)

    def begin(self, key: str, payload: bytes) -> Position | None:
        """Add a payload that stays in the journal until `end_of` its key."""
        self.end_of(key)
        position = self.append(payload)
        self._open[key] = payload
        self._open_bytes += len(payload)
        while self._open_bytes > MAX_OPEN_BYTES:
            self.end_of(next(iter(self._open)))
            self._counters["journal_open_forgotten"] += 1
        return position

    def end_of(self, key: str) -> None:
        """Carry what began with this key no further: its end was appended."""
        if (payload := self._open.pop(key, None)) is not None:
            self._open_bytes -= len(payload)

    def _write(self, raw: bytes) -> Position | None:
        if self._fd < 0:
            self._counters["journal_errors"] += 1
            return None
        try:
            written = os.pwrite(self._fd, raw, self._offset)
        except OSError as exc:
            self._failed(exc)
            written = -1
        if written != len(raw):
            self._cut()
            return None
        self._offset += written
        self._total += written
        self._sizes[self._number] = self._offset
        return Position(self._number, self._offset)

    def _cut(self) -> None:
        """Remove what a write that failed left; if even that fails, leave the segment as it is and go on in another."""
        self._counters["journal_errors"] += 1
        try:
            os.ftruncate(self._fd, self._offset)
        except OSError as exc:
            self._failed(exc)
            self._close_segment()

    def _rotate(self) -> None:
        """Begin the next segment with what is open. When that fails, the current one goes on growing."""
        if time.monotonic() < self._next_try_s:
            return
        number, salt = self._number + 1, int.from_bytes(os.urandom(4), "little")
        frames = b"".join(_FRAME.pack(len(raw), zlib.crc32(raw, salt)) + raw for raw in self._open.values())
        raw = _HEADER.pack(_MAGIC, number, salt) + frames
        fd = -1
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(_path(self._folder, number), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            if os.pwrite(fd, raw, 0) != len(raw):
                raise OSError("short write")
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            self._failed(exc)
            self._next_try_s = time.monotonic() + _RETRY_S
            return
        self._close_segment()
        self._fd, self._number, self._salt = fd, number, salt
        self._offset = self._carried = self._sizes[number] = len(raw)
        self._total += len(raw)

    def _failed(self, exc: OSError) -> None:
        self._counters["journal_failures"] += 1
        if self._counters["journal_failures"] % 1000 == 1:
            _log.error("journal %s: %s; what the store has not written yet would be lost with us", self._folder, exc)

    def _close_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Close the file; what is in it stays."""
        self._close_segment()

    # --- reading and deleting ---------------------------------------------------------------------------------------

    def behind(self, applied: Position) -> list[Path]:
        """Forget the segments before the one that applied is in, and return their files, which may be deleted."""
        done = [number for number in self._sizes if number < applied.segment]
        for number in done:
            self._total -= self._sizes.pop(number)
        return [_path(self._folder, number) for number in done]

    def next_segment(self, number: int) -> int | None:
        """Return the number of the segment that follows."""
        return min((found for found in self._sizes if found > number), default=None)

    def frames(self, segment: int, offset: int = 0, end: int | None = None) -> Iterator[tuple[Position, bytes]]:
        """Yield payloads of a segment from offset on, each with its position; from any thread.

        Ends at `end`, at the end of the file, or at the first frame that is not whole.
        """
        try:
            with open(_path(self._folder, segment), "rb") as file:
                yield from self._read(file, segment, offset, end)
        except FileNotFoundError:
            return
        except OSError as exc:
            self._failed(exc)

    def _read(self, file: BinaryIO, segment: int, offset: int, end: int | None) -> Iterator[tuple[Position, bytes]]:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:8] != _MAGIC:
            self._counters["journal_damaged"] += 1
            return
        salt = _HEADER.unpack(head)[2]
        at = max(offset, _HEADER.size)
        file.seek(at)
        while (end is None or at < end) and (frame := file.read(_FRAME.size)):
            length, crc = _FRAME.unpack(frame) if len(frame) == _FRAME.size else (0, 0)
            payload = file.read(length) if 0 < length <= MAX_PAYLOAD else b""
            if not payload or len(payload) != length or zlib.crc32(payload, salt) != crc:
                self._counters["journal_damaged"] += 1
                _log.warning("journal: segment %d ends at offset %d, in a frame that is not whole", segment, at)
                return
            at += _FRAME.size + length
            yield Position(segment, at), payload

    def last_alive_ns(self) -> int:
        """Return when the last inherited segment was written, CLOCK_REALTIME; 0 when there is none."""
        times = [0]
        for number in self.inherited:
            try:
                times.append(_path(self._folder, number).stat().st_mtime_ns)
            except OSError:
                continue
        return max(times)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:0{_NAME_DIGITS}d}"


def _stock(folder: Path) -> dict[int, int]:
    """Return the size of each segment in the folder."""
    try:
        return {
            int(entry.name): entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(folder)
            if len(entry.name) == _NAME_DIGITS and entry.name.isdecimal() and entry.is_file(follow_symlinks=False)
        }
    except OSError:
        return {}
