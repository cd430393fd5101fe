"""Secrets out of what is shown: headers, URLs, and text that programs wrote to each other. Pure.

Works on assembled text, never on pieces of it, so that no secret hides on the border of two chunks. Where the text
itself was cut, what touches the cut goes too: it may be half of a secret that no pattern knows any more.

Theory of operation: agents choose the text, and the event loop that all sandboxes share waits for us. So places are
found by plain search for a few words and prefixes, patterns are only matched there, and what a match took, or looked
through in vain, is not looked at again. What is found is a list of spans, replaced in one go.

Known limit: a secret that its sender spread over several messages (a model that streams it word by word) is text like
any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

REDACTED: Final = "[redacted]"
REDACTED_IN_URL: Final = "REDACTED"  # semconv 1.41.1, url.full
_EDGE_BYTES: Final = 4096
# Places of a text that may hold a secret, and are looked at: texts that people write have a tenth of that.
_MIN_PLACES: Final = 2000
_BYTES_PER_PLACE: Final = 256

_Span = tuple[int, int]

# --- headers --------------------------------------------------------------------------------------------------------

_SECRET_HEADERS: Final = frozenset(("cookie", "set-cookie", "cookie2", "set-cookie2", "authentication-info"))
# Last words of names. Plural tokens are a count everywhere; an idempotency key or a session opens nothing.
_SECRET_HEADER: Final = re.compile(
    r"(?:^|[-_.])(?:auth|authorization|token|jwt|secret|password|passwd|passphrase|signature|credentials?"
    r"|(?:api|access|private|secret|auth|subscription|functions|account|client|master|admin)[-_]?key|apikey)$"
    r"|^x-.*-(?:key|secret)$"
)

# --- what begins with a prefix of its own: prefix → what has to follow -----------------------------------------------

_SHAPES: Final = {
    prefix.encode(): re.compile(pattern)
    for prefix, pattern in {
        "sk-": rb"[A-Za-z0-9_-]{8,}",  # Anthropic, OpenAI and many that took after them
        **dict.fromkeys(("sk_live_", "sk_test_", "rk_live_", "rk_test_"), rb"[A-Za-z0-9]{8,}"),  # Stripe
        "whsec_": rb"[A-Za-z0-9+/=]{8,}",
        **dict.fromkeys(("AKIA", "ASIA"), rb"[A-Z0-9]{12,}"),  # AWS
        "AIza": rb"[A-Za-z0-9_-]{20,}",  # Google
        "ya29.": rb"[A-Za-z0-9_-]{8,}",
        **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), rb"[A-Za-z0-9]{8,}"),  # GitHub
        "github_pat_": rb"[A-Za-z0-9_]{8,}",
        "glpat-": rb"[A-Za-z0-9_-]{8,}",
        **dict.fromkeys([f"xox{letter}-" for letter in "abceoprs"], rb"[A-Za-z0-9-]{6,}"),  # Slack
        "xapp-": rb"[A-Za-z0-9-]{6,}",
        **dict.fromkeys(("hf_", "npm_", "gsk_", "xai-"), rb"[A-Za-z0-9]{16,}"),
        "pypi-": rb"[A-Za-z0-9_-]{16,}",
        # in the path of a URL: Telegram, webhooks of Slack and Discord
        "bot": rb"\d{6,12}:[A-Za-z0-9_-]{20,}",
        "services/": rb"T[A-Z0-9]{6,16}/[A-Z0-9]{6,16}/[A-Za-z0-9]{16,}",
        "webhooks/": rb"\d{5,20}/[A-Za-z0-9_-]{30,}",
    }.items()
}
_KEY_BEGIN: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END: Final = re.compile(rb"-----END [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----")
_TOKEN_RUN: Final = re.compile(rb"[A-Za-z0-9_.-]+")

# --- what has a name ------------------------------------------------------------------------------------------------

_WORDS: Final = (
    b"password", b"passwd", b"passphrase", b"passcode", b"secret", b"token", b"authorization", b"credential",
    b"cookie", b"apikey", b"api_key", b"api-key", b"accesskey", b"access_key", b"access-key", b"privatekey",
    b"private_key", b"private-key", b"authkey", b"auth_key", b"auth-key", b"pwd",
)  # fmt: skip
_SUFFIX: Final = rb"(?:(?<!token)s|[_-]?(?:key|value|id|hash)){0,2}"  # plural tokens are a count
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
    + rb"|\"(?:;[^\r\n]{0,256})?\r?\n(?:[^\r\n]{1,256}\r?\n){0,4}\r?\n(.*?)(?=\r?\n--|\Z)"
    # `name: "value"`, `name = "value"`, `name=value`, `name: value`
    + rb"|[ \t]{0,8}(?::|=>?)[ \t]{0,8}("
    + _QUOTE
    + rb")([^\r\n]*?)(?:(?<!\\)\6|(?=[\r\n])|\Z)"
    + rb"|(?:[ \t]{0,8}=[ \t]{0,8}|%3d)([^\s&\"'<>\\;,]+)"
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
_URL_WORDS: Final = (b"key=", b"sig=", b"code=", b"signature=")  # too common to be secrets elsewhere
_URL_VALUE: Final = re.compile(rb"[^\s&\"'<>\\#;]+")
_SCHEMES: Final = (b"bearer", b"basic")
_CREDENTIALS: Final = re.compile(rb"(?:\s|%20|\+){1,4}([A-Za-z0-9._~+/=-]{8,})")
_USERINFO: Final = re.compile(rb"[^\s/?#@\"'<>\\]{1,512}(?=@)")
_KEY_MARK: Final = b"-----BEGIN "
_TOKEN_MARK: Final = b"eyJ"
_USERINFO_MARK: Final = b"://"
# Every secret stands behind one of these, or in it. As text in lower case: bytes take three times as long to search.
_MARKS: Final = tuple(
    mark.decode().lower()
    for mark in (*_SHAPES, *_WORDS, *_SCHEMES, *_URL_WORDS, _KEY_MARK, _TOKEN_MARK, _USERINFO_MARK)
)
# The end of a line, or of a member of a JSON object: a name that was cut off has its value before it.
_WHOLE_AGAIN: Final = re.compile(rb"(?<!:)\n|(?<!\\)[\"'\]}]\s{0,64}[,}]")
_EDGE_RUN: Final = re.compile(rb"[^\s\"'<>,{}\[\]()]*")


def is_secret_header(name: str) -> bool:
    """Say whether a header's value is never to be shown; name in any case."""
    lower = name.lower()
    return lower in _SECRET_HEADERS or _SECRET_HEADER.search(lower) is not None


