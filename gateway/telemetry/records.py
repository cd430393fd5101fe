"""The record of an invocation: what is known of it without reading its spans. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.call_filter import CallFilter

# Position in a listing: (created_ns, invocation_id) of the last one seen.
InvocationPosition = tuple[int, str]


class InvocationRecord(msgspec.Struct, frozen=True):
    """How one invocation stands; each change is a whole new record, the last one written counts.

    Shape: caller is `address:port`, `uid 1000` for the admin socket, "" for a schedule. status is the HTTP status that
    the caller got, 0: none. span ids and trace_id are those of `ingress.dispatch` and `invoke_agent`.
    Units: CLOCK_REALTIME nanoseconds, 0: not yet.
    """

    invocation_id: str
    namespace: str
    agent: str
    revision: str
    trigger: str
    phase: Phase
    trace_id: str
    dispatch_span_id: str
    run_span_id: str
    created_ns: int
    started_ns: int = 0
    ended_ns: int = 0
    caller: str = ""
    status: int = 0
    exit_code: int | None = None
    exit_reason: str = ""
    message: str = ""
    identity: dict[str, str] = {}


class InvocationTotals(msgspec.Struct, frozen=True):
    """What the calls of an invocation add up to, from clrk's own spans; agents' own spans do not count.

    Shape: calls are all calls that went out (llm_calls among them) and errors those that failed; what was denied is in
    denials only. cost_usd is None when no call had a known price.
    """

    llm_calls: int = 0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    denials: int = 0
    errors: int = 0


class InvocationSummary(msgspec.Struct, frozen=True):
    """A record and its totals: one line of `clrk agents invocations` and of the page."""

    record: InvocationRecord
    totals: InvocationTotals

    @property
    def position(self) -> InvocationPosition:
        """Where it stands in a listing: what follows it is asked for with this."""
        return (self.record.created_ns, self.record.invocation_id)


@dataclass(frozen=True, slots=True)
class InvocationFilter(CallFilter):
    """What listings of invocations may ask for, by created_ns; empty fields do not filter.

    Shape: system, model, denied, would_deny, errors and min_input_tokens ask for invocations with at least one such
    call (errors: one such span, as `clrk traces --errors` shows them).
    """

    phase: str = ""
    trigger: str = ""
