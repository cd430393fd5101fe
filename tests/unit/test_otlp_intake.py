"""What an agent's own SDK says: whose it is, which trace it is of, and everything that it may not say."""

from __future__ import annotations

import base64
import json
import struct
import time
import zlib

import pytest
from agent_otlp import (
    DAEMON,
    FORGED,
    IDENTITY,
    NOW,
    OTHER_TRACE,
    OWN_ATTRIBUTES,
    RUN_SPAN,
    SPAN_ID,
    TRACE,
    any_value,
    exported,
    intake,
    make_span,
    pairs,
    plain,
    read,
    traces,
)
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    Exemplar,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
    Summary,
    SummaryDataPoint,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as OtlpStatus

from clrk.gateway.telemetry.meter import ITEM_BYTES, Meter
from clrk.gateway.telemetry.receive_wire import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    MAX_PLAIN_BYTES,
    ReceiveError,
    Signal,
    inflate,
)
from clrk.gateway.telemetry.spans import SpanKind, Status, StatusCode

SPAN = bytes.fromhex(SPAN_ID)
DAY_NS = 86_400 * 10**9


# --- identity -------------------------------------------------------------------------------------------------------


def test_identity_is_the_runs_wherever_it_is_claimed():
    span = make_span(
        FORGED | {"own": "kept"},
        events=[Span.Event(name="e", time_unix_nano=NOW, attributes=pairs(FORGED | {"own": "kept"}))],
        links=[Span.Link(trace_id=b"\1" * 16, span_id=b"\1" * 8, attributes=pairs(FORGED | {"own": "kept"}))],
    )
    batch = read(traces(span, resource=FORGED | {"service.name": "mine", "host.name": "victim"}, scope=FORGED))
    sent, out = exported(batch)
    record = batch.items[0].record
    assert b"victim" not in batch.items[0].otlp
    assert "victim" not in str(record)
    assert plain(out.attributes) == OWN_ATTRIBUTES | {"own": "kept"} == record.attributes
    resource = {
        "service.name": "mine", "host.name": "host-1", "clrk.component": "agent",
        "clrk.egress_gateway": "default/egress",
    }  # fmt: skip
    assert plain(sent.resource.attributes) == resource == record.resource
    assert plain(sent.scope_spans[0].scope.attributes) == {}
    assert plain(out.events[0].attributes) == {"own": "kept"} == record.events[0].attributes
    assert plain(out.links[0].attributes) == {"own": "kept"}


def test_identity_of_logs():
    log = LogRecord(time_unix_nano=NOW, body=any_value("hello"), attributes=pairs(FORGED), severity_number=17)
    request = ExportLogsServiceRequest(
        resource_logs=[
            ResourceLogs(
                resource=Resource(attributes=pairs(FORGED)),
                scope_logs=[ScopeLogs(scope=InstrumentationScope(attributes=pairs(FORGED)), log_records=[log])],
            )
        ]
    )
    batch = read(request, Signal.LOGS)
    (item,) = batch.items
    assert b"victim" not in item.otlp
    sent = ResourceLogs.FromString(item.otlp)
    assert plain(sent.scope_logs[0].log_records[0].attributes) == OWN_ATTRIBUTES
    assert plain(sent.resource.attributes)["clrk.component"] == "agent"
    assert (item.text, item.severity, item.time_ns, item.trace_id, item.span_id) == ("hello", 17, NOW, TRACE, RUN_SPAN)


def number(**fields):
    return NumberDataPoint(**({"time_unix_nano": NOW, "as_int": 1} | fields))


def metrics(*made, resource=None):
    return ExportMetricsServiceRequest(
        resource_metrics=[
            ResourceMetrics(
                resource=Resource(attributes=pairs(resource or {})), scope_metrics=[ScopeMetrics(metrics=made)]
            )
        ]
    )


# What Prometheus makes of our names is ours too, in metrics.
FLAT = {"agent_name": "victim", "Invocation-Id": "victim", "clrk_component": "victim", "agent_identity_user": "victim"}


