"""The embedded trace store: `<stateDir>/traces.db`, SQLite in WAL mode, one writer thread, readers beside it.

Nothing here raises into the data path. Readers see what is committed; `flush` makes what was recorded so far visible.
"""

from __future__ import annotations

import asyncio
import collections
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeVar, overload

from clrk.core.errors import ClrkError
from clrk.gateway.telemetry import invocation_query, outbox, query
from clrk.gateway.telemetry.daily_cost import DaySpending, select_spending
from clrk.gateway.telemetry.items import Barrier, BeginItem, CursorItem, InvocationItem, LogItem, MetricsItem, SpanItem
from clrk.gateway.telemetry.outbox import Signal, Stored, StoredLog, StoredMetrics
from clrk.gateway.telemetry.query import LogLine, Position, SpanFilter, StoredSpan
from clrk.gateway.telemetry.records import InvocationFilter, InvocationPosition, InvocationRecord, InvocationSummary
from clrk.gateway.telemetry.spans import SpanRecord
from clrk.gateway.telemetry.writer import StoreWriter

FILE_NAME: Final = "traces.db"
MAX_FILE_BYTES: Final = 4 * 2**30
_MAX_RECENT: Final = 20_000
_FLUSH_TIMEOUT_S: Final = 5.0
_CLOSE_TIMEOUT_S: Final = 10.0

T = TypeVar("T")


class StoreError(ClrkError):
    """The store can not be read; the daemon goes on without it."""


