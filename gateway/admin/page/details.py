"""The attributes and events of one span, cut to what a page can hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from clrk.gateway.cli.facts import show_duration
from clrk.gateway.telemetry import attributes as attr

# Of each side of an exchange: its events, the prefix of a header, and the attribute that holds the body.
_CAPTURED: Final = {
    "request": (
        attr.EVENT_HTTP_REQUEST_HEADERS, attr.EVENT_HTTP_REQUEST_BODY,
        attr.HTTP_REQUEST_HEADER_PREFIX, attr.HTTP_REQUEST_BODY_CONTENT,
    ),
    "response": (
        attr.EVENT_HTTP_RESPONSE_HEADERS, attr.EVENT_HTTP_RESPONSE_BODY,
        attr.HTTP_RESPONSE_HEADER_PREFIX, attr.HTTP_RESPONSE_BODY_CONTENT,
    ),
}  # fmt: skip
_IDENTITY: Final = frozenset(
    {
        attr.INVOCATION_ID, attr.AGENT_KIND, attr.AGENT_NAMESPACE, attr.AGENT_NAME, attr.AGENT_UID,
        attr.AGENT_REVISION, attr.CLRK_SANDBOX_ID,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a span is shown. Units: characters."""

    value: int
    body: int
    attributes: int


IN_WATERFALL: Final = Limits(value=400, body=2_000, attributes=64)
ALONE: Final = Limits(value=100_000, body=1_000_000, attributes=1_000)


@dataclass(frozen=True, slots=True)
class Text:
    """Text, perhaps cut. left is how many characters are not shown."""

    text: str
    left: int = 0

    @classmethod
    def cut(cls, value: object, limit: int) -> Text:
        """Return value as text of at most limit characters."""
        text = _as_text(value)
        return cls(text[:limit], max(0, len(text) - limit))


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a span."""

    name: str
    offset: str
    attributes: list[tuple[str, Text]]


@dataclass(frozen=True, slots=True)
class Capture:
    """What was captured of one side of an exchange. side is `request` or `response`."""

    side: str
    headers: list[tuple[str, Text]] = field(default_factory=list)
    body: Text | None = None
    body_facts: list[tuple[str, Text]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Details:
    """Everything of a span that is not in its row."""

    attributes: list[tuple[str, Text]]
    identity: list[tuple[str, Text]]
    attributes_left: int
    captures: list[Capture]
    events: list[Event]
    events_left: int


def details_of(span: Mapping[str, Any], limits: Limits) -> Details:
    """Return what is shown of a span's JSON document."""
    everything = sorted(span["attributes"].items())
    attributes = [pair for pair in everything if not _is_identity(pair[0])]
    identity = [pair for pair in everything if _is_identity(pair[0])]
    captured = {name for names in _CAPTURED.values() for name in names[:2]}
    others = [event for event in span["events"] if event["name"] not in captured]
    return Details(
        attributes=_pairs(attributes[: limits.attributes], limits.value),
        identity=_pairs(identity[: limits.attributes], limits.value),
        attributes_left=max(0, len(attributes) - limits.attributes),
        captures=[capture for side in _CAPTURED if (capture := _capture(span["events"], side, limits)) is not None],
        events=[_event(event, span["start_time_unix_nano"], limits) for event in others[: limits.attributes]],
        events_left=max(0, len(others) - limits.attributes),
    )


def _is_identity(key: str) -> bool:
    """Say whether every span of an invocation has it: not what one looks for in a call."""
    return key in _IDENTITY or key.startswith(attr.AGENT_IDENTITY_PREFIX)


def _event(event: Mapping[str, Any], start_ns: int, limits: Limits) -> Event:
    offset_ns = event["time_unix_nano"] - start_ns
    return Event(
        event["name"],
        f"{'-' if offset_ns < 0 else '+'}{show_duration(abs(offset_ns))}",
        _pairs(sorted(event["attributes"].items())[: limits.attributes], limits.value),
    )


def _capture(events: list[dict[str, Any]], side: str, limits: Limits) -> Capture | None:
    """Gather the captured headers and body of one side; None when nothing was captured."""
    headers: list[tuple[str, Text]] = []
    body: Text | None = None
    facts: list[tuple[str, Text]] = []
    headers_event, body_event, prefix, content = _CAPTURED[side]
    for event in events:
        if event["name"] == headers_event:
            pairs = sorted(event["attributes"].items())
            headers += [(key.removeprefix(prefix), Text.cut(value, limits.value)) for key, value in pairs]
        elif event["name"] == body_event:
            for key, value in sorted(event["attributes"].items()):
                if body is None and key == content:
                    body = Text.cut(value, limits.body)
                else:
                    facts.append((key, Text.cut(value, limits.value)))
    return Capture(side, headers[: limits.attributes], body, facts) if headers or body or facts else None


def _pairs(pairs: list[tuple[str, Any]], limit: int) -> list[tuple[str, Text]]:
    return [(str(key)[:limit], Text.cut(value, limit)) for key, value in pairs]


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    return str(value)
