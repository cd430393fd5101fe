"""The JSON-RPC 2.0 messages of MCP, as far as they become attributes. Arguments and results are never kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from clrk.gateway.llm import values
from clrk.gateway.llm.reading import ABSENT, MALFORMED, reader
from clrk.gateway.telemetry import attributes as names

# semconv 1.41.1, registry/attributes/mcp: the well-known values of mcp.method.name.
METHODS: Final = frozenset(
    {
        "initialize", "ping", "completion/complete", "elicitation/create", "logging/setLevel",
        "tools/list", "tools/call", "prompts/list", "prompts/get", "roots/list", "sampling/createMessage",
        "resources/list", "resources/read", "resources/templates/list", "resources/subscribe", "resources/unsubscribe",
        "notifications/initialized", "notifications/cancelled", "notifications/progress", "notifications/message",
        "notifications/resources/list_changed", "notifications/resources/updated", "notifications/roots/list_changed",
        "notifications/tools/list_changed", "notifications/prompts/list_changed",
    }
)  # fmt: skip
_METHOD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_/.$-]{0,127}")
_MAX_BATCH: Final = 256


class _Message(msgspec.Struct):
    """A request, a notification or a response."""

    jsonrpc: Any = None
    id: Any = None
    method: Any = None
    params: msgspec.Raw = ABSENT
    result: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


class _Params(msgspec.Struct):
    """Arguments are skipped unread."""

    name: Any = None
    uri: Any = None
    protocolVersion: Any = None


class _Result(msgspec.Struct):
    """Content is skipped unread."""

    isError: Any = None
    protocolVersion: Any = None


class _Error(msgspec.Struct):
    code: Any = None
    message: Any = None


_NULL: Final = (b"", b"null")
_MAX_BRACKETS: Final = 100_000  # of a batch: each may begin a message, and all are made at once
_MANY: Final = msgspec.json.Decoder(list[_Message])
_read_one = reader(_Message)
_read_params = reader(_Params)
_read_result = reader(_Result)
_read_error = reader(_Error)


@dataclass(frozen=True, slots=True)
class Request:
    """A request or, without id, a notification."""

    method: str
    id: str | None
    tool: str | None = None
    prompt: str | None = None
    uri: str | None = None
    protocol_version: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a request. error_code is the JSON-RPC code; is_tool_error a result with isError."""

    id: str | None
    error_code: int | None
    message: str
    is_tool_error: bool
    protocol_version: str | None

    @property
    def error_type(self) -> str | None:
        """Value of error.type (semconv 1.41.1, mcp)."""
        if self.error_code is not None:
            return str(self.error_code)
        return names.ERROR_TYPE_TOOL if self.is_tool_error else None


def parse(raw: bytes) -> tuple[Request | Response, ...]:
    """Return the messages of a body or of one event; none when it is not JSON-RPC 2.0. Methods that are none go."""
    found = (_request(one) if one.method is not None else _response(one) for one in _messages(raw))
    return tuple(one for one in found if one is not None)


def _messages(raw: bytes) -> list[_Message]:
    if raw.lstrip()[:1] != b"[":
        one = _read_one(raw)
        return [one] if one is not None and one.jsonrpc == "2.0" else []
    try:
        messages = _MANY.decode(raw) if raw.count(b"{") + raw.count(b"[") <= _MAX_BRACKETS else []
    except MALFORMED:
        return []
    return messages[:_MAX_BATCH] if all(message.jsonrpc == "2.0" for message in messages) else []


def _request(message: _Message) -> Request | None:
    method = message.method
    if not isinstance(method, str) or not _METHOD.fullmatch(method):
        return None
    params = _read_params(bytes(message.params)) or _Params()
    uri = values.text(params.uri) if method.startswith("resources/") else None
    name = values.text(params.name)
    version = params.protocolVersion if method == "initialize" else None
    return Request(
        method=method,
        id=_id(message.id),
        tool=name if method == "tools/call" else None,
        prompt=name if method == "prompts/get" else None,
        uri=_public_uri(uri) if uri is not None else None,
        protocol_version=values.code(version) or values.text(version, 32),
    )


def _response(message: _Message) -> Response:
    failed = bytes(message.error) not in _NULL
    error = _read_error(bytes(message.error)) or _Error()
    result = _read_result(bytes(message.result)) or _Result()
    code = values.integer(error.code)
    return Response(
        id=_id(message.id),
        error_code=(0 if code is None else code) if failed else None,
        message=values.message(error.message),
        is_tool_error=result.isError is True,
        protocol_version=values.text(result.protocolVersion, 32),
    )


def _id(value: object) -> str | None:
    """Return an id in string form: 7 and "7" become the same, as semconv 1.41.1 wants it (jsonrpc.request.id)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    number = values.integer(value)
    return str(number) if number is not None else values.text(value)


def _public_uri(uri: str) -> str:
    """Leave out what may be secret in a URI: userinfo and query."""
    plain = uri.partition("?")[0]
    return re.sub(r"(?<=://)[^/@]*@", "", plain)
