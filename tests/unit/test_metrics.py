"""Metrics (CONTRACT section 13): exact names, units, kinds, buckets, attributes and their types; nothing unlisted."""

import time

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from otlp_receiver import Failure, Receiver, attributes
from prometheus_client.parser import text_string_to_metric_families
from span_samples import MS, config, gateway, identity, record

from clrk.core.messages import Counters
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry import export_task, metrics_meters
from clrk.gateway.telemetry.metrics import INSTRUMENTS, measure
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.spans import Component, SpanKind, SpanRecord

AGENT = {"agent.namespace": str, "agent.name": str}
SERVER = {"server.address": str, "server.port": int}
GEN_AI = AGENT | SERVER | {
    "gen_ai.operation.name": str, "gen_ai.provider.name": str,
    "gen_ai.request.model": str, "gen_ai.response.model": str,
}  # fmt: skip
NETWORK = {"network.protocol.name": str, "network.protocol.version": str}
GEN_AI_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
EXPORTER = {"clrk.exporter": str, "clrk.export.signal": str}

# name: (kind, unit, bounds, attributes that the samples below have)
TABLE = {
    "gen_ai.client.token.usage": (
        "histogram", "{token}",
        [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864],
        GEN_AI | {"gen_ai.token.type": str},
    ),
    "gen_ai.client.operation.duration": ("histogram", "s", GEN_AI_BOUNDS, GEN_AI | {"error.type": str}),
    "gen_ai.client.operation.time_to_first_chunk": ("histogram", "s", GEN_AI_BOUNDS, GEN_AI | {"error.type": str}),
    "http.client.request.duration": (
        "histogram", "s", [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
        AGENT | SERVER | NETWORK
        | {"http.request.method": str, "http.response.status_code": int, "error.type": str},
    ),
    "mcp.client.operation.duration": (
        "histogram", "s", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300],
        AGENT | SERVER | NETWORK
        | {"mcp.method.name": str, "gen_ai.operation.name": str, "gen_ai.tool.name": str, "error.type": str,
           "mcp.protocol.version": str, "rpc.response.status_code": str},
    ),
    "clrk.sandbox.spawn.duration": (
        "histogram", "s", [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10],
        AGENT | {"clrk.sandbox.warm": bool},
    ),
    "clrk.egress.denied": ("sum", "{denial}", None, AGENT | {"clrk.egress.deny_reason": str}),
    "clrk.egress.would_deny": ("sum", "{call}", None, AGENT | {"clrk.egress.would_deny": str}),
    "clrk.cost.usd": (
        "sum", "{USD}", None,
        AGENT | {key: GEN_AI[key] for key in GEN_AI if key.startswith("gen_ai.")},
    ),
}  # fmt: skip
HOST_TABLE = {
    "clrk.sandboxes": ("gauge", "{sandbox}", "runtime", {"clrk.sandbox.state": str}),
    "clrk.kernel.events": ("sum", "{event}", "runtime", {"clrk.kernel.counter": str}),
    "clrk.telemetry.dropped": ("sum", "{item}", "gateway", {"clrk.drop.reason": str}),
    "clrk.export.items": ("sum", "{item}", "gateway", EXPORTER),
    "clrk.export.refused": ("sum", "{item}", "gateway", EXPORTER),
    "clrk.export.failures": ("sum", "{request}", "gateway", EXPORTER),
}

