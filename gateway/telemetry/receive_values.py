"""Attributes that an agent sent: cleaned of what it may not say, bounded, and as the store keeps them. Pure.

Everything is built anew from the fields that are known here, so that a field of a later OTLP version can not carry past
us what this version refuses.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.proto.common.v1.common_pb2 import (
    AnyValue,
    ArrayValue,
    InstrumentationScope,
    KeyValue,
    KeyValueList,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import AttributeValue

MAX_NAME_CHARS: Final = 256
MAX_TEXT_CHARS: Final = 32_768  # in what is exported: prompts and answers are long
MAX_KEPT_CHARS: Final = 8192  # in the store's own record
MAX_ATTRIBUTES: Final = 128  # of a span, a log record, an event
_MAX_SEEN: Final = 1024  # attributes of one thing that are looked at
_MAX_HEAD_ATTRIBUTES: Final = 64  # of a resource or a scope, which is repeated with every item
_MAX_HEAD_BYTES: Final = 16_384
_MAX_DEPTH: Final = 8
_MAX_NODES: Final = 1024  # of one nested value
_MAX_INT64: Final = 2**63 - 1

# Names that only clrk may fill. `clrk` and `agent` alone: as the head of a nested value they are the same names to a
# backend that flattens.
_RESERVED: Final = frozenset(
    {attr.INVOCATION_ID, attr.AGENT_KIND, attr.AGENT_NAMESPACE, attr.AGENT_NAME, attr.AGENT_UID, attr.AGENT_REVISION}
)
_RESERVED_PREFIXES: Final = ("clrk.", attr.AGENT_IDENTITY_PREFIX)
_RESERVED_HEADS: Final = frozenset({"clrk", "invocation", "agent", attr.AGENT_IDENTITY_PREFIX.rstrip(".")})
_SEPARATORS: Final = re.compile(r"[^a-z0-9]")


def is_reserved(name: str, *, nested: bool = False, flat: bool = False) -> bool:
    """Say whether an agent may not use an attribute's name.

    Shape: nested says that the value is a map. flat takes the names that Prometheus makes of ours for ours: metrics end
        there, and `agent_name` would be merged with `agent.name`.
    """
    if flat:
        name = _SEPARATORS.sub(".", name.lower())
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES) or (nested and name in _RESERVED_HEADS)


@dataclass(slots=True)
class Cleaned:
    """Attributes as they go on, and how many did not."""

    values: list[KeyValue] = field(default_factory=list)
    dropped: int = 0


def clean_attributes(
    source: Sequence[KeyValue], *, limit: int = MAX_ATTRIBUTES, max_bytes: int | None = None, flat: bool = False
) -> Cleaned:
    """Return the attributes that an agent may set: unique, bounded, without reserved names. Those are not counted."""
    cleaned = Cleaned()
    seen: set[str] = set()
    size = 0
    for index, pair in enumerate(source):
        if index >= _MAX_SEEN or len(seen) >= limit:
            cleaned.dropped += len(source) - index
            break
        name = pair.key
        if is_reserved(name, nested=pair.value.WhichOneof("value") == "kvlist_value", flat=flat):
            continue
        value = _clean_value(pair.value, _Allowance())
        if not name or len(name) > MAX_NAME_CHARS or name in seen or value is None:
            cleaned.dropped += 1
            continue
        made = KeyValue(key=name, value=value)
        size += made.ByteSize()
        if max_bytes is not None and size > max_bytes:
            cleaned.dropped += 1
            continue
        seen.add(name)
        cleaned.values.append(made)
    return cleaned


def clean_body(value: AnyValue) -> AnyValue:
    """Return a log record's body within bounds; empty where it is out of them."""
    return _clean_value(value, _Allowance()) or AnyValue()


def clean_resource(source: Resource, ours: Sequence[KeyValue]) -> Resource:
    """Return the agent's resource with our attributes in place of what it says under their names."""
    own_names = {pair.key for pair in ours}
    theirs = [pair for pair in source.attributes[:_MAX_SEEN] if pair.key not in own_names]
    cleaned = clean_attributes(theirs, limit=_MAX_HEAD_ATTRIBUTES, max_bytes=_MAX_HEAD_BYTES)
    return Resource(
        attributes=[*cleaned.values, *ours],
        dropped_attributes_count=bounded_count(source.dropped_attributes_count + cleaned.dropped),
    )


