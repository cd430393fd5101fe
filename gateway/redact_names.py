"""Secrets that have a name: `"password": …`, `token=…`, `<Secret>…`, a form's field, a URL's parameter. Pure.

Places are found by plain search for a few words, patterns are matched only there, and what a match took, or looked
through in vain, is not looked at again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from clrk.gateway.redact_shapes import Budget, Span, any_of, matches_behind

_KEYS: Final = (
    "access", "account", "api", "auth", "client", "encryption", "functions", "master", "private", "session", "shared",
    "signing", "subscription",
)  # fmt: skip
_WORDS: Final = (
    b"password", b"passwd", b"passphrase", b"passcode", b"secret", b"token", b"authorization", b"credential",
    b"cookie", b"pwd", *(f"{kind}{dash}key".encode() for kind in _KEYS for dash in ("", "_", "-")),
)  # fmt: skip
_SUFFIX: Final = rb"(?:(?<!token)s|[_-]?(?:key|value|id|hash)){0,2}"  # plural tokens are a count
# What stands for a member or an item of what is named so: `user[password]=`, `token[]=`.
_INDEX: Final = rb"(?:\]|\[[\w-]{0,32}\]){0,4}"
# A quote as it is, in JSON inside JSON, in a form, in HTML.
_QUOTE: Final = rb"\\{0,8}[\"']|(?:%5c){0,8}%2[27]|&(?:quot|apos|#0?3[49]);"
_GAP: Final = rb"(?:\s|\+|%20){0,64}"
_NO_SECRET: Final = rb"(?!(?:true|false|null)\b)"
_NAMED: Final = re.compile(
    _SUFFIX
    # `"name": value`, whatever the value is, or `"name", "value": value`
    + rb"(?:("
    + _QUOTE
    + rb")(?:\s{0,16},\s{0,16}\1value\1)?"
    + _GAP
    + rb"(?::|%3a|=>)"
    + _GAP
    + rb"(?:\1(.*?)(?:(?<!\\)(?<!%5c)\1|\Z)|([\[{]|%5b|%7b)|"
    + _NO_SECRET
    + rb"([^\s,}\]\"'\[{]+))"
    # a field of multipart/form-data
    + rb"|"
    + _INDEX
    + rb"\"(?:;[^\r\n]{0,256})?\r?\n(?:[^\r\n]{1,256}\r?\n){0,4}\r?\n(.*?)(?=\r?\n--|\Z)"
    # `name: "value"`, `name = "value"`, `name=value`, `name: value`
    + rb"|[ \t]{0,8}(?::|=>?)[ \t]{0,8}("
    + _QUOTE
    + rb")([^\r\n]*?)(?:(?<!\\)\6|(?=[\r\n])|\Z)"
    + rb"|"
    + _INDEX
    + rb"(?:[ \t]{0,8}=[ \t]{0,8}|%3d)([^\s&\"'<>\\;,]+)"
    + rb"|:[ \t]{0,8}([^\s\"'\\,}\]]+))",
    re.IGNORECASE | re.DOTALL,
)
_VALUES: Final = (2, 3, 4, 5, 7, 8, 9)  # the groups that hold the value; one of them is there
_NESTED: Final = 3
_PARTS: Final = re.compile(rb"\"(?:[^\"\\]|\\.)*+(?:\"|\Z)|[\[\]{}]", re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[\]{}]|%[57][bd]", re.IGNORECASE)
_OPENING: Final = frozenset((b"[", b"{", b"%5b", b"%7b"))
_CLOSING: Final = frozenset((b"]", b"}", b"%5d", b"%7d"))
_MAX_PARTS: Final = 20_000  # strings and brackets inside such values, in one text
# `<Name>value`, with attributes or without; what may stand between `<` and the word
_TAG: Final = re.compile(_SUFFIX + rb"(?:\s[^<>]{0,256})?>(\s{0,64}<!\[CDATA\[)?", re.IGNORECASE)
_TAG_HEAD: Final = re.compile(rb"<[\w:.-]{0,64}")
_LINE_WORDS: Final = frozenset((b"authorization", b"cookie"))
_LINE: Final = re.compile(rb"[ \t]{0,8}:[ \t]{0,8}([^\r\n\"'\\]+)")
# Parameters whose names are too common to be secrets elsewhere; some also as the last word of a longer name.
_LAST_WORDS: Final = (b"key=", b"signature=", b"assertion=")
_URL_WORDS: Final = (*_LAST_WORDS, b"sig=", b"code=", b"auth=", b"hmac=", b"jwt=", b"pass=", b"pw=", b"samlresponse=")
_URL_VALUE: Final = re.compile(rb"[^\s&\"'<>\\#;]+")
_SCHEMES: Final = (b"bearer", b"basic")
_CREDENTIALS: Final = re.compile(rb"(?:\s|%20|\+){1,4}([A-Za-z0-9._~+/=-]{8,})")
_USERINFO: Final = re.compile(rb"[^\s/?#@\"'<>\\]{1,512}(?=@)")
_USERINFO_MARK: Final = b"://"
NAME_MARKS: Final = (*_WORDS, *_SCHEMES, *_URL_WORDS, _USERINFO_MARK)  # in any case
_MARKS: Final = any_of(NAME_MARKS, any_case=True)


def find_named(raw: bytes, budget: Budget) -> Iterator[Span]:
    """Yield where the values stand."""
    if _MARKS.search(raw) is None:
        return  # as with most URLs and headers
    lower = raw.lower()  # of ASCII alone, so that places stay the same
    yield from _named_values(raw, lower, budget)
    for scheme in [scheme for scheme in _SCHEMES if scheme in lower]:
        yield from (found.span(1) for found in matches_behind(budget, raw, lower, scheme, _CREDENTIALS))
    for word in [word for word in _URL_WORDS if word in lower]:
        yield from (found.span() for found in matches_behind(budget, raw, lower, word, _URL_VALUE, allowed=_in_query))
    yield from (found.span() for found in matches_behind(budget, raw, raw, _USERINFO_MARK, _USERINFO))


def _named_values(raw: bytes, lower: bytes, budget: Budget) -> Iterator[Span]:
    done = 0
    nested, tags = _Nested(raw), _Tags(raw)
    for start, word in sorted((at, named) for named in _WORDS if named in lower for at in budget.places(lower, named)):
        if start < done:
            continue
        end = start + len(word)
        if word in _LINE_WORDS and (line := _LINE.match(raw, end)):
            done = line.end(1)
            yield line.span(1)
        elif found := _NAMED.match(raw, end):
            group = next(number for number in _VALUES if found[number] is not None)
            done = nested.end(found) if group == _NESTED else found.end()
            yield found.start(group), done if group == _NESTED else found.end(group)
        elif value := tags.value(start, end):
            done = value[1]
            yield value


class _Nested:
    """Finds the ends of arrays and objects in one text; what is not closed, or too large, goes to the end."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._left = _MAX_PARTS

    def end(self, found: re.Match[bytes]) -> int:
        """Return where the array or object ends that the match has found the beginning of."""
        depth = 0
        # In a string, brackets do not count; where quotes are escaped, every string looks like the end of another.
        pattern = _PARTS if found[1] == b'"' else _BRACKETS
        for part in pattern.finditer(self._raw, found.start(_NESTED)):
            self._left -= 1
            if self._left < 0:
                break
            text = part[0].lower()
            depth += (text in _OPENING) - (text in _CLOSING)
            if depth == 0:
                return part.end()
        return len(self._raw)


