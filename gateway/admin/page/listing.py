"""The query of the list of invocations: what to show, and where the next page begins. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from clrk.gateway.admin.parameters import ParameterError, parse_filter
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.records import InvocationFilter, InvocationSummary

PAGE_ROWS: Final = 50
PHASES: Final = tuple(phase.value for phase in Phase)
TRIGGERS: Final = ("http", "cron", "cli")

# Names and order of the form. The first are those of `clrk traces`.
FIELDS: Final = (
    "agent", "since", "until", "system", "model", "min_input_tokens", "phase", "trigger", "denied", "errors",
)  # fmt: skip
_OWN: Final = ("phase", "trigger", "before")
_MAX_TEXT: Final = 256
_BEFORE: Final = re.compile(r"(\d{1,19})-([0-9a-f-]{36})")

Before = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of the list. before is created_ns and id of the invocation that it begins behind; None: the newest."""

    wanted: InvocationFilter
    before: Before | None
    given: dict[str, str]

    @property
    def is_filtered(self) -> bool:
        """Say whether anything is left out."""
        return any(self.given.values())


def given_fields(query: Mapping[str, str]) -> dict[str, str]:
    """Return what each field of the form holds; an empty one is sent as well, and means nothing."""
    return {name: query.get(name, "")[:_MAX_TEXT] for name in FIELDS}


def parse_listing(query: Mapping[str, str], now_ns: int) -> Listing:
    """Return what the query asks for.

    Raises: ParameterError that says which parameter can not be used.
    """
    given = {name: value for name, value in query.items() if value}
    if "limit" in given:
        raise ParameterError("unknown parameter 'limit': a page holds so many")
    spans, _ = parse_filter({name: value for name, value in given.items() if name not in _OWN}, now_ns)
    phase = given.get("phase", "")
    if phase and phase not in PHASES:
        raise ParameterError(f"phase: write one of {', '.join(PHASES)}, not {phase[:40]!r}")
    trigger = given.get("trigger", "")
    if len(trigger) > _MAX_TEXT:
        raise ParameterError(f"trigger: at most {_MAX_TEXT} characters")
    wanted = InvocationFilter(
        agent=spans.agent,
        phase=phase,
        trigger=trigger,
        since_ns=spans.since_ns,
        until_ns=spans.until_ns,
        system=spans.system,
        model=spans.model,
        denied=spans.denied,
        errors=spans.errors,
        min_input_tokens=spans.min_input_tokens,
    )
    return Listing(wanted, _parse_before(given.get("before", "")), given_fields(query))


def _parse_before(text: str) -> Before | None:
    if not text:
        return None
    if (found := _BEFORE.fullmatch(text)) is None:
        raise ParameterError("before: follow the link to older invocations, it can not be written by hand")
    return min(int(found[1]), 2**63 - 1), found[2]


def show_before(last: InvocationSummary) -> str:
    """Return the parameter of the page behind this invocation."""
    return f"{last.record.created_ns}-{last.record.invocation_id}"
