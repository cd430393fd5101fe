"""The OTLP receiver inside a sandbox (CONTRACT section 13): what an agent's own SDK reports, as OTLP over HTTP.

Its client is the agent, which may be hostile: few connections, one request of a sandbox at a time, all of them decoded
by one thread of the gateway, so that a flood costs its sender time and nobody else more than a share of one core. What
is taken apart, believed and refused: telemetry/receive.py.

Source: OpenTelemetry protocol specification 1.x, OTLP/HTTP (paths, encodings, Status on errors, partial success).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from aiohttp import web
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from clrk.core.ids import new_invocation_id
from clrk.gateway.http_server import BoundedServer
from clrk.gateway.problem import SERVER, Problem, read_body
from clrk.gateway.telemetry.pipeline import identity_attributes
from clrk.gateway.telemetry.receive import AgentLog, AgentMetric, AgentSpan, Batch, Intake, Received
from clrk.gateway.telemetry.receive_wire import MAX_PLAIN_BYTES, Encoding, ReceiveError, Signal, inflate
from clrk.gateway.telemetry.spans import Identity, SpanRecord
from clrk.gateway.telemetry.token_bucket import TokenBucket

_LOG: Final = logging.getLogger(__name__)
HOSTS: Final = frozenset({"169.254.0.1:4318", "169.254.0.1"})
MAX_BODY_BYTES: Final = 8 * 1024 * 1024  # as it is sent; the SDKs send 512 items at a time, without compression
_MAX_HELD_BYTES: Final = 128 * 1024 * 1024  # of bodies, all sandboxes together
_MAX_CONNECTIONS: Final = 16  # per sandbox
_BACKLOG: Final = 16
_BODY_IDLE_S: Final = 5.0
_BODY_TOTAL_S: Final = 30.0
_KEEPALIVE_S: Final = 60.0
_LINGERING_S: Final = 0.5
_DRAIN_S: Final = 1.0
_READING_SHARE: Final = 8  # reading that many bytes costs a run as much as keeping one
_SLICE: Final = 256  # items that are recorded in one turn of the loop
_PATHS: Final = {signal.value: signal for signal in Signal}
_STATUS: Final = {"malformed": 400, "too_large": 413}
_CODINGS: Final = ("gzip", "deflate")
_Success = ExportTraceServiceResponse | ExportLogsServiceResponse | ExportMetricsServiceResponse
# The signal's own answer, and where it says how many items were dropped.
_SUCCESSES: Final[dict[Signal, tuple[type[_Success], str]]] = {
    Signal.TRACES: (ExportTraceServiceResponse, "rejected_spans"),
    Signal.LOGS: (ExportLogsServiceResponse, "rejected_log_records"),
    Signal.METRICS: (ExportMetricsServiceResponse, "rejected_data_points"),
}
_RETRY: Final = {"Retry-After": "1"}

# One for the process: two decoding at once would only take turns, and hold twice the memory.
_DECODER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clrk-otlp")


class AgentSink(Protocol):
    """Where an agent's own telemetry goes. Nothing of it raises or blocks."""

    def record_agent_span(self, identity: Identity, record: SpanRecord, otlp: bytes) -> None:
        """Keep a span; otlp is ResourceSpans."""

    def record_agent_log(
        self, identity: Identity, *, time_ns: int, severity: int, body: str, trace_id: str, span_id: str, otlp: bytes
    ) -> None:
        """Keep a log record; otlp is ResourceLogs."""

    def record_agent_metrics(self, identity: Identity, *, time_ns: int, otlp: bytes) -> None:
        """Keep metrics; otlp is ResourceMetrics."""

    def is_own_span(self, trace_id: str, span_id: str) -> bool:
        """Say whether a span id is that of a span of clrk."""

    def count_refused(self, signal: str, count: int) -> None:
        """Count items that an agent sent and that are not kept."""


class HeldBytes:
    """How much of agents' requests is in memory, over all sandboxes."""

    def __init__(self, limit: int = _MAX_HELD_BYTES) -> None:
        self.now = 0
        self._limit = limit

    def take(self, size: int) -> None:
        """Raises: Problem 503 when memory is short; the sender may try again."""
        if self.now + size > self._limit:
            raise Problem(503, "the gateway holds as much telemetry as it may", {**_RETRY, "Connection": "close"})
        self.now += size

    def give_back(self, size: int) -> None:
        """Say that these bytes are gone."""
        self.now -= size


_HELD: Final = HeldBytes()


