"""Google's error document (google.rpc.Status over HTTP), read and written: an object, or an array with one in it."""

from __future__ import annotations

from typing import Final

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Completion
from clrk.gateway.telemetry import attributes as names

CONTENT_TYPE: Final = "application/json; charset=UTF-8"
# HTTP status → google.rpc.Code (cloud.google.com/apis/design/errors, "Handling errors").
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def note_error(completion: Completion, error: object) -> None:
    """Take an error member into the completion; None is none."""
    if error is None:
        return
    number = values.integer(values.member(error, "code"))
    kind = values.code(values.member(error, "status")) or (str(number) if number is not None else None)
    completion.error_type = kind or names.ERROR_TYPE_OTHER
    completion.error_message = values.message(values.member(error, "message"))


def error_document(status: int, message: str) -> bytes:
    """Return an error as Google writes it."""
    kind = _STATUSES.get(status, "UNKNOWN")
    return msgspec.json.encode({"error": {"code": status, "message": message, "status": kind}})
