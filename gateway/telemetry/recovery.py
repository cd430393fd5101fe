"""What a gateway that was killed left in its journal, brought into the store: everything once, nothing forgotten."""

from __future__ import annotations

import collections
import logging
import sqlite3
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.items import BeginItem, InvocationItem, Item, Journaled, SpanItem, decode, is_agents_own
from clrk.gateway.telemetry.journal import Journal, Position
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import SpanRecord, Status, StatusCode

_log = logging.getLogger(__name__)

LOST_SPAN_MESSAGE: Final = "the gateway ended before this did"
LOST_INVOCATION_MESSAGE: Final = "the gateway ended before the invocation did"
_BATCH_BYTES: Final = 16 * 2**20
ERROR_TYPE_GATEWAY_LOST: Final = "gateway_lost"  # value of error.type
# Two of clrk's own spans never have one id; what an agent calls its spans is no matter.
_IS_STORED: Final = "SELECT 1 FROM spans WHERE trace_id = ? AND span_id = ? AND otlp IS NULL LIMIT 1"


_HAS_RECORD: Final = "SELECT 1 FROM invocations WHERE invocation_id = ? AND phase != ''"

Frames = Iterator[tuple[Position, bytes]]


def take(frames: Frames, count: int) -> list[tuple[Position, bytes]]:
    """Return the next frames, so many at most, and no more than fit in a batch's memory."""
    taken, size = [], 0
    for frame in frames:
        taken.append(frame)
        size += len(frame[1])
        if len(taken) >= count or size >= _BATCH_BYTES:
            break
    return taken


def read(payload: bytes, counters: collections.Counter[str]) -> Journaled | None:
    """Read a frame's payload; None, counted, when it is none of ours."""
    try:
        return decode(payload)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        counters["journal_damaged"] += 1
        _log.warning("journal: a frame that can not be read: %s", type(exc).__name__)
        return None


class Recovery:
    """Reads the segments of predecessors, from the first to the last."""

    def __init__(self, journal: Journal, counters: collections.Counter[str]) -> None:
        self._journal = journal
        self._counters = counters
        self._open: dict[str, BeginItem] = {}

    def batches(self, applied: Position, size: int) -> Iterator[tuple[list[Item], Position]]:
        """Yield what is behind applied, in order, with the position up to which it reaches."""
        for number in self._journal.inherited:
            frames = self._journal.frames(number)
            while taken := take(frames, size):
                batch = [item for position, payload in taken if (item := self._follow(payload)) and position > applied]
                if batch:
                    yield batch, taken[-1][0]

    def _follow(self, payload: bytes) -> Item | None:
        """Return what a frame brings into the store, and note what has begun and ended."""
        match item := read(payload, self._counters):
            case BeginItem(record):
                self._open[record.span_id] = item
                return None
            case SpanItem(record) if not is_agents_own(item):
                self._open.pop(record.span_id, None)
        return item

    def lost(self, connection: sqlite3.Connection) -> list[Item]:
        """Return the spans that have begun and will never end; call when all batches are in the store."""
        items: list[Item] = []
        for begun in self._open.values():
            record = begun.record
            if connection.execute(_IS_STORED, (record.trace_id, record.span_id)).fetchone() is not None:
                continue  # its end did not get into the journal, but into the store
            ended = msgspec.structs.replace(
                record,
                end_time_unix_nano=max(record.start_time_unix_nano, self.ended_ns),
                status=Status(StatusCode.ERROR, LOST_SPAN_MESSAGE),
                attributes=record.attributes | {attr.ERROR_TYPE: ERROR_TYPE_GATEWAY_LOST},
            )
            items.append(SpanItem(ended, begun.gateway, begun.sampled))
            if record.name == attr.SPAN_INGRESS_DISPATCH and not self._has_record(connection, record):
                items.append(InvocationItem(self._record_of(record)))
        return items

    @staticmethod
    def _has_record(connection: sqlite3.Connection, dispatch: SpanRecord) -> bool:
        return connection.execute(_HAS_RECORD, (dispatch.attributes[attr.INVOCATION_ID],)).fetchone() is not None

    def _record_of(self, dispatch: SpanRecord) -> InvocationRecord:
        """Return the record of an invocation whose gateway was killed between its first span and its record."""
        known = {name: str(value) for name, value in dispatch.attributes.items()}
        return InvocationRecord(
            invocation_id=known[attr.INVOCATION_ID],
            namespace=known[attr.AGENT_NAMESPACE],
            agent=known[attr.AGENT_NAME],
            revision=known[attr.AGENT_REVISION],
            trigger=known.get(attr.CLRK_TRIGGER, ""),
            phase=Phase.FAILED,
            trace_id=dispatch.trace_id,
            dispatch_span_id=dispatch.span_id,
            run_span_id="",
            created_ns=dispatch.start_time_unix_nano,
            ended_ns=max(dispatch.start_time_unix_nano, self.ended_ns),
            message=LOST_INVOCATION_MESSAGE,
        )

    @property
    def ended_ns(self) -> int:
        """When the predecessor was last known to live; now, if it left no sign."""
        return self._journal.last_alive_ns() or time.time_ns()
