"""What became of an invocation: from the gateway's memory, or from its spans when it is too long ago for that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from clrk.core.resources import MAX_TIMEOUT_S
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.spans import SpanRecord, StatusCode
from clrk.gateway.telemetry.store import TraceStore

_MAX_EXAMINED: Final = 100  # spans of an invocation, from its start
_DECODER: Final = msgspec.json.Decoder(SpanRecord)


_RUNNING: Final = "Running"
_LOST: Final = "Lost"  # its gateway died before it could say how it ended
_UNFINISHED: Final = frozenset({"Pending", _RUNNING})


class KnownInvocation(Protocol):
    """An invocation that the gateway remembers without the store. Units: CLOCK_REALTIME ns; end_ns 0: not yet."""

    @property
    def invocation_id(self) -> str:
        """Its id."""

    @property
    def namespace(self) -> str:
        """Namespace of the agent."""

    @property
    def agent(self) -> str:
        """Name of the agent."""

    @property
    def trigger(self) -> str:
        """What caused it."""

    @property
    def phase(self) -> str:
        """Pending, Running, or how it ended."""

    @property
    def start_ns(self) -> int:
        """When it was admitted."""

    @property
    def end_ns(self) -> int:
        """When it ended."""

    @property
    def exit_code(self) -> int | None:
        """Of the agent's main process, if there was one."""

    @property
    def message(self) -> str:
        """What went wrong, for people."""


Recall = Callable[[str], KnownInvocation | None]


async def await_outcome(store: TraceStore, recall: Recall, invocation_id: str, wait_s: float) -> dict[str, Any] | None:
    """Return the outcome, waiting up to wait_s for the end of the invocation; None when nothing is known of it.

    Raises: StoreError.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        committed = store.committed  # the end of an invocation records spans, so a commit follows it
        known = recall(invocation_id)
        outcome = _known_outcome(known) if known is not None else await _stored_outcome(store, invocation_id)
        if outcome is not None and outcome["phase"] not in _UNFINISHED:
            return outcome
        try:
            async with asyncio.timeout_at(deadline):
                await committed.wait()
        except TimeoutError:
            return outcome


def _known_outcome(known: KnownInvocation) -> dict[str, Any]:
    return {
        "invocation": known.invocation_id,
        "namespace": known.namespace,
        "agent": known.agent,
        "trigger": known.trigger,
        "phase": str(known.phase),
        "exitCode": known.exit_code,
        "startTimeUnixNano": known.start_ns,
        "endTimeUnixNano": known.end_ns or None,
        "message": known.message,
    }


async def _stored_outcome(store: TraceStore, invocation_id: str) -> dict[str, Any] | None:
    """Tell it from the spans: `ingress.dispatch` is the last word, `invoke_agent` knows the process."""
    spans: list[SpanRecord] = []
    dispatch = SpanFilter(invocation_id=invocation_id, name=attr.SPAN_INGRESS_DISPATCH)
    async for page in store.spans(dispatch, order="newest", limit=1):
        spans += [_DECODER.decode(span.json) for span in page]
    async for page in store.spans(SpanFilter(invocation_id=invocation_id), limit=_MAX_EXAMINED):
        spans += [_DECODER.decode(span.json) for span in page]
    if not spans:
        return None
    attributes = {key: value for span in reversed(spans) for key, value in span.attributes.items()}
    last = spans[0]
    phase = attributes.get(attr.CLRK_PHASE)
    if last.name != attr.SPAN_INGRESS_DISPATCH:
        # An invocation lives for MAX_TIMEOUT_S at most: what is older and has no end will not get one.
        age_ns = time.time_ns() - last.start_time_unix_nano
        phase = _LOST if age_ns > MAX_TIMEOUT_S * 1e9 else _RUNNING
    elif phase is None:
        phase = "Failed" if last.status.code is StatusCode.ERROR else "Succeeded"
    ended = phase not in _UNFINISHED
    return {
        "invocation": invocation_id,
        "namespace": attributes.get(attr.AGENT_NAMESPACE),
        "agent": attributes.get(attr.AGENT_NAME),
        "trigger": attributes.get(attr.CLRK_TRIGGER),
        "phase": phase,
        "exitCode": attributes.get(attr.CLRK_EXIT_CODE),
        "startTimeUnixNano": last.start_time_unix_nano,
        "endTimeUnixNano": last.end_time_unix_nano if ended else None,
        "message": last.status.message,
    }
