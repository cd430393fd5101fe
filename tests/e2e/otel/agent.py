"""An agent with the OpenTelemetry SDK as its documentation shows it: nothing in it knows of clrk.

`"env"` as the event's data: it continues the context in its environment; else it does not look there.
"""

from __future__ import annotations

import json
import os
import sys
import time

import requests
from opentelemetry import context, metrics, propagate, trace
from opentelemetry._logs import LogRecord, SeverityNumber, get_logger, set_logger_provider
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.propagators._envcarrier import EnvironmentGetter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def main() -> None:
    """Do a piece of work: a span, a log record and a metric, and an HTTP call within the span."""
    text = sys.stdin.read()
    event = json.loads(text) if text else {}  # a daemon gets none
    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracing)
    logging = LoggerProvider()
    logging.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
    set_logger_provider(logging)
    measuring = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
    metrics.set_meter_provider(measuring)
    RequestsInstrumentor().instrument()
    if event.get("data") == "env":
        context.attach(propagate.extract(os.environ, getter=EnvironmentGetter()))
    with trace.get_tracer("agent").start_as_current_span("work") as span:
        span.set_attributes({"step": 1, "invocation.id": "forged", "clrk.component": "gateway"})
        metrics.get_meter("agent").create_counter("agent.steps").add(1, {"agent.name": "forged", "step": "one"})
        get_logger("agent").emit(
            LogRecord(timestamp=time.time_ns(), severity_number=SeverityNumber.WARN, body="working")
        )
        requests.get("http://tools.internal/orders/1042", timeout=60).raise_for_status()
        made = span.get_span_context()
    for provider in (tracing, logging, measuring):
        provider.shutdown()
    print(json.dumps({"trace_id": f"{made.trace_id:032x}", "span_id": f"{made.span_id:016x}", "env": dict(os.environ)}))


if __name__ == "__main__":
    main()
