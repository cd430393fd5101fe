"""Invocations and log lines as the admin API tells them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec

from clrk.gateway.admin.page.listing import parse_listing, show_before
from clrk.gateway.admin.parameters import MAX_LIMIT, ParameterError
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.query import LogLine
from clrk.gateway.telemetry.records import InvocationSummary
from clrk.gateway.telemetry.store import TraceStore

_DEFAULT_LIMIT: Final = 50
_PAGE: Final = 1000
_FLUSH_S: Final = 1.0
_UNFINISHED: Final = frozenset({Phase.PENDING, Phase.RUNNING})
_ENCODER: Final = msgspec.json.Encoder()


async def list_invocations(store: TraceStore, query: Mapping[str, str]) -> dict[str, Any]:
    """Return one page: the newest invocations first, and the parameter `before` of the next page.

    Raises: ParameterError, StoreError.
    """
    limit = _limit(query)
    listing = parse_listing({name: value for name, value in query.items() if name != "limit"}, time.time_ns())
    found = await store.list_invocations(listing.wanted, limit=limit, before=listing.before)
    more = show_before(found[-1]) if len(found) == limit else None
    return {"items": [invocation_document(summary) for summary in found], "before": more}


def invocation_document(summary: InvocationSummary) -> dict[str, Any]:
    """Return the JSON of one invocation. Units: CLOCK_REALTIME nanoseconds, null: not yet."""
    record, totals = summary.record, summary.totals
    return {
        "invocation": record.invocation_id,
        "namespace": record.namespace,
        "agent": record.agent,
        "revision": record.revision,
        "trigger": record.trigger,
        "caller": record.caller,
        "identity": record.identity,
        "phase": record.phase.value,
        "status": record.status or None,
        "exitCode": record.exit_code,
        "exitReason": record.exit_reason,
        "message": record.message,
        "createdTimeUnixNano": record.created_ns,
        "startTimeUnixNano": record.started_ns or None,
        "endTimeUnixNano": record.ended_ns or None,
        "traceId": record.trace_id,
        "calls": totals.calls,
        "llmCalls": totals.llm_calls,
        "inputTokens": totals.input_tokens,
        "outputTokens": totals.output_tokens,
        "costUsd": totals.cost_usd,
        "denials": totals.denials,
        "errors": totals.errors,
    }


async def follow_lines(store: TraceStore, agent: str, invocation_id: str, tail: int) -> AsyncIterator[bytes]:
    """Yield the last lines and then each new one as NDJSON; of one invocation, until it has ended.

    Raises: StoreError.
    """
    after_seq = 0 if tail else await store.last_seq("logs")
    size, head = tail or _PAGE, tail == 0
    while True:
        # Asked before the lines are read: what it wrote before its end is then read as well.
        has_ended = invocation_id != "" and await _has_ended(store, invocation_id)
        committed = store.committed
        await store.flush(_FLUSH_S)
        lines = await store.logs(agent, invocation_id=invocation_id, after_seq=after_seq, tail=size, head=head)
        if lines:
            yield encode_lines(lines)
            after_seq = lines[-1].seq
        elif has_ended:
            return
        else:
            await committed.wait()
        size, head = _PAGE, True  # from where we are: a burst is told whole


def encode_lines(lines: list[LogLine]) -> bytes:
    """Return NDJSON."""
    return b"".join(_ENCODER.encode(line) + b"\n" for line in lines)


async def _has_ended(store: TraceStore, invocation_id: str) -> bool:
    found = await store.find_invocation(invocation_id)
    return found is None or found.record.phase not in _UNFINISHED


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(_DEFAULT_LIMIT))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or not 0 < int(text) <= MAX_LIMIT:
        raise ParameterError(f"limit: write a number from 1 to {MAX_LIMIT}, not {text[:40]!r}")
    return int(text)
