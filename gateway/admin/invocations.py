"""What became of an invocation, told from its spans."""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Any, Final

import msgspec

from clrk.core.resources import MAX_TIMEOUT_S
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.spans import SpanRecord, StatusCode
from clrk.gateway.telemetry.store import TraceStore

_DECODER: Final = msgspec.json.Decoder(SpanRecord)


class Phase(enum.StrEnum):
    """How far an invocation came. RUNNING and LOST are ours; the rest is what the ingress recorded."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    TIMEOUT = "Timeout"
    REJECTED = "Rejected"
    LOST = "Lost"  # its gateway died before it could say how it ended


async def await_outcome(store: TraceStore, invocation_id: str, wait_s: float) -> dict[str, Any] | None:
    """Return the outcome, waiting up to wait_s for the end of the invocation; None when nothing is known of it.

    Raises: StoreError.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        committed = store.committed
        outcome = await _read_outcome(store, invocation_id)
        if outcome is not None and outcome["phase"] != Phase.RUNNING:
            return outcome
        try:
            async with asyncio.timeout_at(deadline):
                await committed.wait()
        except TimeoutError:
            return outcome


async def _read_outcome(store: TraceStore, invocation_id: str) -> dict[str, Any] | None:
    wanted = SpanFilter(invocation_id=invocation_id, name=attr.SPAN_INGRESS_DISPATCH)
    async for page in store.spans(wanted, order="newest", limit=1):
        return _outcome(_DECODER.decode(page[0].json))
    async for page in store.spans(SpanFilter(invocation_id=invocation_id), order="newest", limit=1):
        span = _DECODER.decode(page[0].json)
        # An invocation lives for MAX_TIMEOUT_S at most: what is older and has no end will not get one.
        lost = time.time_ns() - span.end_time_unix_nano > MAX_TIMEOUT_S * 1e9
        return {**_identity(span), "phase": Phase.LOST if lost else Phase.RUNNING, "exitCode": None}
    return None


def _identity(span: SpanRecord) -> dict[str, Any]:
    return {
        "invocation": span.attributes.get(attr.INVOCATION_ID),
        "namespace": span.attributes.get(attr.AGENT_NAMESPACE),
        "agent": span.attributes.get(attr.AGENT_NAME),
        "traceId": span.trace_id,
    }


def _outcome(span: SpanRecord) -> dict[str, Any]:
    phase = span.attributes.get(attr.CLRK_PHASE)
    if phase not in set(Phase):
        phase = Phase.FAILED if span.status.code is StatusCode.ERROR else Phase.SUCCEEDED
    return {
        **_identity(span),
        "phase": phase,
        "exitCode": span.attributes.get(attr.CLRK_EXIT_CODE),
        "trigger": span.attributes.get(attr.CLRK_TRIGGER),
        "httpStatus": span.attributes.get(attr.HTTP_RESPONSE_STATUS_CODE),
        "startTimeUnixNano": span.start_time_unix_nano,
        "endTimeUnixNano": span.end_time_unix_nano,
        "message": span.status.message,
    }
