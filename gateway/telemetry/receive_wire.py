"""OTLP request bodies taken apart: which items are in them, below which resource and scope. Pure.

Theory of operation. A body is split, not parsed: the items (spans, log records, metrics) stay bytes, and are decoded
one at a time. So a request takes the memory of its body and of one item, whatever an agent packs into it: two bytes
that stand for an empty span would become two hundred as an object. All three signals have the same frame:
request { 1: resource_x[] { 1: resource, 2: scope_x[] { 1: scope, 2: item[], 3: schema_url }, 3: schema_url } }.

Source: opentelemetry-proto 1.x (collector/*/v1), the OTLP specification 1.x (JSON: ids in hex, enums as integers),
protobuf's encoding guide.
"""

from __future__ import annotations

import base64
import enum
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError, Message

from clrk.core.errors import ProtocolError

MAX_ITEM_BYTES: Final = 1024 * 1024
MAX_ITEMS: Final = 20_000  # per request: an SDK sends 512 at a time, a collector 8192
MAX_PLAIN_BYTES: Final = 16 * 1024 * 1024  # of a body, after inflating
_MAX_JSON_PARTS: Final = 400_000  # objects and arrays of a JSON body
_MAX_ITEM_PARTS: Final = 8192  # of one JSON item: making a message of it is Python's work
_MAX_DEPTH: Final = 24
_MAX_GZIP_MEMBERS: Final = 16
_INFLATE_STEP: Final = 256 * 1024
_GZIP: Final = 16 + zlib.MAX_WBITS

_LEN: Final = 2  # wire type of strings, bytes and messages
_FIXED: Final = {1: 8, 5: 4}  # wire type -> size
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")
_ID_NAMES: Final = frozenset({"traceId", "spanId", "parentSpanId"})

# What ParseDict raises for JSON of the wrong shape; json_format promises ParseError and keeps to it mostly.
_JSON_ERRORS: Final = (ParseError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)

M = TypeVar("M", bound=Message)


class Signal(enum.Enum):
    """What a request carries; the value is its path."""

    TRACES = "/v1/traces"
    LOGS = "/v1/logs"
    METRICS = "/v1/metrics"


class Encoding(enum.StrEnum):
    """How a request is written; the value is its Content-Type."""

    PROTOBUF = "application/x-protobuf"
    JSON = "application/json"


class ReceiveError(ProtocolError):
    """A request body that is refused as a whole. code: `malformed` or `too_large`."""


@dataclass(frozen=True, slots=True)
class RawGroup:
    """The items of one resource and scope. Everything is still as the agent sent it; `b""` where it sent nothing."""

    resource: bytes
    resource_schema: str
    scope: bytes
    scope_schema: str
    items: list[bytes]


# --- content coding -------------------------------------------------------------------------------------------------


def inflate(body: bytes, coding: str) -> bytes:
    """Undo `gzip` or `deflate` (RFC 9110, section 8.4.1; raw deflate too, which some senders mean).

    Raises: ReceiveError(too_large) for what would not fit MAX_PLAIN_BYTES, (malformed) for broken or cut data.
    """
    plain = bytearray()
    rest, members = body, 0
    while rest or not members:
        members += 1
        if members > _MAX_GZIP_MEMBERS:
            raise ReceiveError("too_large", f"over {_MAX_GZIP_MEMBERS} gzip members")
        stream = zlib.decompressobj(_GZIP if coding == "gzip" else _deflate_bits(rest))
        while not stream.eof:
            try:
                piece = stream.decompress(rest, _INFLATE_STEP)
            except zlib.error as exc:
                raise ReceiveError("malformed", f"the body is no {coding}") from exc
            plain += piece
            if len(plain) > MAX_PLAIN_BYTES:
                raise ReceiveError("too_large", f"the body is over {MAX_PLAIN_BYTES} bytes when it is unpacked")
            rest = stream.unconsumed_tail
            if not piece and not rest and not stream.eof:
                raise ReceiveError("malformed", f"the {coding} data end too soon")
        rest = stream.unused_data
        if coding != "gzip" and rest:
            raise ReceiveError("malformed", "bytes behind the deflate data")
    return bytes(plain)