class OtlpReceiver:
    """Serves one run on the OTLP listener of its sandbox."""

    def __init__(
        self, identity: Identity, sink: AgentSink, *, bucket: TokenBucket | None = None, held: HeldBytes = _HELD
    ) -> None:
        self._identity = identity
        self._sink = sink
        self._held = held
        self._bucket = bucket or TokenBucket()
        self._intake = Intake(
            identity,
            identity_attributes=identity_attributes(identity),
            host_name=socket.gethostname(),
            bucket=self._bucket,
        )
        self._turn = asyncio.Lock()
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._http = BoundedServer(
            self._handle,
            max_connections=_MAX_CONNECTIONS,
            invocation_id=lambda: identity.invocation_id or new_invocation_id(),
            keepalive_timeout=_KEEPALIVE_S,
            handler_cancellation=False,  # an agent that ends right behind its last batch has still sent it
            auto_decompress=False,  # with bounds of our own
            lingering_s=_LINGERING_S,
        )
        self._server: asyncio.Server | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Accept on this listening socket, which stays the caller's to close."""
        self._server = await asyncio.get_running_loop().create_server(
            self._http, sock=listener.dup(), backlog=_BACKLOG
        )  # fmt: skip

    async def close(self) -> None:
        """Stop accepting, take what has arrived, end every connection."""
        if self._server is not None:
            self._server.close()
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._idle.wait()
        except TimeoutError:
            _LOG.info("OTLP requests were cut off", extra={"sandbox_id": self._identity.sandbox_id})
        await self._http.shutdown(0)

    # --- one request ------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._active += 1
        self._idle.clear()
        encoding = _encoding(request)
        try:
            signal, coding = _check_head(request)
            if encoding is None:
                raise Problem(415, f"Content-Type: {Encoding.PROTOBUF.value} or {Encoding.JSON.value}")
            rejected = await self._take(request, signal, encoding, coding)
            return _answer(200, _success(signal, rejected), encoding)
        except Problem as problem:
            return _answer(problem.status, Status(message=problem.detail), encoding, problem.headers)
        except ReceiveError as exc:
            return _answer(_STATUS[exc.code], Status(message=str(exc)), encoding)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _take(
        self, request: web.BaseRequest, signal: Signal, encoding: Encoding, coding: str
    ) -> Counter[str]:  # fmt: skip
        """Read, decode and record one request, while no other one of this sandbox is; return what was refused."""
        async with self._turn:
            if not self._bucket.is_open:
                raise Problem(429, "this run has sent as much telemetry as it may for now", _RETRY)
            if "Expect" in request.headers and request.transport is not None:
                request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            held = 0

            def charge(size: int) -> None:
                nonlocal held
                self._held.take(size)
                held += size

            try:
                body = await read_body(
                    request, limit=MAX_BODY_BYTES, idle_s=_BODY_IDLE_S, total_s=_BODY_TOTAL_S, charge=charge
                )
                loop = asyncio.get_running_loop()
                batch = await loop.run_in_executor(_DECODER, self._decode, body, signal, encoding, coding)
            finally:
                self._held.give_back(held)
            return await self._record(batch, signal)

    def _decode(self, body: bytes, signal: Signal, encoding: Encoding, coding: str) -> Batch:
        try:
            plain = inflate(body, coding) if coding else body
        except ReceiveError:
            self._bucket.take(MAX_PLAIN_BYTES // _READING_SHARE)
            raise
        self._bucket.take(len(plain) // _READING_SHARE)  # what holds nothing is read all the same
        return self._intake.read(plain, signal, encoding, now_ns=time.time_ns())

    async def _record(self, batch: Batch, signal: Signal) -> Counter[str]:
        rejected = batch.rejected
        for index, item in enumerate(batch.items):
            if not self._keep(item):
                rejected["span id is that of a span of clrk"] += 1
            if index % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        if count := rejected.total():
            self._sink.count_refused(signal.name.lower(), count)
        return rejected

    def _keep(self, item: Received) -> bool:
        match item:
            case AgentSpan(record, otlp):
                if self._sink.is_own_span(record.trace_id, record.span_id):
                    return False
                self._sink.record_agent_span(self._identity, record, otlp)
            case AgentLog():
                self._sink.record_agent_log(
                    self._identity, time_ns=item.time_ns, severity=item.severity, body=item.text,
                    trace_id=item.trace_id, span_id=item.span_id, otlp=item.otlp,
                )  # fmt: skip
            case AgentMetric():
                self._sink.record_agent_metrics(self._identity, time_ns=item.time_ns, otlp=item.otlp)
        return True


def _check_head(request: web.BaseRequest) -> tuple[Signal, str]:
    """Return what is sent and its content coding, "" for none. Raises: Problem."""
    if "X-Forwarded-For" in request.headers:
        raise Problem(403, "this service does not answer through a proxy")
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or hosts[0] not in HOSTS:
        raise Problem(403, "use OTEL_EXPORTER_OTLP_ENDPOINT as it is: the Host header names another service")
    signal = _PATHS.get(request.raw_path.partition("?")[0])
    if signal is None:
        raise Problem(404, f"there are {', '.join(_PATHS)}")
    if request.method != "POST":
        raise Problem(405, "only POST", {"Allow": "POST"})
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise Problem(417, "Expect: only 100-continue")
    coding = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    if coding in ("", "identity"):
        return signal, ""
    if coding not in _CODINGS:  # RFC 9110, section 15.5.16
        raise Problem(415, "Content-Encoding: gzip or deflate", {"Accept-Encoding": ", ".join(_CODINGS)})
    return signal, coding


def _encoding(request: web.BaseRequest) -> Encoding | None:
    types = request.headers.getall("Content-Type", [])
    media = types[0].partition(";")[0].strip().lower() if len(types) == 1 else ""
    return Encoding(media) if media in tuple(Encoding) else None


def _success(signal: Signal, rejected: Counter[str]) -> Message:
    """Return the signal's own answer; it says what was dropped and why, and nothing when nothing was."""
    count = rejected.total()
    reasons = ", ".join(f"{number} {reason}" for reason, number in rejected.most_common(8) if number)
    kind, rejected_field = _SUCCESSES[signal]
    response = kind()
    if count:
        setattr(response.partial_success, rejected_field, count)
        response.partial_success.error_message = reasons
    return response


def _answer(
    status: int, message: Message, encoding: Encoding | None, headers: dict[str, str] | None = None
) -> web.Response:
    """Answer in the encoding of the request; JSON to a request that had none of ours."""
    chosen = encoding or Encoding.JSON
    body = message.SerializeToString() if chosen is Encoding.PROTOBUF else MessageToJson(message, indent=None).encode()
    return web.Response(
        status=status, body=body, headers={"Content-Type": chosen.value, **SERVER, **(headers or {})}
    )  # fmt: skip
