"""A caller's request as CloudEvents over HTTP has it: binary mode, structured mode, and what is neither. Pure.

The Content-Type decides (HTTP binding 1.0.2, section 3): `application/cloudevents+json` is an event in structured mode,
whose attributes play the part of ce-* headers and whose data is the body; everything else is a body with ce-* headers.

Source: CloudEvents 1.0.2: core section 3, HTTP binding section 3, JSON format sections 2 and 3.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

import msgspec

from clrk.gateway.envelope import (
    SPEC_VERSION,
    EnvelopeError,
    Received,
    check_body,
    checked_value,
    compact_json,
    content_type_of,
    is_callers,
    text_codec,
)
from clrk.gateway.media import STRUCTURED_EVENT, MediaType, parse_media_type

_REQUIRED: Final = ("id", "source", "type")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
_DEFAULT_TYPE: Final = "application/json"  # of `data` without a datacontenttype (JSON format, section 3.1)
_INT32: Final = 2**31
_MAX_ATTRIBUTES_BYTES: Final = 65_536  # without data; half a million of them took a second of everybody's time
_Members = dict[str, msgspec.Raw]


def is_structured(headers: list[tuple[str, str]]) -> bool:
    """Say whether the request is an event in structured mode.

    Raises: EnvelopeError 400 for a batch, 415 for an event in another format than JSON.
    """
    media = parse_media_type(content_type_of(headers))
    if media is None or not media.essence.startswith("application/cloudevents"):
        return False
    if media.essence == STRUCTURED_EVENT:
        return True
    if media.subtype.startswith("cloudevents-batch"):
        raise EnvelopeError("one request is one invocation: send the events of a batch one by one")
    raise EnvelopeError(f"events are read as {STRUCTURED_EVENT}, or in binary mode with ce-* headers", status=415)


def read_binary(attributes: dict[str, str], headers: list[tuple[str, str]], body: bytes) -> Received:
    """Return what a request in binary mode says. attributes are those of its ce-* headers.

    Raises: EnvelopeError when the body is not the JSON that it is said to be.
    """
    content_type = content_type_of(headers)
    check_body(content_type, body)
    return Received(attributes, content_type, body)


def read_structured(body: bytes) -> Received:
    """Return what an event in structured mode says.

    Raises: EnvelopeError for what is no CloudEvent in JSON.
    """
    members = _members(compact_json(body) if body else b"")
    version = _text("specversion", members.pop("specversion", None))
    if version != SPEC_VERSION:
        raise EnvelopeError(f"specversion: this is version {SPEC_VERSION} of CloudEvents, and the event must say so")
    data, encoded = members.pop("data", None), members.pop("data_base64", None)
    content_type = _content_type(members.pop("datacontenttype", None))
    attributes: dict[str, str] = {}
    for name, raw in members.items():
        if not _NAME.fullmatch(name):
            raise EnvelopeError(f"{name[:64]!r}: an attribute is named with a-z, 0-9 and -")
        value = _text(name, raw)
        if value is not None and is_callers(name):
            attributes[name] = checked_value(name, name, value)
    if missing := next((name for name in _REQUIRED if name not in attributes), None):
        raise EnvelopeError(f"{missing}: a CloudEvent has one")
    if data is not None and encoded is not None:
        raise EnvelopeError("data and data_base64: an event has one of them")
    if encoded is not None:
        return _checked(Received(attributes, content_type, _decode(encoded)))
    if data is None:
        return Received(attributes, content_type)
    content_type = content_type or _DEFAULT_TYPE
    return Received(attributes, content_type, _data(data, parse_media_type(content_type)))


class _Data(msgspec.Struct):
    """What of an event may be large; the rest of it is passed over without making objects."""

    data: msgspec.Raw = msgspec.Raw(b"")
    data_base64: msgspec.Raw = msgspec.Raw(b"")


def _members(text: bytes) -> _Members:
    try:
        large = msgspec.json.decode(text, type=_Data)
        if len(text) - len(bytes(large.data)) - len(bytes(large.data_base64)) > _MAX_ATTRIBUTES_BYTES:
            raise EnvelopeError(f"the attributes of the event are over {_MAX_ATTRIBUTES_BYTES} bytes")
        found = msgspec.json.decode(text, type=_Members)
    except msgspec.DecodeError:
        raise EnvelopeError("the body is not a CloudEvent: a JSON object") from None
    # null means that the attribute is not there (JSON format, section 2.2); for data, that there is none
    return {name: raw for name, raw in found.items() if bytes(raw) != b"null"}


def _text(name: str, raw: msgspec.Raw | None) -> str | None:
    """Return the canonical string of an attribute (core, section 3.1): a string, a boolean or a 32-bit integer."""
    if raw is None:
        return None
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:  # a number that Python's do not reach
        value = None
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() if -_INT32 <= value < _INT32:
            return str(value)
    raise EnvelopeError(f"{name[:64]}: an attribute is a string, a boolean or an integer of 32 bits")


def _content_type(raw: msgspec.Raw | None) -> str:
    content_type = _text("datacontenttype", raw)
    if content_type is None:
        return ""
    if not re.fullmatch(r"[\x20-\x7e]+", content_type) or parse_media_type(content_type) is None:
        raise EnvelopeError("datacontenttype: not a media type")
    return content_type.strip()


def _decode(raw: msgspec.Raw) -> bytes:
    try:
        text = msgspec.json.decode(raw, type=str)
        return base64.b64decode(text, validate=True)
    except (msgspec.ValidationError, binascii.Error, ValueError):
        raise EnvelopeError("data_base64: not base64") from None


def _checked(received: Received) -> Received:
    check_body(received.content_type, received.body)
    return received


def _data(raw: msgspec.Raw, media: MediaType | None) -> bytes:
    """Return data as the bytes that its type says: JSON as it was written, or the text of a string."""
    if media is None or media.is_json:
        return bytes(raw)
    try:
        text = msgspec.json.decode(raw, type=str)
    except msgspec.ValidationError:
        raise EnvelopeError(f"data: for {media.essence} it is a string, or data_base64") from None
    codec = text_codec(media.parameters.get("charset", "utf-8"))
    try:
        if codec is not None:
            return text.encode(codec)
    except UnicodeEncodeError:
        pass  # lone surrogates, or not in that charset
    raise EnvelopeError("data: not in the charset of its datacontenttype; data_base64 takes any bytes")
