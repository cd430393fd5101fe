"""The one thread that writes the embedded store.

Theory of operation: producers append to the journal and to a bounded queue, and go on; the thread takes what is there,
writes it in one transaction together with how far the journal is applied, and reports the commit. It begins with what a
predecessor left in the journal (recovery.py). Nothing here can slow or break a call:
- queue full: the item waits in the journal, from where the thread reads on when it is through with the queue;
- journal full or not writable as well: the item is dropped and counted;
- disk full, file not writable: the batch is kept and tried again every second, while the queue fills;
- an item that SQLite will not take: dropped and counted, the rest of the batch is written;
- a damaged file (or one of another version): moved aside, a new one opened; what it held is lost, not what comes.
"""

from __future__ import annotations

import collections
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from clrk.gateway.telemetry import schema
from clrk.gateway.telemetry.items import (
    JOURNALED,
    Barrier,
    BeginItem,
    Item,
    Lost,
    SpanItem,
    encode,
    is_agents_own,
    size_bytes,
)
from clrk.gateway.telemetry.journal import Journal, Position
from clrk.gateway.telemetry.query import reader
from clrk.gateway.telemetry.recovery import Recovery, read, take
from clrk.gateway.telemetry.store_file import ITEM_ERRORS, StoreFile

_log = logging.getLogger(__name__)

MAX_QUEUE_BYTES: Final = 64 * 2**20
JOURNAL_FOLDER: Final = "journal"
_BATCH: Final = 2000
_COALESCE_S: Final = 0.02  # one transaction for what comes together; the journal has it meanwhile
_RETRY_S: Final = 1.0
_PURGE_EVERY_S: Final = 60.0


class _Queued(NamedTuple):
    """An item in the queue; position is where the journal has it, for a barrier the last position before it."""

    item: Item
    size: int
    position: Position | None


