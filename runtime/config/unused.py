"""Rules that are valid, and that no call can get to: an earlier one fits all of their calls, or nobody reads those."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Final, TypeVar

from clrk.core.egress_resources import EgressGateway, EgressL4Route, L4Rule
from clrk.core.globs import fits_glob
from clrk.core.route_resources import AIMatch, AIProviderRoute, MCPMatch, MCPRoute, TargetRef
from clrk.core.url_paths import path_readings
from clrk.runtime.config.declared import Resources

_PLAIN_HTTP: Final = [80]

M = TypeVar("M")


def covering_hosts(host: str) -> Iterator[str]:
    """Yield the patterns that every name fits that fits host: all as in core.values.HostPattern."""
    yield host
    first, _, rest = host.partition(".")
    if first != "**":
        yield f"*.{rest}"
    while rest:
        yield f"**.{rest}"
        rest = rest.partition(".")[2]


def is_covered(host: str, patterns: Container[str]) -> bool:
    """Say whether every name that fits host fits one of the patterns too."""
    return any(one in patterns for one in covering_hosts(host))


def shadowed_rules(resources: Resources) -> Iterator[str]:
    """Yield the rules of which an earlier one takes every call: the first that fits a call is the call's."""
    for gateway in sorted(resources.gateways):
        ai = [
            (_where(route, index), rule.matches or [AIMatch()])
            for key, route in sorted(resources.ai_routes.items())
            if (key[0], route.spec.gateway_ref.name) == gateway
            for index, rule in enumerate(route.spec.rules)
        ]
        yield from _shadowed(ai, _covers_ai)
    for _, route in sorted(resources.mcp_routes.items()):  # each has its say
        mcp = [(_where(route, index), rule.matches or [MCPMatch()]) for index, rule in enumerate(route.spec.rules)]
        yield from _shadowed(mcp, _covers_mcp)


def unread_rules(resources: Resources) -> Iterator[str]:
    """Yield the rules of EgressL4Routes with http for hosts whose TLS nobody opens."""
    for key, route in sorted(resources.routes.items()):
        gateway = resources.gateways.get((key[0], route.spec.gateway_ref.name))
        for index, rule in enumerate(route.spec.rules):
            narrowed = rule.http is not None and (rule.http.methods or rule.http.paths)
            if gateway is not None and narrowed and rule.ports != _PLAIN_HTTP and _is_unread(gateway, rule):
                what = f"EgressGateway {gateway.metadata.name!r} does not open TLS to them, so only plain HTTP fits it"
                yield f"EgressL4Route {'/'.join(key)} rules[{index}]: {what}"


def dotted_paths(resources: Resources) -> Iterator[str]:
    """Yield the paths with dot segments: a request has to spell them as well, and hardly any client sends them."""
    for key, route in sorted(resources.routes.items()):
        for index, rule in enumerate(route.spec.rules):
            for path in rule.http.paths if rule.http is not None else ():
                resolved, strict, _ = path_readings(path)
                if resolved != strict and {".", ".."} & set(strict.split("/")):
                    where = f"EgressL4Route {'/'.join(key)} rules[{index}]"
                    yield f"{where}: clients resolve the dot segments of {path!r} before they send: write {resolved!r}"


def shadowed_aliases(resources: Resources) -> Iterator[str]:
    """Yield the names that an earlier of hostAliases has already."""
    for key, gateway in sorted(resources.gateways.items()):
        earlier: dict[str, int] = {}
        for index, alias in enumerate(gateway.spec.host_aliases):
            for host in alias.hostnames:
                if places := [earlier[name] for name in covering_hosts(host) if name in earlier]:
                    where = f"EgressGateway {'/'.join(key)} hostAliases[{index}]"
                    yield f"{where}: {host} is not looked for here, since hostAliases[{min(places)}] has it"
                earlier.setdefault(host, index)


def hostless_credentials(resources: Resources) -> Iterator[str]:
    """Yield the policies whose targetRefs name no host: a rule that is for every host names none."""
    for key, policy in sorted(resources.credential_policies.items()):
        routes = [_target(resources, key[0], ref) for ref in policy.spec.target_refs]
        if not policy.spec.hostnames and not any(map(_names_a_host, routes)):
            what = "its targetRefs are for no host in particular, so no call gets its credential; add hostnames"
            yield f"CredentialInjectionPolicy {'/'.join(key)}: {what}"


def _target(resources: Resources, namespace: str, ref: TargetRef) -> EgressL4Route | AIProviderRoute | MCPRoute:
    match ref.kind:
        case "EgressL4Route":
            return resources.routes[namespace, ref.name]
        case "AIProviderRoute":
            return resources.ai_routes[namespace, ref.name]
        case "MCPRoute":
            return resources.mcp_routes[namespace, ref.name]


def _names_a_host(route: EgressL4Route | AIProviderRoute | MCPRoute) -> bool:
    match route:
        case EgressL4Route():
            return any(rule.hostnames for rule in route.spec.rules)
        case MCPRoute():
            return bool(route.spec.hostnames)
        case AIProviderRoute():
            matches = [match for rule in route.spec.rules for match in rule.matches]
            return any(match.hostnames or match.provider not in (None, "openai_compatible") for match in matches)


def _where(route: AIProviderRoute | MCPRoute, index: int) -> str:
    return f"{route.kind} {route.metadata.namespace}/{route.metadata.name} rules[{index}]"


def _shadowed(rules: Sequence[tuple[str, list[M]]], covers: Callable[[M, M], bool]) -> Iterator[str]:
    for place, (where, matches) in enumerate(rules):
        for first, earlier in rules[:place]:
            if all(any(covers(one, match) for one in earlier) for match in matches):
                yield f"{where}: no call gets to it, since {first} fits each of its calls before"
                break


def _covers_ai(earlier: AIMatch, later: AIMatch) -> bool:
    """Say whether every call that fits later fits earlier: where hostnames are given, they say who the provider is."""
    if bool(earlier.hostnames) != bool(later.hostnames):
        return False
    same_host = all(is_covered(host, earlier.hostnames) for host in later.hostnames)
    same_provider = bool(later.hostnames) or earlier.provider in (None, later.provider)
    lower = [[glob.casefold() for glob in globs] for globs in (earlier.endpoints, later.endpoints)]
    models = [[glob.casefold() for glob in globs] for globs in (earlier.models, later.models)]
    return same_host and same_provider and _covers_globs(*lower) and _covers_globs(*models)


def _covers_mcp(earlier: MCPMatch, later: MCPMatch) -> bool:
    same_tools = not earlier.tools or (bool(later.tools) and set(later.tools) <= set(earlier.tools))
    same_regex = earlier.tools_regex in (None, later.tools_regex)
    return (
        same_tools
        and same_regex
        and _covers_globs(earlier.methods, later.methods)
        and _covers_globs(earlier.resources, later.resources)
    )


def _covers_globs(earlier: Sequence[str], later: Sequence[str]) -> bool:
    """Say whether what fits one of later fits one of earlier: an asterisk is a text that only an asterisk fits."""
    return not earlier or (bool(later) and all(any(fits_glob(one, glob) for one in earlier) for glob in later))


def _is_unread(gateway: EgressGateway, rule: L4Rule) -> bool:
    tls = gateway.spec.tls
    if tls.mode == "Passthrough":
        return True
    hosts = [is_covered(host, tls.passthrough_hosts) for host in rule.hostnames]
    return not rule.cidrs and all(hosts)
