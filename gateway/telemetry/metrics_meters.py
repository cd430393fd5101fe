"""The meters: what spans measure and what is counted elsewhere, kept by the OpenTelemetry SDK, read by exporters.

Each EgressGateway has a meter of its own, since its name is in the resource; two more hold what belongs to no gateway.
Readers take cumulative values whenever they like. Attributes are bounded: beyond MAX_SETS of an instrument, what comes
new is counted below `otel.metric.overflow` (models, hosts and tools are the agents' word).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from opentelemetry.sdk.resources import Resource

from clrk import __version__
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.export_encoding import resource_items
from clrk.gateway.telemetry.metrics import INSTRUMENTS, Instrument, Measurement, measure
from clrk.gateway.telemetry.spans import AttributeValue, Component, SpanRecord

_log = logging.getLogger(__name__)

MAX_SETS: Final = 1000  # of attributes, of one instrument of one gateway; the SDK's own limit is 2000
CLRK_SANDBOXES: Final = "clrk.sandboxes"
CLRK_KERNEL_EVENTS: Final = "clrk.kernel.events"
CLRK_TELEMETRY_DROPPED: Final = "clrk.telemetry.dropped"
CLRK_EXPORT_ITEMS: Final = "clrk.export.items"
CLRK_EXPORT_REFUSED: Final = "clrk.export.refused"
CLRK_EXPORT_FAILURES: Final = "clrk.export.failures"

_OVERFLOW: Final[dict[str, str | bool | int | float]] = {attr.OTEL_METRIC_OVERFLOW: True}
_DROPPED_PREFIX: Final = "dropped_"
_Attributes = dict[str, str | bool | int | float]


@dataclass(slots=True)
class HostFacts:
    """What is counted outside of spans; each is read when somebody reads the metrics.

    Shape: kernel is by counter name and sandboxes by state (core.messages.Counters); drops are the store's counters;
    exports yields (exporter, signal, sent, refused, failures).
    """

    kernel: Callable[[], Mapping[str, int]] = dict
    sandboxes: Callable[[], Mapping[str, int]] = dict
    drops: Callable[[], Mapping[str, int]] = dict
    exports: Callable[[], Iterable[tuple[str, str, int, int, int]]] = tuple


class _Meter:
    """A provider, its reader, and nothing that runs by itself."""

    def __init__(self, resource: Mapping[str, AttributeValue]) -> None:
        self.reader = InMemoryMetricReader()
        provider = MeterProvider(
            metric_readers=[self.reader],
            resource=Resource(dict(resource), attr.SCHEMA_URL),
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        self.meter = provider.get_meter("clrk", __version__, attr.SCHEMA_URL)

    def read(self) -> MetricsData | None:
        return self.reader.get_metrics_data()


class _GatewayMeter(_Meter):
    """What the agents of one EgressGateway do."""

    def __init__(self, resource: Mapping[str, AttributeValue]) -> None:
        super().__init__(resource)
        self._instruments = {one.name: self._make(one) for one in INSTRUMENTS}
        self._known: dict[str, set[frozenset[tuple[str, object]]]] = {one.name: set() for one in INSTRUMENTS}

    def _make(self, one: Instrument) -> Histogram | Counter:
        if one.kind == "counter":
            return self.meter.create_counter(one.name, one.unit, one.description)
        return self.meter.create_histogram(
            one.name, one.unit, one.description, explicit_bucket_boundaries_advisory=list(one.buckets)
        )

    def take(self, measurement: Measurement) -> None:
        attributes = self._bounded(measurement)
        match self._instruments[measurement.instrument]:
            case Counter() as counter:
                counter.add(measurement.value, attributes)
            case Histogram() as histogram:
                histogram.record(measurement.value, attributes)

    def _bounded(self, measurement: Measurement) -> _Attributes:
        known = self._known[measurement.instrument]
        key = frozenset(measurement.attributes.items())
        if key not in known:
            if len(known) >= MAX_SETS:
                return _OVERFLOW
            known.add(key)
        return measurement.attributes


class Metrics:
    """All meters of this process. take() is for the event loop, reading may be done in any thread."""

    def __init__(self, base: Mapping[str, AttributeValue]) -> None:
        self.host = HostFacts()
        self._base = base
        self._gateways: dict[str, _GatewayMeter] = {}
        self._runtime = self._make_runtime()
        self._own = self._make_own()

    def take(self, record: SpanRecord, gateway: str) -> None:
        """Take what a finished span measures; gateway is namespace/name of its EgressGateway, or empty."""
        for measurement in measure(record):
            meter = self._gateways.get(gateway)
            if meter is None:
                meter = _GatewayMeter(dict(resource_items(self._base, Component.GATEWAY, gateway)))
                self._gateways = {**self._gateways, gateway: meter}  # readers in other threads walk the old one
            meter.take(measurement)

    def read(self, wants: Callable[[str], bool], *, with_host: bool) -> Iterator[tuple[str, MetricsData]]:
        """Yield (gateway, its metrics) for those that `wants` accepts; what belongs to no gateway has the name ""."""
        if with_host:
            for meter in (self._runtime, self._own):
                if (data := meter.read()) is not None:
                    yield "", data
        for gateway, meter in self._gateways.items():
            if wants(gateway) and (data := meter.read()) is not None:
                yield gateway, data

    def encode(self, wants: Callable[[str], bool], *, with_host: bool) -> bytes:
        """Return a serialised ExportMetricsServiceRequest, empty when there is nothing to say."""
        # Requests are joined by joining their bytes: the field is repeated.
        return b"".join(encode_metrics(data).SerializeToString() for _, data in self.read(wants, with_host=with_host))

    # --- what belongs to no gateway ---------------------------------------------------------------------------------

    def _make_runtime(self) -> _Meter:
        meter = _Meter(dict(resource_items(self._base, Component.RUNTIME, "")))
        meter.meter.create_observable_gauge(
            CLRK_SANDBOXES, [self._observe(self._sandboxes, attr.CLRK_SANDBOX_STATE)],
            "{sandbox}", "Sandboxes by state",
        )  # fmt: skip
        meter.meter.create_observable_counter(
            CLRK_KERNEL_EVENTS, [self._observe(self._kernel, attr.CLRK_KERNEL_COUNTER)],
            "{event}", "What the kernel part did, refused and could not do, by counter",
        )  # fmt: skip
        return meter

    def _make_own(self) -> _Meter:
        meter = _Meter(dict(resource_items(self._base, Component.GATEWAY, "")))
        meter.meter.create_observable_counter(
            CLRK_TELEMETRY_DROPPED, [self._observe(self._dropped, attr.CLRK_DROP_REASON)],
            "{item}", "Spans, log lines and records that could not be kept, by reason",
        )  # fmt: skip
        meter.meter.create_observable_counter(
            CLRK_EXPORT_ITEMS, [self._observe_exports(2)], "{item}", "Rows that a backend took"
        )
        meter.meter.create_observable_counter(
            CLRK_EXPORT_REFUSED,
            [self._observe_exports(3)],
            "{item}",
            "Rows that a backend refused for good",
        )
        meter.meter.create_observable_counter(
            CLRK_EXPORT_FAILURES, [self._observe_exports(4)], "{request}", "Requests that failed, to be sent again"
        )
        return meter

    def _sandboxes(self) -> Mapping[str, int]:
        return self.host.sandboxes()

    def _kernel(self) -> Mapping[str, int]:
        return self.host.kernel()

    def _dropped(self) -> Mapping[str, int]:
        return {
            name.removeprefix(_DROPPED_PREFIX): value
            for name, value in self.host.drops().items()
            if name.startswith(_DROPPED_PREFIX)
        }

    @staticmethod
    def _observe(
        read: Callable[[], Mapping[str, int]], name: str
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _options: [Observation(value, {name: key}) for key, value in sorted(read().items())]

    def _observe_exports(self, column: Literal[2, 3, 4]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for row in self.host.exports():
                yield Observation(row[column], {attr.CLRK_EXPORTER: row[0], attr.CLRK_EXPORT_SIGNAL: row[1]})

        return observe