@pytest.mark.parametrize(
    "fill",
    [
        lambda point: {"gauge": Gauge(data_points=[number(**point)])},
        lambda point: {"sum": Sum(data_points=[number(**point)], is_monotonic=True)},
        lambda point: {"histogram": Histogram(data_points=[HistogramDataPoint(time_unix_nano=NOW, **point)])},
        lambda point: {
            "exponential_histogram": ExponentialHistogram(
                data_points=[ExponentialHistogramDataPoint(time_unix_nano=NOW, **point)]
            )
        },
        lambda point: {
            "summary": Summary(
                data_points=[SummaryDataPoint(time_unix_nano=NOW, attributes=point["attributes"])]
            )
        },
    ],
)  # fmt: skip
def test_identity_of_metrics(fill):
    exemplar = Exemplar(
        time_unix_nano=NOW, as_int=1, trace_id=bytes.fromhex(OTHER_TRACE), span_id=SPAN,
        filtered_attributes=pairs(FORGED | FLAT),
    )  # fmt: skip
    data = fill({"attributes": pairs(FORGED | FLAT | {"own": "kept"}), "exemplars": [exemplar]})
    metric = Metric(name="m", metadata=pairs(FORGED | FLAT), **data)
    batch = read(metrics(metric, resource=FORGED | {"service.name": "mine"}), Signal.METRICS)
    (item,) = batch.items
    assert b"victim" not in item.otlp
    sent = ResourceMetrics.FromString(item.otlp)
    assert plain(sent.resource.attributes).items() >= (OWN_ATTRIBUTES | {"clrk.component": "agent"}).items()
    out = sent.scope_metrics[0].metrics[0]
    (point,) = getattr(out, out.WhichOneof("data")).data_points
    assert plain(point.attributes) == {"own": "kept"}
    if not isinstance(point, SummaryDataPoint):
        assert point.exemplars[0].trace_id.hex() == TRACE


@pytest.mark.parametrize("name", ["clrk", "agent", "invocation", "agent.identity"])
def test_a_nested_value_does_not_flatten_into_our_names(name):
    record = read(traces(make_span({name: {"component": "victim", "name": "victim", "id": "victim"}}))).items[0].record
    assert record.attributes == OWN_ATTRIBUTES


def test_a_second_attribute_of_one_name_is_dropped():
    span = make_span()
    span.attributes.extend([*pairs({"a": "first"}), *pairs({"a": "second"}), *pairs({"": "no name"})])
    _, out = exported(read(traces(span)))
    assert plain(out.attributes)["a"] == "first"
    assert out.dropped_attributes_count == 2


def test_fields_that_this_version_does_not_know_are_not_passed_on():
    unknown = b"\xfa\x3f\x06victim"  # field 1023, length-delimited
    span = make_span({"a": "b"}).SerializeToString() + unknown
    resource = Resource(attributes=pairs({"service.name": "mine"})).SerializeToString() + unknown
    strindex = Span(attributes=[KeyValue(key="k", key_strindex=7, value=AnyValue(string_value_strindex=7))])
    raw = field(1, field(1, resource) + field(2, field(2, span + strindex.SerializeToString()) + unknown) + unknown)
    batch = read(raw)
    assert b"victim" not in batch.items[0].otlp
    _, out = exported(batch)
    assert all(pair.key_strindex == 0 for pair in out.attributes)
    assert out.dropped_attributes_count == 1
    entity = traces(make_span())
    entity.resource_spans[0].resource.entity_refs.add(type="victim", id_keys=["agent.name"])
    assert b"victim" not in read(entity).items[0].otlp


def test_a_daemon_has_no_invocation_and_keeps_its_traces():
    span = make_span(FORGED, trace_id=bytes.fromhex(OTHER_TRACE))
    record = read(traces(span), reader=intake(DAEMON)).items[0].record
    assert (record.trace_id, record.parent_span_id) == (OTHER_TRACE, "")
    assert "invocation.id" not in record.attributes
    assert record.attributes["agent.name"] == "daemon"


# --- traces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [TRACE, OTHER_TRACE])
def test_roots_hang_below_the_run_whatever_trace_they_are_of(trace):
    root = make_span(trace_id=bytes.fromhex(trace))
    child = make_span(trace_id=bytes.fromhex(trace), span_id=b"\2" * 8, parent_span_id=SPAN)
    batch = read(traces(root, child))
    assert [(item.record.trace_id, item.record.parent_span_id) for item in batch.items] == [
        (TRACE, RUN_SPAN),
        (TRACE, SPAN_ID),
    ]
    for index, item in enumerate(batch.items):
        _, out = exported(batch, index)
        assert (out.trace_id.hex(), out.parent_span_id.hex()) == (item.record.trace_id, item.record.parent_span_id)


