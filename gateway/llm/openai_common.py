"""What OpenAI's APIs have in common: errors in documents and streams, service tiers, output types, deployments."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

import msgspec

from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm import values
from clrk.gateway.llm.completion import Completion
from clrk.gateway.llm.dialect import JsonDialect
from clrk.gateway.telemetry import attributes as names

_TYPES: Final = {  # platform.openai.com/docs/guides/error-codes, and the `type` that comes with each
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/")
_API_VERSION: Final = re.compile(r"(?:^|&)api-version=([^&]*)")
_TAKES_USAGE_SINCE: Final = "2024-10-21"  # of Azure's versions, the first stable one with stream_options
_OUTPUT_TYPES: Final = {"text": "text", "json_object": "json", "json_schema": "json"}
_LISTED_TIERS: Final = frozenset(("default", "standard", "auto", "on_demand"))  # what price lists are about


class OpenAiDialect(JsonDialect):
    """What the dialects of OpenAI's APIs have in common: models, and errors for their clients."""

    def __init__(self, head: RequestHead) -> None:
        super().__init__(head)
        self._deployment = _deployment_of(head)
        self._named: str | None = None

    @property
    def price_models(self) -> tuple[str | None, ...]:
        """See Dialect: a deployment may have a name that nothing costs by."""
        return self.completion.model, self.request_model, self._named

    def take_model(self, model: object) -> None:
        """Take the model that the body names. Azure obeys the deployment in the path, whatever the body says."""
        self._named = values.text(model)
        self.request_model = self._deployment or self._named

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


def take_tier(completion: Completion, tier: object) -> None:
    """Note by which service tier a call was served: but for the standard one, each has prices of its own."""
    if (served := values.code(tier)) is not None:
        completion.extra[names.OPENAI_RESPONSE_SERVICE_TIER] = served
        completion.off_list = completion.off_list or served not in _LISTED_TIERS


def output_type(asked: object) -> str | None:
    """Return gen_ai.output.type of a response_format."""
    kind = values.code(values.member(asked, "type"))
    return _OUTPUT_TYPES.get(kind) if kind is not None else None


def takes_include_usage(head: RequestHead) -> bool:
    """Say whether an API of OpenAI's shape has stream_options: Azure's older versions, named in the query, do not."""
    found = _API_VERSION.search(head.query)
    if found is None:
        return _DEPLOYMENT.search(head.path) is None
    return found[1] >= _TAKES_USAGE_SINCE  # `preview` is later than any date


def _deployment_of(head: RequestHead) -> str | None:
    found = _DEPLOYMENT.search(head.path)
    return values.text(unquote(found.group(1))) if found is not None else None
