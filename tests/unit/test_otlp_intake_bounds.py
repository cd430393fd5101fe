"""What an agent's SDK may not send: too long, too many, too deep, broken, a bomb; each costs only itself."""

from __future__ import annotations

import struct
import zlib

import pytest
from agent_otlp import (
    NOW,
    OWN_ATTRIBUTES,
    SPAN,
    exported,
    field,
    intake,
    make_span,
    metrics,
    number,
    pairs,
    plain,
    read,
    traces,
)
from cost import assert_cheap
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    ResourceMetrics,
    Sum,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as OtlpStatus

from clrk.gateway.telemetry.receive_wire import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    MAX_PLAIN_BYTES,
    ReceiveError,
    Signal,
    inflate,
)
from clrk.gateway.telemetry.token_bucket import ITEM_BYTES, TokenBucket

# --- bounds ---------------------------------------------------------------------------------------------------------


def test_what_is_long_is_cut_and_what_is_many_is_counted():
    attributes = {f"k{i}": "v" for i in range(500)} | {"x" * 300: "long name"}
    span = make_span(
        attributes, name="n" * 5000,
        events=[Span.Event(name="e" * 1000, time_unix_nano=NOW, attributes=pairs({"a": "b"})) for _ in range(130)],
        links=[Span.Link(trace_id=b"\1" * 16, span_id=SPAN) for _ in range(200)],
        status=OtlpStatus(code=OtlpStatus.STATUS_CODE_ERROR, message="m" * 50_000),
    )  # fmt: skip
    span.attributes[0].value.string_value = "v" * 100_000
    batch = read(traces(span))
    sent, out = exported(batch)
    record = batch.items[0].record
    assert len(record.name) == 1024
    assert len(record.attributes) == 128 + len(OWN_ATTRIBUTES)
    assert out.dropped_attributes_count == 500 + 1 - 128
    assert {len(event.name) for event in record.events} == {256}
    assert (len(out.events), out.dropped_events_count) == (128, 2)
    assert (len(out.links), out.dropped_links_count) == (128, 72)
    assert len(record.attributes["k0"]) == 8192
    assert len(plain(out.attributes)["k0"]) == 32_768
    assert len(record.status.message) == 8192
    assert not [pair for pair in sent.resource.attributes if len(pair.key) > 256]


def test_a_resource_is_small_because_every_item_repeats_it():
    batch = read(traces(make_span(), resource={f"k{i}": "v" * 10_000 for i in range(20)}))
    assert len(batch.items[0].otlp) < 20_000
    assert exported(batch)[0].resource.dropped_attributes_count == 19


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"k": inner}])
def test_deep_values_are_dropped(wrap):
    value = "x"
    for _ in range(20):
        value = wrap(value)
    _, out = exported(read(traces(make_span({"deep": value, "wide": [[1]] * 1000, "kept": [[1]]}))))
    assert plain(out.attributes).keys() - OWN_ATTRIBUTES.keys() == {"kept"}
    assert out.dropped_attributes_count == 2


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff", "malformed"),  # a number without an end
        (b"\x0a\xff\xff\xff\xff\x0f", "malformed"),  # a length far past the end
        (b"\x0a\x02\x12\x01", "malformed"),  # a length past the end, one level in
        (b"\x0b", "malformed"),  # a group
        (b"\x02\x00", "malformed"),  # field 0
        (b"\x09\x01", "malformed"),  # a cut fixed64
        (b"{}", "malformed"),
        (field(1, b"\x12\x00" * (MAX_ITEMS + 1)), "too_large"),  # a million of nothing
        (field(1, field(2, b"\x12\x00" * (MAX_ITEMS + 1))), "too_large"),
        (b"\x0a\x00" * (MAX_ITEMS + 1), "too_large"),
        (b"\x08\x01" * (MAX_ITEMS + 1), "too_large"),  # fields that nobody knows
    ],
)
def test_bodies_that_are_no_request(raw, code):
    with pytest.raises(ReceiveError) as caught:
        read(raw)
    assert caught.value.code == code


def test_every_cut_of_a_body_ends_well():
    raw = traces(make_span({"a": "b"}), make_span(span_id=b"\2" * 8)).SerializeToString()
    for end in range(1, len(raw)):
        with pytest.raises(ReceiveError) as caught:
            read(raw[:end])
        assert caught.value.code == "malformed"


def test_one_bad_item_costs_only_itself():
    deep = b""
    for _ in range(200):
        deep = field(5, field(1, deep))  # array_value in array_value in ...
    bad = [
        b"\xff",
        field(5, b"\xff\xfe"),  # a name that is no UTF-8
        field(9, field(2, deep)),
        field(5, b"x" * (MAX_ITEM_BYTES + 1)),
    ]
    good = make_span().SerializeToString()
    batch = read(field(1, field(2, b"".join(field(2, item) for item in [*bad, good]))))
    assert len(batch.items) == 1
    assert dict(batch.rejected) == {"not readable": 3, f"over {MAX_ITEM_BYTES} bytes": 1}


def test_a_resource_that_can_not_be_read_is_as_good_as_none():
    good = make_span().SerializeToString()
    batch = read(field(1, field(1, b"\xff") + field(2, field(1, b"\xff") + field(2, good))))
    assert batch.items[0].record.resource == {
        "clrk.component": "agent", "clrk.egress_gateway": "default/egress", "host.name": "host-1",
    }  # fmt: skip