def test_links_follow_the_spans_that_were_moved_and_no_others():
    def link(trace_id):
        return Span.Link(trace_id=bytes.fromhex(trace_id), span_id=SPAN)

    reader = intake()
    earlier, later, foreign = OTHER_TRACE, "cd" * 16, "ef" * 16
    read(traces(make_span(trace_id=bytes.fromhex(earlier))), reader=reader)
    linked = make_span(span_id=b"\3" * 8, links=[link(earlier), link(later), link(foreign), link(TRACE)])
    batch = read(traces(linked, make_span(trace_id=bytes.fromhex(later))), reader=reader)
    (out,) = [span for index in range(2) for _, span in [exported(batch, index)] if span.links]
    assert [entry.trace_id.hex() for entry in out.links] == [TRACE, TRACE, foreign, TRACE]


def test_logs_and_spans_of_logs():
    def log(**fields):
        request = ExportLogsServiceRequest(
            resource_logs=[ResourceLogs(scope_logs=[ScopeLogs(log_records=[LogRecord(time_unix_nano=NOW, **fields)])])]
        )
        return request

    other = {"trace_id": bytes.fromhex(OTHER_TRACE), "span_id": SPAN}
    for fields, task, daemon in [
        ({}, (TRACE, RUN_SPAN), ("", "")),
        (other, (TRACE, SPAN_ID), (OTHER_TRACE, SPAN_ID)),
        ({"span_id": SPAN}, (TRACE, RUN_SPAN), ("", "")),
        ({"trace_id": b"\1"}, (TRACE, RUN_SPAN), ("", "")),
        ({"trace_id": bytes.fromhex(OTHER_TRACE)}, (TRACE, RUN_SPAN), (OTHER_TRACE, "")),
    ]:
        for identity, expected in ((IDENTITY, task), (DAEMON, daemon)):
            (item,) = read(log(**fields), Signal.LOGS, intake(identity)).items
            out = ResourceLogs.FromString(item.otlp).scope_logs[0].log_records[0]
            assert (item.trace_id, item.span_id) == expected == (out.trace_id.hex(), out.span_id.hex())


def test_trace_state_of_a_span_is_kept_if_it_is_one():
    for state, kept in [("a=1,b=2", "a=1,b=2"), ("A=\u00e9", ""), ("x" * 100_000, "")]:
        assert exported(read(traces(make_span(trace_state=state))))[1].trace_state == kept


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trace_id": b""}, "trace or span id is malformed"),
        ({"trace_id": b"\1" * 15}, "trace or span id is malformed"),
        ({"trace_id": b"\1" * 17}, "trace or span id is malformed"),
        ({"trace_id": b"\0" * 16}, "trace or span id is malformed"),
        ({"span_id": b""}, "trace or span id is malformed"),
        ({"span_id": b"\1" * 9}, "trace or span id is malformed"),
        ({"span_id": b"\0" * 8}, "trace or span id is malformed"),
        ({"parent_span_id": b"\1" * 7}, "parent span id is malformed"),
        ({"span_id": bytes.fromhex(RUN_SPAN)}, "span id is that of a span of clrk"),
        ({"span_id": bytes.fromhex(RUN_SPAN), "trace_id": b"\1" * 16}, "span id is that of a span of clrk"),
        ({"start_time_unix_nano": 0}, "start time out of range"),
        ({"start_time_unix_nano": 2**64 - 1}, "start time out of range"),
        ({"start_time_unix_nano": NOW + DAY_NS}, "start time out of range"),
        ({"start_time_unix_nano": NOW - 8 * DAY_NS}, "start time out of range"),
    ],
)
def test_refused_spans(fields, reason):
    good = make_span(span_id=b"\7" * 8)
    batch = read(traces(make_span(**fields), good))
    assert dict(batch.rejected) == {reason: 1}
    assert [item.record.span_id for item in batch.items] == [(b"\7" * 8).hex()]


def test_odd_ends_parents_and_event_times_are_mended():
    for end in (0, NOW - 5000, 2**64 - 1):
        record = read(traces(make_span(end_time_unix_nano=end))).items[0].record
        assert record.end_time_unix_nano == record.start_time_unix_nano == NOW - 1000
    for parent in (SPAN, b"\0" * 8, b""):
        assert read(traces(make_span(parent_span_id=parent))).items[0].record.parent_span_id == RUN_SPAN
    event = Span.Event(name="e", time_unix_nano=2**64 - 1)
    assert read(traces(make_span(events=[event]))).items[0].record.events[0].time_unix_nano == NOW - 1000


