"""Requests to a provider that cost nothing, so that a budget lets them pass unmetered. Pure.

Only what is known to be free: a method that carries no prompt, or the end of a path in its plainest spelling.
"""

from __future__ import annotations

import re
from typing import Final

from clrk.gateway.interpret import RequestHead

_READING: Final = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))
# Anthropic and Bedrock count tokens, Gemini, OpenAI Responses; OpenAI moderations; a response that is called off.
_FREE: Final = re.compile(
    r"(/[A-Za-z0-9._:-]+)*/(messages/count_tokens|models/[A-Za-z0-9._-]+:countTokens|responses/input_tokens|moderations"
    r"|model/[A-Za-z0-9._:-]+/count-tokens|responses/[A-Za-z0-9_-]+/cancel)"
)
_OVERRIDES: Final = frozenset(("x-http-method-override", "x-http-method", "x-method-override"))


def is_harmless(head: RequestHead, body: bytes) -> bool:
    """Say whether the request is known to cost nothing, whatever the provider makes of it."""
    names = {name.lower() for name, _ in head.headers}
    if names & _OVERRIDES or "upgrade" in names or "method" in head.query.lower():
        return False
    if head.method in _READING:
        return not body
    segments = head.path.split("/")
    return head.method == "POST" and _FREE.fullmatch(head.path) is not None and not {".", ".."} & set(segments)


def carries_nothing(head: RequestHead) -> bool:
    """Say whether the head alone shows that there is no body."""
    return not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in head.headers)
