"""What became of an invocation: from the gateway's memory, or from its record in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.store import TraceStore

Recall = Callable[[str], InvocationRecord | None]


async def await_outcome(store: TraceStore, recall: Recall, invocation_id: str, wait_s: float) -> dict[str, Any] | None:
    """Return the outcome, waiting up to wait_s for the end of the invocation; None when nothing is known of it.

    Raises: StoreError.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        committed = store.committed  # whatever changes a record is followed by a commit
        record = recall(invocation_id)
        if record is None and (found := await store.find_invocation(invocation_id)) is not None:
            record = found.record
        if record is not None and record.phase.ended:
            return _outcome(record)
        try:
            async with asyncio.timeout_at(deadline):
                await committed.wait()
        except TimeoutError:
            return _outcome(record) if record is not None else None


def _outcome(record: InvocationRecord) -> dict[str, Any]:
    return {
        "invocation": record.invocation_id,
        "namespace": record.namespace,
        "agent": record.agent,
        "trigger": record.trigger,
        "phase": record.phase.value,
        "exitCode": record.exit_code,
        "startTimeUnixNano": record.created_ns,
        "endTimeUnixNano": record.ended_ns or None,
        "message": record.message,
    }
