"""All exporters of the gateway: one per EgressGateway with `otlp`, and one for what the standard variables ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from clrk.core.gateway_config import GatewayConfig
from clrk.gateway._aio import spawn
from clrk.gateway.telemetry.export_metrics import MetricsPush
from clrk.gateway.telemetry.export_target import (
    DEFAULT_METRIC_INTERVAL_S,
    ExportTarget,
    Targets,
    environment_targets,
    gateway_targets,
    metric_interval_s,
    shown_endpoint,
)
from clrk.gateway.telemetry.export_task import ExportTask, Progress
from clrk.gateway.telemetry.metrics_meters import Metrics
from clrk.gateway.telemetry.outbox import SIGNALS, Signal
from clrk.gateway.telemetry.spans import AttributeValue
from clrk.gateway.telemetry.store import StoreError, TraceStore
from clrk.gateway.telemetry.transport import Transport
from clrk.gateway.telemetry.transport_grpc import GrpcTransport
from clrk.gateway.telemetry.transport_http import HttpTransport

ENVIRONMENT: Final = "environment"  # no gateway's name: those have a /

Wants = Callable[[str], bool]


def open_transport(target: ExportTarget) -> Transport:
    """Return the transport for a target; it connects when it first sends."""
    return GrpcTransport(target) if target.protocol == "grpc" else HttpTransport(target)


@dataclass(slots=True)
class _Export:
    """One signal of one exporter at work."""

    target: ExportTarget
    progress: Progress
    rows: ExportTask
    push: MetricsPush | None = None  # our own metrics, beside those of agents


@dataclass(frozen=True, slots=True)
class ExportStatus:
    """How an exporter stands with a signal; holds no credentials.

    Shape: behind counts the rows of the store that it has not passed, also those of others; sent and dropped those
    that its backend took and refused for good since the start; failures are in a row. Units: failing_since_ns is
    CLOCK_REALTIME, 0 while it works.
    """

    name: str
    signal: Signal
    endpoint: str
    exported_seq: int
    behind: int
    sent: int
    dropped: int
    failures: int
    failing_since_ns: int
    last_error: str


class Exporters:
    """Follows the configuration. Use inside the event loop."""

    def __init__(
        self,
        store: TraceStore,
        metrics: Metrics,
        environment: Mapping[str, str],
        base: Mapping[str, AttributeValue],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._environment = environment
        self._base = base
        self._configured: frozenset[str] = frozenset()  # gateways that have an exporter of their own
        self._exports: dict[tuple[str, Signal], _Export] = {}
        self._retiring: dict[tuple[str, Signal], asyncio.Task[None]] = {}

    @property
    def names(self) -> frozenset[str]:
        """The exporters at work."""
        return frozenset(name for name, _ in self._exports)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Start, stop and replace exporters; one whose target stays goes on undisturbed."""
        wanted = self._wanted(config)
        self._configured = frozenset(wanted) - {ENVIRONMENT}
        with_host = _first_of_each_backend(wanted)
        for key, export in list(self._exports.items()):
            settings = wanted.get(key[0])
            if settings is None or settings.get(key[1]) != export.target:
                self._retire(key, self._exports.pop(key))
        for name, targets in wanted.items():
            for signal, target in targets.items():
                if (name, signal) not in self._exports:
                    self._exports[name, signal] = self._start(name, signal, target)
                if (push := self._exports[name, signal].push) is not None:
                    push.with_host = name in with_host

    def _wanted(self, config: GatewayConfig) -> dict[str, Targets]:
        wanted: dict[str, Targets] = {}
        for gateway in config.gateways:
            if gateway.spec.otlp is not None:
                name = f"{gateway.metadata.namespace}/{gateway.metadata.name}"
                wanted[name] = gateway_targets(gateway.spec.otlp, config.upstream_ca_pem.get(name, ""))
        if targets := environment_targets(self._environment, config.environment_files):
            wanted[ENVIRONMENT] = targets
        return wanted

    def _start(self, name: str, signal: Signal, target: ExportTarget) -> _Export:
        progress = Progress(name, signal)
        after = self._retiring.get((name, signal))
        wants = self._unclaimed if name == ENVIRONMENT else name.__eq__
        rows = ExportTask(self._store, progress, open_transport(target), wants, base=self._base, after=after)
        push = None
        if signal == "metrics":
            interval_s = metric_interval_s(self._environment) if name == ENVIRONMENT else DEFAULT_METRIC_INTERVAL_S
            push = MetricsPush(
                self._metrics, Progress(name, signal), open_transport(target), wants, self._store.counters,
                interval_s=interval_s,
            )  # fmt: skip
        return _Export(target, progress, rows, push)

    def _unclaimed(self, gateway: str) -> bool:
        return gateway not in self._configured

    def _retire(self, key: tuple[str, Signal], export: _Export) -> None:
        task = spawn(_stop(export, 0.0, after=self._retiring.get(key)), name=f"stop export {key[0]} {key[1]}")
        self._retiring[key] = task
        task.add_done_callback(lambda ended: self._retired(key, ended))

    def _retired(self, key: tuple[str, Signal], ended: asyncio.Task[None]) -> None:
        if self._retiring.get(key) is ended:
            del self._retiring[key]

    def totals(self) -> list[tuple[str, str, int, int, int]]:
        """Return (exporter, signal, sent, refused, failed requests), for the metrics. May be called in any thread."""
        return [
            (name, signal, export.progress.sent, export.progress.refused, export.progress.failed_requests)
            for (name, signal), export in list(self._exports.items())
        ]

    async def status(self) -> list[ExportStatus]:
        """Return how each exporter stands with each signal."""
        last: dict[Signal, int] = {}
        for signal in SIGNALS:
            try:
                last[signal] = await self._store.last_seq(signal)
            except StoreError:
                continue
        return [
            _describe(export, last.get(export.progress.signal))
            for _, export in sorted(self._exports.items(), key=lambda item: item[0])
        ]

    async def close(self, grace_s: float) -> None:
        """Give healthy backends a moment to take the rest, and end. Idempotent."""
        exports, self._exports = list(self._exports.values()), {}
        await asyncio.gather(*(_stop(export, grace_s) for export in exports), *self._retiring.values())


async def _stop(export: _Export, grace_s: float, after: asyncio.Task[None] | None = None) -> None:
    """End an export; `after` is the end of the one that it replaced."""
    if after is not None:
        await asyncio.wait([after])
    pushes = [export.push.stop(grace_s)] if export.push is not None else []
    await asyncio.gather(export.rows.stop(grace_s), *pushes)


def _first_of_each_backend(wanted: Mapping[str, Targets]) -> frozenset[str]:
    """Return one exporter for each backend that takes metrics, by endpoint and credentials."""
    first: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}
    for name in sorted(wanted):
        if (target := wanted[name].get("metrics")) is not None:
            first.setdefault((target.endpoint, target.headers), name)
    return frozenset(first.values())


def _describe(export: _Export, last_seq: int | None) -> ExportStatus:
    rows = export.progress
    both = [rows, *([export.push.progress] if export.push is not None else [])]
    failing = next((one for one in both if one.failures), rows)
    exported = rows.exported_seq or 0
    return ExportStatus(
        name=rows.name,
        signal=rows.signal,
        endpoint=shown_endpoint(export.target),
        exported_seq=exported,
        behind=max(0, last_seq - exported) if last_seq is not None else 0,
        sent=rows.sent,
        dropped=rows.refused,
        failures=failing.failures,
        failing_since_ns=failing.failing_since_ns,
        last_error=failing.last_error,
    )
