"""What is wrong with an AIProviderRoute beyond its own fields: budgets that could not be kept."""

from __future__ import annotations

from collections.abc import Iterator

from clrk.core.egress_resources import EgressGateway
from clrk.core.resources import AgentResource, TaskAgent
from clrk.core.route_resources import AIProviderRoute
from clrk.runtime.config.declared import Declared, Problems, Resources
from clrk.runtime.config.unused import is_covered

_LATER = "is part of the contract but not in this version; remove it"


def check_budgets(one: Declared, route: AIProviderRoute, gateway: EgressGateway | None, problems: Problems) -> None:
    """Note hosts with a budget whose TLS nobody opens, and backendRefs. gateway is the route's, None: there is none."""
    for index, rule in enumerate(route.spec.rules):
        if rule.backend_refs:
            problems.add_at(one, ("spec", "rules", index, "backendRefs"), _LATER)
        if not rule.filters or gateway is None:
            continue
        if gateway.spec.tls.mode == "Passthrough":
            text = f"EgressGateway {gateway.metadata.name!r} has tls.mode Passthrough, so it can meter nothing"
            problems.add_at(one, ("spec", "rules", index, "filters"), text)
            continue
        for number, match in enumerate(rule.matches):
            for place, host in enumerate(match.hostnames):
                if is_covered(host, gateway.spec.tls.passthrough_hosts):
                    text = (
                        f"{host} is in tls.passthroughHosts of EgressGateway {gateway.metadata.name!r}: unread calls "
                    )
                    text += "can not be metered, and would be refused"
                    where = ("spec", "rules", index, "matches", number, "hostnames", place)
                    problems.add_at(one, where, text)


def shared_accounts(resources: Resources) -> Iterator[str]:
    """Yield the budgets by an identity that agents of their gateway do not have: all callers of those are one."""
    agents = [*resources.agents.values(), *resources.daemons.values()]
    for (namespace, name), route in sorted(resources.ai_routes.items()):
        mine = [
            agent for agent in agents
            if (agent.metadata.namespace, agent.gateway_name) == (namespace, route.spec.gateway_ref.name)
        ]  # fmt: skip
        for index, rule in enumerate(route.spec.rules):
            for key in dict.fromkeys(one.token_budget.key for one in rule.filters):
                field = key.partition("identity.")[2]
                without = sorted(agent.metadata.name for agent in mine if field and field not in _identity_of(agent))
                if without:
                    where = f"AIProviderRoute {namespace}/{name} rules[{index}], key {key}"
                    what = f"no extractor of {', '.join(without)} has that field, so their callers share one account"
                    yield f"{where}: {what}"


def _identity_of(agent: AgentResource) -> set[str]:
    return {one.field for one in agent.spec.identity.extractors} if isinstance(agent, TaskAgent) else set()
