"""Output of agents as log lines: cut into lines, with a bound on what one run may keep.

What is beyond the bound costs one comparison, so an agent that floods slows neither the store nor its own answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from clrk.gateway.pipes import Pipe

MAX_LINE_BYTES: Final = 16_384
MAX_BYTES: Final = 1024 * 1024  # of both streams together
MAX_LINES: Final = 20_000
DAEMON_WINDOW_S: Final = 60.0  # a daemon never ends: its allowance is new after this


class LogAllowance:
    """What one run may still log, both streams together. With window_s it is renewed; the clock is monotonic."""

    def __init__(self, window_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._since_s = clock()
        self._bytes = MAX_BYTES
        self._lines = MAX_LINES
        self._dropped_bytes = 0

    @property
    def lines(self) -> int:
        """How many lines may be kept now; 0: nothing is kept any more."""
        if self._window_s is not None and self._clock() - self._since_s >= self._window_s:
            self._since_s = self._clock()
            self._bytes, self._lines = MAX_BYTES, MAX_LINES
        return self._lines if self._bytes > 0 else 0

    def take(self, size: int) -> None:
        """One line of this size is kept."""
        self._bytes -= size
        self._lines -= 1

    def drop(self, size: int) -> None:
        """So many bytes are not kept."""
        self._dropped_bytes += size

    def take_dropped(self) -> int:
        """Return how many bytes were dropped since the last time somebody asked."""
        dropped, self._dropped_bytes = self._dropped_bytes, 0
        return dropped


class OutputLog:
    """Cuts one stream into lines. keep gets each line without its newline; a line that is too long becomes several."""

    def __init__(self, keep: Callable[[bytes], None], allowance: LogAllowance) -> None:
        self._keep = keep
        self._allowance = allowance
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Take what was written."""
        budget = self._allowance.lines
        if not budget:
            self._rest = b""
            self._allowance.drop(len(chunk))
            return
        *lines, rest = (self._rest + chunk).split(b"\n", budget)
        if len(lines) == budget:  # what follows has no place any more
            self._allowance.drop(len(rest))
            rest = b""
        elif len(rest) >= MAX_LINE_BYTES:
            lines.append(rest)
            rest = b""
        self._rest = rest
        for line in lines:
            self._keep_pieces(line)

    def end(self) -> None:
        """Keep what has no newline yet; there is no more."""
        rest, self._rest = self._rest, b""
        if rest:
            self._keep_pieces(rest)

    def _keep_pieces(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, MAX_LINE_BYTES):
            piece = line[start : start + MAX_LINE_BYTES]
            if not self._allowance.lines:
                self._allowance.drop(len(line) - start)
                return
            self._allowance.take(len(piece))
            self._keep(piece)


class LoggedPipe(Pipe):
    """The read end of a pipe whose reader is somebody else: what he reads is logged as well."""

    def __init__(self, fd: int, log: OutputLog) -> None:
        super().__init__(fd)
        self._log = log

    async def read(self) -> bytes:
        """See Pipe.read."""
        chunk = await super().read()
        if chunk:
            self._log.feed(chunk)
        else:
            self._log.end()
        return chunk

    def close(self) -> None:
        """See Pipe.close."""
        self._log.end()
        super().close()


async def log_to_end(pipe: Pipe, log: OutputLog) -> None:
    """Read a pipe that nobody else reads."""
    while chunk := await pipe.read():
        log.feed(chunk)
    log.end()