HTTP = {
    "http__request__method": "POST", "http__response__status_code": 200, "url__full": "https://api/v1?key=s3cret",
    "server__address": "api.anthropic.com", "server__port": 443, "network__protocol__name": "http",
    "network__protocol__version": "1.1", "process__pid": 4711, "user_agent__original": "s3cret",
}  # fmt: skip
LLM = HTTP | {
    "gen_ai__operation__name": "chat", "gen_ai__provider__name": "anthropic", "gen_ai__system": "anthropic",
    "gen_ai__request__model": "claude-sonnet-5", "gen_ai__response__model": "claude-sonnet-5-1",
    "gen_ai__usage__input_tokens": 320, "gen_ai__usage__output_tokens": 85, "clrk__cost__usd": 0.25,
    "gen_ai__response__time_to_first_chunk": 0.03,
}  # fmt: skip
MCP = HTTP | {
    "mcp__method__name": "tools/call", "gen_ai__operation__name": "execute_tool", "gen_ai__tool__name": "refund",
    "mcp__session__id": "s3cret", "mcp__protocol__version": "2025-06-18", "jsonrpc__request__id": "7",
    "rpc__response__status_code": "-32602", "error__type": "-32602", "mcp__resource__uri": "file:///s3cret",
}  # fmt: skip


def record_samples(telemetry, who):
    record(telemetry, who, "chat claude-sonnet-5", length_ns=900 * MS, **LLM)
    record(telemetry, who, "chat claude-sonnet-5", length_ns=100 * MS, **LLM, error="overloaded", error__type="429")
    record(telemetry, who, "tools/call refund", length_ns=40 * MS, **MCP, error="bad params")
    record(telemetry, who, "GET tools.internal", length_ns=7 * MS, **HTTP)
    record(telemetry, who, "egress.dial.failed", error="refused", error__type="connection_refused",
           **{key: value for key, value in HTTP.items() if key != "http__response__status_code"})  # fmt: skip
    record(telemetry, who, "egress.dial.denied", error="no rule", clrk__egress__deny_reason="no_rule", **HTTP)
    record(telemetry, who, "egress.tcp", clrk__egress__would_deny="no_rule", clrk__egress__add_rule="s3cret")
    record(telemetry, who, "egress.dns.denied", error="no rule", dns__question__name="s3cret.example")
    record(telemetry, who, "chat", error="over budget", clrk__budget__denied=True, **HTTP)
    internal = {"kind": SpanKind.INTERNAL, "component": Component.RUNTIME}
    record(telemetry, who, "sandbox.spawn", length_ns=6 * MS, clrk__sandbox__warm=False, process__pid=1, **internal)
    record(telemetry, who, "invoke_agent support", clrk__cost__usd=9.0, **internal)
    record(telemetry, who, "ingress.dispatch", kind=SpanKind.SERVER, component=Component.INGRESS, **HTTP)


def points_of(metric):
    return getattr(metric, metric.WhichOneof("data")).data_points


