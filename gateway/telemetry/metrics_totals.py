"""Running totals of what spans measure: counters and histograms, read as the OpenTelemetry SDK's own data.

The SDK's instruments clean, copy, sort and hash the attributes of each measurement anew, and an LLM call has six: that
took longer than all else that is recorded of a call. Attributes here were made by us (metrics.py), and are their own
key. Values are cumulative. Attributes are bounded: beyond MAX_SETS of an instrument, what comes new is counted below
`otel.metric.overflow` (models, hosts and tools are the agents' word).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from clrk import __version__
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.metrics import INSTRUMENTS, Instrument, Measurement
from clrk.gateway.telemetry.spans import AttributeValue

MAX_SETS: Final = 1000  # of attributes, of one instrument of one gateway

_OVERFLOW: Final[dict[str, str | bool | int | float]] = {attr.OTEL_METRIC_OVERFLOW: True}
_OVERFLOW_KEY: Final = frozenset(_OVERFLOW.items())
_BY_NAME: Final = {one.name: one for one in INSTRUMENTS}
_SCOPE: Final = InstrumentationScope("clrk", __version__, attr.SCHEMA_URL)


class _Series:
    """One instrument with one set of attributes. counts are by bucket, the last one above all bounds."""

    __slots__ = ("attributes", "bounds", "count", "counts", "largest", "smallest", "start_ns", "total")

    def __init__(self, instrument: Instrument, attributes: dict[str, str | bool | int | float]) -> None:
        self.attributes, self.bounds = attributes, instrument.buckets
        self.start_ns = time.time_ns()
        self.counts = [0] * (len(instrument.buckets) + 1)
        self.count: int = 0
        self.total: int | float = 0
        self.smallest, self.largest = float("inf"), float("-inf")

    def add(self, value: int | float) -> None:
        self.count += 1
        self.total += value
        self.counts[bisect_left(self.bounds, value)] += 1
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)

    def histogram_point(self, now_ns: int) -> HistogramDataPoint:
        return HistogramDataPoint(
            self.attributes, self.start_ns, now_ns, self.count, self.total, tuple(self.counts), self.bounds,
            self.smallest, self.largest,
        )  # fmt: skip

    def sum_point(self, now_ns: int) -> NumberDataPoint:
        return NumberDataPoint(self.attributes, self.start_ns, now_ns, self.total)


class RunningTotals:
    """What the agents of one EgressGateway do. Any thread may read."""

    def __init__(self, resource: Mapping[str, AttributeValue]) -> None:
        self._resource = Resource(dict(resource), attr.SCHEMA_URL)
        self._lock = threading.Lock()
        self._series: dict[str, dict[frozenset[tuple[str, object]], _Series]] = {name: {} for name in _BY_NAME}

    def take(self, measurement: Measurement) -> None:
        """Add one value; attributes are kept as they are."""
        name, value, attributes = measurement
        known, key = self._series[name], frozenset(attributes.items())
        with self._lock:
            series = known.get(key)
            if series is None:
                key, attributes = (_OVERFLOW_KEY, _OVERFLOW) if len(known) >= MAX_SETS else (key, attributes)
                series = known.setdefault(key, _Series(_BY_NAME[name], attributes))
            series.add(value)

    def read(self) -> MetricsData | None:
        """Return the totals of now; None: nothing was measured yet."""
        with self._lock:
            metrics = list(self._metrics(time.time_ns()))
        if not metrics:
            return None
        scope = ScopeMetrics(_SCOPE, metrics, attr.SCHEMA_URL)
        return MetricsData([ResourceMetrics(self._resource, [scope], attr.SCHEMA_URL)])

    def _metrics(self, now_ns: int) -> Iterator[Metric]:
        temporality = AggregationTemporality.CUMULATIVE
        for one in INSTRUMENTS:
            found = self._series[one.name].values()
            if found and one.kind == "histogram":
                points = [series.histogram_point(now_ns) for series in found]
                yield Metric(one.name, one.description, one.unit, Histogram(points, temporality))
            elif found:
                sums = [series.sum_point(now_ns) for series in found]
                yield Metric(one.name, one.description, one.unit, Sum(sums, temporality, is_monotonic=True))
