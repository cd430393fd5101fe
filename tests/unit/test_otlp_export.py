"""Export against a real OTLP/HTTP receiver on loopback: at least once, in order, never in the way."""

import asyncio
import socket
import time

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from span_samples import config, gateway, identity, record, record_invocation

from clrk.gateway.telemetry import export
from clrk.gateway.telemetry.attributes import SCHEMA_URL
from clrk.gateway.telemetry.export import traces_url
from clrk.gateway.telemetry.pipeline import Telemetry


class Receiver:
    """Takes traces; answers with `status` while it is set."""

    def __init__(self, port=0):
        self.requests, self.headers, self.status, self.port = [], [], None, port
        self.arrived = asyncio.Condition()
        self.refuse = lambda names: None

    async def __aenter__(self):
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/traces", self._traces)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc):
        await self.runner.cleanup()

    async def _traces(self, request):
        message = ExportTraceServiceRequest.FromString(await request.read())
        names = [span.name for group in message.resource_spans for s in group.scope_spans for span in s.spans]
        status = self.refuse(names) or self.status or 200
        if status == 200:
            self.requests.append(message)
        self.headers.append(request.headers)
        async with self.arrived:
            self.arrived.notify_all()
        return web.Response(
            status=status,
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
            headers={"Location": "http://127.0.0.1:1/"} if status == 302 else {},
        )

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self):
        return [span for m in self.requests for r in m.resource_spans for s in r.scope_spans for span in s.spans]

    @property
    def names(self):
        return [span.name for span in self.spans]

    async def wait(self, condition):
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(condition)


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr(export, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(export, "_BATCH_DELAY_S", 0.01)


def value(any_value):
    kind = any_value.WhichOneof("value")
    return [value(v) for v in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)


def attributes(message):
    return {pair.key: value(pair.value) for pair in message.attributes}


async def test_spans_arrive_with_ids_kinds_times_types_and_resource(tmp_path):
    async with Receiver() as receiver:
        telemetry = Telemetry.open(
            tmp_path, config([gateway(receiver.endpoint, headers={"Authorization": "Bearer t"}, timeout="3s")])
        )
        who = identity()
        record_invocation(telemetry, who, remote_parent="00f067aa0ba902b7", start_ns=time.time_ns())
        record(telemetry, who, "odd", error="why", stream=True, ratio=0.5, count=7, tags=["a", "b"])
        await receiver.wait(lambda: len(receiver.spans) == 6)
        await telemetry.close()
    spans = {span.name: span for span in receiver.spans}
    dispatch = spans["ingress.dispatch"]
    assert dispatch.trace_id.hex() == who.context.trace_id
    assert dispatch.parent_span_id.hex() == "00f067aa0ba902b7"
    assert dispatch.kind == dispatch.SPAN_KIND_SERVER
    assert spans["invoke_agent support"].kind == dispatch.SPAN_KIND_INTERNAL
    assert spans["odd"].kind == dispatch.SPAN_KIND_CLIENT
    assert spans["invoke_agent support"].parent_span_id == dispatch.span_id
    assert dispatch.end_time_unix_nano - dispatch.start_time_unix_nano == 1_200_000_000
    assert (spans["odd"].status.code, spans["odd"].status.message) == (spans["odd"].status.STATUS_CODE_ERROR, "why")
    odd = attributes(spans["odd"])
    assert (odd["stream"], odd["ratio"], odd["count"], odd["tags"]) == (True, 0.5, 7, ["a", "b"])
    assert type(odd["count"]) is int
    assert odd["invocation.id"] == who.invocation_id
    by_component = {}
    for message in receiver.requests:
        for group in message.resource_spans:
            assert group.schema_url == SCHEMA_URL
            resource = attributes(group.resource)
            assert resource["service.name"] == "clrk"
            assert resource["clrk.egress_gateway"] == "default"
            for scope in group.scope_spans:
                assert scope.scope.name == "clrk"
                by_component.setdefault(resource["clrk.component"], []).extend(s.name for s in scope.spans)
    assert by_component["ingress"] == ["ingress.dispatch"]
    assert by_component["runtime"] == ["invoke_agent support"]
    assert receiver.headers[0]["Authorization"] == "Bearer t"


async def test_a_dead_backend_slows_nothing_and_gets_everything_later_in_order(tmp_path):
    with socket.socket() as holder:  # a port that refuses connections
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    telemetry = Telemetry.open(tmp_path, config([gateway(f"http://127.0.0.1:{port}", timeout="0.2s")]))
    who = identity()
    begin = time.perf_counter()
    for index in range(1500):
        record(telemetry, who, f"s{index}")
    assert time.perf_counter() - begin < 1.5, "1 ms a span is far over what recording costs"
    await telemetry.flush()
    async with asyncio.timeout(20):
        while not telemetry.store.counters["export_failures"]:
            committed = telemetry.store.committed
            record(telemetry, who, "tick")
            await committed.wait()
    total = await telemetry.store.last_seq()
    async with Receiver(port) as receiver:
        await receiver.wait(lambda: len(set(receiver.names)) >= 1501 and len(receiver.names) >= total)
        await telemetry.close()
    numbered = [name for name in receiver.names if name != "tick"]
    assert numbered == [f"s{index}" for index in range(1500)]


async def test_a_hanging_backend_does_not_hold_up_the_end(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        telemetry = Telemetry.open(tmp_path, config([gateway(endpoint, timeout="60s")]))
        record(telemetry, identity())
        loop = asyncio.get_running_loop()
        silent.setblocking(False)
        connection, _ = await loop.sock_accept(silent)  # the exporter is in the middle of its request
        begin = time.perf_counter()
        await telemetry.close()
        assert time.perf_counter() - begin < 10
        connection.close()


async def test_after_a_restart_the_rest_is_sent_and_nothing_twice(tmp_path):
    async with Receiver() as receiver:
        settings = config([gateway(receiver.endpoint, timeout="0.2s")])
        first = Telemetry.open(tmp_path, settings)
        record(first, identity(), "one")
        await receiver.wait(lambda: receiver.names == ["one"])
        receiver.status = 503
        record(first, identity(), "two")
        async with asyncio.timeout(20), receiver.arrived:
            await receiver.arrived.wait()
        await first.close()
        assert receiver.names == ["one"]
        receiver.status = None
        second = Telemetry.open(tmp_path, settings)
        record(second, identity(), "three")
        await receiver.wait(lambda: "three" in receiver.names)
        await second.close()
        assert receiver.names == ["one", "two", "three"]


async def test_an_orderly_end_sends_what_was_just_recorded(tmp_path):
    async with Receiver() as receiver:
        telemetry = Telemetry.open(tmp_path, config([gateway(receiver.endpoint)]))
        record(telemetry, identity(), "last words")
        await telemetry.close()
        assert receiver.names == ["last words"]


async def test_a_span_that_the_backend_refuses_is_skipped_alone(tmp_path):
    async with Receiver() as receiver:
        receiver.refuse = lambda names: 400 if "poison" in names else None
        telemetry = Telemetry.open(tmp_path, config([gateway(receiver.endpoint)]))
        who = identity()
        for index in range(9):
            record(telemetry, who, "poison" if index == 4 else f"s{index}")
        await receiver.wait(lambda: "s8" in receiver.names)
        assert receiver.names == [f"s{index}" for index in range(9) if index != 4]
        assert telemetry.store.counters["export_refused_spans"] == 1
        await telemetry.close()


@pytest.mark.parametrize("status", [302, 401, 403, 404, 500])
async def test_an_answer_that_is_no_success_loses_nothing(tmp_path, status):
    async with Receiver() as receiver:
        receiver.status = status
        telemetry = Telemetry.open(tmp_path, config([gateway(receiver.endpoint, timeout="0.5s")]))
        record(telemetry, identity(), "kept")
        async with asyncio.timeout(20), receiver.arrived:
            await receiver.arrived.wait()
        receiver.status = None
        await receiver.wait(lambda: receiver.names == ["kept"])
        await telemetry.close()


async def test_each_gateway_gets_its_own_spans_and_history_is_not_sent(tmp_path):
    async with Receiver() as first, Receiver() as second:
        telemetry = Telemetry.open(tmp_path, config())
        record(telemetry, identity(), "history", start_ns=time.time_ns() - 10**9)
        await telemetry.flush()
        telemetry.reconfigure(config([gateway(first.endpoint), gateway(second.endpoint, name="other")]))
        record(telemetry, identity(), "a")
        record(telemetry, identity(gateway_name="other"), "b")
        record(telemetry, identity(gateway_name="third"), "c")
        record(telemetry, identity(gateway_name=""), "d")
        await first.wait(lambda: "a" in first.names)
        await second.wait(lambda: "b" in second.names)
        await telemetry.close()
        assert (first.names, second.names) == (["a"], ["b"])


async def test_the_environment_takes_what_no_gateway_exports(tmp_path):
    async with Receiver() as standard, Receiver() as configured:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": standard.endpoint}
        telemetry = Telemetry.open(tmp_path, config([gateway(configured.endpoint)], environment=environment))
        record(telemetry, identity(), "a")
        record(telemetry, identity(gateway_name="plain"), "b")
        await standard.wait(lambda: standard.names == ["b"])
        await configured.wait(lambda: configured.names == ["a"])
        await telemetry.close()


async def test_a_store_that_was_replaced_is_exported_from_its_beginning(tmp_path):
    async with Receiver() as receiver:
        telemetry = Telemetry.open(tmp_path, config([gateway(receiver.endpoint)]))
        for index in range(20):
            record(telemetry, identity(), f"old{index}")
        await receiver.wait(lambda: len(receiver.names) == 20)
        telemetry.store._writer._path = tmp_path / "new.db"  # as after moving a damaged file aside
        telemetry.store.path = tmp_path / "new.db"
        telemetry.store._writer._connection.close()
        telemetry.store._writer._connection = None
        record(telemetry, identity(), "new")
        await receiver.wait(lambda: "new" in receiver.names)
        await telemetry.close()


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp", "https://c/otlp/v1/traces"),
        ("https://c/v1/traces", "https://c/v1/traces"),
        ("https://c/v1/traces/?k=v", "https://c/v1/traces?k=v"),
    ],
)
def test_a_base_endpoint_gets_the_path_of_the_signal(endpoint, url):
    assert traces_url(endpoint) == url
