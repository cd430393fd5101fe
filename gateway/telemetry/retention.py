"""What leaves the store: rows past retention, and the oldest ones while the file is over its limit."""

from __future__ import annotations

import collections
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from clrk.gateway.telemetry.outbox import SIGNALS, TABLES, TIMES, Signal, count_unexported

_log = logging.getLogger(__name__)

_CHUNK: Final = 5000
_VACUUM_PAGES: Final = 10_000


@dataclass(slots=True)
class Purge:
    """One round. exporters: those at work, for which a row that leaves may come too early.

    Works in chunks, each its own transaction: the writer's queue is served again soon, and the WAL stays small.
    """

    connection: sqlite3.Connection
    counters: collections.Counter[str]
    exporters: frozenset[str]
    is_stopping: Callable[[], bool]

    def run(self, oldest_ns: int, max_file_bytes: int) -> None:
        """Delete what began before oldest_ns, and more while the file is larger than it may be."""
        for signal in SIGNALS:
            table, time = TABLES[signal], TIMES[signal]
            rows = f"SELECT seq FROM {table} WHERE {time} < ? LIMIT {_CHUNK}"  # noqa: S608 - fixed names
            while not self.is_stopping() and self._delete(signal, rows, (oldest_ns,)) == _CHUNK:
                continue
        self._delete_invocations(oldest_ns)
        while not self.is_stopping() and self._file_bytes() > max_file_bytes:
            if not self._drop_oldest(max_file_bytes):
                break
        self.connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()

    def _delete(self, signal: Signal, rows: str, parameters: tuple[object, ...] = ()) -> int:
        """Delete the rows (a SELECT of seq) and return how many they were."""
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            if unexported := count_unexported(self.connection, signal, rows, parameters, self.exporters):
                self.counters[f"dropped_unexported_{signal}"] += unexported
            return self.connection.execute(
                f"DELETE FROM {TABLES[signal]} WHERE seq IN ({rows})",  # noqa: S608 - fixed names
                parameters,
            ).rowcount

    def _delete_invocations(self, before_ns: int) -> int:
        # One that is not over may be older than its retention; its record would come back without its totals.
        sql = (
            "DELETE FROM invocations WHERE seq IN (SELECT seq FROM invocations"  # noqa: S608 - fixed names
            f" WHERE created_ns < ? AND phase NOT IN ('Pending', 'Running') LIMIT {_CHUNK})"
        )
        removed = 0
        while not self.is_stopping():
            chunk = self.connection.execute(sql, (before_ns,)).rowcount
            removed += chunk
            if chunk < _CHUNK:
                break
        return removed

    def _drop_oldest(self, max_file_bytes: int) -> bool:
        """Drop what agents reported of themselves before anything of ours: no agent can push others' calls out."""
        removed = sum(self._delete(signal, _oldest(signal, "otlp IS NOT NULL")) for signal in SIGNALS)
        if not removed:
            removed = sum(self._delete(signal, _oldest(signal, "TRUE")) for signal in SIGNALS)
            first = self.connection.execute("SELECT min(start_ns) FROM spans").fetchone()[0]
            removed += self._delete_invocations(first if first is not None else 2**62)
        self.counters["dropped_disk_limit"] += removed
        _log.warning("trace store: over %d bytes, %d oldest entries removed", max_file_bytes, removed)
        return removed > 0

    def _file_bytes(self) -> int:
        pages, free, size = (
            self.connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)


def _oldest(signal: Signal, condition: str) -> str:
    return f"SELECT seq FROM {TABLES[signal]} WHERE {condition} ORDER BY seq LIMIT {_CHUNK}"  # noqa: S608 - fixed names
