"""Reading what an agent posts to an MCP server so that nobody can read it in another way. Pure.

A governor decides by the body, and the server acts on it: where two JSON parsers could disagree about what a body says
(two members of one name, other spellings of a name that a parser may take for it, an encoding that is not UTF-8, bytes
behind the end), it is refused, not guessed.
Source: JSON-RPC 2.0; RFC 8259; MCP 2025-03-26 (batches), 2025-06-18, 2026-07-28 (basic/transports: Mcp-Method and
Mcp-Name).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from clrk.core.errors import ClrkError
from clrk.gateway.mcp.messages import METHODS

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
MAX_POSTED_BYTES: Final = 4 << 20  # the TypeScript SDK's servers take no more either
MAX_BATCH: Final = 256
TOOLS_CALL: Final = "tools/call"
TOOLS_LIST: Final = "tools/list"

_ENVELOPE: Final = frozenset(("jsonrpc", "id", "method", "params", "result", "error"))
_PARAMETERS: Final = frozenset(("name", "uri"))
_NAMED_BY: Final = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_CHARSET: Final = re.compile(r"""charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)
_CHARSETS: Final = frozenset(("utf-8", "utf8", "us-ascii"))
_BASE64: Final = re.compile(r"=\?base64\?(.*)\?=")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

Headers = tuple[tuple[str, str], ...]


class UnreadableError(ClrkError):
    """A body that can not be judged. Shape: code is the JSON-RPC error code of the answer."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """One posted message. method is "" for a response; id None for a notification; tool is set for tools/call only."""

    method: str
    id: str | int | None = None
    tool: str | None = None
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class Post:
    """One posted body."""

    messages: tuple[Message, ...]
    is_batch: bool


class _Ambiguous(dict[str, Any]):
    """An object with two members of one name."""


def read_post(headers: Headers, body: bytes) -> Post:
    """Return the messages of a body.

    Raises: UnreadableError for everything that is no JSON-RPC 2.0, or may be something else to somebody else.
    Cost: O(len(body)); bodies over MAX_POSTED_BYTES are refused unread.
    """
    _check_headers(headers)
    value = _parse(body)
    if not isinstance(value, list):
        post = Post((_message(value),), is_batch=False)
    elif 0 < len(value) <= MAX_BATCH:
        post = Post(tuple(map(_message, value)), is_batch=True)
    else:
        raise UnreadableError(INVALID_REQUEST, f"a batch has from 1 to {MAX_BATCH} messages")
    for message, found in zip(post.messages, value if post.is_batch else [value], strict=True):
        _check_routing(headers, message, found)
    return post


def _check_headers(headers: Headers) -> None:
    for name, value in headers:
        match name.lower():
            case "content-encoding" if value.strip().lower() not in ("", "identity"):
                raise UnreadableError(PARSE_ERROR, "a request body with a Content-Encoding can not be judged")
            case "content-type":
                for charset in _CHARSET.findall(value):
                    if charset.lower() not in _CHARSETS:
                        raise UnreadableError(PARSE_ERROR, f"JSON is UTF-8, not {charset[:40]!r}")
            case _:
                continue


def _parse(body: bytes) -> Any:
    if len(body) > MAX_POSTED_BYTES:
        raise UnreadableError(INVALID_REQUEST, f"a body over {MAX_POSTED_BYTES >> 20} MiB can not be judged")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and JSONDecodeError among them
        what = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:120]
        raise UnreadableError(PARSE_ERROR, f"no JSON in UTF-8: {what}") from exc


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Ambiguous(found)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise UnreadableError(INVALID_REQUEST, "a message is a JSON object")
    _check_names(value, _ENVELOPE)
    if value.get("jsonrpc") != "2.0":
        raise UnreadableError(INVALID_REQUEST, 'not a JSON-RPC 2.0 message: "jsonrpc" is not "2.0"')
    id_ = _id(value)
    if "method" not in value:
        if id_ is None or ("result" in value) == ("error" in value):
            raise UnreadableError(INVALID_REQUEST, "neither a request, a notification nor a response")
        return Message("", id_)
    if "result" in value or "error" in value:
        raise UnreadableError(INVALID_REQUEST, "both a request and a response")
    method, params = _text(value["method"], "method"), value.get("params")
    if method not in METHODS and (meant := _fold(method)) in METHODS:
        raise UnreadableError(INVALID_REQUEST, f"method {method[:60]!r} may be taken for {meant!r}")
    if isinstance(params, dict):
        _check_names(params, _PARAMETERS)
    tool = uri = None
    if method == TOOLS_CALL:
        tool = _text(params.get("name") if isinstance(params, dict) else None, "params.name")
    elif method.startswith("resources/") and isinstance(params, dict) and "uri" in params:
        uri = _text(params["uri"], "params.uri")
    return Message(method, id_, tool, uri)


def _check_names(found: dict[str, Any], names: frozenset[str]) -> None:
    """Refuse two members of one name, and names that a parser that ignores case may take for another one."""
    if isinstance(found, _Ambiguous):
        raise UnreadableError(INVALID_REQUEST, "two members of one object have the same name")
    for name in found:
        if name not in names and _fold(name) in names:
            raise UnreadableError(INVALID_REQUEST, f"member {name[:60]!r} may be taken for {_fold(name)!r}")


def _id(value: dict[str, Any]) -> str | int | None:
    if "id" not in value:
        return None
    found = value["id"]
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise UnreadableError(INVALID_REQUEST, "an id is a string or an integer")
    return found


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or _UNPRINTABLE.search(value) is not None:
        raise UnreadableError(INVALID_REQUEST, f"{what} is not a string that everybody reads alike")
    return value


def _fold(text: str) -> str:
    """Return what a lenient reader may take a name for: without case, compatibility forms, blanks, invisible marks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in plain if unicodedata.category(char)[0] not in "CZM")


def _check_routing(headers: Headers, message: Message, found: dict[str, Any]) -> None:
    """Servers and proxies may act on these headers instead of the body, so that they have to say the same."""
    params = found.get("params")
    for wanted, header in _routing(message, params if isinstance(params, dict) else {}):
        for name, value in headers:
            if name.lower() == header and _header_text(value) != wanted:
                raise UnreadableError(INVALID_REQUEST, f"the header {header} and the body do not agree")


def _routing(message: Message, params: dict[str, Any]) -> Iterator[tuple[object, str]]:
    if message.method:
        yield message.method, "mcp-method"
        if (key := _NAMED_BY.get(message.method)) is not None:
            yield params.get(key), "mcp-name"


def _header_text(value: str) -> str:
    encoded = _BASE64.fullmatch(value)
    if encoded is None:
        return value
    try:
        return base64.b64decode(encoded[1], validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise UnreadableError(INVALID_REQUEST, "a header of MCP that is no text") from exc
