"""Errors as OpenAI's APIs report them, in documents and in streams, and what imitates it. For dialects to inherit."""

from __future__ import annotations

from typing import Final

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Completion
from clrk.gateway.telemetry import attributes as names

_TYPES: Final = {  # platform.openai.com/docs/guides/error-codes, and the `type` that comes with each
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class OpenAiErrors:
    """Writes errors for clients of OpenAI."""

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """See Dialect."""
        kind = _TYPES.get(status, "server_error")
        error = {"message": message, "type": kind, "param": None, "code": code}
        return "application/json", msgspec.json.encode({"error": error})

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect."""
        _, body = self.error_body(429, code, message)
        return b"data: " + body + b"\n\n"


def take_error(completion: Completion, error: object) -> None:
    """Note the error that a document or event holds."""
    if error is None or error is False:
        return
    number = values.integer(values.member(error, "code"))  # what imitates OpenAI sends HTTP status codes here
    kind = values.code(values.member(error, "code")) or values.code(values.member(error, "type"))
    kind = kind or (str(number) if number is not None else None)
    completion.error_type = kind or names.ERROR_TYPE_OTHER
    completion.error_message = values.message(values.member(error, "message"))
