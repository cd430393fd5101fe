"""Export to an independent receiver on loopback, over http/protobuf and gRPC: at least once, in order, complete."""

import asyncio
import socket
import time

import grpc
import pytest
from exporting_telemetry import opened, until
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans
from otlp_receiver import Failure, Receiver
from span_samples import config, gateway, identity, record

from clrk.core.ids import new_span_id
from clrk.gateway.telemetry import export_task
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.spans import Component, SpanKind, SpanRecord

INVALID = grpc.StatusCode.INVALID_ARGUMENT


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
    telemetry = opened(tmp_path, receiver)
    who = identity()
    for index in range(1500):
        record(telemetry, who, f"s{index}")
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
    telemetry = opened(tmp_path, receiver, timeout="1h")
    record(telemetry, identity())
    await receiver.wait(lambda: receiver.refused)  # the exporter is in the middle of its request
    async with asyncio.timeout(60):
        await telemetry.close()
    assert telemetry.store.counters["exported_spans"] == 0  # it did not wait for the answer, nor take it for given


async def test_no_answer_within_the_timeout_is_a_failure_and_sent_again(tmp_path, receiver):
    receiver.fail = lambda signal, message: Failure(hang=True) if not receiver.refused else None
    telemetry = opened(tmp_path, receiver, timeout="0.3s")
    record(telemetry, identity(), "late")
    await receiver.wait(lambda: receiver.names == ["late"])
    await telemetry.close()
    assert set(receiver.names) == {"late"}
    assert len(receiver.refused) == 1
    assert telemetry.store.counters["export_failures"] >= 1


async def test_after_a_restart_the_rest_is_sent_and_nothing_twice(tmp_path, receiver):
    first = opened(tmp_path, receiver)
    record(first, identity(), "one")
    await until(lambda: first.store.counters["exported_spans"] == 1)
    receiver.fail = lambda signal, message: Failure()
    record(first, identity(), "two")
    await receiver.wait(lambda: receiver.refused)
    await first.close()
    assert receiver.names == ["one"]
    receiver.fail = None
    second = opened(tmp_path, receiver)
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
    assert receiver.names == ["before"]


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
    telemetry = opened(tmp_path, receiver)
    for index in range(3):
        record(telemetry, identity(), f"kept{index}")
    await until(lambda: telemetry.store.counters["export_failures"] >= 4)
    receiver.fail = None
    await receiver.wait(lambda: receiver.names == ["kept0", "kept1", "kept2"])
    assert telemetry.store.counters["export_refused_spans"] == 0
    await telemetry.close()


async def test_the_wait_that_a_backend_asks_for_is_kept(tmp_path, receiver, monkeypatch):
    asked, moments, waits = "1" if receiver.protocol != "grpc" else "0.5", [], []
    backoff_s = export_task.Progress.backoff_s

    def noted(self, answer):
        waits.append(backoff_s(self, answer))
        return waits[-1]

    monkeypatch.setattr(export_task.Progress, "backoff_s", noted)

    def busy(signal, message):
        moments.append(time.monotonic())
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return Failure(429, code, retry_after=asked) if len(moments) == 1 else None

    receiver.fail = busy
    telemetry = opened(tmp_path, receiver)
    record(telemetry, identity(), "patient")
    await receiver.wait(lambda: receiver.names == ["patient"])
    await telemetry.close()
    (wait_s,) = waits
    assert float(asked) <= wait_s <= float(asked) * 1.2  # the most jitter
    assert moments[1] - moments[0] >= wait_s


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


async def test_nothing_listens_and_nothing_is_said_twice(tmp_path, caplog):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        telemetry = Telemetry.open(tmp_path, config([gateway(f"http://127.0.0.1:{holder.getsockname()[1]}")]))
        record(telemetry, identity())
        await until(lambda: telemetry.store.counters["export_failures"] >= 3)
        await telemetry.close()
    assert len([line for line in caplog.messages if "failed" in line]) == 1