def _deflate_bits(head: bytes) -> int:
    is_zlib = len(head) > 1 and head[0] & 0x0F == zlib.DEFLATED and int.from_bytes(head[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS


# --- frames ---------------------------------------------------------------------------------------------------------


def split(body: bytes, signal: Signal, encoding: Encoding) -> list[RawGroup]:
    """Split a body into groups of items. Raises: ReceiveError."""
    if encoding is Encoding.PROTOBUF:
        return _Splitter(body).groups()
    return _split_json(body, signal)


class _Splitter:
    """Walks the frame of a protobuf body; counts what it passes, so that a body of a million nothings ends early."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._left = MAX_ITEMS

    def groups(self) -> list[RawGroup]:
        """Return all groups."""
        found: list[RawGroup] = []
        for start, end in self._messages(0, len(self._body), 1):
            resource, scopes, schema = self._parts(start, end)
            for scope_start, scope_end in scopes:
                scope, items, scope_schema = self._parts(scope_start, scope_end)
                raw = [self._body[item_start:item_end] for item_start, item_end in items]
                found.append(RawGroup(resource, schema, scope, scope_schema, raw))
        return found

    def _parts(self, start: int, end: int) -> tuple[bytes, list[tuple[int, int]], str]:
        """Return field 1, the spans of field 2 and field 3 of a message, which may come in any order."""
        head, schema = b"", b""
        parts: list[tuple[int, int]] = []
        for number, part_start, part_end in self._fields(start, end):
            match number:
                case 1:
                    head = self._body[part_start:part_end]
                case 2:
                    parts.append((part_start, part_end))
                case 3:
                    schema = self._body[part_start:part_end]
                case _:  # of a later version
                    pass
        return head, parts, schema.decode("utf-8", "replace")

    def _messages(self, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
        for number, part_start, part_end in self._fields(start, end):
            if number == wanted:
                yield part_start, part_end

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, end) of each length-delimited field; skip all others."""
        position = start
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise ReceiveError("too_large", f"over {MAX_ITEMS} items in one request")
            tag, position = self._varint(position, end)
            wire_type, number = tag & 7, tag >> 3
            if number == 0:
                raise ReceiveError("malformed", "the body is no protobuf: field number 0")
            if wire_type == 0:
                _, position = self._varint(position, end)
                continue
            if wire_type == _LEN:
                size, position = self._varint(position, end)
            elif wire_type in _FIXED:
                size = _FIXED[wire_type]
            else:
                raise ReceiveError("malformed", f"the body is no protobuf: wire type {wire_type}")
            if size > end - position:
                raise ReceiveError("malformed", "the body is no protobuf: a length passes the end")
            if wire_type == _LEN:
                yield number, position, position + size
            position += size

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for index in range(position, min(end, position + 10)):
            byte = self._body[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, index + 1
            shift += 7
        raise ReceiveError("malformed", "the body is no protobuf: a number without an end")


class _JsonScope(msgspec.Struct, rename="camel"):
    scope: msgspec.Raw = msgspec.Raw(b"{}")
    schema_url: str | None = None
    spans: list[msgspec.Raw] | None = None
    log_records: list[msgspec.Raw] | None = None
    metrics: list[msgspec.Raw] | None = None


class _JsonResource(msgspec.Struct, rename="camel"):
    resource: msgspec.Raw = msgspec.Raw(b"{}")
    schema_url: str | None = None
    scope_spans: list[_JsonScope] | None = None
    scope_logs: list[_JsonScope] | None = None
    scope_metrics: list[_JsonScope] | None = None


class _JsonRequest(msgspec.Struct, rename="camel"):
    resource_spans: list[_JsonResource] | None = None
    resource_logs: list[_JsonResource] | None = None
    resource_metrics: list[_JsonResource] | None = None


_JSON_DECODER: Final = msgspec.json.Decoder(_JsonRequest)
_JSON_FIELDS: Final = {
    Signal.TRACES: ("resource_spans", "scope_spans", "spans"),
    Signal.LOGS: ("resource_logs", "scope_logs", "log_records"),
    Signal.METRICS: ("resource_metrics", "scope_metrics", "metrics"),
}


def _split_json(body: bytes, signal: Signal) -> list[RawGroup]:
    if _parts(body) > _MAX_JSON_PARTS:
        raise ReceiveError("too_large", f"over {_MAX_JSON_PARTS} objects in one request")
    try:
        request = _JSON_DECODER.decode(body)
    except RecursionError as exc:
        raise ReceiveError("malformed", "the body is nested too deeply") from exc
    except ValueError as exc:  # msgspec's own and UnicodeDecodeError
        raise ReceiveError("malformed", "the body is not the JSON of an OTLP request") from exc
    resources_name, scopes_name, items_name = _JSON_FIELDS[signal]
    found: list[RawGroup] = []
    left = MAX_ITEMS
    for resource in getattr(request, resources_name) or []:
        for scope in getattr(resource, scopes_name) or []:
            items = getattr(scope, items_name) or []
            left -= len(items) + 1
            if left < 0:
                raise ReceiveError("too_large", f"over {MAX_ITEMS} items in one request")
            found.append(
                RawGroup(
                    bytes(resource.resource), resource.schema_url or "",
                    bytes(scope.scope), scope.schema_url or "", [bytes(item) for item in items],
                )
            )  # fmt: skip
    return found


def _parts(raw: bytes) -> int:
    return raw.count(b"{") + raw.count(b"[")


# --- items ----------------------------------------------------------------------------------------------------------


def decode(raw: bytes, message: M, encoding: Encoding) -> M:
    """Fill an empty message from the bytes of one part of a body; what the message has no field for is forgotten.

    Raises: ReceiveError: too_large for what is not even looked at, malformed for what is no such message.
    """
    if len(raw) > MAX_ITEM_BYTES:
        raise ReceiveError("too_large", f"over {MAX_ITEM_BYTES} bytes")
    if encoding is Encoding.PROTOBUF:
        try:
            message.ParseFromString(raw)
        except DecodeError as exc:
            raise ReceiveError("malformed", "not readable") from exc
        message.DiscardUnknownFields()  # they would be passed on, unseen
        return message
    if not raw or raw == b"null":
        return message
    if _parts(raw) > _MAX_ITEM_PARTS:
        raise ReceiveError("too_large", f"over {_MAX_ITEM_PARTS} objects in one item")
    try:
        tree = msgspec.json.decode(raw)
        _encode_ids(tree)
        ParseDict(tree, message, ignore_unknown_fields=True, max_recursion_depth=_MAX_DEPTH)
        return message
    except _JSON_ERRORS as exc:
        raise ReceiveError("malformed", "not readable") from exc


def _encode_ids(tree: Any) -> None:
    """Change ids from hex, as OTLP writes them, to base64, as protobuf's JSON has bytes. In place."""
    if isinstance(tree, list):
        for item in tree:
            _encode_ids(item)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if name not in _ID_NAMES:
                _encode_ids(value)
            elif isinstance(value, str) and _HEX.fullmatch(value):
                tree[name] = base64.b64encode(bytes.fromhex(value)).decode()
            elif value is not None:
                raise ValueError(name)
