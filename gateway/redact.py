"""Secrets out of what is shown: headers, URLs, and text that programs wrote to each other. Pure.

Works on assembled text, never on pieces of it, so that no secret hides on the border of two chunks. Where the text
itself was cut, what touches the cut goes too: it may be half of a secret that no pattern knows any more.

Theory of operation: agents choose the text, and the event loop that all sandboxes share waits for us. So one automaton
says whether there is anything to look for, places are found by plain search, patterns are only matched there
(redact_shapes.py, redact_names.py), and an escaped text is looked at as its readers decode it, too (redact_escapes.py).
What is found is a list of spans, replaced in one go.

Known limit: a secret that its sender spread over several messages (a model that streams it word by word) is text like
any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Final

import re2

from clrk.gateway.header_names import fold_header
from clrk.gateway.redact_escapes import View, layers
from clrk.gateway.redact_names import NAME_MARKS, find_named
from clrk.gateway.redact_shapes import KEY_END, KEY_MARK, MARKS, PREFIXES, Budget, Span, find_shapes
from clrk.gateway.redact_values import EDGE_BYTES, HiddenValues
from clrk.gateway.telemetry.spans import AttributeValue

REDACTED: Final = "[redacted]"
REDACTED_IN_URL: Final = "REDACTED"  # semconv 1.41.1, url.full
_MAX_SCANNED: Final = 64 << 20  # bytes that one pattern may run over in one text, matches and all: some ten ms
_MIN_MATCHES: Final = 64
_MAX_REMEMBERED: Final = 512
_MAX_REMEMBERED_CHARS: Final = 128

# --- headers --------------------------------------------------------------------------------------------------------

_SECRET_HEADERS: Final = frozenset(
    ("cookie", "set-cookie", "cookie2", "set-cookie2", "authentication-info", "x-honeycomb-team")
)
# Last words of names, perhaps with a number. Plural tokens are a count everywhere; an idempotency key or a session
# opens nothing.
_SECRET_HEADER: Final = re.compile(
    r"(?:^|[-_.])(?:auth|authorization|token|jwt|secret|password|passwd|passphrase|signature|credentials?"
    r"|(?:api|application|access|private|secret|auth|subscription|functions|account|client|master|admin)[-_]?key|apikey)"
    r"(?:[-_.]?v?[0-9]{1,3})?$"
    r"|^x-.*-(?:key|secret)$"
)

# The end of a line, or of a member of a JSON object: a name that was cut off has its value before it.
_WHOLE_AGAIN: Final = re.compile(rb"(?<!:)\n|(?<!\\)[\"'\]}]\s{0,64}[,}]")
_EDGE_RUN: Final = re.compile(rb"[^\s\"'<>,{}\[\]()]*")


def _gate() -> re2._Regexp:
    """Return what finds out in one pass whether there is anything to look for."""
    options = re2.Options()
    options.encoding, options.never_capture = re2.Options.Encoding.LATIN1, True
    prefixes, marks, names = (b"|".join(map(re2.escape, words)) for words in (PREFIXES, MARKS, NAME_MARKS))
    return re2.compile(rb"(?:\A|[^A-Za-z0-9])(?:" + prefixes + b")|" + marks + b"|(?i:" + names + b")", options)


_GATE: Final = _gate()


def is_secret_header(name: str) -> bool:
    """Say whether a header's value is never to be shown; name in any case."""
    lower = name.lower()
    return lower in _SECRET_HEADERS or _SECRET_HEADER.search(lower) is not None


_NO_VALUES: Final = HiddenValues()


