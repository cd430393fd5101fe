"""An agent's own metrics: their data points cleaned and bounded. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    Exemplar,
    ExponentialHistogramDataPoint,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    SummaryDataPoint,
)

from clrk.gateway.telemetry.receive_traces import RefusedItemError, Traces, is_plausible
from clrk.gateway.telemetry.receive_values import MAX_NAME_CHARS, clean_attributes

_MAX_POINTS: Final = 2000  # of one metric
_MAX_BUCKETS: Final = 1024
_MAX_EXEMPLARS: Final = 16
_MAX_DESCRIPTION: Final = 1024
Point = NumberDataPoint | HistogramDataPoint | ExponentialHistogramDataPoint | SummaryDataPoint


def clean_metric(metric: Metric, traces: Traces, *, now_ns: int, rejected: Counter[str]) -> int:
    """Clean a metric in place; return the time of its last point. Points that are dropped are counted in rejected.

    Raises: RefusedItemError when nothing is left of it.
    """
    kind = metric.WhichOneof("data")
    if kind is None:
        raise RefusedItemError("metric without data")
    points = getattr(metric, kind).data_points
    if not metric.name:
        raise RefusedItemError("metric without a name", len(points))
    metric.name = metric.name[:MAX_NAME_CHARS]
    metric.description = metric.description[:_MAX_DESCRIPTION]
    metric.unit = metric.unit[:MAX_NAME_CHARS]
    metadata = clean_attributes(metric.metadata, flat=True)
    del metric.metadata[:]
    metric.metadata.extend(metadata.values)
    kept: list[Point] = []
    for index, point in enumerate(points):
        reason = "too many data points" if index >= _MAX_POINTS else _problem(point, now_ns)
        if reason is None:
            _clean_point(point, traces)
            kept.append(point)
        else:
            rejected[reason] += 1
    if not kept:
        raise RefusedItemError("metric without a data point", 0)
    if len(kept) != len(points):
        fresh = [type(point).FromString(point.SerializeToString()) for point in kept]  # `del` would empty them
        del points[:]
        points.extend(fresh)
    return max(int(point.time_unix_nano) for point in points)


def _problem(point: Point, now_ns: int) -> str | None:
    """Say why a point can not be kept: one that a backend refuses may take its whole batch with it."""
    if not is_plausible(point.time_unix_nano, now_ns):
        return "time out of range"
    if isinstance(point, HistogramDataPoint):
        counts, bounds = len(point.bucket_counts), len(point.explicit_bounds)
        if (counts or bounds) and counts != bounds + 1:
            return "buckets do not match their bounds"
        if counts > _MAX_BUCKETS:
            return "too many buckets"
    elif isinstance(point, ExponentialHistogramDataPoint):
        if max(len(point.positive.bucket_counts), len(point.negative.bucket_counts)) > _MAX_BUCKETS:
            return "too many buckets"
    elif isinstance(point, SummaryDataPoint) and len(point.quantile_values) > _MAX_BUCKETS:
        return "too many quantiles"
    return None


def _clean_point(point: Point, traces: Traces) -> None:
    if point.start_time_unix_nano > point.time_unix_nano:
        point.start_time_unix_nano = 0  # unknown
    cleaned = clean_attributes(point.attributes, flat=True)
    del point.attributes[:]
    point.attributes.extend(cleaned.values)
    if not isinstance(point, SummaryDataPoint):
        kept = [_clean_exemplar(point.exemplars[i], traces) for i in range(min(_MAX_EXEMPLARS, len(point.exemplars)))]
        del point.exemplars[:]
        point.exemplars.extend(kept)


def _clean_exemplar(source: Exemplar, traces: Traces) -> Exemplar:
    made = Exemplar()
    made.CopyFrom(source)
    cleaned = clean_attributes(source.filtered_attributes, flat=True)
    del made.filtered_attributes[:]
    made.filtered_attributes.extend(cleaned.values)
    traces.place_exemplar(made)
    return made
