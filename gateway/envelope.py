"""The CloudEvents 1.0 codec of CONTRACT sections 5 to 7: request -> event -> structured JSON or binary headers. Pure.

Where a caller's word stops: `specversion`, `traceparent`, `tracestate`, `invocationid`, `clrkrevision`, `clrkidentity`
are ours; `httpmethod`, `httpurl`, `httpquery` and `datacontenttype` state facts of the request. A `ce-` header with one
of these names is passed over in silence; a `ce-` header that is malformed is an EnvelopeError.

Source: CloudEvents 1.0.2: core section 3 (attributes, types), HTTP binding 3.1.3.2 (header values), JSON format 3.1.
"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec

from clrk.core.errors import ClrkError
from clrk.gateway.media import parse_media_type

SPEC_VERSION: Final = "1.0"
DEFAULT_TYPE: Final = "dev.apoxy.clrk.taskagent.invoke"
RESPONSE_TYPE: Final = "dev.apoxy.clrk.taskagent.response"

_OURS: Final = frozenset({"specversion", "traceparent", "tracestate", "invocationid", "clrkrevision", "clrkidentity"})
_FACTS: Final = frozenset({"httpmethod", "httpurl", "httpquery", "datacontenttype"})
_NON_EMPTY: Final = frozenset({"id", "source", "type", "subject", "time", "dataschema"})
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BROKEN_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_FORBIDDEN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef]|[\ufffe\uffff]")  # core, section 3.1 String
_NOT_IN_URI: Final = re.compile(r'[\s<>"{}|\\^`]')
_ENCODE: Final = re.compile(r'[^\x21-\x7e]|["%]')
# Text encodings that decode in linear time; anything else travels as base64.
_CHARSETS: Final = frozenset(
    {"utf-8", "ascii", "iso8859-1", "iso8859-15", "cp1252", "utf-16", "utf-16-le", "utf-16-be"}
)


class EnvelopeError(ClrkError):
    """The caller's request makes no event; answered with status. The message may be shown to the caller."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class EventContext:
    """What clrk itself says about the request. path and query are the request target's, still percent-encoded."""

    namespace: str
    agent: str
    revision: str
    invocation_id: str
    trigger: str
    traceparent: str
    tracestate: str
    method: str
    path: str
    query: str
    time: datetime
    identity: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Received:
    """What a caller's request says, however it says it: its attributes, the type of its data ("": none), the data."""

    attributes: dict[str, str]
    content_type: str
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Event:
    """One CloudEvent: attributes in the order of CONTRACT section 5, and the body as it came."""

    attributes: dict[str, str]
    body: bytes = b""

    @property
    def content_type(self) -> str:
        """Return datacontenttype, or the type of bytes that have none."""
        return self.attributes.get("datacontenttype", "application/octet-stream")


def event_attributes(received: Received, context: EventContext, fallback_id: str = "") -> dict[str, str]:
    """Return the attributes of the event that the agent gets. fallback_id: see request_id."""
    given = dict(received.attributes)
    attributes = {
        "specversion": SPEC_VERSION,
        "id": given.pop("id", "") or fallback_id or context.invocation_id,
        "source": given.pop("source", agent_source(context.namespace, context.agent)),
        "type": given.pop("type", DEFAULT_TYPE),
        "time": given.pop("time", "") or rfc3339(context.time),
        "subject": given.pop("subject", context.trigger),
        "datacontenttype": received.content_type,
        "traceparent": context.traceparent,
        "tracestate": context.tracestate,
        "invocationid": context.invocation_id,
        "clrkrevision": context.revision,
        "clrkidentity": msgspec.json.encode(dict(context.identity)).decode() if context.identity else "",
        "httpmethod": context.method,
        "httpurl": context.path,
        "httpquery": context.query,
    }
    return {name: value for name, value in attributes.items() if value} | given


def check_body(content_type: str, body: bytes) -> None:
    """Refuse a body that is not what a JSON content type says.

    Raises: EnvelopeError with the position.
    """
    media = parse_media_type(content_type)
    if body and media is not None and media.is_json:
        compact_json(body)


def to_structured(event: Event) -> bytes:
    """Return the event as one line of JSON (structured mode), without a line end.

    A JSON body is embedded as it was written, numbers to the digit; only white space between tokens goes.
    """
    head = msgspec.json.encode(event.attributes)[:-1]
    return head + _data_member(event) + b"}"


def to_binary_headers(event: Event) -> list[tuple[str, str]]:
    """Return the ce-* headers of binary mode, and Content-Type if the event has one."""
    headers = [(f"ce-{name}", _percent_encode(v)) for name, v in event.attributes.items() if name != "datacontenttype"]
    if "datacontenttype" in event.attributes:
        headers.append(("Content-Type", event.attributes["datacontenttype"]))
    return headers


def agent_source(namespace: str, agent: str) -> str:
    """Return the agent as a CloudEvents source."""
    return f"clrk://{namespace}/{agent}"


def response_event(request: Event, source: str, content_type: str, body: bytes, now: datetime) -> Event:
    """Wrap an agent's answer to request (CONTRACT section 6); source is the agent's."""
    given = request.attributes
    attributes = {
        "specversion": SPEC_VERSION,
        "id": f"{given['id']}.response",
        "source": source,
        "type": RESPONSE_TYPE,
        "time": rfc3339(now),
        "datacontenttype": content_type,
        "relationid": given["id"],
        "invocationid": given["invocationid"],
        "traceparent": given["traceparent"],
    }
    return Event(attributes, body)


