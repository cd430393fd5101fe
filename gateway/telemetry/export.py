"""Export over OTLP: reads the store by cursor, in order, at least once; never in the way of a call.

Theory of operation: one task per target. It reads the next page behind its cursor, sends what belongs to it through
the official exporter in a thread of its own, and moves the cursor only when the backend took it. A backend that is
down, slow or refuses our credentials is retried with back-off for as long as the store keeps the spans. A page that the
backend calls malformed or too large is halved down to the one span that it does not take; that one is skipped, counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import msgspec
import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExportResult

from clrk.gateway._aio import spawn
from clrk.gateway.telemetry.otlp import readable_span
from clrk.gateway.telemetry.query import StoredSpan
from clrk.gateway.telemetry.spans import SpanRecord
from clrk.gateway.telemetry.store import StoreError, TraceStore

_log = logging.getLogger(__name__)

_PAGE: Final = 512
_BATCH_DELAY_S: Final = 0.2  # spans of one invocation end together: send them together
_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
_GRACE_S: Final = 2.0
# The request itself is at fault (RFC 9110): sending the same again can not help.
_MALFORMED_STATUSES: Final = frozenset({400, 413, 422})

_DECODER: Final = msgspec.json.Decoder(SpanRecord)


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """Where to send. Headers may hold credentials: never logged. timeout_s None: OTEL_EXPORTER_OTLP_TIMEOUT or 10 s."""

    url: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    timeout_s: float | None = None


def traces_url(endpoint: str) -> str:
    """Return the URL of the traces signal: a base endpoint gets `/v1/traces`, a full one stays.

    Source: OpenTelemetry specification, protocol/exporter.md, "Endpoint URLs for OTLP/HTTP".
    """
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path if path.endswith("/v1/traces") else f"{path}/v1/traces"))


class SpanSender:
    """The official exporter, and the HTTP status that it does not tell. Blocking: call from a thread."""

    def __init__(self, target: ExportTarget) -> None:
        self._statuses: list[int] = []
        session = requests.Session()
        session.hooks["response"].append(self._keep_status)
        self._exporter = OTLPSpanExporter(
            endpoint=target.url,
            headers=dict(target.headers),
            timeout=target.timeout_s,
            session=session,
        )

    def send(self, spans: list[StoredSpan]) -> int | None:
        """Send one request. Returns: the HTTP status, or None when no answer came."""
        self._statuses.clear()
        result = self._exporter.export([readable_span(_DECODER.decode(span.json)) for span in spans])
        status = self._statuses[-1] if self._statuses else None
        # A redirect is a SUCCESS to the exporter, so the status decides; no FAILURE may pass for a success.
        return status if result is SpanExportResult.SUCCESS or (status or 0) >= 300 else None

    def abort(self) -> None:
        """End a retry that is waiting inside send."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK left it without annotations

    def _keep_status(self, response: requests.Response, *_args: Any, **_kwargs: Any) -> None:
        self._statuses.append(response.status_code)


class ExportTask:
    """Exports the spans that `wants` accepts by their gateway (namespace/name). Start it inside the event loop."""

    def __init__(self, store: TraceStore, name: str, target: ExportTarget, wants: Callable[[str], bool]) -> None:
        self.name = name
        self.target = target
        self._store = store
        self._wants = wants
        self._sender = SpanSender(target)
        self._since_ns = time.time_ns()
        self._cursor = 0
        self._limit = _PAGE
        self._failures = 0
        self._hurry = asyncio.Event()
        self._progress = asyncio.Event()
        self._task = spawn(self._run(), name=f"export {name}")

    async def stop(self, grace_s: float = _GRACE_S) -> None:
        """Send what is stored if the backend is well, at most grace_s long, then end. The rest waits."""
        self._hurry.set()
        try:
            async with asyncio.timeout(grace_s):
                last = await self._store.last_seq()
                while self._cursor < last and not self._failures and not self._task.done():
                    self._progress.clear()
                    await self._progress.wait()
        except (TimeoutError, StoreError):
            _log.info("export %s: spans left for the next start", self.name)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._sender.abort()

    async def _run(self) -> None:
        while True:
            try:
                await self._resume()
                while True:
                    await self._step()
            except StoreError as exc:
                _log.warning("export %s: %s", self.name, exc)
                await asyncio.sleep(_FIRST_BACKOFF_S)
            except Exception:  # task root: telemetry goes on whatever a span looked like
                self._store.counters["export_errors"] += 1
                _log.exception("export %s: unexpected", self.name)
                await asyncio.sleep(_MAX_BACKOFF_S)

    async def _resume(self) -> None:
        await self._store.flush()  # the file exists from here on, or StoreError says why not
        saved = (await self._store.cursors()).get(self.name)
        if saved is not None:
            self._cursor, self._since_ns = saved, 0

    async def _step(self) -> None:
        committed = self._store.committed
        page = await self._store.after("traces", self._cursor, self._limit)
        if not page:
            if await self._store.last_seq() < self._cursor:  # the file was replaced: its numbers begin anew
                self._cursor = 0
                return
            await committed.wait()
            await self._pause(_BATCH_DELAY_S)
            return
        # Without a saved cursor only what happens from now on is wanted, not the history of the store.
        mine = [span for span in page if self._wants(span.gateway) and span.start_ns >= self._since_ns]
        if mine and not await self._send(mine):
            return
        self._cursor = page[-1].seq
        self._limit = _PAGE
        self._store.set_cursor(self.name, "traces", self._cursor)
        self._progress.set()

    async def _send(self, spans: list[StoredSpan]) -> bool:
        """Send spans; False when the page must be read again, after a pause or with a smaller limit."""
        status = await _in_daemon_thread(lambda: self._sender.send(spans), f"export {self.name}")
        if status is not None and status < 300:
            if self._failures:
                _log.info("export %s: backend is back after %d failures", self.name, self._failures)
            self._failures = 0
            self._store.counters["exported_spans"] += len(spans)
            return True
        if status in _MALFORMED_STATUSES:
            if self._limit > 1:
                self._limit = max(1, self._limit // 2)
                return False
            self._store.counters["export_refused_spans"] += len(spans)
            _log.error("export %s: the backend refuses span seq %d with %s; skipped", self.name, spans[0].seq, status)
            return True
        self._failures += 1
        self._store.counters["export_failures"] += 1
        self._progress.set()
        if self._failures == 1:
            _log.warning("export %s: failed (%s); spans wait in the store", self.name, status or "no answer")
        backoff = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 10))
        await asyncio.sleep(backoff * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
        return False

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return


async def _in_daemon_thread(work: Callable[[], int | None], name: str) -> int | None:
    """Run blocking work. A daemon thread, because a pool's thread would hold up the exit while a backend hangs."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int | None] = loop.create_future()

    def finish(status: int | None, error: BaseException | None) -> None:
        if done.done():  # cancelled meanwhile
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(status)

    def run() -> None:
        status, error = None, None
        try:
            status = work()
        except Exception as exc:  # thread root: handed to the waiting task
            error = exc
        try:
            loop.call_soon_threadsafe(finish, status, error)
        except RuntimeError:  # the loop is gone, and with it whoever waited
            return

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