class _Tags:
    """Finds values between tags of one text, without looking twice for the tag that ends them."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._next = -1  # the last `<` that was looked for

    def value(self, start: int, end: int) -> Span | None:
        """Return the value behind the tag whose name holds the word at start to end; None when it is none."""
        raw = self._raw
        head = raw.rfind(b"<", max(0, start - 64), start)
        if head < 0 or not _TAG_HEAD.fullmatch(raw, head, start) or (tag := _TAG.match(raw, end)) is None:
            return None
        if tag[1] is not None:
            last = raw.find(b"]]>", tag.end())
            return tag.end(), last if last >= 0 else len(raw)
        if self._next < tag.end():
            found = raw.find(b"<", tag.end())
            self._next = found if found >= 0 else len(raw)
        is_closed = self._next == len(raw) or raw.startswith(b"</", self._next)
        return (tag.end(), self._next) if is_closed and self._next > tag.end() else None


def _in_query(lower: bytes, start: int) -> bool:
    """Say whether a parameter begins here, or ends with this word; `&` may be escaped for HTML or JSON."""
    before = lower[max(0, start - 1) : start]
    if before in (b"-", b"_"):
        return lower.startswith(_LAST_WORDS, start)  # a country_code is no secret
    return before in (b"?", b"&", b";") or lower[max(0, start - 6) : start] == b"\\u0026"
