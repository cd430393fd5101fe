"""Agents with unmodified OpenTelemetry SDKs in real sandboxes: their own spans, logs and metrics are where they belong.

One trace: the caller's span → ingress.dispatch → invoke_agent → the agent's own spans → the egress span → the upstream.
"""

from __future__ import annotations

import gzip
import json
import secrets
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from stack import EVENT, ROOT, Daemon, StandIn, agent, document, egress, invoke

pytestmark = pytest.mark.e2e
TRACESTATE = "vendor=opaque , other@x=1"
BAGGAGE = "tenant=acme , flag=on"


class Collector:
    """An OTLP endpoint: what the gateway exports, as messages."""

    def __init__(self) -> None:
        kinds = {
            "/v1/traces": ExportTraceServiceRequest,
            "/v1/logs": ExportLogsServiceRequest,
            "/v1/metrics": ExportMetricsServiceRequest,
        }
        self.received: list[Any] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                received.append(kinds[self.path].FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that close() waits for the last of them
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def spans(self) -> list[tuple[Any, Any]]:
        """Return (resource, span) of everything so far."""
        return [
            (group.resource, span)
            for message in list(self.received)
            for group in getattr(message, "resource_spans", ())
            for scope in group.scope_spans
            for span in scope.spans
        ]

    def logs(self) -> list[tuple[Any, Any]]:
        """Return (resource, record)."""
        return [
            (group.resource, record)
            for message in list(self.received)
            for group in getattr(message, "resource_logs", ())
            for scope in group.scope_logs
            for record in scope.log_records
        ]

    def metrics(self) -> list[tuple[Any, Any]]:
        """Return (resource, metric)."""
        return [
            (group.resource, metric)
            for message in list(self.received)
            for group in getattr(message, "resource_metrics", ())
            for scope in group.scope_metrics
            for metric in scope.metrics
        ]

    def wait(self, what: str, wanted: Any) -> tuple[Any, Any]:
        """Return the first (resource, item) that is wanted; fail after DEADLINE_S."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for resource, item in getattr(self, what)():
                if wanted(resource, item):
                    return resource, item
            threading.Event().wait(0.05)
        raise AssertionError(f"the collector got no such {what}: {getattr(self, what)()[-5:]}")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, providers: StandIn, collector: Collector) -> Iterator[Daemon]:
    """A daemon whose agents have OpenTelemetry SDKs."""
    gateway, routes = egress(providers)
    gateway["spec"]["otlp"] = {"endpoint": collector.url}
    agents = ROOT / "tests/e2e/otel"
    python = {
        "command": ["/agent/venv/bin/python", "-I", "/agent/code/agent.py"],
        "mounts": {"/agent/venv": ROOT / ".venv", "/agent/code": agents},
    }
    node = {"command": ["/usr/bin/node", "/agent/node/agent.mjs"], "mounts": {"/agent/node": ROOT / "tests/node"}}
    signals = {"OTEL_LOGS_EXPORTER": "otlp", "OTEL_METRICS_EXPORTER": "otlp"}
    as_json = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}
    documents = [
        gateway,
        routes,
        agent("py", **python),
        agent("node", **node, env=signals),
        agent("nodejson", **node, env=signals | as_json),
        document("DaemonAgent", "watcher", template=agent("py", **python)["spec"]["template"], restartPolicy="Never"),
        agent("forger", ["/usr/bin/python3", "-I", "/agent/code/forger.py"], mounts={"/agent/code": agents}),
    ]
    running = Daemon(tmp_path_factory.mktemp("traced"), instance("ot"), documents)
    running.start()
    collector.wait(
        "spans", lambda _, span: is_watcher(span) and span.name == "GET tools.internal"
    )  # it has made its call, which no other test may take for its own
    yield running
    assert running.stop() == 0, running.log()


def is_watcher(span: Any) -> bool:
    """Say whether a span is the daemon's."""
    return text_attributes(span).get("agent.name") == "watcher"


async def traced_run(
    caller: aiohttp.ClientSession, daemon: Daemon, name: str, data: Any, flags: str = "01"
) -> tuple[dict[str, Any], str, tuple[str, str]]:
    """Run an agent as a traced caller; return its answer, the invocation id, and the caller's trace and span id."""
    context = (secrets.token_hex(16), secrets.token_hex(8))
    headers = EVENT | {
        "traceparent": f"00-{context[0]}-{context[1]}-{flags}", "tracestate": TRACESTATE, "baggage": BAGGAGE,
    }  # fmt: skip
    text, invocation_id = await invoke(caller, daemon, name, json.dumps(data), headers)
    return json.loads(text), invocation_id, context


def one(spans: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the only span with these fields."""
    (found,) = [span for span in spans if all(span[key] == value for key, value in wanted.items())]
    return found


def of_agent(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [span for span in spans if span["resource"]["clrk.component"] == "agent"]


def text_attributes(message: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in message.attributes}


@pytest.mark.parametrize("name", ["py", "node", "nodejson"])
@pytest.mark.parametrize("mode", ["env", "none"])
async def test_an_unmodified_sdk_joins_the_trace(
    traced: Daemon, collector: Collector, providers: StandIn, caller: aiohttp.ClientSession, name: str, mode: str
) -> None:
    seen_before = len(providers.seen())
    answer, invocation_id, (trace_id, caller_span) = await traced_run(caller, traced, name, mode)
    spans = traced.spans_when_complete(invocation_id)
    assert {span["trace_id"] for span in spans} == {trace_id}
    assert {span["attributes"]["invocation.id"] for span in spans} == {invocation_id}
    assert {span["attributes"]["agent.name"] for span in spans} == {name}
    dispatch, run = one(spans, name="ingress.dispatch"), one(spans, name=f"invoke_agent {name}")
    assert (dispatch["parent_span_id"], run["parent_span_id"]) == (caller_span, dispatch["span_id"])

    work = one(spans, name="work")
    assert (work["span_id"], work["parent_span_id"]) == (answer["span_id"], run["span_id"])
    assert (answer["trace_id"] == trace_id) is (mode == "env")  # without, the SDK made a trace of its own
    assert work["attributes"]["step"] == 1
    assert work["resource"]["service.name"] == name
    (call,) = [span for span in of_agent(spans) if span["kind"] == "SPAN_KIND_CLIENT"]
    assert call["parent_span_id"] == work["span_id"]
    assert len(of_agent(spans)) == 2

    out = one(spans, name="GET tools.internal")
    assert out["resource"]["clrk.component"] == "gateway"
    # With the context of its environment the agent's own HTTP span is of this trace, and the parent of ours.
    assert out["parent_span_id"] == (call["span_id"] if mode == "env" else run["span_id"])
    (request,) = providers.seen()[seen_before:]
    assert request["traceparent"] == [f"00-{trace_id}-{out['span_id']}-01"]
    check_headers(request["headers"], mode)
    check_exported(collector, invocation_id, trace_id, name)
    assert answer["env"]["TRACEPARENT"] == f"00-{trace_id}-{run['span_id']}-01"
    assert answer["env"]["TRACESTATE"] == TRACESTATE
    assert answer["env"]["BAGGAGE"] == BAGGAGE


def check_headers(headers: dict[str, list[str]], mode: str) -> None:
    """To the letter, unless an SDK that parsed them in between wrote them anew."""
    for got, sent in ((headers["tracestate"], TRACESTATE), (headers["baggage"], BAGGAGE)):
        assert len(got) == 1
        assert {member.strip() for member in got[0].split(",")} == {member.strip() for member in sent.split(",")}
        assert got == [sent] or mode == "env"


def check_exported(collector: Collector, invocation_id: str, trace_id: str, name: str) -> None:
    """All three signals reach the backend with the run's identity, and nothing that the agent claimed."""

    def is_ours(resource: Any, item: Any) -> bool:
        attributes = text_attributes(resource) | text_attributes(item) if hasattr(item, "attributes") else {}
        return (attributes or text_attributes(resource)).get("invocation.id") == invocation_id

    resource, span = collector.wait("spans", lambda r, s: is_ours(r, s) and s.name == "work")
    assert span.trace_id.hex() == trace_id
    assert text_attributes(resource)["clrk.component"] == "agent"
    assert text_attributes(resource)["service.name"] == name
    assert text_attributes(resource)["clrk.egress_gateway"] == "default/default"
    resource, record = collector.wait("logs", lambda r, s: is_ours(r, s) and s.body.string_value == "working")
    assert record.trace_id.hex() == trace_id
    assert record.span_id == span.span_id
    assert record.severity_number == 13
    assert text_attributes(record)["agent.name"] == name
    resource, metric = collector.wait("metrics", lambda r, s: is_ours(r, s) and s.name == "agent.steps")
    assert text_attributes(resource)["agent.name"] == name
    assert text_attributes(resource)["clrk.component"] == "agent"
    (point,) = metric.sum.data_points
    assert text_attributes(point) == {"step": "one"}


async def test_an_unsampled_trace_is_kept_here_and_exported_nowhere(
    traced: Daemon, collector: Collector, providers: StandIn, caller: aiohttp.ClientSession
) -> None:
    seen_before = len(providers.seen())
    answer, unsampled, (trace_id, _) = await traced_run(caller, traced, "py", "none", flags="00")
    spans = traced.spans_when_complete(unsampled)
    assert len(of_agent(spans)) == 2
    out = one(spans, name="GET tools.internal")
    assert providers.seen()[seen_before]["traceparent"] == [f"00-{trace_id}-{out['span_id']}-00"]
    assert answer["env"]["TRACEPARENT"].endswith("-00")
    _, later, _ = await traced_run(caller, traced, "py", "none")  # exported behind it: then it is not still on its way
    collector.wait("spans", lambda _, span: text_attributes(span).get("invocation.id") == later and span.name == "work")
    assert not [span for _, span in collector.spans() if span.trace_id.hex() == trace_id]
    assert not [span for _, span in collector.spans() if text_attributes(span).get("invocation.id") == unsampled]


def test_a_daemons_sdk_reports_for_the_daemon(traced: Daemon, collector: Collector, providers: StandIn) -> None:
    """Its traces are its own, one that it continues by HTTP goes on as it is, and it belongs to no invocation."""
    resource, work = collector.wait("spans", lambda _, s: is_watcher(s) and s.name == "work")
    _, out = collector.wait("spans", lambda _, span: is_watcher(span) and span.name == "GET tools.internal")
    _, call = collector.wait("spans", lambda _, s: is_watcher(s) and s.span_id == out.parent_span_id)
    assert text_attributes(resource)["clrk.component"] == "agent"
    for span in (work, call, out):
        attributes = text_attributes(span)
        assert attributes["agent.kind"] == "DaemonAgent"
        assert "invocation.id" not in attributes
        assert span.trace_id == work.trace_id
    assert (work.parent_span_id, call.parent_span_id) == (b"", work.span_id)
    continued = {parent[:52] for request in providers.seen() for parent in request["traceparent"]}  # without flags
    assert f"00-{out.trace_id.hex()}-{out.span_id.hex()}" in continued


async def test_an_agent_can_not_claim_to_be_another_or_to_be_us(traced: Daemon, caller: aiohttp.ClientSession) -> None:
    """Its forged spans are its own: in its own invocation, marked as an agent's word, and nowhere added up."""
    _, victim, (victim_trace, _) = await traced_run(caller, traced, "py", "env")
    victim_spans = traced.spans_when_complete(victim)
    data = {"invocation_id": victim, "trace_id": victim_trace}
    answers, invocation_id, (trace_id, _) = await traced_run(caller, traced, "forger", data)
    (status, partial), *refused = answers
    assert status == 200
    assert partial == {"partialSuccess": {"rejectedSpans": "1", "errorMessage": "1 span id is that of a span of clrk"}}
    assert [code for code, _ in refused] == [403, 403, 404]

    spans = traced.spans_when_complete(invocation_id)
    forged = of_agent(spans)
    assert sorted(span["name"] for span in forged) == ["chat claude-forged", "egress.dial.denied"]
    for span in forged:
        assert (span["trace_id"], span["attributes"]["invocation.id"]) == (trace_id, invocation_id)
        assert (span["attributes"]["agent.name"], span["attributes"]["agent.kind"]) == ("forger", "TaskAgent")
        assert {name for name in span["attributes"] if name.startswith("clrk.")} == {"clrk.sandbox.id"}
        assert "agent.identity.user" not in span["attributes"]
        assert span["resource"]["service.name"] == "clrk"
    assert one(spans, name="ingress.dispatch")["resource"]["clrk.component"] == "ingress"
    assert traced.spans(victim) == victim_spans
    for question in (["--denied"], ["--model", "claude-forged"], ["--min-input-tokens", "1000000"]):
        found = [json.loads(line) for line in traced.clrk("traces", *question, "--json").splitlines()]
        assert invocation_id not in {span["attributes"]["invocation.id"] for span in found}, question
