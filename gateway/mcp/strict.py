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
from dataclasses import dataclass
from typing import Final

from clrk.core.errors import ClrkError
from clrk.gateway.header_names import fold_header
from clrk.gateway.mcp.members import MALFORMED, SameNameError, read_items, read_members
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
_CHARSET: Final = re.compile(r"""charset[\s*0-9]*=\s*["']?([^\s;"']*)""", re.IGNORECASE)
_CHARSETS: Final = frozenset(("utf-8", "utf8", "us-ascii"))
_BASE64: Final = re.compile(r"=\?base64\?(.*)\?=")
_MAX_NAME: Final = 256
_MAX_TEXT: Final = 4096  # of a method, a tool, a URI
_SPACE: Final = b" \t\r\n"
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


def read_post(headers: Headers, body: bytes) -> Post:
    """Return the messages of a body.

    Raises: UnreadableError for everything that is no JSON-RPC 2.0, or may be something else to somebody else.
    Cost: O(len(body)); bodies over MAX_POSTED_BYTES are refused unread.
    """
    _check_headers(headers)
    if len(body) > MAX_POSTED_BYTES:
        raise UnreadableError(INVALID_REQUEST, f"a body over {MAX_POSTED_BYTES >> 20} MiB can not be judged")
    try:
        body.decode("utf-8")
        is_batch = body.lstrip(_SPACE)[:1] == b"["
        messages = tuple(_message(headers, raw) for raw in (read_items(body, MAX_BATCH) if is_batch else [body]))
    except SameNameError as exc:
        raise UnreadableError(INVALID_REQUEST, "two members of one object have the same name") from exc
    except (*MALFORMED, ValueError) as exc:
        what = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:120]
        raise UnreadableError(PARSE_ERROR, f"no JSON-RPC in UTF-8: {what}") from exc
    if not messages:
        raise UnreadableError(INVALID_REQUEST, "an empty batch")
    return Post(messages, is_batch)


def _check_headers(headers: Headers) -> None:
    for name, value in headers:
        match fold_header(name):
            case "content_encoding" if value.strip().lower() not in ("", "identity"):
                raise UnreadableError(PARSE_ERROR, "a request body with a Content-Encoding can not be judged")
            case "content_type":
                for charset in _CHARSET.findall(value):
                    if charset.lower() not in _CHARSETS:
                        raise UnreadableError(PARSE_ERROR, f"JSON is UTF-8, not {charset[:40]!r}")
            case _:
                continue


def _message(headers: Headers, raw: bytes) -> Message:
    found = read_members(raw)
    _check_names(found, _ENVELOPE)
    if _value(found, "jsonrpc") != "2.0":
        raise UnreadableError(INVALID_REQUEST, 'not a JSON-RPC 2.0 message: "jsonrpc" is not "2.0"')
    id_ = _id(found)
    if "method" not in found:
        if id_ is None or ("result" in found) == ("error" in found):
            raise UnreadableError(INVALID_REQUEST, "neither a request, a notification nor a response")
        _check_routing(headers, "", {})
        return Message("", id_)
    if "result" in found or "error" in found:
        raise UnreadableError(INVALID_REQUEST, "both a request and a response")
    method = _text(_value(found, "method"), "method")
    if method not in METHODS and (meant := _fold(method)) in METHODS:
        raise UnreadableError(INVALID_REQUEST, f"method {method[:60]!r} may be taken for {meant!r}")
    params = read_members(found["params"]) if found.get("params", b"")[:1] == b"{" else {}
    _check_names(params, _PARAMETERS)
    tool = uri = None
    if method == TOOLS_CALL:
        tool = _text(_value(params, "name"), "params.name")
    elif method.startswith("resources/") and "uri" in params:
        uri = _text(_value(params, "uri"), "params.uri")
    _check_routing(headers, method, params)
    return Message(method, id_, tool, uri)


def _value(found: dict[str, bytes], name: str) -> object:
    """Return a member's value if it is none that has members: those mean nothing where this is asked."""
    raw = found.get(name, b"null")
    return None if raw[:1] in b"[{" else json.loads(raw)


def _check_names(found: dict[str, bytes], names: frozenset[str]) -> None:
    """Refuse names that a parser that ignores case may take for another one."""
    for name in found:
        if len(name) > _MAX_NAME:
            raise UnreadableError(INVALID_REQUEST, f"a member's name of over {_MAX_NAME} characters")
        if name not in names and _fold(name) in names:
            raise UnreadableError(INVALID_REQUEST, f"member {name[:60]!r} may be taken for {_fold(name)!r}")


def _id(members: dict[str, bytes]) -> str | int | None:
    if "id" not in members:
        return None
    found = _value(members, "id")
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise UnreadableError(INVALID_REQUEST, "an id is a string or an integer")
    return found


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or _UNPRINTABLE.search(value) is not None:
        raise UnreadableError(INVALID_REQUEST, f"{what} is not a string that everybody reads alike")
    return value


def _fold(text: str) -> str:
    """Return what a lenient reader may take a name for: without case, compatibility forms, blanks, invisible marks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in plain if unicodedata.category(char)[0] not in "CZM")


def _check_routing(headers: Headers, method: str, params: dict[str, bytes]) -> None:
    """Servers and proxies may act on these headers instead of the body, so that they have to say the same."""
    for name, value in headers:
        folded = fold_header(name)
        if folded == "mcp_method":
            wanted: object = method
        elif folded == "mcp_name" and method in _NAMED_BY:
            wanted = _value(params, _NAMED_BY[method])
        else:
            continue
        if _header_text(value) != wanted:
            raise UnreadableError(INVALID_REQUEST, f"the header {name[:60]} and the body do not agree")


def _header_text(value: str) -> str:
    encoded = _BASE64.fullmatch(value)
    if encoded is None:
        return value
    try:
        return base64.b64decode(encoded[1], validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise UnreadableError(INVALID_REQUEST, "a header of MCP that is no text") from exc
