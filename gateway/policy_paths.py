"""Paths of the egress policy: what a request's path may mean to a server, and patterns that must hold for each meaning.

A path allowed by its spelling but served as another would be a bypass, and servers differ in what they decode. So:
1. A path that climbs (`..` in any disguise) must be free of everything that servers read differently (`%`, `;`, `\\`,
   `//`): how far it climbs depends on how many segments the server sees. Else no pattern fits it.
2. Any other path has three readings: as written (but for unreserved characters, which are decoded once); that of RFC
   3986 section 6.2 (dot segments removed, slashes merged); and that of the most generous server (decoded until nothing
   changes, `\\` as `/`, `;parameters` dropped, cut at a decoded `?`). A pattern has the same three, and fits only if it
   fits reading by reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from clrk.gateway.globs import fits_glob

_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_MAX_DECODINGS: Final = 8
_SEPARATORS: Final = re.compile(r"[/\\;?#]")
_AMBIGUOUS: Final = re.compile(r"[%;\\]|//")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def path_readings(path: str) -> tuple[str, ...]:
    """Return the readings of a path, or nothing when no reading can be trusted: then no pattern fits."""
    plain = path.partition("?")[0].partition("#")[0]
    generous = _decode_all(plain)
    if generous is None or _CONTROL.search(generous) or not plain.startswith("/"):
        return ()
    strict = _ESCAPE.sub(_keep_reserved, plain)
    if ".." in _SEPARATORS.split(generous) and _AMBIGUOUS.search(strict):
        return ()
    cut = generous.partition("?")[0].partition("#")[0].replace("\\", "/")
    segments = (segment.partition(";")[0] for segment in cut.split("/"))
    return _resolve_dots(strict), strict, _resolve_dots("/".join(segments))


def _keep_reserved(found: re.Match[str]) -> str:
    char = chr(int(found[1], 16))
    return char if char in _UNRESERVED else found[0].upper()


def _decode_all(path: str) -> str | None:
    for _ in range(_MAX_DECODINGS):
        decoded = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), path)
        # Overlong UTF-8 of `.`, `/` and `\` (RFC 3629, section 10).
        decoded = decoded.replace("\xc0\xae", ".").replace("\xc0\xaf", "/").replace("\xc1\x9c", "\\")
        if decoded == path:
            return decoded
        path = decoded
    return None


def _resolve_dots(path: str) -> str:
    """Remove dot segments and empty segments; a slash at the end stays."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    closing = "/" if kept and segments[-1] in ("", ".", "..") else ""
    return "/" + "/".join(kept) + closing


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A prefix of whole segments (`/v1` fits `/v1` and `/v1/x`, not `/v1beta`), or with `*` a glob of the whole path.

    `*` stands for any characters, `/` too.
    """

    readings: tuple[str, ...]
    is_glob: bool

    @classmethod
    def compile(cls, pattern: str) -> PathPattern:
        """Compile a pattern that core.resources has checked to begin with `/`."""
        return cls(path_readings(pattern), "*" in pattern)

    def matches(self, readings: tuple[str, ...]) -> bool:
        """Say whether the pattern fits every reading of a path."""
        if not readings or not self.readings:
            return False
        fits = fits_glob if self.is_glob else _fits_prefix
        return all(fits(pattern, path) for pattern, path in zip(self.readings, readings, strict=True))


def _fits_prefix(prefix: str, path: str) -> bool:
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else prefix + "/")
