"""HTTP that does not look like it at first: found in a tunnel before its request line is complete. Pure.

What a connection is, is decided by its first bytes. A client that cuts them short, or takes a method that nobody uses,
would have a tunnel, and behind its first request others that no policy, budget or interpreter sees. No server acts on a
request line before its end, so the tunnel is watched up to there, and nothing is held back.
"""

from __future__ import annotations

import re
from typing import Final

MAX_LINE: Final = 64 * 1024  # servers refuse longer request lines

# Wider than RFC 9112 on purpose: whatever a lenient server would take for a request line.
_REQUEST_LINE: Final = re.compile(rb"[^\x00-\x20\x7f-\xff]+[ \t\x0b\x0c\r]+[^\n]*HTTP/[0-9]", re.IGNORECASE)
_BINARY: Final = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f-\xff]")


class HiddenHttpError(ConnectionAbortedError):
    """A tunnel's client speaks HTTP; both sides were reset."""


class FirstLine:
    """Watches what a client says first in a tunnel."""

    def __init__(self) -> None:
        self._line = bytearray()

    def goes_on(self, data: bytes) -> bool:
        """Take bytes that are about to go up; return whether there is more to watch. Raises: HiddenHttpError."""
        line = self._line
        line += data
        while (end := line.find(b"\n")) >= 0 and not line[:end].strip():
            del line[: end + 1]  # servers pass over empty lines before a request
        if not line:
            return True
        if _REQUEST_LINE.match(line, 0, min(end, MAX_LINE) if end >= 0 else MAX_LINE) is not None:
            raise HiddenHttpError("the client of a tunnel speaks HTTP: a request begins with its method, in capitals")
        return end < 0 and len(line) <= MAX_LINE and _BINARY.match(line) is None
