"""What the path of a request, or of a rule, may mean to a server. Pure.

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
from typing import Final
from urllib.parse import quote

_UNICODE: Final = re.compile(r"%[uU]([0-9A-Fa-f]{4})")  # of JScript's escape(), which IIS decodes in URLs
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_FORBIDDEN: Final = "./\\;?#%"  # characters that decide where a path leads


def _look_alikes() -> dict[str, str]:
    """Return what sloppy decoders take for such a character, as bytes in Latin-1.

    Overlong UTF-8 (RFC 3629, section 10); full width (U+FF01 to U+FF5E) and the like, which become plain by NFKC or by
    best fit to a code page.
    """
    found: dict[str, str] = {}
    for char in _FORBIDDEN:
        code = ord(char)
        low, high = 0x80 | (code & 0x3F), code >> 6
        for overlong in ((0xC0 | high, low), (0xE0, 0x80 | high, low), (0xF0, 0x80, 0x80 | high, low)):
            found[bytes(overlong).decode("latin-1")] = char
        found[chr(code + 0xFEE0).encode().decode("latin-1")] = char
    for other, char in {
        "\u2024": ".", "\u2025": "..", "\ufe52": ".", "\u3002": ".", "\uff61": ".",
        "\u2044": "/", "\u2215": "/", "\u29f8": "/", "\u2216": "\\", "\u29f5": "\\", "\ufe68": "\\",
    }.items():  # fmt: skip
        found[other.encode().decode("latin-1")] = char
    return found


_PLAIN: Final = _look_alikes()
_LOOK_ALIKE: Final = re.compile("|".join(map(re.escape, sorted(_PLAIN, key=len, reverse=True))))
_MAX_DECODINGS: Final = 8
_SEPARATORS: Final = re.compile(r"[/\\;?#]")
_AMBIGUOUS: Final = re.compile(r"[%;\\]|//")
# Unreserved characters, no empty segment, and none that begins with a dot: what most paths are.
_ONE_MEANING: Final = re.compile(r"/|(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+/?")
_ASCII: Final = "".join(map(chr, range(128)))
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def path_readings(path: str) -> tuple[str, ...]:
    """Return the readings of a path, or nothing when no reading can be trusted: then no pattern fits."""
    plain = path.partition("?")[0].partition("#")[0]
    if _ONE_MEANING.fullmatch(plain):
        return plain, plain, plain
    plain = plain if plain.isascii() else quote(plain.encode("utf-8", "surrogateescape"), safe=_ASCII)
    generous = _decode_all(plain)
    if generous is None or " " in plain or _CONTROL.search(generous) or not plain.startswith("/"):
        return ()
    strict = _ESCAPE.sub(_keep_reserved, plain)
    if any(part.rstrip() == ".." for part in _SEPARATORS.split(generous)) and _AMBIGUOUS.search(strict):
        return ()
    cut = generous.partition("?")[0].partition("#")[0].replace("\\", "/")
    segments = (segment.partition(";")[0].rstrip() for segment in cut.split("/"))  # Windows drops trailing spaces
    return _resolve_dots(strict), strict, _resolve_dots("/".join(segments))


def _keep_reserved(found: re.Match[str]) -> str:
    char = chr(int(found[1], 16))
    return char if char in _UNRESERVED else found[0].upper()


def _decode_all(path: str) -> str | None:
    for _ in range(_MAX_DECODINGS):
        decoded = _UNICODE.sub(lambda found: chr(int(found[1], 16)).encode("utf-8", "replace").decode("latin-1"), path)
        decoded = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), decoded)
        decoded = _LOOK_ALIKE.sub(lambda found: _PLAIN[found[0]], decoded)
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