def redact_headers(headers: Iterable[tuple[str, str]], secret: frozenset[str] = frozenset()) -> dict[str, list[str]]:
    """Return the values of each header by its lower-case name, in order, without secrets.

    Shape: secret are more names that are not shown, in lower case and with `_` for `-`.
    """
    found: dict[str, list[str]] = {}
    for name, value in headers:
        is_secret = is_secret_header(name) or name.lower().replace("-", "_") in secret
        shown = REDACTED if is_secret else redact_text(value)
        found.setdefault(name.lower(), []).append(shown)
    return found


def redact_url(url: str) -> str:
    """Return a URL, or the path and query of one, without credentials, as semconv asks for url.full."""
    raw = url.encode("utf-8", "replace")
    return _replace(raw, _find_secrets(url, raw), REDACTED_IN_URL)


def redact_text(text: str, *, cut_start: bool = False, cut_end: bool = False) -> str:
    """Return text without what looks like a secret.

    Shape: cut_start and cut_end say that there was more before and behind it.
    Cost: about 1 ms for 64 KiB, some ten ms for what is made to be slow; of that the end may not be shown.
    """
    raw = text.encode("utf-8", "replace")
    spans = _find_secrets(text, raw)
    if cut_start:
        spans.append((0, _start_edge(raw)))
    if cut_end:
        spans.append((_end_edge(raw), len(raw)))
    return _replace(raw, spans, REDACTED)


def _replace(raw: bytes, spans: Iterable[_Span], instead: str) -> str:
    """Return raw as text, with each span, or run of overlapping ones, replaced."""
    pieces: list[bytes] = []
    at = 0
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if start > at or not pieces:
            pieces += (raw[at:start], instead.encode())
        at = max(at, end)
    pieces.append(raw[at:])
    return b"".join(pieces).decode("utf-8", "replace")


class _Budget:
    """How many places of one text are looked at. Behind the first that is not, nothing of the text is shown."""

    def __init__(self, size: int) -> None:
        self.left = _MIN_PLACES + size // _BYTES_PER_PLACE
        self.unseen = size

    def places(self, raw: bytes, word: bytes) -> Iterator[int]:
        """Yield where the word stands."""
        at = raw.find(word)
        while at >= 0:
            self.left -= 1
            if self.left < 0:
                self.unseen = min(self.unseen, at)
                return
            yield at
            at = raw.find(word, at + len(word))