def opened(tmp_path, receiver, *names, **environment):
    gateways = [gateway(receiver.endpoint, name=name, protocol=receiver.protocol) for name in names]
    return Telemetry.open(tmp_path, config(gateways, environment=environment))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(export_task, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr("clrk.gateway.telemetry.exporters.DEFAULT_METRIC_INTERVAL_S", 0.05)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_what_a_backend_gets_is_the_table_and_nothing_else(tmp_path, protocol):
    async with Receiver(protocol) as receiver:
        telemetry = opened(tmp_path, receiver, "default")
        telemetry.watch_host(lambda: Counters({"refused_udp": 3}, {"ready": 2, "running": 1}))
        telemetry.store.counters["dropped_queue_full"] += 4
        record_samples(telemetry, identity())
        await receiver.wait(lambda: {*TABLE, *HOST_TABLE} <= {metric.name for metric in receiver.metrics})
        await telemetry.close()
    resources = {
        metric.name: (metric, attributes(group.resource), scope.schema_url)
        for group in receiver.groups("metrics")
        for scope in group.scope_metrics
        for metric in scope.metrics
    }
    assert set(resources) == {*TABLE, *HOST_TABLE}
    for name, (kind, unit, bounds, expected) in TABLE.items():
        metric, resource, schema_url = resources[name]
        assert (metric.WhichOneof("data"), metric.unit) == (kind, unit), name
        assert metric.description
        assert schema_url == attr.SCHEMA_URL
        assert (resource["clrk.component"], resource["clrk.egress_gateway"]) == ("gateway", "default/default")
        assert (resource["service.name"], type(resource["host.name"])) == ("clrk", str)
        points = points_of(metric)
        found = {key: type(value) for point in points for key, value in attributes(point).items()}
        assert found == expected, name
        if bounds:
            assert all(list(point.explicit_bounds) == pytest.approx(bounds) for point in points), name
        assert getattr(metric, kind).aggregation_temporality == CUMULATIVE
    for name, (kind, unit, component, expected) in HOST_TABLE.items():
        metric, resource, _ = resources[name]
        assert (metric.WhichOneof("data"), metric.unit, resource["clrk.component"]) == (kind, unit, component), name
        assert "clrk.egress_gateway" not in resource
        assert {key: type(value) for point in points_of(metric) for key, value in attributes(point).items()} == expected
    assert "s3cret" not in str(receiver.groups("metrics"))
    # Values.
    by_type = {attributes(p)["gen_ai.token.type"]: p for p in points_of(resources["gen_ai.client.token.usage"][0])}
    assert {kind: (point.count, point.sum) for kind, point in by_type.items()} == {
        "input": (2, 640),
        "output": (2, 170),
    }
    denied = {attributes(p)["clrk.egress.deny_reason"]: p.as_int for p in points_of(resources["clrk.egress.denied"][0])}
    assert denied == {"no_rule": 1, "dns": 1, "budget": 1}
    would = {
        attributes(p)["clrk.egress.would_deny"]: p.as_int for p in points_of(resources["clrk.egress.would_deny"][0])
    }
    assert would == {"no_rule": 1}
    assert sum(p.as_double for p in points_of(resources["clrk.cost.usd"][0])) == pytest.approx(0.5)
    http = points_of(resources["http.client.request.duration"][0])
    assert sum(point.count for point in http) == 5, "LLM, MCP and plain calls, and the one that failed; no denials"
    states = {attributes(p)["clrk.sandbox.state"]: p.as_int for p in points_of(resources["clrk.sandboxes"][0])}
    assert states == {"ready": 2, "running": 1}


def test_an_agents_own_words_and_plain_spans_measure_nothing():
    now = time.time_ns()
    for name in ("egress.tcp", "sandbox.acquire", "sandbox.teardown", "chat"):
        span = SpanRecord("0" * 32, "0" * 16, "", name, SpanKind.CLIENT, now, now, attributes={"gen_ai.system": "x"})
        assert list(measure(span)) == []


def test_every_instrument_is_in_the_contracts_table():
    assert {one.name for one in INSTRUMENTS} == set(TABLE)


async def test_each_backend_gets_its_gateways_and_the_hosts_once(tmp_path):
    async with Receiver() as first, Receiver("grpc") as second, Receiver() as standard:
        gateways = [
            gateway(first.endpoint, name="one"), gateway(first.endpoint, name="same"),
            gateway(second.endpoint, name="two", protocol="grpc"),
        ]  # fmt: skip
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": standard.endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "50"}
        telemetry = Telemetry.open(tmp_path, config(gateways, environment=environment))
        for name in ("one", "same", "two", "three", ""):
            record(telemetry, identity(gateway_name=name), "GET x", **HTTP)

        def gateways_of(receiver):
            return {attributes(group.resource).get("clrk.egress_gateway") for group in receiver.groups("metrics")}

        await first.wait(lambda: {"default/one", "default/same"} <= gateways_of(first))
        await second.wait(lambda: {"default/two"} <= gateways_of(second))
        await standard.wait(lambda: {"default/three", None} <= gateways_of(standard))
        await telemetry.close()
        assert gateways_of(first) == {"default/one", "default/same", None}
        assert gateways_of(second) == {"default/two", None}
        assert gateways_of(standard) == {"default/three", None}
        last = [one.message for one in first.requests if one.signal == "metrics"]
        with_host = [
            m for m in last if any("clrk.egress_gateway" not in attributes(g.resource) for g in m.resource_metrics)
        ]
        named = {
            attributes(g.resource)["clrk.egress_gateway"]
            for m in with_host for g in m.resource_metrics if "clrk.egress_gateway" in attributes(g.resource)
        }  # fmt: skip
        assert named <= {"default/one"}, "two exporters to one backend: the first tells what belongs to no gateway"


async def test_a_backend_that_fails_gets_newer_values_and_the_last_at_the_end(tmp_path):
    async with Receiver() as receiver:
        receiver.fail = lambda signal, message: Failure(503) if len(receiver.refused) < 3 else None
        telemetry = opened(tmp_path, receiver, "default")
        record(telemetry, identity(), "GET x", **HTTP)
        await receiver.wait(lambda: any(m.name == "http.client.request.duration" for m in receiver.metrics))
        record(telemetry, identity(), "GET x", **HTTP)
        await telemetry.close()
        durations = [m for m in receiver.metrics if m.name == "http.client.request.duration"]
        assert points_of(durations[-1])[0].count == 2


async def test_what_agents_invent_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_meters, "MAX_SETS", 20)
    telemetry = Telemetry.open(tmp_path, config())
    who = identity()
    for index in range(100):
        record(telemetry, who, "chat", **{**LLM, "gen_ai__request__model": f"{index} " + "m" * 8000})
    text = telemetry.render_prometheus()[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = [s for s in families["gen_ai_client_operation_duration_seconds"].samples if s.name.endswith("_count")]
    assert len(counts) == 21
    (overflow,) = [sample for sample in counts if sample.labels.get("otel_metric_overflow") == "true"]
    assert (overflow.value, sum(sample.value for sample in counts)) == (80, 100)
    assert max(len(sample.labels.get("gen_ai_request_model", "")) for sample in counts) == 256
    await telemetry.close()


async def test_prometheus_text_has_the_same(tmp_path):
    telemetry = Telemetry.open(tmp_path, config())
    telemetry.watch_host(lambda: Counters({"refused_udp": 3}, {"running": 1}))
    telemetry.store.counters["dropped_queue_full"] += 4
    record_samples(telemetry, identity())
    record_samples(telemetry, identity(name='od"d\n', gateway_name="other"))
    raw, content_type = telemetry.render_prometheus()
    await telemetry.close()
    assert content_type.startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(raw.decode())}
    assert {name: family.type for name, family in families.items()} == {
        "gen_ai_client_token_usage": "histogram",
        "gen_ai_client_operation_duration_seconds": "histogram",
        "gen_ai_client_operation_time_to_first_chunk_seconds": "histogram",
        "http_client_request_duration_seconds": "histogram",
        "mcp_client_operation_duration_seconds": "histogram",
        "clrk_sandbox_spawn_duration_seconds": "histogram",
        "clrk_egress_denied": "counter",
        "clrk_egress_would_deny": "counter",
        "clrk_cost_usd": "counter",
        "clrk_sandboxes": "gauge",
        "clrk_kernel_events": "counter",
        "clrk_telemetry_dropped": "counter",
    }
    assert "s3cret" not in raw.decode()
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples}
    assert samples["clrk_sandboxes", (("clrk_sandbox_state", "running"),)] == 1
    assert samples["clrk_kernel_events_total", (("clrk_kernel_counter", "refused_udp"),)] == 3
    assert samples["clrk_telemetry_dropped_total", (("clrk_drop_reason", "queue_full"),)] == 4
    spawns = {
        s.labels["clrk_egress_gateway"]: (s.labels["agent_name"], s.value)
        for s in families["clrk_sandbox_spawn_duration_seconds"].samples
        if s.name.endswith("_bucket") and s.labels["le"] == "0.01"
    }
    assert spawns == {"default/default": ("support", 1), "default/other": ('od"d\n', 1)}
