"""The spans of a run: `invoke_agent` and what its sandbox cost (CONTRACT section 13)."""

from __future__ import annotations

import time

from clrk.core.messages import Exited, Removed, Spawned, Started, StartFailure
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import (
    UNSET,
    AttributeValue,
    Component,
    Identity,
    Recorder,
    SpanKind,
    Status,
    StatusCode,
)


def record_acquire(recorder: Recorder, identity: Identity, started: Started) -> None:
    """Record how long it took to get a sandbox."""
    recorder.record(
        identity,
        component=Component.RUNTIME,
        name=attr.SPAN_SANDBOX_ACQUIRE,
        kind=SpanKind.INTERNAL,
        start_ns=started.acquire_start_ns,
        end_ns=started.acquire_end_ns,
        attributes={attr.CLRK_SANDBOX_WARM: started.warm},
    )


def record_spawn(recorder: Recorder, identity: Identity, spawned: Spawned, *, warm: bool) -> None:
    """Record how long it took until the agent's first process existed."""
    recorder.record(
        identity,
        component=Component.RUNTIME,
        name=attr.SPAN_SANDBOX_SPAWN,
        kind=SpanKind.INTERNAL,
        start_ns=spawned.spawn_start_ns,
        end_ns=spawned.spawn_end_ns,
        attributes={attr.CLRK_SANDBOX_WARM: warm, attr.PROCESS_PID: spawned.pid},
    )


def record_teardown(recorder: Recorder, identity: Identity, removed: Removed, *, warm: bool) -> None:
    """Record how long it took to remove everything."""
    recorder.record(
        identity,
        component=Component.RUNTIME,
        name=attr.SPAN_SANDBOX_TEARDOWN,
        kind=SpanKind.INTERNAL,
        start_ns=removed.teardown_start_ns,
        end_ns=removed.teardown_end_ns,
        attributes={attr.CLRK_SANDBOX_WARM: warm},
    )


def begin_run(recorder: Recorder, identity: Identity, *, start_ns: int, parent_span_id: str) -> None:
    """Note that `invoke_agent` has begun: from now on the agent may act."""
    recorder.begin(
        identity,
        component=Component.RUNTIME,
        name=attr.invoke_agent_span_name(identity.agent_name),
        kind=SpanKind.INTERNAL,
        start_ns=start_ns,
        span_id=identity.context.span_id,
        parent_span_id=parent_span_id,
        attributes=_agent_attributes(identity),
    )


def record_run(
    recorder: Recorder,
    identity: Identity,
    outcome: Outcome,
    exited: Exited | None,
    *,
    start_ns: int,
    parent_span_id: str,
    failure: StartFailure,
) -> None:
    """Record `invoke_agent`; its span id is the identity's, since everything of the run hangs below it.

    Shape: exited is None when the sandbox was there but the agent never began: failure says why.
    """
    attributes = _agent_attributes(identity) | {attr.CLRK_PHASE: outcome.phase.value}
    if exited is not None:
        attributes |= {attr.CLRK_EXIT_REASON: exited.reason.value, attr.CLRK_EXIT_CODE: exited.exit_code}
        if exited.max_rss_bytes:  # 0: nobody measured it
            attributes |= {attr.CLRK_CPU_TIME: exited.cpu_s, attr.CLRK_MEMORY_PEAK: exited.max_rss_bytes}
    status = UNSET
    if not outcome.succeeded:
        attributes[attr.ERROR_TYPE] = error_type(outcome, exited, failure)
        status = Status(StatusCode.ERROR, outcome.message)
    recorder.record(
        identity,
        component=Component.RUNTIME,
        name=attr.invoke_agent_span_name(identity.agent_name),
        kind=SpanKind.INTERNAL,
        start_ns=start_ns,
        end_ns=max(start_ns, exited.exit_ns if exited is not None else time.time_ns()),
        attributes=attributes,
        status=status,
        span_id=identity.context.span_id,
        parent_span_id=parent_span_id,
    )


def _agent_attributes(identity: Identity) -> dict[str, AttributeValue]:
    return {
        attr.GEN_AI_OPERATION_NAME: attr.OPERATION_INVOKE_AGENT,
        attr.GEN_AI_AGENT_NAME: identity.agent_name,
    }


def error_type(outcome: Outcome, exited: Exited | None, failure: StartFailure) -> str:
    """Return a low-cardinality name of what went wrong."""
    if outcome.phase is Phase.CANCELLED:
        return "cancelled"
    if exited is None:
        return failure.value
    return f"exit_code_{exited.exit_code}" if exited.reason.value == "exited" else exited.reason.value