def _find_secrets(text: str, raw: bytes) -> list[_Span]:
    lower = text.lower()
    for mark in _MARKS:
        if mark in lower:
            budget = _Budget(len(raw))
            return [*_find_each(raw, budget), (budget.unseen, len(raw))]
    return []  # as with most URLs and headers


def _find_each(raw: bytes, budget: _Budget) -> Iterator[_Span]:
    lower = raw.lower()  # of ASCII alone, so that places stay the same
    yield from _private_keys(raw, budget)
    for prefix in [prefix for prefix in _SHAPES if prefix in raw]:
        for found in _matches_behind(budget, raw, raw, prefix, _SHAPES[prefix], allowed=_begins_word):
            yield found.start() - len(prefix), found.end()
    yield from _tokens(raw, budget)
    yield from _named_values(raw, lower, budget)
    for scheme in [scheme for scheme in _SCHEMES if scheme in lower]:
        yield from (found.span(1) for found in _matches_behind(budget, raw, lower, scheme, _CREDENTIALS))
    for word in [word for word in _URL_WORDS if word in lower]:
        yield from (found.span() for found in _matches_behind(budget, raw, lower, word, _URL_VALUE, allowed=_in_query))
    yield from (found.span() for found in _matches_behind(budget, raw, raw, _USERINFO_MARK, _USERINFO))


def _matches_behind(
    budget: _Budget,
    raw: bytes,
    searched: bytes,
    word: bytes,
    pattern: re.Pattern[bytes],
    *,
    allowed: Callable[[bytes, int], bool] | None = None,
) -> Iterator[re.Match[bytes]]:
    """Match the pattern behind each place of the word that allowed() lets through; places in a match are passed over.

    Shape: searched is raw or its lower case. The pattern fails early, or not at all.
    """
    done = 0
    for start in budget.places(searched, word):
        if start < done or (allowed is not None and not allowed(searched, start)):
            continue
        if found := pattern.match(raw, start + len(word)):
            done = found.end()
            yield found


def _private_keys(raw: bytes, budget: _Budget) -> Iterator[_Span]:
    done = 0
    for start in budget.places(raw, _KEY_MARK):
        if start >= done and _KEY_BEGIN.match(raw, start):
            end = _KEY_END.search(raw, start)
            done = end.end() if end is not None else len(raw)
            yield start, done


def _tokens(raw: bytes, budget: _Budget) -> Iterator[_Span]:
    """JWS and JWE: base64url of `{"`, then dots."""
    done = 0
    for start in budget.places(raw, _TOKEN_MARK):
        if start >= done and (found := _TOKEN_RUN.match(raw, start)):
            done = found.end()
            if b"." in found[0]:
                yield start, done


def _named_values(raw: bytes, lower: bytes, budget: _Budget) -> Iterator[_Span]:
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

    def value(self, start: int, end: int) -> _Span | None:
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


def _begins_word(raw: bytes, start: int) -> bool:
    return start == 0 or not raw[start - 1 : start].isalnum()


def _in_query(lower: bytes, start: int) -> bool:
    """Say whether a parameter begins here, or ends with this word; `&` may be escaped for HTML or JSON."""
    before = lower[max(0, start - 1) : start]
    if before in (b"-", b"_"):
        return lower.startswith((b"key=", b"signature="), start)  # a country_code is no secret
    return before in (b"?", b"&", b";") or lower[max(0, start - 6) : start] == b"\\u0026"


def _start_edge(raw: bytes) -> int:
    """Return where the text is whole again: behind a line or a member, and behind a private key's last line."""
    after = 0
    if (key := _KEY_END.search(raw)) is not None and _KEY_MARK not in raw[: key.start()]:
        after = key.end()
    if (end := _WHOLE_AGAIN.search(raw, after, after + _EDGE_BYTES)) is not None:
        return end.end() - 1
    if raw.find(b'"', after, after + _EDGE_BYTES) >= 0:  # the value of a name that we do not see may go on
        return min(len(raw), after + _EDGE_BYTES)
    run = _EDGE_RUN.match(raw, after, after + _EDGE_BYTES)
    return run.end() if run is not None else after


def _end_edge(raw: bytes) -> int:
    """Return where the word begins that the cut goes through."""
    run = _EDGE_RUN.match(raw[: -_EDGE_BYTES - 1 : -1])
    return len(raw) - (run.end() if run is not None else 0)