class StoreWriter(threading.Thread):
    """Owns the read-write connection and the journal. Methods may be called from any thread.

    Side effects: creates `path` (mode 0600), SQLite's -wal and -shm and the journal's folder beside it; on_commit runs
    in this thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        retention_s: float,
        max_file_bytes: int,
        on_commit: Callable[[], None],
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        super().__init__(name="clrk-trace-store", daemon=True)
        self.retention_s = retention_s
        self.exporters: frozenset[str] = frozenset()
        self.counters: collections.Counter[str] = collections.Counter()
        self._file = StoreFile(path, self.counters)
        self._max_file_bytes = max_file_bytes
        self._max_queue_bytes = max_queue_bytes
        self._on_commit = on_commit
        self._queue: collections.deque[_Queued] = collections.deque()
        self._queued_bytes = 0
        self._hurry = False
        self._journal = Journal(path.parent / JOURNAL_FOLDER, self.counters, above=_applied_segment(path))
        self._applied = self._last = self._journal.start
        self._behind = False  # the queue was full: what came then is in the journal only
        self._held: list[_Queued] = []  # barriers that wait for what is in the journal only
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._stopping = False

    # --- any thread -------------------------------------------------------------------------------------------------

    def put(self, item: Item) -> bool:
        """Keep an item; False when it was dropped. Never waits for the store.

        When this returns True for a journaled item, the end of this process does not lose it any more, unless the
        journal counted an error.
        """
        try:
            payload = encode(item) if isinstance(item, JOURNALED) else None
        except ITEM_ERRORS as exc:
            return self._refuse(exc)
        size = size_bytes(item, payload)
        with self._lock:
            position = self._journal.append(payload) if payload is not None and not self._stopping else None
            if position is not None:
                self._last = position
                if isinstance(item, SpanItem) and not is_agents_own(item):
                    self._journal.end_of(item.record.span_id)
            elif isinstance(item, Barrier):
                position = self._last
            if size and (self._behind or self._queued_bytes + size > self._max_queue_bytes) and position is not None:
                self._behind = True
                return True
            if self._stopping or (size and self._queued_bytes + size > self._max_queue_bytes):
                self.counters["dropped_queue_full"] += 1
                if isinstance(item, Barrier):
                    item.done.set_result(None)
                return False
            self._queue.append(_Queued(item, size, position))
            self._queued_bytes += size
            if isinstance(item, Barrier):
                self._hurry = True
            if self._hurry or len(self._queue) in (1, _BATCH):
                self._wake.notify()
        return True

    def begin(self, item: BeginItem) -> bool:
        """Note in the journal that a span has begun; False when the journal could not take it, which is counted."""
        try:
            payload = encode(item)
        except ITEM_ERRORS as exc:
            return self._refuse(exc)
        with self._lock:
            return not self._stopping and self._journal.begin(item.record.span_id, payload) is not None

    def _refuse(self, exc: Exception) -> bool:
        self.counters["dropped_bad_item"] += 1
        _log.warning("trace store: item refused: %s", type(exc).__name__)
        return False

    @property
    def queued_bytes(self) -> int:
        """Estimate of the memory that waits for the disk."""
        return self._queued_bytes

    @property
    def journal_bytes(self) -> int:
        """Size of the journal on the disk."""
        return self._journal.size_bytes

    def stop(self) -> None:
        """Write what is queued, once, and end. Join the thread afterwards."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # --- this thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Recover, then write batches until stopped."""
        next_purge = 0.0
        if self._recover():
            while (taken := self._take()) is not None and self._persist(*taken):
                if time.monotonic() >= next_purge:
                    next_purge = time.monotonic() + _PURGE_EVERY_S
                    self._file.purge(self.retention_s, self._max_file_bytes, self.exporters, lambda: self._stopping)
        left = list(self._queue)  # nothing is added any more; what the journal has is for the next start
        self.counters["dropped_at_close"] += _unjournaled(left)
        self._release(left, everything=True)
        self._file.close()
        self._journal.close()

    def _persist(self, batch: list[_Queued], applied: Position | None) -> bool:
        """Write the batch, however long it takes; False when stopped before the disk took it."""
        while not self._write([entry.item for entry in batch], applied):
            self._release(batch, everything=True)
            if not self._wait_to_retry():
                self.counters["dropped_at_close"] += _unjournaled(batch)
                return False
        self._release(batch)
        return True

    def _wait_to_retry(self) -> bool:
        """Wait a moment; False when there will be no other try."""
        with self._wake:
            return not self._wake.wait_for(lambda: self._stopping, timeout=_RETRY_S)

    def _recover(self) -> bool:
        """Apply the journal of predecessors; False when stopped before the disk took it: it is left for the next."""
        while True:
            try:
                if self._recover_once(self._file.open()):
                    return True
            except (sqlite3.Error, OSError) as exc:
                self._file.failed(exc)
            with self._wake:
                waiting = list(self._queue)
            self._release(waiting, everything=True)
            if not self._wait_to_retry():
                return False

    def _recover_once(self, connection: sqlite3.Connection) -> bool:
        applied = Position(*(connection.execute(schema.SELECT_APPLIED).fetchone() or (0, 0)))
        recovery = Recovery(self._journal, self.counters)
        for items, position in recovery.batches(applied, _BATCH):
            # No segment is deleted yet: what had begun in it is not in the store before `lost` is.
            if not self._file.write(items, position):
                return False
            self.counters["journal_replayed"] += len(items)
        lost = recovery.lost(connection)
        if not self._write([*lost, Lost(recovery.ended_ns)], self._journal.start):
            return False
        self.counters["gateway_lost_spans"] += len(lost)
        return True

    def _take(self) -> tuple[list[_Queued], Position | None] | None:
        """Wait for items, and say up to where the journal is applied with them. None when stopped and through.

        An idle minute gives an empty batch, so that it can purge.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._behind or self._stopping, timeout=_PURGE_EVERY_S)
            self._wake.wait_for(
                lambda: self._hurry or self._behind or self._stopping or len(self._queue) >= _BATCH,
                timeout=_COALESCE_S if self._queue else 0,
            )
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._queued_bytes -= sum(entry.size for entry in batch)
            self._hurry = self._hurry and bool(self._queue)
            if batch or not self._behind:
                if not batch and self._stopping:
                    return None
                positions = [entry.position for entry in batch if entry.size and entry.position is not None]
                return batch, positions[-1] if positions else None
        return self._read_on()

    def _read_on(self) -> tuple[list[_Queued], Position | None]:
        """Return what is in the journal only, behind what is applied."""
        with self._wake:
            end, following = self._journal.end, self._journal.next_segment(self._applied.segment)
        segment, offset = self._applied
        frames = take(self._journal.frames(segment, offset, end.offset if segment == end.segment else None), _BATCH)
        if frames:
            applied = frames[-1][0]
        else:
            applied = end if following is None or segment == end.segment else Position(following, 0)
        with self._wake:
            if applied == self._journal.end:
                self._behind = False
        items = [read(payload, self.counters) for _, payload in frames]
        return [_Queued(item, 0, applied) for item in items if item and not isinstance(item, BeginItem)], applied

    def _release(self, batch: list[_Queued], *, everything: bool = False) -> None:
        """Resolve barriers: those before which all is applied, or everything when the disk does not follow."""
        waiting = [*self._held, *(entry for entry in batch if isinstance(entry.item, Barrier))]
        self._held = []
        for entry in waiting:
            if everything or not self._behind or entry.position is None or entry.position <= self._applied:
                if isinstance(entry.item, Barrier) and not entry.item.done.done():
                    entry.item.done.set_result(None)
            else:
                self._held.append(entry)

    def _write(self, batch: list[Item], applied: Position | None) -> bool:
        if not self._file.write(batch, applied):
            return False
        if applied is not None:
            self._delete_applied(applied)
        self._on_commit()
        return True

    def _delete_applied(self, applied: Position) -> None:
        self._applied = applied
        with self._wake:
            done = self._journal.behind(applied)
        for path in done:
            try:
                path.unlink()
            except OSError as exc:
                _log.warning("journal: delete %s: %s", path, exc)


def _unjournaled(entries: list[_Queued]) -> int:
    return sum(1 for entry in entries if entry.size and entry.position is None)


def _applied_segment(path: Path) -> int:
    """Return the highest journal segment that the store knows of: new ones get higher numbers, whatever was deleted."""
    try:
        with reader(path) as connection:
            row = connection.execute(schema.SELECT_APPLIED).fetchone()
    except sqlite3.Error:  # no file yet, one of version 1, or a damaged one: nothing is known
        return 0
    return int(row[0]) if row else 0
