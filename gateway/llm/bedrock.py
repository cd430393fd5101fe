"""What the APIs of Amazon Bedrock's runtime have in common: model ids, headers, errors, usage, the event stream.

A model id is a foundation model's, an inference profile's (`us.` and the like in front), or the ARN of either, or of
something that has a name only. The operation stands behind it: `/model/{id}/converse`.

Source: docs.aws.amazon.com/bedrock/latest/APIReference (Amazon Bedrock Runtime).
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm import framing, values
from clrk.gateway.llm.aws_event_stream import MEDIA_TYPE, EventStreamSplitter, encode_message
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.llm.reading import reader
from clrk.gateway.telemetry import attributes as names

_ERRORS: Final = {
    400: "ValidationException",
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    413: "ValidationException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}
_REFUSALS: Final = frozenset(("refusal", "guardrail_intervened", "content_filtered", "CONTENT_FILTERED"))
_DIGITS: Final = re.compile(r"[0-9]{1,15}")


class _Message(msgspec.Struct):
    """An error body, and the payload of an exception in a stream; AWS writes its message in either case."""

    lower: Any = msgspec.field(default=None, name="message")
    upper: Any = msgspec.field(default=None, name="Message")
    type: Any = msgspec.field(default=None, name="__type")


_read_message = reader(_Message)


class BedrockDialect(JsonDialect):
    """Base of the dialects of the Bedrock runtime (see dialect.Dialect)."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        model, _, self._method = head.path.partition("/model/")[2].rstrip("/").rpartition("/")
        self.request_model = values.text(unquote(model))
        self.streams = self._method.endswith("-stream")
        self.routed_model: str | None = None
        self.guardrail = values.text(head.header("x-amzn-bedrock-guardrailidentifier"))

    @property
    def price_models(self) -> tuple[str | None, ...]:
        """See Dialect: an ARN is priced by its last part, which is a model's id, or a name that nothing costs by.

        The model's own name for itself, in what InvokeModel answers, does not say through which profile it was asked.
        """
        asked = self.request_model
        return (asked.rpartition("/")[2] if asked and asked.startswith("arn:") else asked, self.routed_model)

    def note_end(self, choice: int, reason: str) -> None:
        """Note why an answer ended."""
        self.completion.finished(choice, reason)
        self.completion.refused |= reason in _REFUSALS

    def note_tier(self, tier: object, latency: object) -> None:
        """Note what is asked for beyond the list's prices: a service tier, or latency that is paid for."""
        if tier not in (None, "default") or latency not in (None, "standard"):
            self.completion.off_list = True

    def response_head(self, head: ResponseHead) -> None:
        """Take what the headers say: the request's id, the kind of error, and counts where the body has none."""
        request_id = values.text(head.header("x-amzn-requestid"))
        if request_id is not None:
            self.completion.extra[names.AWS_REQUEST_ID] = request_id
        if head.status >= 400:
            self.note_error((head.header("x-amzn-errortype") or "").partition(":")[0].rpartition("#")[2], b"")
        if not self.spends_tokens:
            return
        self.completion.usage = usage(
            _number(head.header("x-amzn-bedrock-input-token-count")),
            _number(head.header("x-amzn-bedrock-output-token-count")),
            _number(head.header("x-amzn-bedrock-cache-read-input-token-count")),
            _number(head.header("x-amzn-bedrock-cache-write-input-token-count")),
        )

    def splitter(self, media_type: str) -> framing.Splitter | None:
        """See Dialect."""
        return EventStreamSplitter() if media_type == MEDIA_TYPE else None

    def note_error(self, kind: str, payload: bytes) -> None:
        """Take an error's kind, as a header or a stream's exception names it, and its message."""
        found = _read_message(payload) or _Message()
        if not kind and self.completion.error_type in (None, names.ERROR_TYPE_OTHER) and isinstance(found.type, str):
            kind = found.type.rpartition("#")[2]
        done = self.completion
        done.error_type = values.code(kind[:1].upper() + kind[1:]) or done.error_type or names.ERROR_TYPE_OTHER
        done.error_message = values.message(found.lower) or values.message(found.upper)

    def stream_error(self, name: bytes, payload: bytes) -> bool:
        """Take an event that is an exception or an error; False when it is neither."""
        kind, _, word = name.decode(errors="replace").partition("/")
        if kind not in ("exception", "error"):
            return False
        self.note_error(word, payload)
        return True

    def error_headers(self, status: int) -> tuple[tuple[str, str], ...]:
        """See Dialect: AWS names the kind of error in a header."""
        return (("x-amzn-ErrorType", _kind(status)),)

    def error_body(self, status: int, code: str, message: str) -> tuple[str, bytes]:
        """See Dialect. The kind stands in the body too: every AWS client looks there when there is no header."""
        return "application/json", msgspec.json.encode({"message": message, "__type": _kind(status)})

    def error_event(self, code: str, message: str) -> bytes:
        """See Dialect: an exception of the event stream."""
        kind = _kind(429)
        headers = {
            ":exception-type": kind[:1].lower() + kind[1:],
            ":content-type": "application/json",
            ":message-type": "exception",
        }
        return encode_message(headers, msgspec.json.encode({"message": message}))


def path_shape(*methods: str) -> re.Pattern[str]:
    """Return the shape of `…/model/{id}/{method}`; the id may be an ARN with slashes. Linear on hostile paths."""
    return re.compile(rf"^(?=.*/model/[^/]+/[^/]).*/(?:{'|'.join(methods)})/?$")


def usage(
    fresh: int | None, output: int | None, read: int | None, written: int | None, written_1h: int | None = None
) -> Usage:
    """Return counts as semconv wants them: Bedrock's input leaves out what was read from or written to the cache."""
    total = None if fresh is None else values.count(fresh + (read or 0) + (written or 0))
    return Usage(total, output, cache_read=read, cache_creation=written, cache_creation_1h=written_1h)


def _kind(status: int) -> str:
    return _ERRORS.get(status, "InternalServerException")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and _DIGITS.fullmatch(text) else None
