"""OTLP over gRPC. Source: opentelemetry-proto docs/specification.md, "OTLP/gRPC".

gRPC's core runs in threads of its own; an answer comes back into the event loop by call_soon_threadsafe. A channel
serves as long as it works: after a failure a new one is made, so that neither a cached address nor the core's own
back-off (up to two minutes) stands between a backend that is back and us.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else the core writes a stranger's words to stderr

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from clrk import __version__
from clrk.gateway.telemetry.export_target import ExportTarget
from clrk.gateway.telemetry.outbox import Signal
from clrk.gateway.telemetry.transport import (
    MAX_RETRY_AFTER_S,
    Answer,
    TlsMaterialError,
    Verdict,
    root_certificates,
    words,
)
from clrk.gateway.telemetry.transport_http import partial_success

_METHODS: Final[dict[Signal, str]] = {
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}
_OPTIONS: Final = (
    ("grpc.primary_user_agent", f"clrk/{__version__}"),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 65_536),
    ("grpc.enable_retries", 0),  # whether to send again is decided above
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # no back-off inherited from the channel before
    ("grpc.service_config_disable_resolution", 1),
)
_STATUS_DETAILS: Final = "grpc-status-details-bin"
_DOUBTFUL: Final = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.FAILED_PRECONDITION})


class GrpcTransport:
    """One channel; requests are sent one at a time."""

    def __init__(self, target: ExportTarget) -> None:
        self._target = target
        # The core refuses upper-case names, and those that end in -bin want bytes.
        self._metadata = tuple(
            (name.lower(), value.encode() if name.lower().endswith("-bin") else value) for name, value in target.headers
        )
        self._channel: Any = None

    async def send(self, body: bytes) -> Answer:
        """Make one call; see Transport."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():  # cancelled meanwhile
                done.set_result(None)

        def wake(_call: object) -> None:
            try:
                loop.call_soon_threadsafe(finish)
            except RuntimeError:  # the loop is gone, and with it whoever waited
                return

        try:
            call = await asyncio.to_thread(self._start, body)  # copies and compresses the body
        except TlsMaterialError as exc:
            return Answer(Verdict.LATER, str(exc))
        except (ValueError, TypeError, grpc.RpcError) as exc:  # metadata that gRPC does not take
            return Answer(Verdict.LATER, type(exc).__name__)
        try:
            call.add_done_callback(wake)
            await done
        finally:
            call.cancel()  # does nothing to a call that has ended
        answer = _judge(self._target.signal, call)
        if answer.verdict is Verdict.LATER:
            await self.close()
        return answer

    async def close(self) -> None:
        """Close the channel."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await asyncio.to_thread(channel.close)

    def _start(self, body: bytes) -> Any:
        target = self._target
        if self._channel is None:
            if target.secure:
                credentials = grpc.ssl_channel_credentials(
                    root_certificates(target),
                    target.client_key_pem.encode() or None,
                    target.client_cert_pem.encode() or None,
                )
                self._channel = grpc.secure_channel(target.endpoint, credentials, options=_OPTIONS)
            else:
                self._channel = grpc.insecure_channel(target.endpoint, options=_OPTIONS)
        export = self._channel.unary_unary(_METHODS[target.signal])  # bytes in, bytes out
        return export.future(
            body,
            timeout=target.timeout_s,
            metadata=self._metadata,
            compression=grpc.Compression.Gzip if target.gzip else grpc.Compression.NoCompression,
        )


def _judge(signal: Signal, call: Any) -> Answer:
    code: grpc.StatusCode = call.code()
    details = call.details() or ""
    match code:
        case grpc.StatusCode.OK:
            rejected, message = partial_success(signal, call.result())
            return Answer(Verdict.TAKEN, code.name, rejected=rejected, message=message)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return Answer(Verdict.REFUSED, code.name, message=words(details))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            retry = _retry_info_s(call)
            # Without RetryInfo the resource will not recover by itself, and a message over the size limit looks so.
            too_large = retry is None and "larger than max" in details
            return Answer(Verdict.REFUSED if too_large else Verdict.LATER, code.name, retry, message=words(details))
        case _ if code in _DOUBTFUL:
            return Answer(Verdict.DOUBTFUL, code.name, message=words(details))
        case _:
            return Answer(Verdict.LATER, code.name, _retry_info_s(call), message=words(details))


def _retry_info_s(call: Any) -> float | None:
    """Return the seconds of a google.rpc.RetryInfo in the trailers."""
    for name, value in call.trailing_metadata() or ():
        if name != _STATUS_DETAILS:
            continue
        try:
            for detail in Status.FromString(value).details:
                info = RetryInfo()
                if detail.Unpack(info):
                    seconds = float(info.retry_delay.ToMilliseconds()) / 1000
                    return max(0.0, min(seconds, MAX_RETRY_AFTER_S))
        except (DecodeError, TypeError):
            return None
    return None
