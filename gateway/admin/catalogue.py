"""What the admin API needs to know of the agents, and how it shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from clrk.core.resources import Agent, TaskAgent


class AgentCatalogue(Protocol):
    """The agents that can be invoked now."""

    def find(self, namespace: str, name: str) -> Agent | None:
        """Return the agent, or None."""

    def all(self) -> Sequence[Agent]:
        """Return every agent."""


def agent_summary(agent: Agent) -> dict[str, Any]:
    """Return one entry of a listing."""
    summary: dict[str, Any] = {
        "kind": agent.kind,
        "namespace": agent.metadata.namespace,
        "name": agent.metadata.name,
        "uid": agent.uid,
        "revision": agent.revision,
        "egressGateway": agent.gateway_name,
    }
    if not isinstance(agent, TaskAgent):
        return summary
    spec = agent.spec
    return summary | {
        "delivery": spec.delivery.mode,
        "timeoutSeconds": spec.timeout,
        "maxConcurrent": spec.max_concurrent,
    }


def agent_detail(agent: Agent) -> dict[str, Any]:
    """Return the whole agent, without the values of its environment: people put secrets there."""
    spec = agent.spec.model_dump(mode="json", by_alias=True)
    for variable in spec["template"]["spec"]["env"]:
        if variable["value"] is not None:
            variable["value"] = "[redacted]"
    return {**agent_summary(agent), "labels": dict(agent.metadata.labels), "spec": spec}