class TraceStore:
    """Spans and log lines of the retention window. Use from the event loop that opened it."""

    def __init__(self, path: Path, *, retention_s: float, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.path = path
        self._loop = asyncio.get_running_loop()
        self._committed = asyncio.Event()
        self._recent: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="clrk-trace-read")
        self._closed = False
        self._writer = StoreWriter(
            path, retention_s=retention_s, max_file_bytes=max_file_bytes, on_commit=self._commit_from_thread
        )
        self._writer.start()

    # --- writing ---

    def add_span(
        self,
        record: SpanRecord,
        *,
        invocation_id: str,
        gateway: str,
        sampled: bool = True,
        otlp: bytes | None = None,
    ) -> None:
        """Keep a span. Never blocks, never raises; a full queue drops it and counts.

        Shape: otlp of an agent's own span: a serialised ResourceSpans, exported as it is.
        """
        self._remember(invocation_id)
        if self._writer.put(SpanItem(record, gateway, sampled, otlp)):
            self.counters["spans"] += 1

    def begin_span(self, record: SpanRecord, *, gateway: str, sampled: bool = True) -> None:
        """Note durably that a span has begun; add_span with the same span_id ends it."""
        self._writer.begin(BeginItem(record, gateway, sampled))

    def add_log(self, item: LogItem) -> None:
        """Keep a log line, like add_span."""
        if self._writer.put(item):
            self.counters["log_lines"] += 1

    def add_metrics(self, item: MetricsItem) -> None:
        """Keep what an agent measured, like add_span."""
        if self._writer.put(item):
            self.counters["agent_metrics"] += 1

    def add_invocation(self, record: InvocationRecord) -> None:
        """Keep the record in place of an earlier one of the same invocation, like add_span."""
        self._remember(record.invocation_id)
        self._writer.put(InvocationItem(record))

    def set_cursor(self, exporter: str, signal: Signal, seq: int) -> None:
        """Remember that the exporter is done with everything of the signal up to seq."""
        self._writer.put(CursorItem(exporter, signal, seq))

    def _remember(self, invocation_id: str) -> None:
        if not invocation_id:  # a daemon's
            return
        self._recent[invocation_id] = None
        if len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)

    def set_retention(self, retention_s: float) -> None:
        """Change the retention; the next purge follows it."""
        self._writer.retention_s = retention_s

    def set_exporters(self, names: frozenset[str]) -> None:
        """Say which exporters are at work: what leaves the store before they sent it is counted.

        Shape: an exporter with the name of a gateway (namespace/name) sends what belongs to that gateway, one with
        another name all that belongs to gateways without an exporter of their own.
        """
        self._writer.exporters = names

    async def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything added so far is visible; False when the disk does not follow in time."""
        barrier: Future[None] = Future()
        self._writer.put(Barrier(barrier))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(barrier)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Write what is queued and end the threads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._writer.stop()
        await asyncio.to_thread(self._writer.join, _CLOSE_TIMEOUT_S)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._committed.set()

    @property
    def counters(self) -> collections.Counter[str]:
        """What was kept and what was dropped, and why."""
        return self._writer.counters

    @property
    def queued_bytes(self) -> int:
        """Estimate of the memory that waits for the disk."""
        return self._writer.queued_bytes

    @property
    def journal_bytes(self) -> int:
        """Size of the journal on the disk."""
        return self._writer.journal_bytes

    @property
    def committed(self) -> asyncio.Event:
        """Set at the next commit. Take it before reading and wait on it after, and no commit is missed."""
        return self._committed

    def _commit_from_thread(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._commit)
        except RuntimeError:  # the loop was closed before us: nobody is left to be told
            return

    def _commit(self) -> None:
        self._committed.set()
        self._committed = asyncio.Event()

    # --- reading ---

    async def _read(self, question: Callable[[sqlite3.Connection], T]) -> T:
        def ask() -> T:
            with query.reader(self.path) as connection:
                return question(connection)

        try:
            return await self._loop.run_in_executor(self._threads, ask)
        except (sqlite3.Error, RuntimeError) as exc:  # RuntimeError: the pool is shut down
            raise StoreError(f"trace store {self.path}: {exc}") from exc

    async def spans(
        self, wanted: SpanFilter, *, order: Literal["oldest", "newest"] = "oldest", limit: int | None = None
    ) -> AsyncIterator[list[StoredSpan]]:
        """Yield matching spans in pages; the store is not locked between them. Raises: StoreError."""
        after: Position | None = None
        left = limit
        while left is None or left > 0:
            size = query.PAGE_SIZE if left is None else min(query.PAGE_SIZE, left)
            page = await self._read(_page(wanted, order, after, size))
            if page:
                yield page
                after = (page[-1].start_ns, page[-1].seq)
            if len(page) < size:
                return
            left = None if left is None else left - len(page)

    @overload
    async def after(self, signal: Literal["traces"], seq: int, limit: int) -> list[StoredSpan]: ...
    @overload
    async def after(self, signal: Literal["logs"], seq: int, limit: int) -> list[StoredLog]: ...
    @overload
    async def after(self, signal: Literal["metrics"], seq: int, limit: int) -> list[StoredMetrics]: ...
    async def after(self, signal: Signal, seq: int, limit: int) -> Sequence[Stored]:
        """Return rows of the signal behind seq in stored order, for exporters. Raises: StoreError."""
        return await self._read(lambda connection: outbox.select_after(connection, signal, seq, limit))

    async def list_invocations(
        self, wanted: InvocationFilter, *, limit: int, before: InvocationPosition | None = None
    ) -> list[InvocationSummary]:
        """Return invocations, the newest first; `before` is the position of the last one seen. Raises: StoreError."""
        return await self._read(
            lambda connection: invocation_query.select_listing(connection, wanted, limit=limit, before=before)
        )

    async def find_invocation(self, invocation_id: str) -> InvocationSummary | None:
        """Return the record of an invocation and its totals, or None. Raises: StoreError."""
        return await self._read(lambda connection: invocation_query.select_one(connection, invocation_id))

    async def invocations(self, prefix: str) -> list[str]:
        """Return up to 20 invocation ids that begin with prefix. Raises: StoreError."""
        return await self._read(lambda connection: query.select_invocations(connection, prefix))

    async def logs(
        self, agent: str, *, invocation_id: str = "", after_seq: int = 0, tail: int = 10_000, head: bool = False
    ) -> list[LogLine]:
        """Return the last lines of an agent (`namespace/name`); head: the first after after_seq. Raises: StoreError."""
        return await self._read(
            lambda connection: query.select_logs(
                connection, agent=agent, invocation_id=invocation_id, after_seq=after_seq, tail=tail, head=head
            )
        )

    async def spending(self, namespace: str, name: str) -> list[DaySpending]:
        """Return what an agent's LLM calls cost by UTC day, the newest first. Raises: StoreError."""
        return await self._read(lambda connection: select_spending(connection, namespace, name, time.time_ns()))

    async def cursors(self, signal: Signal = "traces") -> dict[str, int]:
        """Return how far each exporter has come with a signal. Raises: StoreError."""
        return await self._read(lambda connection: outbox.select_cursors(connection, signal))

    async def last_seq(self, signal: Signal = "traces") -> int:
        """Return the seq of the newest row of a signal. Raises: StoreError."""
        return await self._read(lambda connection: outbox.select_last_seq(connection, signal))

    def seen_invocation(self, invocation_id: str) -> bool:
        """Say whether the invocation, or a span of it, is in the store or on its way there.

        Cost: two indexed look-ups, tens of microseconds. A store that can not be read has seen nothing: telemetry
        fails open.
        """
        if not invocation_id or invocation_id in self._recent:
            return bool(invocation_id)
        oldest_ns = time.time_ns() - int(self._writer.retention_s * 1e9)
        try:
            with query.reader(self.path) as connection:
                return invocation_query.is_known(connection, invocation_id, oldest_ns)
        except sqlite3.Error:
            return False


def _page(
    wanted: SpanFilter, order: Literal["oldest", "newest"], after: Position | None, limit: int
) -> Callable[[sqlite3.Connection], list[StoredSpan]]:
    return lambda connection: query.select_spans(connection, wanted, order=order, after=after, limit=limit)
