"""What was declared, in lines: the answer of `clrk-runtime check`. Pure."""

from __future__ import annotations

from clrk.core.route_resources import AIProviderRoute, MCPRoute
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.notes import notes_of


def summarise(resources: Resources) -> list[str]:
    """Return one line for each resource, and a note for what is declared and can not work."""
    spec = resources.runtime
    lines = [f"valid: ingress {spec.ingress.listen}, admin {spec.admin.listen}, state in {spec.state_dir}"]
    for (namespace, name), agent in sorted([*resources.agents.items(), *resources.daemons.items()]):
        known = (namespace, agent.gateway_name) in resources.gateways
        egress = f"egress by {agent.gateway_name}" if known else "no egress: everything is denied"
        lines.append(f"  {agent.kind} {namespace}/{name}: revision {agent.revision}, {egress}")
    for (namespace, name), gateway in sorted(resources.gateways.items()):
        routes = [one for (space, _), one in resources.routes.items() if space == namespace]
        rules = sum(len(one.spec.rules) for one in routes if one.spec.gateway_ref.name == name)
        mode = (
            ""
            if gateway.spec.mode == "Enforce"
            else f", mode {gateway.spec.mode}: nothing is denied for lack of a rule"
        )
        lines.append(f"  EgressGateway {namespace}/{name}: {gateway.spec.default_policy}, {count(rules, 'rule')}{mode}")
    governing: list[AIProviderRoute | MCPRoute] = [*resources.ai_routes.values(), *resources.mcp_routes.values()]
    for route in sorted(governing, key=lambda route: (route.kind, route.metadata.namespace, route.metadata.name)):
        where = f"{route.kind} {route.metadata.namespace}/{route.metadata.name}"
        lines.append(f"  {where}: {count(len(route.spec.rules), 'rule')} of {route.spec.gateway_ref.name}")
    for (namespace, name), policy in sorted(resources.credential_policies.items()):
        lines.append(
            f"  CredentialInjectionPolicy {namespace}/{name}: Secret {namespace}/{policy.spec.secret_ref.name}"
        )
    for (namespace, name), values in sorted(resources.secrets.items()):
        lines.append(f"  Secret {namespace}/{name}: {count(len(values), 'key')}")
    lines += [f"  note: {note}" for note in notes_of(resources)]
    if not resources.agents and not resources.daemons:
        lines.append("  no agent is declared")
    return lines


def count(number: int, noun: str) -> str:
    """Return `1 rule`, `2 rules`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
