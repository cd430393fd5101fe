"""Our own metrics on their way to one backend: read and sent at each interval, cumulative: a failure loses nothing."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable
from typing import Final

from clrk.gateway._aio import spawn
from clrk.gateway.telemetry.export_task import Progress
from clrk.gateway.telemetry.metrics_meters import Metrics
from clrk.gateway.telemetry.transport import Answer, Transport, Verdict

_log = logging.getLogger(__name__)

_MAX_RETRY_S: Final = 60.0


class MetricsPush:
    """Sends the metrics of the gateways that `wants` accepts; with with_host also those that belong to no gateway."""

    def __init__(
        self,
        metrics: Metrics,
        progress: Progress,
        transport: Transport,
        wants: Callable[[str], bool],
        counters: collections.Counter[str],
        *,
        interval_s: float,
    ) -> None:
        self.with_host = False
        self.progress = progress
        self._label = f"export {progress.name} own metrics"
        self._metrics = metrics
        self._transport = transport
        self._wants = wants
        self._counters = counters
        self._interval_s = interval_s
        self._task = spawn(self._run(), name=self._label)

    async def stop(self, grace_s: float) -> None:
        """Send the last values if the backend is well, at most grace_s long, then end."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if grace_s > 0 and not self.progress.failures:
            try:
                async with asyncio.timeout(grace_s):
                    await self._push()
            except TimeoutError:
                _log.info("%s: the last values did not get through", self._label)
        await self._transport.close()

    async def _run(self) -> None:
        delay_s = self._interval_s
        while True:
            await asyncio.sleep(delay_s)
            try:
                delay_s = await self._push()
            except Exception:  # task root: telemetry goes on
                self._counters["export_errors"] += 1
                _log.exception("%s: unexpected", self._label)
                delay_s = self._interval_s

    async def _push(self) -> float:
        """Read and send once; returns how long to wait for the next time."""
        body = await asyncio.to_thread(self._metrics.encode, self._wants, with_host=self.with_host)
        if not body:
            return self._interval_s
        answer = await self._transport.send(body)
        if answer.verdict is Verdict.TAKEN:
            if ended := self.progress.succeeded():
                _log.info("%s: backend is back after %d failures", self._label, ended)
            if answer.rejected > 0:
                self._counters["export_refused_metrics"] += answer.rejected
            return self._interval_s
        return self._failed(answer)

    def _failed(self, answer: Answer) -> float:
        self.progress.failed(answer)
        self._counters["export_failures"] += 1
        if self.progress.failures == 1:
            _log.warning("%s: failed (%s); sent again with newer values", self._label, self.progress.last_error)
        if answer.verdict is not Verdict.LATER:  # the same again would not help; the next values may
            self._counters["export_refused_metrics"] += 1
            return self._interval_s
        return min(self.progress.backoff_s(answer), max(self._interval_s, answer.retry_after_s or 0.0), _MAX_RETRY_S)
