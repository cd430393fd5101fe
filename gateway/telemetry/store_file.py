"""The store's file and the one connection that writes it: transactions, a damaged file moved aside, the purge."""

from __future__ import annotations

import collections
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
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
    Lost,
    MetricsItem,
    SpanItem,
)
from clrk.gateway.telemetry.journal import Position
from clrk.gateway.telemetry.recovery import LOST_INVOCATION_MESSAGE
from clrk.gateway.telemetry.retention import Purge
from clrk.gateway.telemetry.totals import ADD_TOTALS, Totals

_log = logging.getLogger(__name__)

# Bind errors (an int over 64 bits, a lone surrogate): the item's fault, not the file's.
ITEM_ERRORS: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
                      OverflowError, ValueError, TypeError, msgspec.MsgspecError)  # fmt: skip
_MAX_HELD: Final = 32  # rows that wait for one statement
_HELD_BYTES: Final = 2**20
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_KEPT_COUNTERS: Final = ("dropped_", "damaged_", "gateway_lost_")  # over restarts: a loss is not forgotten with us


class StoreFile:
    """Used by one thread at a time. Side effects: creates `path` (mode 0600), and SQLite's -wal and -shm beside it."""

    def __init__(self, path: Path, counters: collections.Counter[str]) -> None:
        self.path = path
        self.counters = counters
        self._connection: sqlite3.Connection | None = None
        self._saved_counters: dict[str, int] | None = None

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def write(self, batch: Sequence[Item], applied: Position | None = None) -> bool:
        """Write the batch in one transaction; False when it must be tried again.

        Shape: applied is up to where the journal is in the store once this batch is.
        """
        try:
            connection = self.open()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                totals = Totals()
                for item in batch:
                    if not isinstance(item, SpanItem):
                        self._insert(connection, item)
                self._insert_spans(connection, (item for item in batch if isinstance(item, SpanItem)), totals)
                connection.executemany(ADD_TOTALS, [total.row(key) for key, total in totals.sums.items()])
                if applied is not None:
                    connection.execute(schema.UPSERT_APPLIED, applied)
                kept = self._save_counters(connection)
            self._saved_counters = kept
        except (sqlite3.Error, OSError) as exc:
            self.failed(exc)
            return False
        except Exception as exc:  # a bug of ours must not end all telemetry
            self.counters["write_failures"] += 1
            _log.exception("trace store: batch of %d lost: %s", len(batch), type(exc).__name__)
            self.counters["dropped_bad_item"] += len(batch)
        return True

    def _insert_spans(self, connection: sqlite3.Connection, items: Iterable[SpanItem], totals: Totals) -> None:
        """Insert many spans by one statement, which lets the event loop run meanwhile and takes the GIL back once."""
        held: list[tuple[SpanItem, schema.Row]] = []
        held_bytes = 0
        for item in items:
            try:
                row = schema.span_row(item)
            except ITEM_ERRORS as exc:
                self._refuse(exc)
                continue
            held.append((item, row))
            held_bytes += schema.row_bytes(row)
            if len(held) == _MAX_HELD or held_bytes > _HELD_BYTES:
                self._insert_held(connection, held, totals)
                held, held_bytes = [], 0
        if held:
            self._insert_held(connection, held, totals)

    def _insert_held(
        self, connection: sqlite3.Connection, held: Sequence[tuple[SpanItem, schema.Row]], totals: Totals
    ) -> None:
        try:
            values = [value for _, row in held for value in row]
            connection.execute(schema.insert_spans(len(held)), values)
        except ITEM_ERRORS as exc:  # nothing of it was written
            if len(held) == 1:
                self._refuse(exc)
            else:
                for one in held:
                    self._insert_held(connection, [one], totals)
            return
        for item, _ in held:
            totals.add(item)

    def _refuse(self, exc: Exception) -> None:
        self.counters["dropped_bad_item"] += 1
        _log.warning("trace store: item refused: %s", type(exc).__name__)

    def _insert(self, connection: sqlite3.Connection, item: Item) -> None:
        try:
            match item:
                case LogItem():
                    connection.execute(schema.INSERT_LOG, schema.log_row(item))
                case MetricsItem():
                    connection.execute(schema.INSERT_METRICS, schema.metrics_row(item))
                case InvocationItem():
                    connection.execute(schema.UPSERT_RECORD, schema.record_row(item))
                case CursorItem(exporter, signal, seq):
                    connection.execute(schema.UPSERT_CURSOR, (exporter, signal, seq))
                case Lost(ended_ns):
                    connection.execute(schema.END_UNFINISHED, (LOST_INVOCATION_MESSAGE, ended_ns))
                case SpanItem() | Barrier():
                    pass
        except ITEM_ERRORS as exc:
            self._refuse(exc)

    def _save_counters(self, connection: sqlite3.Connection) -> dict[str, int]:
        """Keep the counts of losses; the first time, go on from those of predecessors."""
        if self._saved_counters is None:
            self._saved_counters = dict(connection.execute("SELECT name, value FROM counters").fetchall())
            for name, value in self._saved_counters.items():
                self.counters[name] += value
        kept = {name: value for name, value in dict(self.counters).items() if name.startswith(_KEPT_COUNTERS)}
        if kept != self._saved_counters:
            connection.executemany(schema.UPSERT_COUNTER, list(kept.items()))
        return kept

    def open(self) -> sqlite3.Connection:
        """Return the connection, made and checked when there is none. Raises: sqlite3.Error, OSError."""
        if self._connection is not None:
            return self._connection
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            schema.prepare(connection)
        except sqlite3.Error:
            connection.close()
            raise
        self._connection = connection
        return connection

    def failed(self, exc: Exception) -> None:
        """Close after an error; a damaged file is moved aside, so that the next try begins an empty one."""
        self.counters["write_failures"] += 1
        self.close()
        # A plain DatabaseError without an error code is schema.prepare's word on a foreign version.
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if type(exc) is sqlite3.DatabaseError and code in _DAMAGED:
            self._move_aside(exc)
        elif self.counters["write_failures"] % 60 == 1:  # about once a minute while it lasts
            _log.error("trace store %s: %s; spans wait in memory and are dropped when that is full", self.path, exc)

    def _move_aside(self, exc: Exception) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        _log.error("trace store %s can not be used (%s); moved to %s, starting an empty one", self.path, exc, aside)
        self.counters["damaged_files"] += 1
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            except FileNotFoundError:
                continue
            except OSError as move_exc:
                _log.error("trace store: move %s%s aside: %s", self.path, suffix, move_exc)

    def purge(
        self, retention_s: float, max_file_bytes: int, exporters: frozenset[str], is_stopping: Callable[[], bool]
    ) -> None:
        """Delete what is past retention, then the oldest rows while the file is over its limit."""
        try:
            oldest_ns = time.time_ns() - int(retention_s * 1e9)
            Purge(self.open(), self.counters, exporters, is_stopping).run(oldest_ns, max_file_bytes)
        except (sqlite3.Error, OSError) as exc:
            self.failed(exc)
