"""The page's token: made once, kept 0600 in the gateway's state folder, compared in constant time."""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

FILE_NAME: Final = "page.token"
_BYTES: Final = 32
_FORM: Final = re.compile(rb"[A-Za-z0-9_-]{43}\n?")  # 32 bytes of base64url

_LOG: Final = logging.getLogger(__name__)


class PageToken:
    """The one secret of the page. Its text is for `clrk page` alone, which only the admin socket's group can ask."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def of(cls, state_dir: Path) -> PageToken:
        """Return the token of the folder; make one where there is none, or none that only we can read.

        A folder that can not be written is no reason to serve without: the token then lives as long as the process.
        """
        path = state_dir / FILE_NAME
        if (kept := _read(path)) is not None:
            return cls(kept)
        text = secrets.token_urlsafe(_BYTES)
        try:
            _write(path, text)
        except OSError as exc:
            _LOG.warning("the page's token can not be kept, the next start makes another: %s", exc)
        return cls(text)

    def fits(self, candidate: str) -> bool:
        """Compare in constant time. Any text may be asked."""
        return hmac.compare_digest(candidate.encode("utf-8", "replace"), self.text.encode())


def _read(path: Path) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
            _LOG.warning("%s is not ours alone: making another token", path)
            return None
        raw = file.read(_BYTES * 2)
    return raw.decode().strip() if _FORM.fullmatch(raw) else None


def _write(path: Path, text: str) -> None:
    """Put a whole file in place of whatever is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(fd)
    os.replace(new, path)
