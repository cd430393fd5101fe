"""One signal on its way to one backend: reads the store by cursor, in order, at least once; never in a call's way.

Theory of operation. The task reads the next rows behind its cursor, sends those that belong to its exporter, and moves
the cursor only when the backend took them or will never take them. What an answer means (transport.py):
- TAKEN: go on; what a partial success rejected is counted.
- LATER (no answer, 429, 503, wrong path or credentials, …): wait, as long as the backend asks for or with back-off, and
  send the same rows again, for as long as the store keeps them.
- REFUSED: the rows are halved down to the one that the backend does not take; that one is skipped and counted.
- DOUBTFUL (500, INTERNAL): the backend or the rows. Halved as well, slowly; a single row that gets such an answer is
  skipped only if the backend takes one of the next rows; else it is the backend, and everything waits.
Without a cursor, what ends after the task was made is wanted, not the history of the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from clrk.gateway._aio import spawn
from clrk.gateway.telemetry import export_encoding
from clrk.gateway.telemetry.outbox import Signal, Stored, StoredLog, StoredMetrics
from clrk.gateway.telemetry.query import StoredSpan
from clrk.gateway.telemetry.spans import AttributeValue
from clrk.gateway.telemetry.store import StoreError, TraceStore
from clrk.gateway.telemetry.transport import Answer, Transport, Verdict

_log = logging.getLogger(__name__)

_MAX_ROWS: Final = 512
_FIRST_ROWS: Final = 16
_PROBE_ROWS: Final = 32
_MAX_BATCH_BYTES: Final = 2 * 2**20  # gRPC servers take 4 MiB unless told otherwise
_PROBES: Final = 4
_BATCH_DELAY_S: Final = 0.2  # rows of one invocation end together: send them together
_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
_GRACE_S: Final = 2.0
_LOOK_BACK: Final = 10_000  # rows that may have been committed between the making of a task and its first look
_SAY_AGAIN_S: Final = 60.0
NOUNS: Final[dict[Signal, str]] = {"traces": "spans", "logs": "logs", "metrics": "metrics"}


class _Times(msgspec.Struct):
    end_time_unix_nano: int


_TIMES: Final = msgspec.json.Decoder(_Times)


@dataclass(slots=True)
class Progress:
    """How an exporter stands with a signal. Units: CLOCK_REALTIME nanoseconds; failing_since_ns is 0 while it works.

    Shape: exported_seq is None until the first look at the store; sent and refused count rows since the start.
    """

    name: str
    signal: Signal
    exported_seq: int | None = None
    sent: int = 0
    refused: int = 0
    failed_requests: int = 0
    failures: int = 0  # in a row
    failing_since_ns: int = 0
    last_error: str = ""

    def succeeded(self) -> int:
        """Note a success; returns how many failures it ended."""
        ended, self.failures, self.failing_since_ns, self.last_error = self.failures, 0, 0, ""
        return ended

    def failed(self, answer: Answer) -> None:
        """Note a failure."""
        self.failures += 1
        self.failed_requests += 1
        self.failing_since_ns = self.failing_since_ns or time.time_ns()
        self.last_error = f"{answer.reason}: {answer.message}" if answer.message else answer.reason

    def backoff_s(self, answer: Answer) -> float:
        """Return how long to wait: what the backend asks for, else 1 s doubling to a minute, with jitter."""
        jitter: float = random.uniform(0.8, 1.2)  # noqa: S311 - not a secret
        if answer.retry_after_s is not None:
            return answer.retry_after_s * max(1.0, jitter)
        return min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self.failures - 1, 10)) * jitter


class ExportTask:
    """Exports the rows of a signal that `wants` accepts by their gateway (namespace/name).

    Shape: base is the resource of log lines. Order: starts when `after` has ended, the task that it replaces. Make it
    inside the event loop.
    """

    def __init__(
        self,
        store: TraceStore,
        progress: Progress,
        transport: Transport,
        wants: Callable[[str], bool],
        *,
        base: Mapping[str, AttributeValue],
        after: asyncio.Task[None] | None = None,
    ) -> None:
        self.progress = progress
        self._signal = progress.signal
        self._label = f"export {progress.name} {progress.signal}"
        self._store = store
        self._transport = transport
        self._wants = wants
        self._base = base
        self._since_ns = time.time_ns()
        self._history_end = -1  # rows up to here may have ended before _since_ns
        self._cursor = 0
        self._rows = _FIRST_ROWS
        self._most = _MAX_ROWS  # rows of one request
        self._remark_at = self._warn_at = 0.0
        self._unsaid = 0
        self._hurry = asyncio.Event()
        self._moved = asyncio.Event()
        self._task = spawn(self._run(after), name=self._label)

    async def stop(self, grace_s: float = _GRACE_S) -> None:
        """Send what is stored if the backend is well, at most grace_s long, then end. The rest waits."""
        self._hurry.set()
        if grace_s > 0:
            try:
                async with asyncio.timeout(grace_s):
                    last = await self._store.last_seq(self._signal)
                    while self._cursor < last and not self.progress.failures and not self._task.done():
                        self._moved.clear()
                        await self._moved.wait()
            except (TimeoutError, StoreError):
                _log.info("%s: %s left for the next start", self._label, NOUNS[self._signal])
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._transport.close()

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _run(self, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])
        while True:
            try:
                await self._resume()
                while True:
                    await self._step()
            except StoreError as exc:
                _log.warning("%s: %s", self._label, exc)
                await asyncio.sleep(_FIRST_BACKOFF_S)
            except Exception:  # task root: telemetry goes on whatever a row looked like
                self._store.counters["export_errors"] += 1
                _log.exception("%s: unexpected", self._label)
                await asyncio.sleep(_MAX_BACKOFF_S)

    async def _resume(self) -> None:
        await self._store.flush()  # the file exists from here on, or StoreError says why not
        saved = (await self._store.cursors(self._signal)).get(self.progress.name)
        if saved is None:
            self._history_end = await self._store.last_seq(self._signal)
            saved = await self._first_wanted(max(0, self._history_end - _LOOK_BACK)) - 1
            # At once: if the backend is dead from the beginning, the next start goes on from here.
            self._store.set_cursor(self.progress.name, self._signal, saved)
        self._cursor = self.progress.exported_seq = saved

    async def _first_wanted(self, seq: int) -> int:
        """Return the seq of the first row behind seq that ended after this task was made."""
        while page := await self._store.after(self._signal, seq, _MAX_ROWS):
            for row in page:
                if _end_ns(row) >= self._since_ns:
                    return row.seq
            seq = page[-1].seq
        return seq + 1

    async def _step(self) -> None:
        committed = self._store.committed
        page = await self._store.after(self._signal, self._cursor, self._rows)
        if not page:
            if await self._store.last_seq(self._signal) < self._cursor:  # the file was replaced: numbers begin anew
                self._cursor, self._history_end = 0, -1
                return
            await committed.wait()
            await self._pause(_BATCH_DELAY_S)
            return
        size = sum(map(_size_bytes, page))
        batch, covered = self._select(page)
        self._rows = max(1, self._rows // 2) if size > _MAX_BATCH_BYTES else min(_MAX_ROWS, self._rows * 2)
        if not batch or await self._deliver(batch):
            self._advance(covered)

    def _select(self, page: Sequence[Stored]) -> tuple[list[Stored], int]:
        """Return the rows of one request, and the seq of the last row that they settle."""
        batch: list[Stored] = []
        size, covered = 0, self._cursor
        for row in page:
            if self._is_mine(row):
                size += _size_bytes(row)
                if batch and (size > _MAX_BATCH_BYTES or len(batch) >= self._most):
                    break
                batch.append(row)
            covered = row.seq
        return batch, covered

    def _is_mine(self, row: Stored) -> bool:
        if not self._wants(row.gateway) or (isinstance(row, StoredSpan) and not row.sampled):
            return False
        return row.seq > self._history_end or _end_ns(row) >= self._since_ns

    def _advance(self, seq: int) -> None:
        self._cursor = self.progress.exported_seq = seq
        self._store.set_cursor(self.progress.name, self._signal, seq)
        self._moved.set()

    # --- one batch --------------------------------------------------------------------------------------------------

    async def _deliver(self, batch: list[Stored]) -> bool:
        """Send rows; False when they must be sent again, after a pause or fewer at a time."""
        answer = await self._send(batch)
        match answer.verdict:
            case Verdict.TAKEN:
                self._most = _MAX_ROWS
                return True
            case Verdict.REFUSED if len(batch) == 1:
                self._skip(batch[0], answer)
                return True
            case Verdict.REFUSED:
                self._most = max(1, len(batch) // 2)
                return False
            case Verdict.DOUBTFUL if len(batch) == 1:
                return await self._probe_behind(batch[0], answer)
            case Verdict.DOUBTFUL:
                self._most = max(1, len(batch) // 2)
                await self._wait(answer, at_most_s=_FIRST_BACKOFF_S)
                return False
            case Verdict.LATER:
                await self._wait(answer)
                return False

    async def _probe_behind(self, row: Stored, answer: Answer) -> bool:
        """A single row got an error that may be its own fault: see whether the backend takes one of the next ones."""
        suspects = [(row, answer)]
        for other in await self._store.after(self._signal, row.seq, _PROBE_ROWS):
            if len(suspects) > _PROBES:
                break
            if not self._is_mine(other):
                continue
            verdict = await self._send([other])
            if verdict.verdict is Verdict.TAKEN:
                for suspect, why in suspects:
                    self._skip(suspect, why)
                self._advance(other.seq)
                self._most = _MAX_ROWS
                return False  # the cursor stands where it belongs: not where the caller would put it
            if verdict.verdict is Verdict.LATER:
                break
            suspects.append((other, verdict))
        await self._wait(answer)
        return False

    async def _send(self, batch: list[Stored]) -> Answer:
        try:
            body = await asyncio.to_thread(self._encode, batch)
        except Exception as exc:  # the edge to what is stored: found by halving, like what a backend refuses
            return Answer(Verdict.REFUSED, f"can not be encoded: {type(exc).__name__}")
        answer = await self._transport.send(body)
        if answer.verdict is Verdict.TAKEN:
            self._taken(len(batch), answer)
        return answer

    def _encode(self, batch: list[Stored]) -> bytes:
        if self._signal == "traces":
            return export_encoding.join_groups(
                export_encoding.span_groups(row for row in batch if isinstance(row, StoredSpan))
            )
        if self._signal == "logs":
            lines = (row for row in batch if isinstance(row, StoredLog))
            return export_encoding.join_groups(export_encoding.log_groups(lines, self._base))
        return export_encoding.join_groups(row.otlp for row in batch if isinstance(row, StoredMetrics))

    def _taken(self, count: int, answer: Answer) -> None:
        if ended := self.progress.succeeded():
            _log.info("%s: backend is back after %d failures", self._label, ended)
        rejected = max(0, answer.rejected)
        # Data points of one row may be rejected by the dozen: what is left is not always a number of rows.
        kept = max(0, count - rejected)
        self.progress.sent += kept
        self._store.counters[f"exported_{NOUNS[self._signal]}"] += kept
        if rejected:
            self._refused(rejected, answer)
        elif answer.message and time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + _SAY_AGAIN_S
            _log.warning("%s: the backend warns: %s", self._label, answer.message)

    def _skip(self, row: Stored, answer: Answer) -> None:
        _log.debug("%s: seq %d refused with %s", self._label, row.seq, answer.reason)
        self._refused(1, answer)

    def _refused(self, count: int, answer: Answer) -> None:
        """Count what the backend will never take, and say so once a minute, not once a row."""
        self.progress.refused += count
        self._store.counters[f"export_refused_{NOUNS[self._signal]}"] += count
        self._unsaid += count
        if time.monotonic() >= self._remark_at:
            self._remark_at = time.monotonic() + _SAY_AGAIN_S
            _log.error(
                "%s: the backend refuses %d %s for good (%s%s); left out", self._label, self._unsaid,
                NOUNS[self._signal], answer.reason, f": {answer.message}" if answer.message else "",
            )  # fmt: skip
            self._unsaid = 0

    async def _wait(self, answer: Answer, at_most_s: float = _MAX_BACKOFF_S * 60) -> None:
        self.progress.failed(answer)
        self._store.counters["export_failures"] += 1
        self._moved.set()
        if self.progress.failures == 1:
            _log.warning("%s: failed (%s); what is to come waits in the store", self._label, self.progress.last_error)
        await asyncio.sleep(min(at_most_s, self.progress.backoff_s(answer)))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return


def _end_ns(row: Stored) -> int:
    if not isinstance(row, StoredSpan):
        return row.time_ns
    try:
        return _TIMES.decode(row.json).end_time_unix_nano
    except msgspec.MsgspecError:
        return row.start_ns


def _size_bytes(row: Stored) -> int:
    """Return about how large the row is in a request, and in memory."""
    match row:
        case StoredSpan():
            return len(row.otlp if row.otlp is not None else row.json)
        case StoredLog():
            return len(row.otlp) if row.otlp is not None else len(row.line) + 400
        case StoredMetrics():
            return len(row.otlp)
