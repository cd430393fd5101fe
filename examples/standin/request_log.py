"""One JSON line per request, written when its body is complete: what tests compare with the spans."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class RequestLog:
    """Appends to one file, line by line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(
        self, *, listener: str, method: str, target: str, headers: Iterable[tuple[str, str]], body: BodyFacts
    ) -> None:
        """Write one request. headers in wire order; a repeated one shows every value."""
        by_name: dict[str, list[str]] = {}
        for name, value in headers:
            by_name.setdefault(name.lower(), []).append(value)
        line: dict[str, Any] = {
            "time_unix_nano": time.time_ns(),
            "listener": listener,
            "method": method,
            "target": target,
            "host": by_name.get("host", [""])[0],
            "traceparent": by_name.get("traceparent", []),
            "headers": by_name,
            "body_bytes": body.size,
            "body_sha256": body.sha256,
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BodyFacts:
    """Size and hash of a body that passes by."""

    def __init__(self, raw: bytes = b"") -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self.feed(raw)

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""
        self.size += len(chunk)
        self._hash.update(chunk)

    @property
    def sha256(self) -> str:
        """Hex digest of what was fed."""
        return self._hash.hexdigest()
