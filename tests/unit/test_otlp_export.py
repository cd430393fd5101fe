"""Export to an independent receiver on loopback, over http/protobuf and gRPC: at least once, in order, complete."""

import asyncio
import json
import logging
import socket
import time

import grpc
import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import ResourceLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans
from otlp_receiver import Failure, Receiver, any_value, attributes
from span_samples import config, gateway, identity, record, record_invocation

from clrk.core.ids import new_span_id, new_trace_id
from clrk.gateway.telemetry import export_task
from clrk.gateway.telemetry.attributes import SCHEMA_URL
from clrk.gateway.telemetry.export_target import grpc_authority, signal_url
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.spans import Component, SpanEvent, SpanKind, SpanRecord, Status, StatusCode, TraceContext

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr(export_task, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(export_task, "_BATCH_DELAY_S", 0.01)


@pytest.fixture(params=["http/protobuf", "grpc"])
async def receiver(request):
    async with Receiver(request.param) as started:
        yield started


def exporting(receiver, name="default", **otlp):
    return gateway(receiver.endpoint, name=name, protocol=receiver.protocol, **otlp)


def opened(tmp_path, receiver, **otlp):
    return Telemetry.open(tmp_path, config([exporting(receiver, **otlp)]))


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def stored(telemetry):
    await telemetry.flush()
    return [json.loads(span.json) async for page in telemetry.store.spans(SpanFilter()) for span in page]


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


async def test_the_rows_of_a_trace_keep_their_order(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    runs = [identity() for _ in range(8)]
    for index in range(700):
        who = runs[index % 8]
        component = (Component.INGRESS, Component.GATEWAY, Component.RUNTIME)[index % 3]
        record(telemetry, who, f"s{index:04}", component=component)
    await receiver.wait(lambda: len(receiver.spans) >= 700)
    await telemetry.close()
    for who in runs:
        names = [span.name for span in receiver.spans if span.trace_id.hex() == who.context.trace_id]
        assert names == sorted(names)
        assert len(names) == 700 // 8 + (1 if runs.index(who) < 700 % 8 else 0)


async def test_a_dead_backend_slows_nothing_and_gets_everything_later_in_order(tmp_path, receiver):
    await receiver.stop()
    telemetry = opened(tmp_path, receiver, timeout="0.2s")
    who = identity()
    begin = time.perf_counter()
    for index in range(1500):
        record(telemetry, who, f"s{index}")
    assert time.perf_counter() - begin < 1.5, "1 ms a span is far over what recording costs"
    await until(lambda: telemetry.store.counters["export_failures"] >= 2)
    (status,) = [one for one in await telemetry.export_status() if one.signal == "traces"]
    assert (status.name, status.exported_seq, status.behind) == ("default/default", 0, 1500)
    assert status.failures >= 2
    assert 0 < status.failing_since_ns < time.time_ns()
    assert status.last_error
    await receiver.start()
    await receiver.wait(lambda: len(receiver.names) >= 1500)
    await until(lambda: telemetry.store.counters["exported_spans"] >= 1500)
    (status,) = [one for one in await telemetry.export_status() if one.signal == "traces"]
    assert (status.behind, status.failures, status.last_error) == (0, 0, "")
    await telemetry.close()
    assert receiver.names == [f"s{index}" for index in range(1500)]


async def test_a_hanging_backend_does_not_hold_up_the_end(tmp_path, receiver):
    receiver.fail = lambda signal, message: Failure(hang=True)
    telemetry = opened(tmp_path, receiver, timeout="60s")
    record(telemetry, identity())
    await receiver.wait(lambda: receiver.refused)  # the exporter is in the middle of its request
    begin = time.perf_counter()
    await telemetry.close()
    assert time.perf_counter() - begin < 10


async def test_no_answer_within_the_timeout_is_a_failure_and_sent_again(tmp_path, receiver):
    receiver.fail = lambda signal, message: Failure(hang=True) if not receiver.refused else None
    telemetry = opened(tmp_path, receiver, timeout="0.3s")
    record(telemetry, identity(), "late")
    await receiver.wait(lambda: receiver.names == ["late"])
    await telemetry.close()


async def test_after_a_restart_the_rest_is_sent_and_nothing_twice(tmp_path, receiver):
    first = opened(tmp_path, receiver, timeout="0.2s")
    record(first, identity(), "one")
    await until(lambda: first.store.counters["exported_spans"] == 1)
    receiver.fail = lambda signal, message: Failure()
    record(first, identity(), "two")
    await receiver.wait(lambda: receiver.refused)
    await first.close()
    assert receiver.names == ["one"]
    receiver.fail = None
    second = opened(tmp_path, receiver, timeout="0.2s")
    record(second, identity(), "three")
    await receiver.wait(lambda: "three" in receiver.names)
    await second.close()
    assert receiver.names == ["one", "two", "three"]


async def test_a_backend_that_is_dead_from_the_beginning_and_over_a_restart_loses_nothing(tmp_path, receiver):
    await receiver.stop()
    first = opened(tmp_path, receiver)
    record(first, identity(), "before")
    await until(lambda: first.store.counters["export_failures"])
    await first.close()
    await receiver.start()
    second = opened(tmp_path, receiver)
    await receiver.wait(lambda: receiver.names == ["before"])
    await second.close()


async def test_killed_in_the_middle_it_sends_again_what_was_not_noted(tmp_path, receiver):
    """Duplicates are allowed, losses are not."""
    total = 3000
    first = opened(tmp_path, receiver)
    who = identity()
    for index in range(total):
        record(first, who, f"s{index}")
    await first.flush()
    await receiver.wait(lambda: receiver.spans)
    first.store.set_cursor = lambda *_: None  # what happens from here on is not noted, as after a SIGKILL
    for export in first._exporters._exports.values():
        export.rows._task.cancel()
    await first.store.close()
    await first.close()
    second = opened(tmp_path, receiver)
    await receiver.wait(lambda: len(set(receiver.names)) == total)
    await second.close()
    assert set(receiver.names) == {f"s{index}" for index in range(total)}
    seen = list(dict.fromkeys(receiver.names))
    assert seen == [f"s{index}" for index in range(total)], "first arrivals are in order"
    assert len(receiver.names) - total <= 2 * export_task._MAX_ROWS


async def test_an_orderly_end_sends_what_was_just_recorded(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    record(telemetry, identity(), "last words")
    await telemetry.close()
    assert receiver.names == ["last words"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, INVALID), (413, INVALID), (422, INVALID), (500, grpc.StatusCode.INTERNAL), (500, grpc.StatusCode.UNKNOWN)],
)
async def test_a_span_that_the_backend_refuses_is_skipped_alone(tmp_path, receiver, status, code, caplog):
    def poisoned(signal, message):
        names = [s.name for group in message.resource_spans for scope in group.scope_spans for s in scope.spans]
        return Failure(status, code, message="no\nway") if any("poison" in name for name in names) else None

    receiver.fail = poisoned
    telemetry = opened(tmp_path, receiver)
    who = identity()
    for index in range(12):
        record(telemetry, who, f"poison {index}" if index in (4, 5, 8) else f"s{index}")
    await receiver.wait(lambda: "s11" in receiver.names)
    assert [name for name in receiver.names if "poison" not in name] == [
        f"s{index}" for index in range(12) if index not in (4, 5, 8)
    ]
    await until(lambda: telemetry.store.counters["exported_spans"] == 9)
    (state,) = [one for one in await telemetry.export_status() if one.signal == "traces"]
    assert (state.sent, state.dropped, state.failures) == (9, 3, 0)
    await telemetry.close()
    assert len([line for line in caplog.messages if "for good" in line]) == 1, "said once a burst"
    assert "no?way" in caplog.text


async def test_a_message_over_the_size_limit_is_split_and_a_span_over_it_left_out(tmp_path):
    async with Receiver("grpc") as receiver:  # its limit is gRPC's own: 4 MiB
        telemetry = opened(tmp_path, receiver, compression="none")
        who = identity()
        wide = {f"k{index}": "x" * 8000 for index in range(200)}  # 1.6 MB
        for index in range(6):
            record(telemetry, who, f"wide{index}", **wide)
        huge = ResourceSpans()
        huge.scope_spans.add().spans.add(trace_id=bytes(16), span_id=bytes(8), name="h" * 5_000_000)
        now = time.time_ns()
        own = SpanRecord(
            who.context.trace_id, new_span_id(), "", "huge", SpanKind.INTERNAL, now, now,
            resource={"clrk.component": "agent"},
        )  # fmt: skip
        telemetry.record_agent_span(who, own, huge.SerializeToString())
        record(telemetry, who, "after")
        await receiver.wait(lambda: "after" in receiver.names)
        assert receiver.names == [*(f"wide{index}" for index in range(6)), "after"]
        assert telemetry.store.counters["export_refused_spans"] == 1
        await telemetry.close()


NO_SUCCESS = [
    (302, grpc.StatusCode.UNIMPLEMENTED), (401, grpc.StatusCode.UNAUTHENTICATED),
    (403, grpc.StatusCode.PERMISSION_DENIED), (404, grpc.StatusCode.NOT_FOUND),
    (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (500, grpc.StatusCode.INTERNAL), (502, grpc.StatusCode.ABORTED), (503, grpc.StatusCode.UNAVAILABLE),
    (504, grpc.StatusCode.DEADLINE_EXCEEDED),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code"), NO_SUCCESS)
async def test_an_answer_that_is_no_success_loses_nothing(tmp_path, receiver, status, code):
    receiver.fail = lambda signal, message: Failure(status, code)
    telemetry = opened(tmp_path, receiver, timeout="0.5s")
    for index in range(3):
        record(telemetry, identity(), f"kept{index}")
    await until(lambda: telemetry.store.counters["export_failures"] >= 4)
    receiver.fail = None
    await receiver.wait(lambda: receiver.names == ["kept0", "kept1", "kept2"])
    assert telemetry.store.counters["export_refused_spans"] == 0
    await telemetry.close()


async def test_the_wait_that_a_backend_asks_for_is_kept(tmp_path, receiver):
    asked, moments = "1" if receiver.protocol != "grpc" else "0.5", []

    def busy(signal, message):
        moments.append(time.monotonic())
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return Failure(429, code, retry_after=asked) if len(moments) == 1 else None

    receiver.fail = busy
    telemetry = opened(tmp_path, receiver)
    record(telemetry, identity(), "patient")
    await receiver.wait(lambda: receiver.names == ["patient"])
    await telemetry.close()
    assert float(asked) <= moments[1] - moments[0] < float(asked) * 2


async def test_a_partial_success_is_counted_and_not_sent_again(tmp_path, receiver, caplog):
    receiver.fail = lambda signal, message: Failure(rejected=2, message="too old\x1b[31m")
    telemetry = opened(tmp_path, receiver)
    with_three = identity()
    for index in range(3):
        record(telemetry, with_three, f"s{index}")
    await until(lambda: telemetry.store.counters["exported_spans"] == 1)
    assert telemetry.store.counters["export_refused_spans"] == 2
    receiver.fail = None
    record(telemetry, with_three, "next")
    await receiver.wait(lambda: "next" in receiver.names)
    await telemetry.close()
    assert receiver.names == ["s0", "s1", "s2", "next"]
    assert "too old?[31m" in caplog.text


async def test_a_backend_that_warns_each_time_is_heard_once_a_minute(tmp_path, receiver, caplog):
    receiver.fail = lambda signal, message: Failure(rejected=0, message="deprecated")
    telemetry = opened(tmp_path, receiver)
    for index in range(3):
        record(telemetry, identity(), f"s{index}")
        await until(lambda done=index + 1: telemetry.store.counters["exported_spans"] == done)
    await telemetry.close()
    assert receiver.names == ["s0", "s1", "s2"]
    assert len([line for line in caplog.messages if "deprecated" in line]) == 1


# --- who gets what --------------------------------------------------------------------------------------------------


async def test_each_gateway_gets_its_own_spans_and_history_is_not_sent(tmp_path):
    async with Receiver() as first, Receiver("grpc") as second:
        telemetry = Telemetry.open(tmp_path, config())
        record(telemetry, identity(), "history", start_ns=time.time_ns() - 10**9)
        await telemetry.flush()
        telemetry.reconfigure(config([exporting(first), exporting(second, name="other")]))
        # What began before and ends after the configuration is wanted.
        record(telemetry, identity(), "a", start_ns=time.time_ns() - 10**9, length_ns=2 * 10**9)
        record(telemetry, identity(gateway_name="other"), "b")
        record(telemetry, identity(gateway_name="third"), "c")
        record(telemetry, identity(gateway_name=""), "d")
        await first.wait(lambda: "a" in first.names)
        await second.wait(lambda: "b" in second.names)
        await telemetry.close()
        assert (first.names, second.names) == (["a"], ["b"])


async def test_headers_go_to_their_own_backend_and_into_no_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    async with Receiver() as first, Receiver("grpc") as second, Receiver() as standard:
        second.fail = lambda signal, message: Failure(503)
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": standard.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-env=s3cret-environment",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20s3cret-traces",
        }
        gateways = [
            exporting(first, headers={"Authorization": "Bearer s3cret-first"}),
            exporting(second, name="other", headers={"Authorization": "Bearer s3cret-second"}),
        ]
        telemetry = Telemetry.open(tmp_path, config(gateways, environment=environment))
        record(telemetry, identity(), "a")
        record(telemetry, identity(gateway_name="other"), "b")
        record(telemetry, identity(gateway_name="plain"), "c")
        telemetry.record_log(identity(gateway_name="plain"), "stdout", b"line", time.time_ns())
        await first.wait(lambda: first.names == ["a"])
        await standard.wait(lambda: standard.names == ["c"] and standard.logs)
        await second.wait(lambda: second.refused)
        status = await telemetry.export_status()
        await telemetry.close()
        by_backend = {
            "first": [one.metadata for one in first.requests],
            "second": [one.metadata for one in second.refused],
            "standard": [one.metadata for one in standard.requests],
        }
    secrets = {
        backend: {
            value.split()[-1] for metadata in all_metadata for value in metadata.values() if "s3cret" in str(value)
        }
        for backend, all_metadata in by_backend.items()
    }
    assert secrets == {
        "first": {"s3cret-first"}, "second": {"s3cret-second"}, "standard": {"s3cret-traces", "s3cret-environment"},
    }  # fmt: skip
    logs = next(one.metadata for one in standard.requests if one.signal == "logs")
    assert "Authorization" not in logs
    assert "s3cret" not in caplog.text
    assert "s3cret" not in repr(status)


async def test_unsampled_spans_stay_in_the_store(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    unsampled = identity()
    object.__setattr__(unsampled, "context", TraceContext(new_trace_id(), new_span_id(), flags=0))
    record(telemetry, unsampled, "quiet")
    telemetry.record_log(unsampled, "stdout", b"but said", time.time_ns())
    record(telemetry, identity(), "loud")
    await receiver.wait(lambda: receiver.names == ["loud"] and receiver.logs)
    assert {document["name"] for document in await stored(telemetry)} == {"quiet", "loud"}
    await telemetry.close()
    assert (receiver.logs[0].body.string_value, receiver.logs[0].flags) == ("but said", 0)


async def test_a_target_that_changes_goes_on_where_the_old_one_stopped(tmp_path):
    async with Receiver() as old, Receiver("grpc") as new:
        telemetry = opened(tmp_path, old)
        record(telemetry, identity(), "one")
        await until(lambda: telemetry.store.counters["exported_spans"] == 1)
        telemetry.reconfigure(config([exporting(new)]))
        record(telemetry, identity(), "two")
        await new.wait(lambda: new.names == ["two"])
        await until(lambda: telemetry.store.counters["exported_spans"] == 2)
        telemetry.reconfigure(config())
        record(telemetry, identity(), "meanwhile")
        await telemetry.flush()
        telemetry.reconfigure(config([exporting(old)]))
        await old.wait(lambda: old.names == ["one", "meanwhile"])
        await telemetry.close()


async def test_a_store_that_was_replaced_is_exported_from_its_beginning(tmp_path, receiver):
    telemetry = opened(tmp_path, receiver)
    for index in range(20):
        record(telemetry, identity(), f"old{index}")
    await until(lambda: telemetry.store.counters["exported_spans"] == 20)
    await telemetry.close()
    for path in tmp_path.iterdir():
        if path.name.startswith("traces.db"):
            path.unlink()
    telemetry = opened(tmp_path, receiver)
    record(telemetry, identity(), "new")
    await receiver.wait(lambda: "new" in receiver.names)
    await telemetry.close()


# --- logs, and what agents send themselves --------------------------------------------------------------------------


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


# --- what is written ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("endpoint", "signal", "url"),
    [
        ("http://c:4318", "traces", "http://c:4318/v1/traces"),
        ("http://c:4318/", "logs", "http://c:4318/v1/logs"),
        ("https://c/otlp", "metrics", "https://c/otlp/v1/metrics"),
        ("https://c/v1/traces", "traces", "https://c/v1/traces"),
        ("https://c/v1/traces", "logs", "https://c/v1/logs"),
        ("https://c/v1/traces/?k=v", "traces", "https://c/v1/traces?k=v"),
    ],
)
def test_a_base_endpoint_gets_the_path_of_the_signal(endpoint, signal, url):
    assert signal_url(endpoint, signal) == url


@pytest.mark.parametrize(
    ("endpoint", "insecure", "authority"),
    [
        ("http://c:4317", False, ("c:4317", False)),
        ("https://c:4317/ignored", False, ("c:4317", True)),
        ("https://c", True, ("c:443", True)),
        ("http://[::1]", False, ("[::1]:80", False)),
        ("c:4317", False, ("c:4317", True)),
        ("c:4317", True, ("c:4317", False)),
    ],
)
def test_the_forms_of_a_grpc_endpoint(endpoint, insecure, authority):
    assert grpc_authority(endpoint, insecure=insecure) == authority


async def test_nothing_listens_and_nothing_is_said_twice(tmp_path, caplog):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        telemetry = Telemetry.open(tmp_path, config([gateway(f"http://127.0.0.1:{holder.getsockname()[1]}")]))
        record(telemetry, identity())
        await until(lambda: telemetry.store.counters["export_failures"] >= 3)
        await telemetry.close()
    assert len([line for line in caplog.messages if "failed" in line]) == 1
