"""The one thread that writes the embedded store.

Theory of operation: producers append to a bounded queue and go on; the thread takes what is there, writes it in one
transaction, and reports the commit. Nothing here can slow or break a call:
- queue full: the item is dropped and counted;
- disk full, file not writable: the batch is kept and tried again every second, while the queue fills and then drops;
- an item that SQLite will not take: dropped and counted, the rest of the batch is written;
- a damaged file (or one of another version): moved aside, a new one opened; what it held is lost, not what comes.
"""

from __future__ import annotations

import collections
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import msgspec

from clrk.gateway.telemetry import schema
from clrk.gateway.telemetry.items import (
    Barrier,
    CursorItem,
    InvocationItem,
    Item,
    LogItem,
    MetricsItem,
    SpanItem,
    size_bytes,
)
from clrk.gateway.telemetry.totals import ADD_TOTALS, Totals

_log = logging.getLogger(__name__)

MAX_QUEUE_BYTES: Final = 64 * 2**20
_BATCH: Final = 2000
_RETRY_S: Final = 1.0
_PURGE_EVERY_S: Final = 60.0
_PURGE_CHUNK: Final = 5000

# Bind errors (an int over 64 bits, a lone surrogate): the item's fault, not the file's.
_ITEM_ERRORS: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
                       OverflowError, ValueError, TypeError, msgspec.MsgspecError)  # fmt: skip
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class StoreWriter(threading.Thread):
    """Owns the read-write connection. Methods may be called from any thread.

    Side effects: creates `path` (mode 0600) and SQLite's -wal and -shm beside it; on_commit runs in this thread.
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
        self.counters: collections.Counter[str] = collections.Counter()
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._max_queue_bytes = max_queue_bytes
        self._on_commit = on_commit
        self._queue: collections.deque[tuple[Item, int]] = collections.deque()
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._connection: sqlite3.Connection | None = None

    def put(self, item: Item) -> bool:
        """Queue an item; False when it was dropped because the queue is full or closed. Never blocks on the disk."""
        size = size_bytes(item)
        with self._wake:
            if self._stopping or (size and self._queued_bytes + size > self._max_queue_bytes):
                self.counters["dropped_queue_full"] += 1
                if isinstance(item, Barrier):
                    item.done.set_result(None)
                return False
            self._queue.append((item, size))
            self._queued_bytes += size
            self._wake.notify()
        return True

    @property
    def queued_bytes(self) -> int:
        """Estimate of the memory that waits for the disk."""
        return self._queued_bytes

    def stop(self) -> None:
        """Write what is queued, once, and end. Join the thread afterwards."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Write batches until stopped."""
        next_purge = 0.0
        while batch := self._take():
            while not self._write(batch):
                self._release_barriers(batch)
                with self._wake:
                    if self._stopping:
                        self.counters["dropped_at_close"] += len(batch)
                        break
                    self._wake.wait_for(lambda: self._stopping, timeout=_RETRY_S)
            self._release_barriers(batch)
            if time.monotonic() >= next_purge:
                next_purge = time.monotonic() + _PURGE_EVERY_S
                self._purge()
        if self._connection is not None:
            self._connection.close()

    def _take(self) -> list[Item]:
        """Wait for items. Empty only when stopped and drained; an idle minute gives a barrier, so that it can purge."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._stopping, timeout=_PURGE_EVERY_S)
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._queued_bytes -= sum(size for _, size in batch)
            if not batch and not self._stopping:
                return [Barrier(Future())]
        return [item for item, _ in batch]

    def _release_barriers(self, batch: list[Item]) -> None:
        for item in batch:
            if isinstance(item, Barrier) and not item.done.done():
                item.done.set_result(None)

    def _write(self, batch: list[Item]) -> bool:
        """Write the batch in one transaction; False when it must be tried again."""
        try:
            connection = self._open()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                totals = Totals()
                for item in batch:
                    self._insert(connection, item, totals)
                connection.executemany(ADD_TOTALS, [total.row(key) for key, total in totals.sums.items()])
        except (sqlite3.Error, OSError) as exc:
            self._failed(exc)
            return False
        except Exception as exc:  # the root of this thread: a bug of ours must not end all telemetry
            self.counters["write_failures"] += 1
            _log.exception("trace store: batch of %d lost: %s", len(batch), type(exc).__name__)
            self.counters["dropped_bad_item"] += len(batch)
            return True
        self._on_commit()
        return True

    def _insert(self, connection: sqlite3.Connection, item: Item, totals: Totals) -> None:
        try:
            match item:
                case SpanItem(record):
                    connection.execute(schema.INSERT_SPAN, schema.span_row(item))
                    totals.add(record)
                case LogItem():
                    connection.execute(schema.INSERT_LOG, schema.log_row(item))
                case MetricsItem():
                    connection.execute(schema.INSERT_METRICS, schema.metrics_row(item))
                case InvocationItem():
                    connection.execute(schema.UPSERT_RECORD, schema.record_row(item))
                case CursorItem(exporter, signal, seq):
                    connection.execute(schema.UPSERT_CURSOR, (exporter, signal, seq))
                case Barrier():
                    pass
        except _ITEM_ERRORS as exc:
            self.counters["dropped_bad_item"] += 1
            _log.warning("trace store: item refused: %s", type(exc).__name__)

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            schema.prepare(connection)
        except sqlite3.Error:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _failed(self, exc: Exception) -> None:
        self.counters["write_failures"] += 1
        if self._connection is not None:
            self._connection.close()  # an open transaction is rolled back
            self._connection = None
        # A plain DatabaseError without an error code is schema.prepare's word on a foreign version.
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if type(exc) is sqlite3.DatabaseError and code in _DAMAGED:
            self._move_aside(exc)
        elif self.counters["write_failures"] % 60 == 1:  # about once a minute while it lasts
            _log.error("trace store %s: %s; spans wait in memory and are dropped when that is full", self._path, exc)

    def _move_aside(self, exc: Exception) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        _log.error("trace store %s can not be used (%s); moved to %s, starting an empty one", self._path, exc, aside)
        self.counters["damaged_files"] += 1
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
            except FileNotFoundError:
                continue
            except OSError as move_exc:
                _log.error("trace store: move %s%s aside: %s", self._path, suffix, move_exc)

    def _purge(self) -> None:
        """Delete what is past retention, then the oldest spans while the file is over its limit."""
        oldest_ns = time.time_ns() - int(self.retention_s * 1e9)
        try:
            connection = self._open()
            self._purge_before(connection, "spans", "start_ns", oldest_ns)
            self._purge_before(connection, "logs", "time_ns", oldest_ns)
            while self._file_bytes(connection) > self._max_file_bytes and not self._stopping:
                if not self._drop_oldest(connection):
                    break
            connection.execute("PRAGMA incremental_vacuum(10000)").fetchall()
        except (sqlite3.Error, OSError) as exc:
            self._failed(exc)

    def _purge_before(self, connection: sqlite3.Connection, table: str, column: str, oldest_ns: int) -> None:
        # In chunks, each its own transaction: the queue is served again soon, and the WAL stays small.
        old = f"SELECT seq FROM {table} WHERE {column} < ? LIMIT {_PURGE_CHUNK}"  # noqa: S608 - fixed names
        while not self._stopping:
            if connection.execute(f"DELETE FROM {table} WHERE seq IN ({old})", (oldest_ns,)).rowcount < _PURGE_CHUNK:  # noqa: S608
                return

    def _drop_oldest(self, connection: sqlite3.Connection) -> bool:
        removed = 0
        for table in ("spans", "logs"):
            sql = f"DELETE FROM {table} WHERE seq IN (SELECT seq FROM {table} ORDER BY seq LIMIT {_PURGE_CHUNK})"  # noqa: S608
            removed += connection.execute(sql).rowcount
        self.counters["dropped_disk_limit"] += removed
        _log.warning("trace store: over %d bytes, %d oldest entries removed", self._max_file_bytes, removed)
        return removed > 0

    @staticmethod
    def _file_bytes(connection: sqlite3.Connection) -> int:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)
