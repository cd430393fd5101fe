"""Nothing that an agent sends to its OTLP receiver makes it raise anything but ReceiveError, or speak for another."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from agent_otlp import FORGED, IDENTITY, NOW, OWN_ATTRIBUTES, TRACE, intake, make_span, pairs, plain, traces

from clrk.gateway.telemetry.receive import AgentSpan, Batch
from clrk.gateway.telemetry.receive_values import is_reserved
from clrk.gateway.telemetry.receive_wire import Encoding, ReceiveError, Signal, inflate

EVENT = Span.Event(name="e", time_unix_nano=NOW, attributes=pairs(FORGED))
LINK = Span.Link(trace_id=b"\1" * 16, span_id=b"\2" * 8, attributes=pairs(FORGED))
NESTED = {"a": [1, {"b": b"\xff"}], "s": ["x", "y"]}
LOGS = ExportLogsServiceRequest(
    resource_logs=[
        ResourceLogs(scope_logs=[ScopeLogs(log_records=[LogRecord(time_unix_nano=NOW, attributes=pairs(FORGED))])])
    ]
)
METRICS = ExportMetricsServiceRequest(
    resource_metrics=[
        ResourceMetrics(
            scope_metrics=[
                ScopeMetrics(
                    metrics=[
                        Metric(name="g", gauge=Gauge(data_points=[NumberDataPoint(time_unix_nano=NOW, as_int=1)])),
                        Metric(name="h", histogram=Histogram(data_points=[HistogramDataPoint(time_unix_nano=NOW)])),
                    ]
                )
            ]
        )
    ]
)
SEEDS = {
    Signal.TRACES: traces(make_span(FORGED | NESTED, events=[EVENT], links=[LINK]), resource=FORGED, scope=FORGED),
    Signal.LOGS: LOGS,
    Signal.METRICS: METRICS,
}
RAW = {signal: message.SerializeToString() for signal, message in SEEDS.items()}


def with_hex_ids(tree: Any) -> Any:
    """Return protobuf's JSON as OTLP has it."""
    if isinstance(tree, list):
        return [with_hex_ids(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        name: base64.b64decode(value).hex() if name in ("traceId", "spanId") else with_hex_ids(value)
        for name, value in tree.items()
    }


TREES = {signal: with_hex_ids(MessageToDict(message)) for signal, message in SEEDS.items()}
KEYS = st.sampled_from(
    """resourceSpans scopeSpans spans resource scope attributes key value stringValue intValue doubleValue bytesValue
    arrayValue kvlistValue values traceId spanId parentSpanId startTimeUnixNano endTimeUnixNano kind status code events
    links resourceLogs scopeLogs logRecords body resourceMetrics scopeMetrics metrics gauge dataPoints exemplars name
    timeUnixNano flags""".split()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([TRACE, "ab" * 8, str(NOW), "agent.name", "invocation.id"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=15,
)  # fmt: skip


def read(body: bytes, signal: Signal, encoding: Encoding) -> Batch | None:
    """Read as the receiver does; None for what it refuses."""
    try:
        return intake().read(body, signal, encoding, now_ns=NOW)
    except ReceiveError as exc:
        assert exc.code in ("malformed", "too_large")  # noqa: PT017 - both outcomes are right
        return None


def check(batch: Batch | None, least: int = 0) -> None:
    """What is kept is this run's, of its trace, and can be written as JSON."""
    assert batch is None or len(batch.items) >= least
    for item in batch.items if batch is not None else ():
        if isinstance(item, AgentSpan):
            assert item.record.trace_id == TRACE
            assert item.record.attributes.items() >= OWN_ATTRIBUTES.items()
            json.dumps(item.record.attributes, allow_nan=False).encode()
            (span,) = ResourceSpans.FromString(item.otlp).scope_spans[0].spans
            ours = {name: value for name, value in plain(span.attributes).items() if is_reserved(name)}
            assert ours == OWN_ATTRIBUTES
            assert item.record.resource["clrk.component"] == "agent"
            assert span.span_id.hex() != IDENTITY.context.span_id


@pytest.mark.parametrize("signal", Signal)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 3)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_protobuf_that_was_damaged(signal: Signal, edits: list[tuple[int, bytes, int]]) -> None:
    body = RAW[signal]
    for position, replacement, removed in edits:
        at = position % (len(body) + 1)
        body = body[:at] + replacement + body[at + removed :]
    batch = read(body, signal, Encoding.PROTOBUF)
    if batch is not None and not edits:
        assert batch.items
    for item in batch.items if batch is not None else ():
        assert item.otlp
        if isinstance(item, AgentSpan):
            assert item.record.trace_id == TRACE
            assert item.record.attributes.items() >= OWN_ATTRIBUTES.items()


@pytest.mark.parametrize("signal", Signal)
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=12), value=VALUES)
@settings(max_examples=300, deadline=None)
def test_json_with_a_part_replaced(signal: Signal, path: list[int], value: Any) -> None:
    tree = json.loads(json.dumps(TREES[signal]))
    place: Any = tree
    for step in path:
        if not isinstance(place, dict | list) or not place:
            break
        key: Any = list(place)[step % len(place)] if isinstance(place, dict) else step % len(place)
        if not isinstance(place[key], dict | list) or step == path[-1]:
            place[key] = value
            break
        place = place[key]
    check(read(json.dumps(TREES[signal]).encode(), signal, Encoding.JSON), least=1)
    check(read(json.dumps(tree).encode("utf-8", "surrogatepass"), signal, Encoding.JSON))


@given(body=st.binary(max_size=200), signal=st.sampled_from(Signal), encoding=st.sampled_from(Encoding))
@settings(max_examples=500, deadline=None)
def test_any_bytes(body: bytes, signal: Signal, encoding: Encoding) -> None:
    check(read(body, signal, encoding))


@given(body=st.binary(max_size=100), coding=st.sampled_from(["gzip", "deflate"]))
@settings(max_examples=300, deadline=None)
def test_any_coding(body: bytes, coding: str) -> None:
    try:
        assert isinstance(inflate(body, coding), bytes)
    except ReceiveError as exc:
        assert exc.code in ("malformed", "too_large")  # noqa: PT017 - both outcomes are right