# --- projection -----------------------------------------------------------------------------------------------------


def test_values_as_the_store_keeps_them():
    values = {
        "text": "caf\u00e9 \0", "yes": True, "int": -(2**63), "float": 0.5, "bytes": b"\xff\0", "none": None,
        "words": ["a", "b"], "numbers": [1, 2.5, True], "map": {"a": [b"\1", {"b": None}]}, "nan": float("nan"),
        "infinite": [float("-inf")], "empty": [],
    }  # fmt: skip
    batch = read(traces(make_span(values)))
    kept = batch.items[0].record.attributes
    expected = {
        "text": "caf\u00e9 \0", "yes": True, "int": -(2**63), "float": 0.5, "bytes": "/wA=", "none": "",
        "words": ["a", "b"], "numbers": "[1, 2.5, true]", "map": '{"a": ["AQ==", {"b": null}]}', "nan": "nan",
        "infinite": ["-inf"], "empty": [],
    }  # fmt: skip
    assert kept == expected | OWN_ATTRIBUTES
    assert kept["yes"] is True
    sent = {pair.key: pair.value for pair in exported(batch)[1].attributes}
    for name in values.keys() - {"nan"}:
        assert sent[name] == any_value(values[name]), name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [*((getattr(Span, kind.value), kind) for kind in SpanKind), (0, SpanKind.INTERNAL), (77, SpanKind.INTERNAL)],
)
def test_kinds(kind, expected):
    assert read(traces(make_span(kind=kind))).items[0].record.kind is expected


def test_status():
    for code, expected in [
        (OtlpStatus.STATUS_CODE_ERROR, Status(StatusCode.ERROR, "bad")),
        (OtlpStatus.STATUS_CODE_OK, Status(StatusCode.OK)),
        (55, Status()),
    ]:
        span = make_span(status=OtlpStatus(code=code, message="bad"))
        assert read(traces(span)).items[0].record.status == expected


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


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


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
    reader = intake(meter=Meter(burst_bytes=size * 3, bytes_per_s=size, clock=lambda: clock[0]))
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


# --- JSON -----------------------------------------------------------------------------------------------------------


def json_traces(**fields):
    span = {
        "traceId": OTHER_TRACE.upper(), "spanId": SPAN_ID, "name": "work", "kind": 3,
        "startTimeUnixNano": str(NOW - 1000), "endTimeUnixNano": NOW, "unknownField": [{}],
    } | fields  # fmt: skip
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "mine"}}]}
    scope = {"scope": {"name": "lib"}, "spans": [span], "unknown": 1}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope], "schemaUrl": "https://x"}]}


def test_json_says_the_same_as_protobuf():
    attributes = [
        {"key": "s", "value": {"stringValue": "x"}},
        {"key": "i", "value": {"intValue": "5"}},
        {"key": "j", "value": {"intValue": 5}},
        {"key": "d", "value": {"doubleValue": 0.5}},
        {"key": "b", "value": {"bytesValue": base64.b64encode(b"\xff").decode()}},
        {"key": "a", "value": {"arrayValue": {"values": [{"stringValue": "x"}]}}},
        {"key": "invocation.id", "value": {"stringValue": "victim"}},
        {"key": "traceId", "value": {"stringValue": "an attribute of this name is no id"}},
    ]
    links = [{"traceId": OTHER_TRACE, "spanId": "b" * 16}]
    batch = read(json_traces(attributes=attributes, links=links, status={"code": 2, "message": "m"}))
    record = batch.items[0].record
    assert record.attributes == OWN_ATTRIBUTES | {
        "s": "x", "i": 5, "j": 5, "d": 0.5, "b": "/w==", "a": ["x"],
        "traceId": "an attribute of this name is no id",
    }  # fmt: skip
    assert (record.trace_id, record.span_id, record.parent_span_id) == (TRACE, SPAN_ID, RUN_SPAN)
    assert (record.kind, record.status) == (SpanKind.CLIENT, Status(StatusCode.ERROR, "m"))
    assert record.resource["service.name"] == "mine"
    sent, out = exported(batch)
    assert (sent.schema_url, out.links[0].trace_id.hex()) == ("https://x", TRACE)