def rfc3339(moment: datetime) -> str:
    """Return an aware time in UTC with milliseconds and `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- from headers ---------------------------------------------------------------------------------------------------


def caller_attributes(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return what the ce-* headers say, without what a caller can not set.

    Raises: EnvelopeError for a malformed one.
    """
    found: dict[str, str] = {}
    for header, raw in headers:
        name = header.lower().removeprefix("ce-")
        if name == header.lower() or not is_callers(name):
            continue
        if not _NAME.fullmatch(name) or name == "data":
            raise EnvelopeError(f"{header}: an attribute is named with a-z, 0-9 and -, and not `data`")
        if name in found:
            raise EnvelopeError(f"{header}: given more than once")
        found[name] = checked_value(header, name, _decode_header_value(header, raw))
    return found


def is_callers(name: str) -> bool:
    """Say whether the attribute is a caller's to set; one that is not is passed over in silence."""
    return name not in _OURS and name not in _FACTS


def checked_value(where: str, name: str, value: str) -> str:
    """Return the value of an attribute as the event has it; times are in UTC.

    Raises: EnvelopeError that names where.
    """
    if name in _NON_EMPTY and not value:
        raise EnvelopeError(f"{where}: must not be empty")
    if _FORBIDDEN.search(value) or any(ord(char) & 0xFFFE == 0xFFFE for char in value):
        raise EnvelopeError(f"{where}: control characters and noncharacters are not allowed")
    if name in ("source", "dataschema") and _NOT_IN_URI.search(value):
        raise EnvelopeError(f"{where}: not a URI reference")
    return _utc_time(where, value) if name == "time" else value


def _decode_header_value(header: str, raw: str) -> str:
    """Unquote, then decode percent-encoding exactly once (HTTP binding 3.1.3.2)."""
    text = raw.strip(" \t")
    if text.startswith('"'):
        quoted = _QUOTED.fullmatch(text)
        if quoted is None:
            raise EnvelopeError(f"{header}: a quoted value that does not end")
        text = re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL)
    if not text.isascii():
        raise EnvelopeError(f"{header}: characters outside ASCII must be percent-encoded as UTF-8")
    if _BROKEN_PERCENT.search(text):
        raise EnvelopeError(f"{header}: % must be followed by two hex digits; write a percent sign as %25")
    try:
        return re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes.fromhex(m[1].decode()), text.encode()).decode()
    except UnicodeDecodeError:
        raise EnvelopeError(f"{header}: percent-encoded bytes are not UTF-8") from None


def _utc_time(header: str, value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", value):
        raise EnvelopeError(f"{header}: not an RFC 3339 time, for example 2026-01-31T08:15:00Z")
    try:
        moment = datetime.fromisoformat(value.upper())
    except ValueError:
        raise EnvelopeError(f"{header}: no such time") from None
    if value.endswith("Z"):
        return value  # to the letter: fractions beyond microseconds stay
    try:
        return rfc3339(moment)
    except OverflowError:
        raise EnvelopeError(f"{header}: no such time in UTC") from None


def request_id(headers: Sequence[tuple[str, str]]) -> str:
    """Return the event's id where the caller's event has none: X-Clrk-Execution-ID, X-Request-Id, or ""."""
    for wanted in ("x-clrk-execution-id", "x-request-id"):
        for name, value in headers:
            if name.lower() == wanted and (text := value.strip(" \t")) and re.fullmatch(r"[\x20-\x7e]+", text):
                return text
    return ""


def content_type_of(headers: Sequence[tuple[str, str]]) -> str:
    """Return the request's Content-Type, "" when it has none.

    Raises: EnvelopeError when it is not printable, or there are several.
    """
    values = [value.strip(" \t") for name, value in headers if name.lower() == "content-type"]
    if len(values) > 1:
        raise EnvelopeError("Content-Type: given more than once")
    if values and values[0] and not re.fullmatch(r"[\x20-\x7e]+", values[0]):
        raise EnvelopeError("Content-Type: not printable ASCII")
    return values[0] if values else ""


# --- to JSON and headers --------------------------------------------------------------------------------------------


def compact_json(body: bytes) -> bytes:
    """Return JSON text without white space between its tokens, which are kept to the letter.

    Raises: EnvelopeError with the position.
    """
    try:
        body.decode()
        return msgspec.json.format(body, indent=-1)
    except UnicodeDecodeError as exc:
        raise EnvelopeError(f"the body is not JSON: byte {exc.start} is not UTF-8") from None
    except RecursionError:
        raise EnvelopeError("the body is not usable JSON: nested too deep") from None
    except msgspec.DecodeError as exc:
        raise EnvelopeError(f"the body is not JSON: {str(exc).removeprefix('JSON is malformed: ')}") from None


def _data_member(event: Event) -> bytes:
    if not event.body:
        return b""
    media = parse_media_type(event.content_type)
    if media is not None and media.is_json:
        try:
            return b',"data":' + compact_json(event.body)
        except EnvelopeError:  # an agent's answer is not checked before: what is no JSON travels as bytes
            return _base64_member(event.body)
    if media is not None and media.type == "text":
        text = _decode_text(event.body, media.parameters.get("charset", "utf-8"))
        return _base64_member(event.body) if text is None else b',"data":' + msgspec.json.encode(text)
    return _base64_member(event.body)


def _base64_member(body: bytes) -> bytes:
    return b',"data_base64":"' + base64.b64encode(body) + b'"'


def text_codec(charset: str) -> str | None:
    """Return the name of a codec that text in this charset is read and written with; None: it travels as bytes."""
    try:
        codec = codecs.lookup(charset).name
    except (LookupError, ValueError):  # ValueError: a NUL in its name
        return None
    return codec if codec in _CHARSETS else None


def _decode_text(body: bytes, charset: str) -> str | None:
    codec = text_codec(charset)
    try:
        return body.decode(codec) if codec is not None else None
    except ValueError:
        return None


def _percent_encode(value: str) -> str:
    return _ENCODE.sub(lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode()), value)