class Redactor:
    """What is secret to one gateway: the shapes and names that everybody knows, its own patterns, its secrets' values.

    Shape: patterns are RE2 (core.values.Regex has checked them); values returns those of now; headers are more names of
        headers that are not shown, folded.
    """

    def __init__(
        self,
        patterns: Iterable[str] = (),
        values: Callable[[], HiddenValues] = lambda: _NO_VALUES,
        headers: frozenset[str] = frozenset(),
    ) -> None:
        options = re2.Options()
        options.log_errors, options.never_capture = False, True
        self._patterns = tuple(re2.compile(pattern, options) for pattern in patterns)
        self._values, self._headers = values, headers
        self._clean: set[str] = (
            set()
        )  # short texts that were looked through: hosts, methods, models come again and again
        self._clean_of = values()

    def headers(self, headers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        """Return the values of each header by its lower-case name, in order, without secrets."""
        found: dict[str, list[str]] = {}
        for name, value in headers:
            is_secret = is_secret_header(name) or fold_header(name) in self._headers
            shown = REDACTED if is_secret else self.text(value)
            found.setdefault(name.lower(), []).append(shown)
        return found

    def url(self, url: str) -> str:
        """Return a URL, or the path and query of one, without credentials, as semconv asks for url.full."""
        if url in self._known_clean():
            return url
        raw = url.encode("utf-8", "replace")
        if spans := self._find(raw):
            return _replace(raw, spans, REDACTED_IN_URL).decode("utf-8", "replace")
        self._remember(url)
        return url

    def text(self, text: str, *, cut_start: bool = False, cut_end: bool = False) -> str:
        """Return text without what looks like a secret.

        Shape: cut_start and cut_end say that there was more before and behind it.
        Cost: about 1 ms for 64 KiB, some ten ms for what is made to be slow; of that the end may not be shown.
        """
        is_cut = cut_start or cut_end
        if not is_cut and text in self._known_clean():
            return text
        raw = text.encode("utf-8", "replace")
        spans = self._find(raw)
        if not spans and not is_cut:
            self._remember(text)
            return text
        if cut_start:
            spans.append((0, max(_start_edge(raw), self._values().rest_at_start(raw))))
        if cut_end:
            spans.append((min(_end_edge(raw), self._values().rest_at_end(raw)), len(raw)))
        return _replace(raw, spans, REDACTED).decode("utf-8", "replace") if spans else text

    def attributes(
        self, attributes: Mapping[str, AttributeValue], but: Container[str] = ()
    ) -> dict[str, AttributeValue]:
        """Return attributes without secrets in their texts; `but` names those that stay as they are."""
        found, clean = dict(attributes), self._known_clean()
        unknown: list[str] = []
        for name, value in found.items():
            if isinstance(value, str):
                if value not in clean and name not in but:
                    unknown.append(value)
            elif not isinstance(value, (int, float)):
                unknown += [text for text in value if text not in clean]
        if not unknown:
            return found
        if not any(self._fits_own(text) for text in unknown) and not self._may_find("\n".join(unknown)):
            for text in unknown:
                self._remember(text)
            return found
        for name, value in found.items():  # rare: one by one
            if isinstance(value, str) and name not in but:
                found[name] = self.text(value)
            elif not isinstance(value, str | int | float):
                found[name] = [self.text(one) for one in value]
        return found

    def _known_clean(self) -> set[str]:
        """Return the texts that were looked through before, and nothing found; for the values of now."""
        values = self._values()
        if values is not self._clean_of:
            self._clean, self._clean_of = set(), values
        return self._clean

    def _remember(self, text: str) -> None:
        if len(text) <= _MAX_REMEMBERED_CHARS:
            if len(self._clean) >= _MAX_REMEMBERED:
                self._clean.clear()
            self._clean.add(text)

    def _may_find(self, text: str) -> bool:
        """Say whether there is anything to look for beside patterns: the same for a text by itself and among others."""
        raw = text.encode("utf-8", "replace")
        return _GATE.search(raw) is not None or self._values().may_stand_in(raw) or next(layers(raw), None) is not None

    def _fits_own(self, text: str) -> bool:
        """Say whether a pattern fits, which may ask for a text's beginning or end."""
        raw = text.encode("utf-8", "replace") if self._patterns else b""
        return any(pattern.search(raw) is not None for pattern in self._patterns)

    def _find(self, raw: bytes) -> list[Span]:
        return _everywhere(raw, lambda text: (*_find_known(text), *self._find_own(text)))

    def _find_own(self, raw: bytes) -> Iterator[Span]:
        yield from self._values().find(raw)
        most = max(_MIN_MATCHES, _MAX_SCANNED // (len(raw) or 1))
        for pattern in self._patterns:
            for count, found in enumerate(pattern.finditer(raw)):
                if count == most:
                    yield found.start(), len(raw)
                    break
                if found.end() > found.start():
                    yield found.start(), found.end()


KNOWN_SECRETS: Final = Redactor()


def redact_headers(headers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return headers without what everybody knows to be secret; see Redactor.headers."""
    return KNOWN_SECRETS.headers(headers)


def redact_url(url: str) -> str:
    """Return a URL without what everybody knows to be secret; see Redactor.url."""
    return KNOWN_SECRETS.url(url)


def redact_text(text: str, *, cut_start: bool = False, cut_end: bool = False) -> str:
    """Return text without what everybody knows to be secret; see Redactor.text."""
    return KNOWN_SECRETS.text(text, cut_start=cut_start, cut_end=cut_end)


def hide_values(text: str, values: HiddenValues) -> str:
    """Return the value of a header, or of several, without those values; the same object if there are none."""
    raw = text.encode("latin-1")
    spans = _everywhere(raw, values.find)
    return _replace(raw, spans, REDACTED_IN_URL).decode("latin-1") if spans else text


def _everywhere(raw: bytes, find: Callable[[bytes], Iterable[Span]]) -> list[Span]:
    """Return what find() finds in a text as it was written, and as its readers decode it."""
    spans = [*find(raw)]
    for way in layers(raw):
        for span in find(way[-1].raw):
            for view in reversed(way):
                span = view.back(span)  # noqa: PLW2901 - the same place, one layer further out
            spans.append(span)
        if (unseen := _unseen(way)) is not None:
            spans.append((unseen, len(raw)))
    return spans


def _replace(raw: bytes, spans: Iterable[Span], instead: str) -> bytes:
    """Return the text with each span, or run of overlapping ones, replaced."""
    pieces: list[bytes] = []
    at = 0
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if start > at or not pieces:
            pieces += (raw[at:start], instead.encode())
        at = max(at, end)
    pieces.append(raw[at:])
    return b"".join(pieces)


def _unseen(way: Sequence[View]) -> int | None:
    """Return where the text begins that was not decoded, since there was too much of it; None: there is none."""
    at = way[-1].seen
    if at is None:
        return None
    for view in reversed(way[:-1]):
        at = view.back((at, at + 1))[0]
    return at


def _find_known(raw: bytes) -> list[Span]:
    if _GATE.search(raw) is None:
        return []  # as with most URLs and headers
    budget = Budget(len(raw))
    spans = [*find_shapes(raw, budget), *find_named(raw, budget)]
    if budget.unseen < len(raw):
        spans.append((budget.unseen, len(raw)))
    return spans


def _start_edge(raw: bytes) -> int:
    """Return where the text is whole again: behind a line or a member, and behind a private key's last line."""
    after = 0
    if (key := KEY_END.search(raw)) is not None and KEY_MARK not in raw[: key.start()]:
        after = key.end()
    if (end := _WHOLE_AGAIN.search(raw, after, after + EDGE_BYTES)) is not None:
        return end.end() - 1
    if raw.find(b'"', after, after + EDGE_BYTES) >= 0:  # the value of a name that we do not see may go on
        return min(len(raw), after + EDGE_BYTES)
    run = _EDGE_RUN.match(raw, after, after + EDGE_BYTES)
    return run.end() if run is not None else after


def _end_edge(raw: bytes) -> int:
    """Return where the word begins that the cut goes through."""
    run = _EDGE_RUN.match(raw[: -EDGE_BYTES - 1 : -1])
    return len(raw) - (run.end() if run is not None else 0)
