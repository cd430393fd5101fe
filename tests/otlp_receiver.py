"""An OTLP backend for tests, independent of clrk: http/protobuf and gRPC, with TLS, and every way to fail.

Built on opentelemetry-proto, grpc and aiohttp alone, so that what it receives says something about what was sent.
"""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field

import grpc
from aiohttp import web
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from instances import DEADLINE_S
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

REQUESTS = {
    "traces": (trace_service_pb2.ExportTraceServiceRequest, trace_service_pb2.ExportTraceServiceResponse),
    "logs": (logs_service_pb2.ExportLogsServiceRequest, logs_service_pb2.ExportLogsServiceResponse),
    "metrics": (metrics_service_pb2.ExportMetricsServiceRequest, metrics_service_pb2.ExportMetricsServiceResponse),
}
REJECTED = {"traces": "rejected_spans", "logs": "rejected_log_records", "metrics": "rejected_data_points"}


@dataclass
class Failure:
    """How to answer instead of taking a request. status is of HTTP, code of gRPC."""

    status: int = 503
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    retry_after: str | None = None  # HTTP: the header as it stands; gRPC: seconds
    message: str = ""
    rejected: int | None = None  # a partial success: taken, but for so many
    hang: bool = False  # never answer


@dataclass
class Received:
    """One request that was taken."""

    signal: str
    message: object
    metadata: dict[str, str]


@dataclass
class Tls:
    """PEM texts: the server's certificate and key, and whose client certificates are demanded."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None
    files: str = ""  # a folder with cert.pem, key.pem and client-ca.pem of the same content, for HTTP


def any_value(value):
    """Return an AnyValue as Python."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [any_value(item) for item in value.array_value.values]
    return getattr(value, kind)


def attributes(message):
    """Return the attributes of a span, event, resource, log record or data point."""
    return {pair.key: any_value(pair.value) for pair in message.attributes}


def as_document(span, resource):
    """Return a received span in the words of `clrk trace --json`."""
    return {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex(),
        "name": span.name,
        "kind": Span.SpanKind.Name(span.kind),
        "start_time_unix_nano": span.start_time_unix_nano,
        "end_time_unix_nano": span.end_time_unix_nano,
        "status": {"code": type(span.status).StatusCode.Name(span.status.code), "message": span.status.message},
        "attributes": attributes(span),
        "events": [
            {"name": event.name, "time_unix_nano": event.time_unix_nano, "attributes": attributes(event)}
            for event in span.events
        ],
        "resource": resource,
    }


