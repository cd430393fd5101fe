"""Metrics as Prometheus text, for `/metrics`. Pure.

Names follow the OpenTelemetry specification (compatibility/prometheus_and_openmetrics.md): dots become underscores,
a unit in seconds and `_total` of a counter are written out, annotations such as {token} are not. The gateway, which
OTLP has in the resource, is a label here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from opentelemetry.sdk.metrics.export import Gauge, Histogram, HistogramDataPoint, Metric, MetricsData, Sum
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.utils import floatToGoString

_UNITS: Final = {"s": "seconds", "By": "bytes"}
_GATEWAY_LABEL: Final = "clrk_egress_gateway"


def render(read: Iterable[tuple[str, MetricsData]]) -> tuple[bytes, str]:
    """Return the text and its Content-Type; read is (gateway as namespace/name, its metrics)."""
    registry = CollectorRegistry()
    registry.register(_Once(list(_families(read))))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Once:
    """What the client library calls a collector."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> list[Family]:
        return self._families


def _families(read: Iterable[tuple[str, MetricsData]]) -> Iterator[Family]:
    found: dict[str, tuple[Metric, list[tuple[dict[str, str], object]]]] = {}
    for gateway, data in read:
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    _, points = found.setdefault(metric.name, (metric, []))
                    points += [(_labels(gateway, point.attributes), point) for point in metric.data.data_points]
    for metric, points in found.values():
        yield _family(metric, points)


def _labels(gateway: str, attributes: object) -> dict[str, str]:
    labels = {_GATEWAY_LABEL: gateway} if gateway else {}
    for name, value in dict(attributes or {}).items():  # type: ignore[call-overload]  # the SDK's own Mapping | None
        labels[_identifier(name)] = str(value).lower() if isinstance(value, bool) else str(value)
    return labels


def _family(metric: Metric, points: list[tuple[dict[str, str], object]]) -> Family:
    """Samples of one family may differ in their labels, which the library's own add_metric does not allow."""
    name = _identifier(metric.name)
    if (unit := _UNITS.get(metric.unit or "", "")) and not name.endswith(f"_{unit}"):
        name = f"{name}_{unit}"
    text = metric.description or metric.name
    match metric.data:
        case Histogram():
            family: Family = HistogramMetricFamily(name, text)
            for labels, point in points:
                if isinstance(point, HistogramDataPoint):
                    _add_histogram(family, name, labels, point)
        case Sum(is_monotonic=True):
            family = CounterMetricFamily(name, text)
            for labels, point in points:
                family.add_sample(f"{name}_total", labels, getattr(point, "value", 0))
        case Sum() | Gauge() | _:
            family = GaugeMetricFamily(name, text)
            for labels, point in points:
                family.add_sample(name, labels, getattr(point, "value", 0))
    return family


def _add_histogram(family: Family, name: str, labels: dict[str, str], point: HistogramDataPoint) -> None:
    total = 0
    for bound, count in zip((*point.explicit_bounds, float("inf")), point.bucket_counts, strict=True):
        total += count
        le = floatToGoString(bound)  # type: ignore[no-untyped-call]  # the library left it so
        family.add_sample(f"{name}_bucket", labels | {"le": le}, total)
    family.add_sample(f"{name}_count", labels, point.count)
    family.add_sample(f"{name}_sum", labels, point.sum)


def _identifier(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
