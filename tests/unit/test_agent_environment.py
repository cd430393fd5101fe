"""The environment of a run: what the agent asked for, and what it can not forge."""

from __future__ import annotations

import pytest

from clrk.core.ids import new_invocation_id
from clrk.core.messages import AgentKey, AgentKind, StartRun
from clrk.core.resources import DaemonAgent, TaskAgent
from clrk.runtime.environment import build_environment

INVOCATION = new_invocation_id()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def build(
    env: list[dict[str, object]],
    secrets: dict[tuple[str, str], dict[str, str]],
    tracestate: str = "",
    baggage: str = "",
    name: str = "a",
) -> dict[str, str]:
    agent = TaskAgent.model_validate(
        {
            "kind": "TaskAgent",
            "metadata": {"name": name, "namespace": "n"},
            "spec": {"template": {"spec": {"command": ["x"], "env": env}}},
        }
    )
    request = StartRun(INVOCATION, AgentKey("n", name), TRACEPARENT, tracestate, baggage=baggage)
    return build_environment(agent, request, secrets)


def test_without_env_there_is_only_the_invocation(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter2")
    built = build([], {})
    attributes = dict(pair.split("=") for pair in built.pop("OTEL_RESOURCE_ATTRIBUTES").split(","))
    assert built == {
        "LANG": "C.UTF-8",
        "CLRK_INVOCATION_ID": INVOCATION,
        "CLRK_METADATA_URL": "http://169.254.169.254",
        "CLRK_METADATA_URL_V6": "http://[fd00:ec2::254]",
        "TRACEPARENT": TRACEPARENT,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://169.254.0.1:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "a",
    }
    assert set(attributes) == {
        "service.namespace", "invocation.id", "agent.kind", "agent.namespace", "agent.name", "agent.uid",
        "agent.revision",
    }  # fmt: skip
    assert (attributes["invocation.id"], attributes["agent.kind"]) == (INVOCATION, "TaskAgent")


def test_a_daemon_has_no_trace_and_no_invocation():
    spec = {"template": {"spec": {"command": ["x"], "env": [{"name": "TRACEPARENT", "value": TRACEPARENT}]}}}
    agent = DaemonAgent.model_validate({"kind": "DaemonAgent", "metadata": {"name": "d"}, "spec": spec})
    request = StartRun(INVOCATION, AgentKey("default", "d"), kind=AgentKind.DAEMON)
    built = build_environment(agent, request, {})
    assert not {"TRACEPARENT", "TRACESTATE", "BAGGAGE", "CLRK_INVOCATION_ID"} & set(built)
    assert "invocation.id" not in built["OTEL_RESOURCE_ATTRIBUTES"]
    assert "agent.kind=DaemonAgent" in built["OTEL_RESOURCE_ATTRIBUTES"]
    assert built["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://169.254.0.1:4318"


def test_the_operators_own_opentelemetry_variables_win():
    names = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_RESOURCE_ATTRIBUTES"]
    env = [{"name": name, "value": f"own {name}"} for name in [*names, "OTEL_SERVICE_NAME", "OTEL_TRACES_SAMPLER"]]
    built = build(env, {})
    assert {pair["name"]: built[pair["name"]] for pair in env} == {pair["name"]: pair["value"] for pair in env}


def test_values_and_secrets():
    ref = {"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    secrets = {("n", "s"): {"k": "right"}, ("default", "s"): {"k": "of another namespace"}}
    built = build([{"name": "A", "value": "b"}, {"name": "LANG", "value": "de_DE.UTF-8"}, ref], secrets)
    assert (built["A"], built["LANG"], built["T"]) == ("b", "de_DE.UTF-8", "right")


@pytest.mark.parametrize("name", ["CLRK_INVOCATION_ID", "CLRK_METADATA_URL", "CLRK_METADATA_URL_V6", "TRACEPARENT"])
def test_names_of_the_invocation_can_not_be_overridden(name):
    assert build([{"name": name, "value": "forged"}], {})[name] == build([], {})[name]


@pytest.mark.parametrize("name", ["TRACESTATE", "BAGGAGE"])
def test_what_goes_with_the_trace_is_the_callers_or_absent(name):
    forged = [{"name": name, "value": "forged=1"}]
    assert name not in build(forged, {})
    assert build(forged, {}, tracestate="a=b", baggage="a=b")[name] == "a=b"
