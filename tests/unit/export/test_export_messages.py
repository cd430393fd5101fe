"""What is in the messages: every span and line as it is stored, and what agents send themselves as it came."""

import time

import pytest
from exporting_telemetry import opened, stored
from opentelemetry.proto.logs.v1.logs_pb2 import ResourceLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans
from otlp_receiver import Receiver, any_value, attributes
from span_samples import identity, record, record_invocation

from clrk.gateway.telemetry.attributes import SCHEMA_URL
from clrk.gateway.telemetry.spans import Component, SpanEvent, SpanKind, SpanRecord, Status, StatusCode


async def test_what_arrives_is_what_is_stored_span_by_span(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    for index in range(5):
        who = identity(name=f"agent-{index}")
        record_invocation(telemetry, who, remote_parent="00f067aa0ba902b7", start_ns=time.time_ns())
        record(
            telemetry, who, "odd ünïcode \udc80", error="why", stream=True, ratio=0.5, count=7, big=2**62, tags=["a"]
        )
        now = time.time_ns()
        telemetry.record(
            who, component=Component.GATEWAY, name="with events", kind=SpanKind.PRODUCER, start_ns=now, end_ns=now + 5,
            attributes={"whole": 1, "half": 1.0}, status=Status(StatusCode.OK),
            events=[SpanEvent("one", now, {"k": 1, "f": 0.25, "b": False, "l": ["x", "y"]}), SpanEvent("two", now)],
        )  # fmt: skip
    await receiver.wait(lambda: len(receiver.spans) >= 35)
    expected, found = await stored(telemetry), receiver.documents()
    await telemetry.close()

    def key(document):
        return document["span_id"]

    assert sorted(found, key=key) == sorted(expected, key=key)
    types = {name: type(value) for document in found for name, value in document["attributes"].items()}
    assert (types["stream"], types["ratio"], types["count"], types["tags"]) == (bool, float, int, list)
    assert all(type(doc["attributes"].get("half", 1.0)) is float for doc in found)
    assert all(group.schema_url == SCHEMA_URL for group in receiver.groups())
    scopes = {(scope.scope.name, scope.schema_url) for group in receiver.groups() for scope in group.scope_spans}
    assert scopes == {("clrk", SCHEMA_URL)}
    remote = {span.name: bool(span.flags & 0x200) for span in receiver.spans}
    assert {name for name, flag in remote.items() if flag} == {"ingress.dispatch"}
    assert all(span.flags & 0x101 == 0x101 for span in receiver.spans)


async def test_lines_of_agents_arrive_as_log_records(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    who, now = identity(), time.time_ns()
    telemetry.record_log(who, "stdout", "hällo".encode(), now)
    telemetry.record_log(who, "stderr", b"not utf-8: \xff", now + 1)
    await receiver.wait(lambda: len(receiver.logs) == 2)
    await telemetry.close()
    first, second = receiver.logs
    assert (first.time_unix_nano, second.time_unix_nano) == (now, now + 1)
    assert (first.body.string_value, second.body.string_value) == ("hällo", "not utf-8: \ufffd")
    assert {(log.severity_number, log.severity_text) for log in (first, second)} == {(9, "INFO")}
    assert (first.trace_id.hex(), first.span_id.hex()) == (who.context.trace_id, who.context.span_id)
    assert first.flags == 1
    assert attributes(first) == {
        "invocation.id": who.invocation_id,
        "agent.kind": "TaskAgent",
        "agent.namespace": "default",
        "agent.name": "support",
        "agent.uid": who.agent_uid,
        "agent.revision": who.agent_revision,
        "clrk.sandbox.id": "deadbeef",
        "log.iostream": "stdout",
    }
    assert attributes(second)["log.iostream"] == "stderr"
    (group,) = receiver.groups("logs")
    resource = attributes(group.resource)
    assert (resource["service.name"], resource["clrk.component"]) == ("clrk", "runtime")
    assert resource["clrk.egress_gateway"] == "default/default"


async def test_the_remark_that_output_was_cut_is_a_warning(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    who = identity()
    for _ in range(70):
        telemetry.record_log(who, "stdout", b"x" * 16_384, time.time_ns())
    await receiver.wait(lambda: receiver.logs and receiver.logs[-1].severity_text == "WARN")
    await telemetry.close()
    assert "log.iostream" not in attributes(receiver.logs[-1])


async def test_what_agents_send_goes_out_as_it_came_and_in_its_place(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    who, now = identity(), time.time_ns()
    spans, logs, points = ResourceSpans(), ResourceLogs(), ResourceMetrics()
    spans.resource.attributes.add(key="service.name").value.string_value = "theirs"
    span = spans.scope_spans.add().spans.add(
        trace_id=bytes.fromhex(who.context.trace_id), span_id=b"\1" * 8, name="own"
    )
    span.attributes.add(key="nested").value.kvlist_value.values.add(key="k").value.bytes_value = b"\0\xff"
    span.links.add(trace_id=b"\2" * 16, span_id=b"\3" * 8)
    logs.scope_logs.add().log_records.add(severity_number=17, severity_text="ERROR").body.double_value = 1.5
    metric = points.scope_metrics.add().metrics.add(name="theirs.count")
    metric.sum.data_points.add(as_int=3)
    own = SpanRecord(
        who.context.trace_id, "01" * 8, who.context.span_id, "own", SpanKind.INTERNAL, now, now,
        resource={"clrk.component": "agent"},
    )  # fmt: skip
    record(telemetry, who, "before")
    telemetry.record_agent_span(who, own, spans.SerializeToString())
    record(telemetry, who, "behind")
    telemetry.record_agent_log(
        who, time_ns=now, severity=17, body="1.5", trace_id=who.context.trace_id, span_id="01" * 8,
        otlp=logs.SerializeToString(),
    )  # fmt: skip
    telemetry.record_agent_metrics(who, time_ns=now, otlp=points.SerializeToString())
    await receiver.wait(lambda: len(receiver.spans) == 3 and receiver.logs and receiver.metrics)
    assert receiver.names == ["before", "own", "behind"]
    assert receiver.groups()[1] == spans
    assert receiver.groups("logs")[0] == logs
    assert points in receiver.groups("metrics")
    await telemetry.close()


def test_any_value_reads_what_the_tests_compare():
    value = ResourceSpans().resource.attributes.add(key="k").value
    value.int_value = 3
    assert any_value(value) == 3


@pytest.mark.parametrize(("compression", "encoding"), [("gzip", "gzip"), ("none", None)])
async def test_gzip_when_asked_for(tmp_path, compression, encoding):
    async with Receiver() as receiver:
        telemetry = opened(tmp_path, receiver, compression=compression)
        record(telemetry, identity(), long="x" * 4000)
        await receiver.wait(lambda: receiver.spans)
        await telemetry.close()
        metadata = receiver.requests[0].metadata
    assert metadata.get("Content-Encoding") == encoding
    assert metadata["Content-Type"] == "application/x-protobuf"
    assert metadata["User-Agent"].startswith("clrk/")
    assert attributes(receiver.spans[0])["long"] == "x" * 4000