def test_a_run_has_a_share_and_no_more():
    clock = [0.0]
    size = len(read(traces(make_span())).items[0].otlp) + ITEM_BYTES
    reader = intake(bucket=TokenBucket(burst_bytes=size * 3, bytes_per_s=size, clock=lambda: clock[0]))
    many = traces(*(make_span(span_id=struct.pack(">Q", i + 1)) for i in range(10)))
    batch = read(many, reader=reader)
    assert (len(batch.items), dict(batch.rejected)) == (3, {"over this run's limit": 7})
    assert not read(many, reader=reader).items
    clock[0] = 2.0
    assert len(read(many, reader=reader).items) == 2
    linked = make_span(links=[Span.Link(trace_id=b"\1" * 16, span_id=SPAN)])
    assert dict(read(traces(linked), reader=reader).rejected) == {"over this run's limit": 1}


# --- metrics --------------------------------------------------------------------------------------------------------


def histogram(counts, bounds):
    point = HistogramDataPoint(time_unix_nano=NOW, bucket_counts=counts, explicit_bounds=bounds)
    return Metric(name="h", histogram=Histogram(data_points=[point]))


@pytest.mark.parametrize(
    ("metric", "reasons"),
    [
        (Metric(name="m"), {"metric without data": 1}),
        (Metric(gauge=Gauge(data_points=[number(), number()])), {"metric without a name": 2}),
        (Metric(name="m", gauge=Gauge()), {}),
        (Metric(name="m", gauge=Gauge(data_points=[number(time_unix_nano=0)])), {"time out of range": 1}),
        (histogram([1, 2], [1.0, 2.0]), {"buckets do not match their bounds": 1}),
        (histogram([1] * 2000, [float(i) for i in range(1999)]), {"too many buckets": 1}),
        (
            Metric(
                name="m",
                exponential_histogram=ExponentialHistogram(
                    data_points=[
                        ExponentialHistogramDataPoint(
                            time_unix_nano=NOW,
                            positive=ExponentialHistogramDataPoint.Buckets(bucket_counts=[1] * 2000),
                        )
                    ]
                ),
            ),
            {"too many buckets": 1},
        ),
    ],
)
def test_refused_points(metric, reasons):
    batch = read(metrics(metric), Signal.METRICS)
    assert not batch.items
    assert dict(+batch.rejected) == reasons


def test_points_that_are_left_are_kept_as_they_are():
    points = [number(as_int=1), number(time_unix_nano=5), number(as_int=3, start_time_unix_nano=NOW + 1)]
    batch = read(metrics(Metric(name="m", unit="1", sum=Sum(data_points=points, is_monotonic=True))), Signal.METRICS)
    out = ResourceMetrics.FromString(batch.items[0].otlp).scope_metrics[0].metrics[0]
    assert [(point.as_int, point.start_time_unix_nano) for point in out.sum.data_points] == [(1, 0), (3, 0)]
    assert (out.unit, out.sum.is_monotonic, batch.items[0].time_ns) == ("1", True, NOW)
    assert dict(batch.rejected) == {"time out of range": 1}


# --- content coding -------------------------------------------------------------------------------------------------


def gzip_member(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    return stream.compress(data) + stream.flush()


def raw_deflate(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


LARGEST = gzip_member(b"x" * MAX_PLAIN_BYTES)


def test_codings():
    plain_body = b"some bytes " * 1000
    assert inflate(gzip_member(plain_body), "gzip") == plain_body
    assert inflate(gzip_member(b"a") + gzip_member(b"b"), "gzip") == b"ab"
    assert inflate(zlib.compress(plain_body), "deflate") == plain_body
    assert inflate(raw_deflate(plain_body), "deflate") == plain_body
    assert inflate(LARGEST, "gzip") == b"x" * MAX_PLAIN_BYTES


@pytest.mark.parametrize(
    ("body", "coding", "code"),
    [
        (b"", "gzip", "malformed"),
        (b"\x1f\x8b", "gzip", "malformed"),
        (b"no gzip at all", "gzip", "malformed"),
        (gzip_member(b"abc")[:-1], "gzip", "malformed"),
        (gzip_member(b"abc") + b"rest", "gzip", "malformed"),
        (b"", "deflate", "malformed"),
        (zlib.compress(b"abc")[:-1], "deflate", "malformed"),
        (zlib.compress(b"abc") + b"x", "deflate", "malformed"),
        (gzip_member(b"x" * (MAX_PLAIN_BYTES + 1)), "gzip", "too_large"),
        (gzip_member(b"\0" * (1 << 28)), "gzip", "too_large"),
        (raw_deflate(b"\0" * (1 << 26)), "deflate", "too_large"),
        (gzip_member(b"") * 100_000, "gzip", "too_large"),
    ],
)
def test_bombs_and_broken_codings(body, coding, code):
    def refused() -> None:
        with pytest.raises(ReceiveError) as caught:
            inflate(body, coding)
        assert caught.value.code == code

    assert_cheap(refused, lambda: inflate(LARGEST, "gzip"), at_most=10)


def test_an_empty_request_is_one():
    assert not read(ExportTraceServiceRequest()).items
