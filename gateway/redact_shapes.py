"""Secrets that are known by their shape: what their issuers put in front of them, or into them. Pure.

Sources: the issuers' published token formats (GitHub, GitLab, Slack, Stripe, AWS IAM identifiers, …), as far as a
prefix tells them from other words. What has no prefix (a Twilio auth token, an AWS secret access key) is found by its
name only (redact_names.py): 32 hex digits are a checksum as well.

Theory of operation: one automaton finds every prefix in one pass, and behind each a pattern is matched that fails early
or not at all. The number of places is bounded: behind the last one that is looked at nothing is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import re2

Span = tuple[int, int]

# Places of a text that may hold a secret, and are looked at: texts that people write have a tenth of that.
_MIN_PLACES: Final = 2000
_BYTES_PER_PLACE: Final = 256

_WORD: Final = r"[A-Za-z0-9]"
_DASHED: Final = r"[A-Za-z0-9_-]"
_HEX: Final = r"[0-9a-fA-F]"

# What has to follow → the prefixes in front of it. Lengths are less than what issuers use: half of a secret is one.
_FAMILIES: Final = {
    # Anthropic, OpenAI and many that took after them (OpenRouter, DeepSeek, Langfuse)
    rf"{_DASHED}{{8,}}": (
        "sk-",
        "glpat-",
        "gldt-",
        "glrt-",
        "glptt-",
        "glcbt-",
        "glft-",
        "glsoat-",
        "glimt-",
        "glagent-",
        "glffct-",
        "GOCSPX-",
        "ya29.",
        "hvs.",
        "hvb.",
        "hvr.",
        "xoxe.",
        "CFPAT-",
    ),
    rf"{_WORD}{{8,}}": (
        "sk_live_",
        "sk_test_",
        "rk_live_",
        "rk_test_",  # Stripe
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",  # GitHub
        "tvly-",
        "pplx-",
        "bkua_",
        "nfp_",
        "HRKU-",
        "NRAK-",
    ),
    rf"{_DASHED}{{16,}}": (
        "pypi-",
        "rubygems_",
        "dckr_pat_",
        "dckr_oat_",
        "dop_v1_",
        "doo_v1_",
        "dor_v1_",
        "lsv2_pt_",
        "lsv2_sk_",
        "pcsk_",
        "nvapi-",
        "tgp_v1_",
        "glsa_",
        "glc_",
        "sntrys_",
        "sntryu_",
        "sq0atp-",
        "sq0csp-",
        "sq0idp-",
        "pscale_tkn_",
        "pscale_pw_",
        "pscale_oauth_",
        "pul-",
        "sgp_",
        "lin_api_",
        "lin_oauth_",
        "figd_",
        "ntn_",
        "CCIPAT_",
        "SWMTKN-1-",
        "vck_",
        "phx_",
        "sb_secret_",
        "sbp_",
        "xkeysib-",
        "PMAK-",
        "rdme_",
        "jina_",
        "AGE-SECRET-KEY-1",
        "atlasv1.",
        "dp.pt.",
        "dp.st.",
        "ops_eyJ",
        "bedrock-api-key-",
        "FlyV1 fm",
        "tskey-",
        "csb_v1_",
        "e2b_",
    ),
    rf"{_WORD}{{16,}}": (
        "hf_",
        "api_org_",
        "npm_",
        "gsk_",
        "xai-",
        "r8_",
        "shpat_",
        "shpss_",
        "shpca_",
        "shppa_",
        "dapi",
        "LTAI",
        "AKID",
        "rnd_",
        "fw_",
        "EZAK",
        "EZTK",
        "FLWSECK",
        "GR1348941",
    ),
    r"[A-Z0-9]{12,}": ("AKIA", "ASIA", "ABIA", "ACCA"),  # AWS
    rf"{_WORD}[A-Za-z0-9+/=]{{60,}}": ("ABSK",),  # Amazon Bedrock's API keys
    rf"{_DASHED}{{20,}}": ("AIza", "1//0", "ATATT3", "ATCTT3", "EAAA"),  # Google, Atlassian, Square
    r"[A-Za-z0-9+/=]{8,}": ("whsec_",),
    r"[A-Za-z0-9_]{8,}": ("github_pat_",),
    r"[A-Za-z0-9-]{6,}": (*(f"xox{letter}-" for letter in "abceoprs"), "xapp-"),  # Slack
    rf"{_DASHED}{{16,32}}\.{_DASHED}{{16,64}}": ("SG.",),  # SendGrid
    r"[A-Z0-9]{8,32}\.[A-Z0-9]{16,}": ("dt0c01.", "dt0s01."),  # Dynatrace
    rf"{_HEX}{{32}}(?![0-9A-Za-z])": ("SK", "key-"),  # Twilio, Mailgun
    rf"{_WORD}{{6,10}}_{_WORD}{{16,}}": ("re_",),  # Resend
    rf"{_DASHED}{{6,}}": ("AccountKey=", "SharedAccessKey="),
    # in the path of a URL: Telegram; webhooks of Slack, Discord and Teams
    rf"\d{{6,12}}:{_DASHED}{{20,}}": ("bot",),
    r"T[A-Z0-9]{6,16}/[A-Z0-9]{6,16}/[A-Za-z0-9]{16,}": ("services/",),
    rf"\d{{5,20}}/{_DASHED}{{30,}}": ("webhooks/",),
    rf"{_HEX}{{16,64}}/{_HEX}{{8}}-": ("IncomingWebhook/",),
}
_SHAPES: Final = {
    prefix.encode(): re.compile(pattern.encode()) for pattern, prefixes in _FAMILIES.items() for prefix in prefixes
}
_KEY_BEGIN: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----")
KEY_END: Final = re.compile(rb"-----END [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----")
_PUTTY_BEGIN: Final = re.compile(rb"PuTTY-User-Key-File-[23]: ")
_PUTTY_END: Final = re.compile(rb"Private-MAC: [0-9a-f]+")
_TOKEN_RUN: Final = re.compile(rb"[A-Za-z0-9_.-]+")
_TELEGRAM: Final = re.compile(rb"[A-Za-z0-9_-]{30,}")
_AZURE: Final = re.compile(rb"[A-Za-z0-9_~.-]{28,40}")
KEY_MARK: Final = b"-----BEGIN "
_PUTTY_MARK: Final = b"PuTTY-User-Key-File-"
_TOKEN_MARK: Final = b"eyJ"
_TELEGRAM_MARK: Final = b":AA"  # behind the bot's number
_AZURE_MARK: Final = b"Q~"  # in a client secret of Entra ID: three characters, a digit, `Q~`


def any_of(
    words: Iterable[bytes], before: bytes = b"", *, any_case: bool = False, max_mem: int = 8 << 20
) -> re2._Regexp:
    """Return the automaton that finds the first of the words, in group 1; of two at one place, the longer one.

    Shape: max_mem is the most bytes that it takes; with less than it needs it is a thousand times slower.
    """
    options = re2.Options()
    options.max_mem = max_mem
    options.log_errors = False  # the words may be secrets
    options.encoding, options.case_sensitive = re2.Options.Encoding.LATIN1, not any_case
    ordered = sorted(set(words), key=len, reverse=True)
    return re2.compile(before + b"(" + b"|".join(re2.escape(word) for word in ordered) + b")", options)


PREFIXES: Final = tuple(_SHAPES)  # where a word begins
MARKS: Final = (KEY_MARK, _PUTTY_MARK, _TOKEN_MARK, _TELEGRAM_MARK, _AZURE_MARK)  # anywhere
_PREFIXES: Final = any_of(_SHAPES, rb"(?:\A|[^A-Za-z0-9])")  # only where a word begins


class Budget:
    """How many places of one text are looked at. Behind the first that is not, nothing of the text is shown."""

    def __init__(self, size: int) -> None:
        self.left = _MIN_PLACES + size // _BYTES_PER_PLACE
        self.unseen = size

    def take(self, at: int) -> bool:
        """Ask to look at one more place."""
        self.left -= 1
        if self.left < 0:
            self.unseen = min(self.unseen, at)
            return False
        return True

    def places(self, raw: bytes, word: bytes) -> Iterator[int]:
        """Yield where the word stands."""
        at = raw.find(word)
        while at >= 0 and self.take(at):
            yield at
            at = raw.find(word, at + len(word))


def matches_behind(
    budget: Budget,
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


def find_shapes(raw: bytes, budget: Budget) -> Iterator[Span]:
    """Yield where the secrets stand."""
    yield from _blocks(raw, budget, KEY_MARK, _KEY_BEGIN, KEY_END)
    yield from _blocks(raw, budget, _PUTTY_MARK, _PUTTY_BEGIN, _PUTTY_END)
    yield from _prefixed(raw, budget)
    yield from _tokens(raw, budget)
    for found in matches_behind(budget, raw, raw, _TELEGRAM_MARK, _TELEGRAM):
        start = _back(raw, found.start() - len(_TELEGRAM_MARK), b"0123456789", 12)
        if start < found.start() - len(_TELEGRAM_MARK) - 5:
            yield start, found.end()
    for found in matches_behind(budget, raw, raw, _AZURE_MARK, _AZURE):
        if raw[found.start() - 3 : found.start() - 2].isdigit() and found.start() >= _AZURE_HEAD:
            yield found.start() - _AZURE_HEAD, found.end()


_AZURE_HEAD: Final = 6  # characters of the secret up to and with `Q~`


def _prefixed(raw: bytes, budget: Budget) -> Iterator[Span]:
    at = 0
    while (found := _PREFIXES.search(raw, at)) is not None:
        start, end = found.span(1)
        if not budget.take(start):
            return
        behind = _SHAPES[found[1]].match(raw, end)
        at = behind.end() if behind else max(start, 1)  # where it was none, another prefix may begin in this one
        if behind:
            yield start, at


def _back(raw: bytes, at: int, chars: bytes, most: int) -> int:
    """Return where the run of chars begins that ends at a place."""
    return at - (len(head := raw[max(0, at - most) : at]) - len(head.rstrip(chars)))


def _blocks(
    raw: bytes, budget: Budget, mark: bytes, begin: re.Pattern[bytes], end: re.Pattern[bytes]
) -> Iterator[Span]:
    done = 0
    for start in budget.places(raw, mark):
        if start >= done and begin.match(raw, start):
            last = end.search(raw, start)
            done = last.end() if last is not None else len(raw)
            yield start, done


def _tokens(raw: bytes, budget: Budget) -> Iterator[Span]:
    """JWS and JWE: base64url of `{"`, then dots."""
    done = 0
    for start in budget.places(raw, _TOKEN_MARK):
        if start >= done and (found := _TOKEN_RUN.match(raw, start)):
            done = found.end()
            if b"." in found[0]:
                yield start, done
