"""Media types and their negotiation (RFC 9110, sections 8.3.1 and 12.5.1). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

STRUCTURED_EVENT: Final = "application/cloudevents+json"

_NAME: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAMETER: Final = re.compile(rf'\s*;\s*(?:({_NAME})\s*=\s*(?:({_NAME})|"((?:[^"\\]|\\.)*)"))?')
_ESSENCE: Final = re.compile(rf"\s*({_NAME})/({_NAME})")
_ELEMENT: Final = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*")+')  # between commas that are not in quotes
_MAX_ACCEPT_SIZE: Final = 1024  # unbalanced quotes make the pattern above quadratic


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type or range. Names are lower-case; parameter values are kept."""

    type: str
    subtype: str
    parameters: Mapping[str, str]

    @property
    def essence(self) -> str:
        """Return `type/subtype`."""
        return f"{self.type}/{self.subtype}"

    @property
    def is_json(self) -> bool:
        """Say whether the content is JSON (RFC 6839, section 3.1, for the suffix)."""
        return self.subtype == "json" or self.subtype.endswith("+json")


def parse_media_type(text: str) -> MediaType | None:
    """Return the media type, or None when text is none."""
    found = _ESSENCE.match(text)
    if found is None:
        return None
    parameters: dict[str, str] = {}
    position = found.end()
    while position < len(text.rstrip()):
        parameter = _PARAMETER.match(text, position)
        if parameter is None:
            return None
        position = parameter.end()
        if parameter[1]:
            value = parameter[2] if parameter[2] is not None else re.sub(r"\\(.)", r"\1", parameter[3])
            parameters.setdefault(parameter[1].lower(), value)
    return MediaType(found[1].lower(), found[2].lower(), parameters)


def prefers_structured(accept: str, content_type: str) -> bool:
    """Say whether the client wants the event as `application/cloudevents+json` rather than as its raw content_type.

    It must name that type itself (a wildcard means raw), with a q above 0 and not below the raw type's.
    """
    ranges = [found for part in _ELEMENT.findall(accept[:_MAX_ACCEPT_SIZE]) if (found := parse_media_type(part))]
    named = [_quality(found) for found in ranges if found.essence == STRUCTURED_EVENT]
    return bool(named) and max(named) > 0 and max(named) >= _best_quality(ranges, content_type)


def _best_quality(ranges: list[MediaType], content_type: str) -> float:
    wanted = parse_media_type(content_type)
    essence, wildcard = (wanted.essence, f"{wanted.type}/*") if wanted else ("", "")
    for candidate in (essence, wildcard, "*/*"):  # the most specific range decides (12.5.1)
        found = [_quality(entry) for entry in ranges if entry.essence == candidate]
        if found:
            return max(found)
    return 0.0


def _quality(entry: MediaType) -> float:
    text = entry.parameters.get("q", "1")
    return float(text) if re.fullmatch(r"0(\.\d{0,3})?|1(\.0{0,3})?", text) else 0.0
