"""What an agent's own SDK says: whose it is, which trace it is of, and what the store keeps of it."""

from __future__ import annotations

import pytest
from agent_otlp import (
    DAEMON,
    FORGED,
    IDENTITY,
    NOW,
    OTHER_TRACE,
    OWN_ATTRIBUTES,
    RUN_SPAN,
    SPAN,
    SPAN_ID,
    TRACE,
    any_value,
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
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
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
    ResourceMetrics,
    Sum,
    Summary,
    SummaryDataPoint,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as OtlpStatus

from clrk.gateway.telemetry.receive_wire import Signal
from clrk.gateway.telemetry.spans import SpanKind, Status, StatusCode

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
