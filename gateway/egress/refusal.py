"""Answers that the gateway gives in place of the upstream: problem documents (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

from clrk.core.errors import ClrkError
from clrk.gateway.egress.http1 import render_head
from clrk.gateway.govern import Answer, ErrorWriter

PROBLEM_TYPE: Final = "application/problem+json"
_STATUS_OF_CODE: Final = {"head_too_large": 431, "too_many_headers": 431, "version": 505, "timeout": 408}


class RefusedError(ClrkError):
    """A request that goes nowhere.

    Shape: reason is stable and low-cardinality; rule names what decided; hint is the rule to add, if one would help.
    """

    def __init__(self, status: int, reason: str, message: str, *, rule: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.rule = rule
        self.hint = hint


def status_of(code: str) -> int:
    """Return the status of a ProtocolError in a request."""
    return _STATUS_OF_CODE.get(code, 400)


def render_problem(
    status: int,
    reason: str,
    detail: str,
    *,
    invocation_id: str,
    hint: str = "",
    head_only: bool = False,
    errors: ErrorWriter | None = None,
) -> bytes:
    """Return a whole response that ends the connection. A daemon has no invocation_id ("").

    Shape: with errors the document has the members of the provider's own error too, where its SDK looks for a message.
    """
    title = HTTPStatus(status).phrase
    body: dict[str, object] = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body["reason"] = reason
    if invocation_id:
        body["invocation_id"] = invocation_id
    if hint:
        body["add_rule"] = hint
    headers = [("Content-Type", PROBLEM_TYPE)]
    if errors is not None:
        message = f"clrk: {detail}:\n{hint}" if hint else f"clrk: {detail}"
        body |= json.loads(errors.error_body(status, reason, message)[1])
        headers += errors.error_headers(status)
    content = json.dumps(body).encode() + b"\n"
    headers += [("Content-Length", str(len(content))), ("Connection", "close")]
    head = render_head(f"HTTP/1.1 {status} {title}", headers)
    return head if head_only else head + content


def render_answer(answer: Answer, *, head_only: bool, close: bool) -> bytes:
    """Return a governor's whole response; close says that the connection ends with it."""
    head = render_head(
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        [
            ("Content-Type", answer.content_type),
            *answer.headers,
            ("Content-Length", str(len(answer.body))),
            *([("Connection", "close")] if close else []),
        ],
    )
    return head if head_only else head + answer.body
