"""What an agent's environment says of its run. PATH, HOME and the CA variables are isolation.py's.

Source: OpenTelemetry specification: context/env-carriers.md (TRACEPARENT, TRACESTATE, BAGGAGE), protocol/exporter.md,
configuration/sdk-environment-variables.md and resource/sdk.md (OTEL_RESOURCE_ATTRIBUTES is written as W3C Baggage is).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from clrk.core.messages import AgentKind, StartRun
from clrk.core.resources import Agent

METADATA_URL_V4: Final = "http://169.254.169.254"
METADATA_URL_V6: Final = "http://[fd00:ec2::254]"
OTLP_ENDPOINT: Final = "http://169.254.0.1:4318"

# Only the run's own may stand there: an operator's `env` with one of these would be believed to be the caller's.
_OF_THE_RUN: Final = ("CLRK_INVOCATION_ID", "TRACEPARENT", "TRACESTATE", "BAGGAGE")


def build_environment(
    agent: Agent, request: StartRun, secrets: Mapping[tuple[str, str], Mapping[str, str]]
) -> dict[str, str]:
    """Return the variables of one run; nothing of the runtime's own environment is among them.

    Shape: the agent's `env` can not forge the run's own names, but its OTEL_* wins: whoever sends telemetry elsewhere
        means it. secrets maps (namespace, name) of a Secret to its values. A daemon's run belongs to no invocation.
    Raises: KeyError when a secret is gone; loading has checked that it is there.
    """
    environment = {"LANG": "C.UTF-8"} | _opentelemetry(agent, request)
    for variable in agent.spec.template.spec.env:
        if variable.value_from is None:
            environment[variable.name] = variable.value or ""
        else:
            ref = variable.value_from.secret_key_ref
            environment[variable.name] = secrets[(agent.metadata.namespace, ref.name)][ref.key]
    for name in _OF_THE_RUN:
        environment.pop(name, None)
    environment |= {"CLRK_METADATA_URL": METADATA_URL_V4, "CLRK_METADATA_URL_V6": METADATA_URL_V6}
    if request.kind is AgentKind.TASK:
        environment["CLRK_INVOCATION_ID"] = request.run_id
    if request.traceparent:
        environment["TRACEPARENT"] = request.traceparent
        if request.tracestate:
            environment["TRACESTATE"] = request.tracestate
    if request.baggage:
        environment["BAGGAGE"] = request.baggage
    return environment


def _opentelemetry(agent: Agent, request: StartRun) -> dict[str, str]:
    """Return what an unmodified SDK needs to report to this sandbox's own receiver.

    The receiver sets the identity on whatever arrives; the attributes are here for what an agent sends elsewhere.
    """
    attributes = {
        "service.namespace": agent.metadata.namespace,
        "agent.kind": request.kind.value,
        "agent.namespace": agent.metadata.namespace,
        "agent.name": agent.metadata.name,
        "agent.uid": agent.uid,
        "agent.revision": agent.revision,
    }
    if request.kind is AgentKind.TASK:
        attributes["invocation.id"] = request.run_id
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": OTLP_ENDPOINT,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(f"{name}={quote(value, safe='')}" for name, value in attributes.items()),
        "OTEL_SERVICE_NAME": agent.metadata.name,
    }
