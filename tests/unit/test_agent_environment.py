"""The environment of a run: what the agent asked for, and what it can not forge."""

from __future__ import annotations

import pytest

from clrk.core.ids import new_invocation_id
from clrk.core.messages import AgentKey, StartRun
from clrk.core.resources import TaskAgent
from clrk.runtime.environment import build_environment

INVOCATION = new_invocation_id()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def build(env: list[dict[str, object]], secrets: dict[tuple[str, str], dict[str, str]], tracestate: str = "") -> dict:
    spec = {"template": {"spec": {"command": ["x"], "env": env}}}
    agent = TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": "a", "namespace": "n"}, "spec": spec})
    return build_environment(agent, StartRun(INVOCATION, AgentKey("n", "a"), TRACEPARENT, tracestate), secrets)


def test_without_env_there_is_only_the_invocation(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert build([], {}) == {
        "LANG": "C.UTF-8",
        "CLRK_INVOCATION_ID": INVOCATION,
        "CLRK_METADATA_URL": "http://169.254.169.254",
        "CLRK_METADATA_URL_V6": "http://[fd00:ec2::254]",
        "TRACEPARENT": TRACEPARENT,
    }


def test_values_and_secrets():
    ref = {"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    secrets = {("n", "s"): {"k": "right"}, ("default", "s"): {"k": "of another namespace"}}
    built = build([{"name": "A", "value": "b"}, {"name": "LANG", "value": "de_DE.UTF-8"}, ref], secrets)
    assert (built["A"], built["LANG"], built["T"]) == ("b", "de_DE.UTF-8", "right")


@pytest.mark.parametrize("name", ["CLRK_INVOCATION_ID", "CLRK_METADATA_URL", "CLRK_METADATA_URL_V6", "TRACEPARENT"])
def test_names_of_the_invocation_can_not_be_overridden(name):
    assert build([{"name": name, "value": "forged"}], {})[name] == build([], {})[name]


def test_tracestate_is_the_callers_or_absent():
    forged = [{"name": "TRACESTATE", "value": "forged=1"}]
    assert "TRACESTATE" not in build(forged, {})
    assert build(forged, {}, tracestate="a=b")["TRACESTATE"] == "a=b"