@dataclass
class Receiver:
    """A backend on loopback. `fail` is asked for each request: None takes it. Stop it and start it again at will."""

    protocol: str = "http/protobuf"
    tls: Tls | None = None
    port: int = 0
    fail: object = None
    requests: list[Received] = field(default_factory=list)
    refused: list[Received] = field(default_factory=list)

    async def __aenter__(self):
        self.changed = asyncio.Condition()
        self.release = asyncio.Event()
        await self.start()
        return self

    async def __aexit__(self, *exc):
        await self.stop()

    # --- what a test asks -------------------------------------------------------------------------------------------

    @property
    def endpoint(self):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def _messages(self, signal):
        return [one.message for one in self.requests if one.signal == signal]

    def groups(self, signal="traces"):
        """Every ResourceSpans, ResourceLogs or ResourceMetrics, in the order of arrival."""
        name = {"traces": "resource_spans", "logs": "resource_logs", "metrics": "resource_metrics"}[signal]
        return [group for message in self._messages(signal) for group in getattr(message, name)]

    @property
    def spans(self):
        return [span for group in self.groups() for scope in group.scope_spans for span in scope.spans]

    @property
    def names(self):
        return [span.name for span in self.spans]

    @property
    def logs(self):
        return [log for group in self.groups("logs") for scope in group.scope_logs for log in scope.log_records]

    @property
    def metrics(self):
        return [m for group in self.groups("metrics") for scope in group.scope_metrics for m in scope.metrics]

    def documents(self):
        """Every span as `clrk trace --json` shows it."""
        return [
            as_document(span, attributes(group.resource))
            for group in self.groups()
            for scope in group.scope_spans
            for span in scope.spans
        ]

    async def wait(self, condition, timeout_s=DEADLINE_S):
        """Wait until condition() holds; asked after each request."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(condition)

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self):
        """Listen, on the port of the last time."""
        await (self._start_grpc() if self.protocol == "grpc" else self._start_http())

    async def stop(self):
        """Die: connections are cut."""
        self.release.set()
        if self.protocol == "grpc":
            await self._server.stop(None)
        else:
            await self._runner.cleanup()
        self.release = asyncio.Event()

    async def _start_http(self):
        app = web.Application(client_max_size=2**28)
        for signal in REQUESTS:
            app.router.add_post(f"/v1/{signal}", self._http(signal))
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        context = None
        if self.tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(f"{self.tls.files}/cert.pem", f"{self.tls.files}/key.pem")
            if self.tls.client_ca:
                context.load_verify_locations(cadata=self.tls.client_ca.decode())
                context.verify_mode = ssl.CERT_REQUIRED
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    def _http(self, signal):
        request_type, response_type = REQUESTS[signal]

        async def handle(request):
            raw = await request.read()  # inflated by aiohttp
            failure = await self._take(signal, request_type.FromString(raw), dict(request.headers))
            response = response_type()
            status, headers = 200, {}
            if failure is not None:
                status = 200 if failure.rejected is not None else failure.status
                if failure.rejected is None and failure.message:
                    response = Status(message=failure.message)
                elif failure.rejected is not None:
                    self._partial(signal, response, failure)
                if failure.retry_after:
                    headers["Retry-After"] = failure.retry_after
                if status == 302:
                    headers["Location"] = "http://127.0.0.1:1/"
            body = response.SerializeToString()
            return web.Response(status=status, body=body, content_type="application/x-protobuf", headers=headers)

        return handle

    async def _start_grpc(self):
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        for signal, module, name in (
            ("traces", trace_service_pb2_grpc, "TraceService"),
            ("logs", logs_service_pb2_grpc, "LogsService"),
            ("metrics", metrics_service_pb2_grpc, "MetricsService"),
        ):
            servicer = type(name, (getattr(module, f"{name}Servicer"),), {"Export": self._grpc(signal)})
            getattr(module, f"add_{name}Servicer_to_server")(servicer(), self._server)
        address = f"127.0.0.1:{self.port}"
        if self.tls:
            credentials = grpc.ssl_server_credentials(
                [(self.tls.key, self.tls.certificate)], self.tls.client_ca, require_client_auth=bool(self.tls.client_ca)
            )
            self.port = self._server.add_secure_port(address, credentials)
        else:
            self.port = self._server.add_insecure_port(address)
        await self._server.start()

    def _grpc(self, signal):
        async def export(_servicer, request, context):
            failure = await self._take(signal, request, dict(context.invocation_metadata()))
            response = REQUESTS[signal][1]()
            if failure is not None and failure.rejected is not None:
                self._partial(signal, response, failure)
            elif failure is not None:
                if failure.retry_after is not None:
                    status = Status(code=failure.code.value[0], message=failure.message)
                    delay = Duration()
                    delay.FromMilliseconds(int(float(failure.retry_after) * 1000))
                    status.details.add().Pack(RetryInfo(retry_delay=delay))
                    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
                await context.abort(failure.code, failure.message)
            return response

        return export

    def _partial(self, signal, response, failure):
        setattr(response.partial_success, REJECTED[signal], failure.rejected)
        response.partial_success.error_message = failure.message

    async def _take(self, signal, message, metadata):
        received = Received(signal, message, metadata)
        failure = self.fail(signal, message) if self.fail is not None else None
        (self.requests if failure is None or failure.rejected is not None else self.refused).append(received)
        async with self.changed:
            self.changed.notify_all()
        if failure is not None and failure.hang:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.release.wait(), 30)
        return failure
