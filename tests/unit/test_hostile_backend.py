"""An OTLP backend that is hostile: whatever it answers, sending goes on, and nothing of it breaks our own numbers."""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from clrk.gateway.telemetry.transport import MAX_RETRY_AFTER_S
from clrk.gateway.telemetry.transport_http import partial_success, retry_after_s


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "Mon, 99999999999999999999 Jan 2024 99999999999999:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +" + "9" * 4400,
        "Mon, 01 Jan 9999 23:59:59 -2359",
        "9" * 5000,
        "-1",
        "\u0661",
        "",
    ],
)
def test_no_moment_to_try_again_is_too_odd(header):
    found = retry_after_s(header)
    assert found is None or 0 <= found <= MAX_RETRY_AFTER_S


@pytest.mark.parametrize(("said", "counted"), [(3, 3), (-5, 0), (2**63 - 1, 1_000_000)])
def test_what_was_rejected_can_be_added_up(said, counted):
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = said
    answer.partial_success.error_message = "\x1b[2J" + "a" * 10_000
    rejected, message = partial_success("traces", answer.SerializeToString())
    assert rejected == counted
    assert message.isprintable()
    assert len(message) <= 200