def clean_scope(source: InstrumentationScope) -> InstrumentationScope:
    """Return the scope within bounds."""
    cleaned = clean_attributes(source.attributes, limit=_MAX_HEAD_ATTRIBUTES, max_bytes=_MAX_HEAD_BYTES)
    return InstrumentationScope(
        name=source.name[:MAX_NAME_CHARS],
        version=source.version[:MAX_NAME_CHARS],
        attributes=cleaned.values,
        dropped_attributes_count=bounded_count(source.dropped_attributes_count + cleaned.dropped),
    )


def bounded_count(count: int) -> int:
    """Return a count that fits the uint32 of OTLP."""
    return min(count, 2**32 - 1)


class _Allowance:
    """How much of one value has been looked at."""

    __slots__ = ("nodes",)

    def __init__(self) -> None:
        self.nodes = _MAX_NODES


def _clean_value(value: AnyValue, allowance: _Allowance, depth: int = 0) -> AnyValue | None:
    """Return a copy within bounds; None when it is nested too deeply or has too many parts."""
    allowance.nodes -= 1
    if depth > _MAX_DEPTH or allowance.nodes < 0:
        return None
    kind = value.WhichOneof("value")
    match kind:
        case "string_value":
            return AnyValue(string_value=value.string_value[:MAX_TEXT_CHARS])
        case "bytes_value":
            return AnyValue(bytes_value=value.bytes_value[:MAX_TEXT_CHARS])
        case "bool_value" | "int_value" | "double_value":
            return AnyValue(**{kind: getattr(value, kind)})
        case "array_value":
            items = [_clean_value(item, allowance, depth + 1) for item in value.array_value.values]
            whole = [item for item in items if item is not None]
            return AnyValue(array_value=ArrayValue(values=whole)) if len(whole) == len(items) else None
        case "kvlist_value":
            return _clean_map(value.kvlist_value, allowance, depth)
        case None:
            return AnyValue()
        case _:  # a kind of value of a later OTLP
            return None


def _clean_map(source: KeyValueList, allowance: _Allowance, depth: int) -> AnyValue | None:
    made = KeyValueList()
    for pair in source.values:
        value = _clean_value(pair.value, allowance, depth + 1)
        if value is None:
            return None
        made.values.append(KeyValue(key=pair.key[:MAX_NAME_CHARS], value=value))
    return AnyValue(kvlist_value=made)


# --- as the store keeps them ----------------------------------------------------------------------------------------


def key_values(attributes: Mapping[str, AttributeValue]) -> list[KeyValue]:
    """Return our own attributes as OTLP; those of an identity and a resource are all strings."""
    return [
        KeyValue(key=name, value=AnyValue(string_value=str(value).encode("utf-8", "replace").decode()))
        for name, value in attributes.items()
    ]


def project(source: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    """Return cleaned attributes as a span record has them: what is nested becomes JSON text, bytes base64."""
    return {pair.key: project_value(pair.value) for pair in source}


def project_value(value: AnyValue) -> AttributeValue:
    """Return one value; a float that JSON can not say becomes its name."""
    plain = _plain(value)
    if plain is None:
        return ""
    if isinstance(plain, str):
        return plain[:MAX_KEPT_CHARS]
    if isinstance(plain, bool | int | float):
        return plain
    if isinstance(plain, list) and all(isinstance(item, str) for item in plain):
        if sum(len(item) for item in plain) <= MAX_KEPT_CHARS:
            return plain
    return json.dumps(plain, ensure_ascii=False)[:MAX_KEPT_CHARS]


def _plain(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            number = value.double_value
            return number if math.isfinite(number) else str(number)
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case "array_value":
            return [_plain(item) for item in value.array_value.values]
        case "kvlist_value":
            return {pair.key: _plain(pair.value) for pair in value.kvlist_value.values}
        case _:
            return None
