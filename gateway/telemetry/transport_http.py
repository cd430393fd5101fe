"""OTLP over http/protobuf. Source: opentelemetry-proto docs/specification.md, "OTLP/HTTP"."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import ssl
import time
from typing import Final

import aiohttp
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from clrk import __version__
from clrk.gateway.telemetry.export_target import ExportTarget
from clrk.gateway.telemetry.outbox import Signal
from clrk.gateway.telemetry.transport import (
    MAX_RETRY_AFTER_S,
    Answer,
    TlsMaterialError,
    Verdict,
    client_context,
    words,
)

_PROTOBUF: Final = "application/x-protobuf"
_GZIP_MIN_BYTES: Final = 1024
_GZIP_LEVEL: Final = 1  # spans repeat themselves so much that more work saves little
_MAX_ANSWER_BYTES: Final = 65_536
_MAX_REJECTED: Final = 1_000_000  # of one request; we send fewer
_KEEPALIVE_S: Final = 10.0  # below what servers close after
# The request itself is at fault (RFC 9110).
_REFUSED_STATUSES: Final = frozenset({400, 413, 422})
# "SHOULD be retried" (OTLP). Beside them, what says that path, credentials or gateway are wrong, not the request: the
# operator mends it, and until then nothing may be lost.
_LATER_5XX: Final = frozenset({501, 502, 503, 504})


class HttpTransport:
    """One connection pool; requests are sent one at a time."""

    def __init__(self, target: ExportTarget) -> None:
        self._target = target
        self._session: aiohttp.ClientSession | None = None

    async def send(self, body: bytes) -> Answer:
        """Post one request; see Transport."""
        headers = dict(self._target.headers)
        headers |= {"Content-Type": _PROTOBUF, "Accept": _PROTOBUF}
        if self._target.gzip and len(body) >= _GZIP_MIN_BYTES:
            body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL, mtime=0)
            headers["Content-Encoding"] = "gzip"
        try:
            async with asyncio.timeout(self._target.timeout_s):
                session = await self._open()
                # A redirect is not followed: it would take the credentials to another host.
                async with session.post(
                    self._target.endpoint, data=body, headers=headers, allow_redirects=False
                ) as response:
                    return _judge(self._target.signal, response, await _bounded(response))
        except TimeoutError:
            return Answer(Verdict.LATER, "timeout")
        except TlsMaterialError as exc:
            return Answer(Verdict.LATER, str(exc))
        except (aiohttp.ClientError, ssl.SSLError, OSError, ValueError) as exc:  # ValueError: a URL, a header
            return Answer(Verdict.LATER, type(exc).__name__, message=words(_cause(exc)))

    async def close(self) -> None:
        """Close the pool."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = await asyncio.to_thread(client_context, self._target) if self._target.secure else True
            connector = aiohttp.TCPConnector(ssl=context, limit=1, keepalive_timeout=_KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),  # send has the deadline
                headers={"User-Agent": f"clrk/{__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    raw = b""
    while len(raw) < _MAX_ANSWER_BYTES and (chunk := await response.content.read(_MAX_ANSWER_BYTES - len(raw))):
        raw += chunk
    return raw


def _judge(signal: Signal, response: aiohttp.ClientResponse, raw: bytes) -> Answer:
    status, reason = response.status, f"HTTP {response.status}"
    if 200 <= status < 300:
        rejected, message = partial_success(signal, raw) if response.content_type == _PROTOBUF else (0, "")
        return Answer(Verdict.TAKEN, reason, rejected=rejected, message=message)
    message = _status_message(raw) if response.content_type == _PROTOBUF else ""
    if status in _REFUSED_STATUSES:
        return Answer(Verdict.REFUSED, reason, message=message)
    if status >= 500 and status not in _LATER_5XX:
        return Answer(Verdict.DOUBTFUL, reason, message=message)
    return Answer(Verdict.LATER, reason, retry_after_s(response.headers.get("Retry-After")), message=message)


def partial_success(signal: Signal, raw: bytes) -> tuple[int, str]:
    """Return how many items a successful response says were rejected, and why; (0, "") when it can not be read."""
    try:
        match signal:
            case "traces":
                spans = ExportTraceServiceResponse.FromString(raw).partial_success
                return _count(spans.rejected_spans), words(spans.error_message)
            case "logs":
                logs = ExportLogsServiceResponse.FromString(raw).partial_success
                return _count(logs.rejected_log_records), words(logs.error_message)
            case "metrics":
                points = ExportMetricsServiceResponse.FromString(raw).partial_success
                return _count(points.rejected_data_points), words(points.error_message)
    except DecodeError:
        return 0, ""


def _count(rejected: int) -> int:
    """Return a backend's count as one that can be added up: sums of int64 do not fit our own metrics."""
    return max(0, min(rejected, _MAX_REJECTED))


def _status_message(raw: bytes) -> str:
    """Return the message of a google.rpc.Status, which failures carry."""
    status: Message = Status()
    try:
        status.ParseFromString(raw)
    except DecodeError:
        return ""
    return words(getattr(status, "message", ""))


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, section 10.2.3): a number, or a date."""
    if header is None:
        return None
    if header.isascii() and header.isdigit():
        return min(float(header), MAX_RETRY_AFTER_S)
    try:
        moment_s = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):  # numbers that no calendar has
        return None
    return max(0.0, min(moment_s - time.time(), MAX_RETRY_AFTER_S))


def _cause(exc: BaseException) -> str:
    """Return the operating system's or OpenSSL's words; aiohttp's own repeat the URL."""
    cause = exc.__cause__ or exc
    return getattr(cause, "verify_message", "") or getattr(cause, "strerror", "") or type(cause).__name__
