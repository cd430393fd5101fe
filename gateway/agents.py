"""Which agents and gateways exist now: the gateway's view of the resources, replaced as a whole at each reload."""

from __future__ import annotations

from clrk.core.egress_resources import EgressGateway
from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import InvocationId, SandboxId
from clrk.core.resources import Agent, DaemonAgent, TaskAgent
from clrk.gateway.telemetry.spans import Identity, TraceContext

_Key = tuple[str, str]  # namespace, name


def identity_of(agent: Agent, invocation_id: InvocationId, context: TraceContext) -> Identity:
    """Return who an agent's run is before it has a sandbox. A DaemonAgent's has the invocation id ""."""
    return Identity(
        invocation_id=invocation_id,
        agent_kind=agent.kind,
        agent_namespace=agent.metadata.namespace,
        agent_name=agent.metadata.name,
        agent_uid=agent.uid,
        agent_revision=agent.revision,
        sandbox_id=SandboxId(""),
        egress_gateway=f"{agent.metadata.namespace}/{agent.gateway_name}",
        context=context,
    )


class AgentTable:
    """Looks up agents by namespace and name. Who got an agent keeps it, whatever a reload does."""

    def __init__(self, config: GatewayConfig) -> None:
        self._agents: dict[_Key, Agent] = {}
        self._gateways: dict[_Key, EgressGateway] = {}
        self.replace(config)

    def replace(self, config: GatewayConfig) -> None:
        """Use another configuration from now on."""
        agents: list[Agent] = [*config.agents, *config.daemons]
        self._agents = {agent.key: agent for agent in agents}
        self._gateways = {(entry.metadata.namespace, entry.metadata.name): entry for entry in config.gateways}

    def find(self, namespace: str, name: str) -> Agent | None:
        """Return the agent, or None."""
        return self._agents.get((namespace, name))

    def all(self) -> list[Agent]:
        """Return every agent, by namespace and name."""
        return [self._agents[key] for key in sorted(self._agents)]

    def tasks(self) -> list[TaskAgent]:
        """Return every TaskAgent, by namespace and name."""
        return [agent for agent in self.all() if isinstance(agent, TaskAgent)]

    def daemons(self) -> list[DaemonAgent]:
        """Return every DaemonAgent, by namespace and name."""
        return [agent for agent in self.all() if isinstance(agent, DaemonAgent)]

    def gateway_of(self, agent: Agent) -> EgressGateway | None:
        """Return the EgressGateway that the agent uses; None: everything is denied."""
        return self._gateways.get((agent.metadata.namespace, agent.gateway_name))
