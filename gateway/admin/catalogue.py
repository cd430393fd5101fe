"""What the admin API needs to know of the agents, and how it shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from clrk.core.resources import Agent, TaskAgent
from clrk.gateway.agent_status import AgentStatus
from clrk.gateway.telemetry.exporters import ExportStatus


class AgentCatalogue(Protocol):
    """The agents that can be invoked now."""

    def find(self, namespace: str, name: str) -> Agent | None:
        """Return the agent, or None."""

    def all(self) -> Sequence[Agent]:
        """Return every agent."""


def agent_summary(agent: Agent, status: AgentStatus) -> dict[str, Any]:
    """Return one entry of a listing. Units: times in CLOCK_REALTIME nanoseconds, null: none."""
    summary: dict[str, Any] = {
        "kind": agent.kind,
        "namespace": agent.metadata.namespace,
        "name": agent.metadata.name,
        "uid": agent.uid,
        "revision": agent.revision,
        "egressGateway": agent.gateway_name,
        "running": status.running,
    }
    if not isinstance(agent, TaskAgent):
        return summary | _daemon_facts(status)
    spec = agent.spec
    return summary | {
        "delivery": spec.delivery.mode,
        "timeoutSeconds": spec.timeout,
        "maxConcurrent": spec.max_concurrent,
        "warm": status.warm,
        "warmPoolSize": spec.warm_pool_size,
        "schedule": spec.schedule,
        "nextFireTimeUnixNano": status.next_fire_ns,
        "lastFireTimeUnixNano": status.last_fire_ns,
        "skippedFires": status.skipped_fires,
    }


def _daemon_facts(status: AgentStatus) -> dict[str, Any]:
    daemon = status.daemon
    if daemon is None:
        return {}
    return {
        "state": daemon.state,
        "restarts": daemon.restarts,
        "stateSinceTimeUnixNano": daemon.since_ns or None,
        "nextStartTimeUnixNano": daemon.next_start_ns or None,
        "lastExit": daemon.last_exit,
        "sandbox": daemon.sandbox_id,
    }


def exporter_document(exporter: ExportStatus) -> dict[str, Any]:
    """Return how an exporter stands."""
    return {
        "name": f"{exporter.name} {exporter.signal}",
        "endpoint": exporter.endpoint,
        "behind": exporter.behind,
        "failingSinceUnixNano": exporter.failing_since_ns or None,
        "error": exporter.last_error,
        "dropped": exporter.dropped,
    }


def agent_detail(agent: Agent, status: AgentStatus = AgentStatus()) -> dict[str, Any]:  # noqa: B008 - immutable
    """Return the whole agent, without the values of its environment: people put secrets there."""
    spec = agent.spec.model_dump(mode="json", by_alias=True)
    for variable in spec["template"]["spec"]["env"]:
        if variable["value"] is not None:
            variable["value"] = "[redacted]"
    return {**agent_summary(agent, status), "labels": dict(agent.metadata.labels), "spec": spec}