@pytest.mark.parametrize(
    "fields",
    [
        {"traceId": 5}, {"traceId": "zz"}, {"traceId": ["ab"]}, {"spanId": "ab cd"}, {"spanId": {}},
        {"name": 5}, {"name": {}}, {"startTimeUnixNano": "soon"}, {"startTimeUnixNano": -1},
        {"startTimeUnixNano": 2**64}, {"startTimeUnixNano": 1e300}, {"attributes": {}}, {"attributes": [5]},
        {"attributes": [{"key": "k", "value": {"intValue": {}}}]},
        {"attributes": [{"key": "k", "value": {"stringValue": "a", "intValue": 1}}]},
        {"links": [None]}, {"links": "x"}, {"flags": -5}, {"flags": "x"}, {"droppedAttributesCount": 1.5},
    ],
)  # fmt: skip
def test_json_of_the_wrong_type_costs_the_item(fields):
    batch = read(json_traces(**fields))
    assert (len(batch.items), dict(batch.rejected)) == (0, {"not readable": 1})


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "x"}, {"attributes": [{"key": "k", "value": "x"}]}, {"status": []}, {"events": [[]]},
        {"attributes": [{"key": "k", "value": {"bytesValue": "\u00e9"}}]},
    ],
)  # fmt: skip
def test_json_of_the_wrong_type_that_protobuf_overlooks_does_no_harm(fields):
    record = read(json_traces(**fields)).items[0].record
    assert (record.trace_id, record.parent_span_id, record.kind) == (TRACE, RUN_SPAN, SpanKind.INTERNAL) or (
        "kind" not in fields and record.kind is SpanKind.CLIENT
    )
    assert record.attributes.items() >= OWN_ATTRIBUTES.items()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "5", "null", "{", '{"resourceSpans": {}}', '{"resourceSpans": [5]}',
        '{"resourceSpans": [{"scopeSpans": 5}]}', json.dumps({"resourceSpans": [{"scopeSpans": [{"schemaUrl": 1}]}]}),
        '{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "\\ud800"}]}]}]}',
        '{"resourceSpans": [{"schemaUrl": 5}]}', '{"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]}',
        "[" * 100_000, '{"x":' * 100_000, '{"resourceSpans": [{"resource": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_json_that_is_no_request(text):
    with pytest.raises(ReceiveError) as caught:
        read(text)
    assert caught.value.code == "malformed"


def test_empty_json_is_an_empty_request():
    for text in ("{}", '{"resourceSpans": null}', '{"resourceSpans": [{"scopeSpans": [{"spans": null}]}]}'):
        assert not read(text).items


def test_deep_and_wide_json_is_cheap():
    deep = '{"stringValue":"x"}'
    for _ in range(50):
        deep = '{"arrayValue":{"values":[' + deep + "]}}"
    wide = '{"key":"k","value":{}},' * 9000 + '{"key":"k"}'
    for attributes, reason in [
        ('[{"key":"k","value":' + deep + "}]", "not readable"),
        (f"[{wide}]", "over 8192 objects in one item"),
    ]:
        text = json.dumps(json_traces(attributes="HERE")).replace('"HERE"', attributes)
        batch = read(text)
        assert (len(batch.items), dict(batch.rejected)) == (0, {reason: 1})
    with pytest.raises(ReceiveError, match="objects in one request"):
        read('{"resourceSpans": [' + "{}," * 500_000 + "{}]}")
    with pytest.raises(ReceiveError, match="items in one request"):
        read('{"resourceSpans": [{"scopeSpans": [{"spans": [' + "0," * MAX_ITEMS + "0]}]}]}")


def test_a_signal_sent_to_another_path_is_nothing():
    assert not read(json_traces(), Signal.LOGS).items


# --- content coding -------------------------------------------------------------------------------------------------


def gzip_member(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    return stream.compress(data) + stream.flush()


def raw_deflate(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


def test_codings():
    plain_body = b"some bytes " * 1000
    assert inflate(gzip_member(plain_body), "gzip") == plain_body
    assert inflate(gzip_member(b"a") + gzip_member(b"b"), "gzip") == b"ab"
    assert inflate(zlib.compress(plain_body), "deflate") == plain_body
    assert inflate(raw_deflate(plain_body), "deflate") == plain_body
    assert inflate(gzip_member(b"x" * MAX_PLAIN_BYTES), "gzip") == b"x" * MAX_PLAIN_BYTES


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
    started = time.process_time()
    with pytest.raises(ReceiveError) as caught:
        inflate(body, coding)
    assert caught.value.code == code
    assert time.process_time() - started < 2


def test_an_empty_request_is_one():
    assert not read(ExportTraceServiceRequest()).items
