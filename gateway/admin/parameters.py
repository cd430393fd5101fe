"""Query parameters of the admin API as filters. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.values import parse_duration
from clrk.gateway.telemetry.query import SpanFilter

MAX_LIMIT: Final = 10_000

_LONG_AGO_S: Final = 200 * 365 * 86_400.0  # further back does not fit in 64 bits of nanoseconds
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_KNOWN: Final = frozenset(
    {"agent", "since", "until", "system", "model", "denied", "would_deny", "errors", "min_input_tokens", "limit"}
)
_AGENT: Final = re.compile(r"(?:[a-z0-9-]{1,63}/)?[a-z0-9-]{1,63}")


class ParameterError(ClrkError):
    """A parameter that can not be used; the message says which and what to write instead."""


def parse_time(text: str, now_ns: int) -> int:
    """Return CLOCK_REALTIME nanoseconds of a duration before now (`15m`) or an RFC 3339 time; without offset: UTC.

    Raises: ParameterError that does not know its name.
    """
    try:
        seconds = parse_duration(text)
    except ValueError:
        pass  # not a duration: then it has to be a time
    else:
        return now_ns - int(min(seconds, _LONG_AGO_S) * 1e9)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ParameterError(f"{text[:40]!r} is no time: write 15m, 2h, 1d or 2026-11-22T03:14:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(-(2**62), min(2**62, (moment - _EPOCH) // timedelta(microseconds=1) * 1000))


def parse_filter(query: Mapping[str, str], now_ns: int) -> tuple[SpanFilter, int | None]:
    """Return the filter and the limit (None: everything).

    Raises: ParameterError.
    """
    if unknown := set(query) - _KNOWN:
        raise ParameterError(f"unknown parameter {min(unknown)!r}: use {', '.join(sorted(_KNOWN))}")
    agent = query.get("agent", "")
    if agent and not _AGENT.fullmatch(agent):
        raise ParameterError(f"agent: write NAME or NAMESPACE/NAME, not {agent[:128]!r}")
    wanted = SpanFilter(
        agent=agent,
        since_ns=_time(query, "since", now_ns),
        until_ns=_time(query, "until", now_ns),
        system=query.get("system", ""),
        model=query.get("model", ""),
        denied=_flag(query, "denied"),
        would_deny=_flag(query, "would_deny"),
        errors=_flag(query, "errors"),
        min_input_tokens=_count(query, "min_input_tokens", 2**62),
    )
    return wanted, _count(query, "limit", MAX_LIMIT)


def _time(query: Mapping[str, str], name: str, now_ns: int) -> int | None:
    try:
        return parse_time(query[name], now_ns) if name in query else None
    except ParameterError as exc:
        raise ParameterError(f"{name}: {exc}") from None


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise ParameterError(f"{name}: write true or false, not {value!r}")
    return value == "true"


def _count(query: Mapping[str, str], name: str, maximum: int) -> int | None:
    if name not in query:
        return None
    value = query[name]
    if not value.isascii() or not value.isdecimal() or len(value) > 19 or int(value) > maximum:
        raise ParameterError(f"{name}: write a number from 0 to {maximum}, not {value[:40]!r}")
    return int(value)
