"""The OTLP server of a sandbox: what HTTP and OTLP say about every wrong request, and what right ones leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import itertools
import json
import socket
import struct
import zlib
from collections import Counter

import aiohttp
import pytest
from agent_otlp import (
    IDENTITY,
    NOW,
    OTHER_TRACE,
    OWN_ATTRIBUTES,
    RUN_SPAN,
    SPAN_ID,
    TRACE,
    any_value,
    make_span,
    traces,
)
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics

from clrk.gateway.otlp_receiver import MAX_BODY_BYTES, HeldBytes, OtlpReceiver
from clrk.gateway.telemetry.token_bucket import TokenBucket

PROTOBUF = {"Host": "169.254.0.1:4318", "Content-Type": "application/x-protobuf"}
JSON = {"Host": "169.254.0.1:4318", "Content-Type": "application/json; charset=utf-8"}
GOOD = traces(make_span()).SerializeToString()


class Sink:
    """Keeps what the receiver records."""

    def __init__(self) -> None:
        self.spans, self.logs, self.metrics = [], [], []
        self.refused: Counter[str] = Counter()
        self.own: set[tuple[str, str]] = set()

    def record_agent_span(self, identity, record, otlp):
        assert identity is IDENTITY
        self.spans.append(record)

    def record_agent_log(self, identity, **fields):
        self.logs.append(fields)

    def record_agent_metrics(self, identity, **fields):
        self.metrics.append(fields)

    def is_own_span(self, trace_id, span_id):
        return (trace_id, span_id) in self.own

    def count_refused(self, signal, count):
        self.refused[signal] += count


@contextlib.asynccontextmanager
async def serving(**options):
    """Serve on loopback; yields the sink, an HTTP client and the port."""
    sink = Sink()
    receiver = OtlpReceiver(IDENTITY, sink, **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        await receiver.serve(listener)
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                yield sink, client, port
        finally:
            await receiver.close()


async def test_spans_in_both_encodings_and_all_codings():
    text = json.dumps({
        "resourceSpans": [{"scopeSpans": [{"spans": [{
            "traceId": OTHER_TRACE, "spanId": SPAN_ID, "name": "work", "startTimeUnixNano": str(NOW),
            "endTimeUnixNano": str(NOW),
        }]}]}]
    }).encode()  # fmt: skip
    codings = [
        ({}, bytes), ({"Content-Encoding": "identity"}, bytes), ({"Content-Encoding": "gzip"}, gzip.compress),
        ({"Content-Encoding": "DEFLATE"}, zlib.compress),
    ]  # fmt: skip
    async with serving() as (sink, client, _):
        for coding, pack in codings:
            async with client.post("/v1/traces", data=pack(GOOD), headers=PROTOBUF | coding) as answer:
                assert (answer.status, answer.content_type) == (200, "application/x-protobuf")
                assert await answer.read() == ExportTraceServiceResponse().SerializeToString()
            async with client.post("/v1/traces", data=pack(text), headers=JSON | coding) as answer:
                assert (answer.status, answer.content_type) == (200, "application/json")
                assert await answer.json() == {}
    assert len(sink.spans) == 8
    assert {(span.trace_id, span.parent_span_id) for span in sink.spans} == {(TRACE, RUN_SPAN)}
    assert all(span.attributes.items() >= OWN_ATTRIBUTES.items() for span in sink.spans)


async def test_logs_and_metrics():
    records = [LogRecord(time_unix_nano=NOW, body=any_value("hi")), LogRecord(time_unix_nano=1)]
    log = ExportLogsServiceRequest(
        resource_logs=[
            ResourceLogs(
                scope_logs=[
                    ScopeLogs(log_records=records)
                ]
            )
        ]
    )  # fmt: skip
    points = [NumberDataPoint(time_unix_nano=NOW), NumberDataPoint(time_unix_nano=1)]
    metric = ExportMetricsServiceRequest(
        resource_metrics=[
            ResourceMetrics(scope_metrics=[ScopeMetrics(metrics=[Metric(name="m", gauge=Gauge(data_points=points))])])
        ]
    )
    async with serving() as (sink, client, _):
        async with client.post("/v1/logs", data=log.SerializeToString(), headers=PROTOBUF) as answer:
            logs = ExportLogsServiceResponse.FromString(await answer.read())
        async with client.post("/v1/metrics", data=metric.SerializeToString(), headers=PROTOBUF) as answer:
            metrics = ExportMetricsServiceResponse.FromString(await answer.read())
    assert (logs.partial_success.rejected_log_records, logs.partial_success.error_message) == (1, "1 time out of range")
    assert metrics.partial_success.rejected_data_points == 1
    assert [(entry["body"], entry["trace_id"], entry["span_id"]) for entry in sink.logs] == [("hi", TRACE, RUN_SPAN)]
    assert len(sink.metrics) == 1
    assert sink.refused == {"logs": 1, "metrics": 1}


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("GET", "/v1/traces", PROTOBUF, None, 405),
        ("OPTIONS", "/v1/metrics", PROTOBUF, None, 405),
        ("PUT", "/v1/logs", PROTOBUF, GOOD, 405),
        ("POST", "/", PROTOBUF, GOOD, 404),
        ("POST", "/v1/traces/", PROTOBUF, GOOD, 404),
        ("POST", "/v1development/profiles", PROTOBUF, GOOD, 404),
        ("POST", "/v1/traces", {"Host": "169.254.0.1:4318"}, GOOD, 415),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Type": "text/plain"}, GOOD, 415),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Type": "application/grpc"}, GOOD, 415),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Encoding": "br"}, GOOD, 415),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Encoding": "gzip, gzip"}, GOOD, 415),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Encoding": "gzip"}, GOOD, 400),
        ("POST", "/v1/traces", PROTOBUF, b"no protobuf", 400),
        ("POST", "/v1/traces", JSON, b"no json", 400),
        ("POST", "/v1/traces", JSON, b"[" * 200_000, 400),
        ("POST", "/v1/traces", PROTOBUF, b"\x0a\x00" * 100_000, 413),
        ("POST", "/v1/traces", PROTOBUF, b"\0" * (MAX_BODY_BYTES + 1), 413),
        ("POST", "/v1/traces", PROTOBUF | {"Content-Encoding": "gzip"}, gzip.compress(b"\0" * (1 << 26)), 413),
        ("POST", "/v1/traces", PROTOBUF | {"Host": "localhost:4318"}, GOOD, 403),
        ("POST", "/v1/traces", PROTOBUF | {"Host": "collector.example"}, GOOD, 403),
        ("POST", "/v1/traces", PROTOBUF | {"X-Forwarded-For": "10.0.0.1"}, GOOD, 403),
    ],
    ids=map(str, itertools.count()),  # bodies hold the time: no name for a test
)  # fmt: skip
async def test_wrong_requests(method, path, headers, body, status):
    # Content-Type: aiohttp would add application/octet-stream of its own.
    data = None if body is None else io.BytesIO(body)
    async with (
        serving() as (sink, client, _),
        client.request(method, path, headers=headers, data=data, skip_auto_headers=["Content-Type"]) as answer,
    ):
        raw = await answer.read()
        assert answer.status == status, raw
        assert answer.headers["Server"] == "clrk"
        if headers.get("Content-Type") == PROTOBUF["Content-Type"]:
            assert answer.content_type == "application/x-protobuf"
            assert Status.FromString(raw).message
        else:
            assert json.loads(raw)["message"]
        assert answer.headers.get("Allow") == ("POST" if status == 405 else None)
    assert not sink.spans


async def test_a_chunked_body_without_end_is_cut_off_at_the_limit():
    async def flood():
        while True:
            yield b"\0" * 65_536

    async with (
        serving() as (_, client, _port),
        client.post("/v1/traces", data=flood(), headers=PROTOBUF) as answer,
    ):
        assert answer.status == 413


async def test_a_span_id_of_ours_is_refused_and_said_so():
    async with serving() as (sink, client, _):
        sink.own.add((TRACE, SPAN_ID))
        body = traces(make_span(), make_span(span_id=b"\7" * 8)).SerializeToString()
        async with client.post("/v1/traces", data=body, headers=PROTOBUF) as answer:
            partial = ExportTraceServiceResponse.FromString(await answer.read()).partial_success
    assert (partial.rejected_spans, partial.error_message) == (1, "1 span id is that of a span of clrk")
    assert [span.span_id for span in sink.spans] == [(b"\7" * 8).hex()]
    assert sink.refused == {"traces": 1}


async def test_over_the_rate_drops_are_told_and_then_429():
    many = traces(*(make_span(span_id=struct.pack(">Q", i + 1)) for i in range(20))).SerializeToString()
    async with serving(bucket=TokenBucket(burst_bytes=10_000, bytes_per_s=0)) as (sink, client, _):
        async with client.post("/v1/traces", data=many, headers=JSON | PROTOBUF) as answer:
            partial = ExportTraceServiceResponse.FromString(await answer.read()).partial_success
            assert answer.status == 200
        async with client.post("/v1/traces", data=many, headers=PROTOBUF) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert partial.rejected_spans + len(sink.spans) == 20
    assert 0 < len(sink.spans) < 20
    assert "over this run's limit" in partial.error_message


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (gzip.compress(b"\0" * (1 << 25)), PROTOBUF | {"Content-Encoding": "gzip"}, 413),
        (b"{" + b" " * 2_000_000 + b"}", JSON, 200),  # a large nothing
        (b"x" * 2_000_000, JSON, 400),
    ],
    ids=["bomb", "nothing", "junk"],
)
async def test_what_is_only_read_has_its_price_too(body, headers, status):
    async with serving(bucket=TokenBucket(burst_bytes=300_000, bytes_per_s=0)) as (_, client, _port):
        statuses = []
        for _ in range(4):
            async with client.post("/v1/traces", data=io.BytesIO(body), headers=headers) as answer:
                statuses.append(answer.status)
    assert statuses[0] == status
    assert statuses[-1] == 429


async def test_memory_is_shared_and_given_back():
    held = HeldBytes(limit=len(GOOD))
    async with serving(held=held) as (sink, client, _):
        for _ in range(3):
            async with client.post("/v1/traces", data=GOOD, headers=PROTOBUF) as answer:
                assert answer.status == 200
        async with client.post("/v1/traces", data=GOOD + b"\x0a\x00", headers=PROTOBUF) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert held.now == 0
    assert len(sink.spans) == 3


async def test_an_agent_that_ends_right_behind_its_last_batch_is_heard():
    async with serving() as (sink, _, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        headers = PROTOBUF | {"Content-Length": str(len(GOOD))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST /v1/traces HTTP/1.1\r\n{head}\r\n".encode() + GOOD)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        while not sink.spans:
            await asyncio.sleep(0)
    assert len(sink.spans) == 1


async def test_expect_is_answered():
    async with serving() as (sink, client, _):
        async with client.post("/v1/traces", data=GOOD, headers=PROTOBUF, expect100=True) as answer:
            assert answer.status == 200
        async with client.post("/v1/traces", data=GOOD, headers=PROTOBUF | {"Expect": "a-miracle"}) as answer:
            assert answer.status == 417
    assert len(sink.spans) == 1


async def test_connections_are_few():
    async with serving() as (_, _, port):
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(17)]
        writers = [writer for _, writer in streams]
        assert (await streams[16][0].read()).startswith(b"HTTP/1.1 503 ")
        for writer in writers:
            writer.close()
