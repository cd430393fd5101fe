"""Which hosts get which credentials: CredentialInjectionPolicies and the routes that they name, compiled. Pure.

A credential is for hosts that somebody wrote down. Recognising a call is generous (gateway/recognise.py: a path shape
on any host); handing out a key is not, so providers have a table of their own here: what is "openai" to a parser may be
Groq's host, and Groq is not to see OpenAI's key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.gateway_config import GatewayConfig
from clrk.core.route_resources import AIProviderRoute, AIRule, CredentialInjectionPolicy, MCPRoute
from clrk.core.wire import IPAddress
from clrk.gateway import sigv4
from clrk.gateway.credentials import Credential
from clrk.gateway.policy_names import HostPattern, parse_ip, plain_host
from clrk.gateway.secret_values import SecretValues

_MAX_FOUND: Final = 1024

# Hosts of each `provider` that nobody else can be; self-hosted and compatible servers are named by hostnames.
_PROVIDER_HOSTS: Final[Mapping[str, tuple[re.Pattern[str], ...]]] = {
    "anthropic": (re.compile(r"api\.anthropic\.com"),),
    "openai": (re.compile(r"api\.openai\.com"),),
    "google_genai": (
        re.compile(r"generativelanguage\.googleapis\.com"),
        re.compile(r"(?:[a-z]+-[a-z]+[0-9]{1,2}-)?aiplatform\.googleapis\.com"),
    ),
    "azure_openai": (re.compile(r"[a-z0-9-]+\.openai\.azure\.com"),),
    "aws_bedrock": (
        re.compile(r"bedrock-runtime(?:-fips)?\.[a-z]{2}(?:-[a-z]+)+-[0-9]{1,2}\.amazonaws\.com(?:\.cn)?"),
    ),
    "openai_compatible": (),
}

Route = EgressL4Route | AIProviderRoute | MCPRoute


@dataclass(frozen=True, slots=True)
class Hosts:
    """Some hosts; ports empty: any."""

    patterns: tuple[HostPattern, ...] = ()
    addresses: frozenset[IPAddress] = frozenset()
    shapes: tuple[re.Pattern[str], ...] = ()
    ports: frozenset[int] = frozenset()

    @classmethod
    def named(cls, hostnames: Iterable[str], ports: Iterable[int] = ()) -> Hosts:
        """Compile host patterns that core.values has checked; addresses may stand among them."""
        found = [(name, parse_ip(name)) for name in hostnames]
        return cls(
            tuple(HostPattern.compile(name) for name, address in found if address is None),
            frozenset(address for _, address in found if address is not None),
            ports=frozenset(ports),
        )

    def fits(self, host: str, port: int) -> bool:
        """Say whether a normalised name, or an address as text, is one of them."""
        if self.ports and port not in self.ports:
            return False
        if (address := parse_ip(host)) is not None:
            return address in self.addresses
        return any(one.matches(host) for one in self.patterns) or any(one.fullmatch(host) for one in self.shapes)


@dataclass(frozen=True, slots=True)
class _Reach:
    """The hosts of one policy: any of `hosts`, or with `anywhere` all; and any of `narrowed`, where that is given."""

    hosts: tuple[Hosts, ...]
    anywhere: bool
    narrowed: Hosts | None

    def fits(self, host: str, port: int) -> bool:
        if self.narrowed is not None and not self.narrowed.fits(host, port):
            return False
        if self.anywhere:  # a rule that is for every host names none: without hostnames beside it, nobody is meant
            return self.narrowed is not None
        return any(hosts.fits(host, port) for hosts in self.hosts)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What calls through one gateway get. Immutable, but for the values and what was looked up."""

    values: SecretValues
    entries: tuple[tuple[_Reach, Credential], ...] = ()
    secret_headers: frozenset[str] = frozenset()  # folded: never shown
    _found: dict[tuple[str, int], tuple[Credential, ...]] = field(default_factory=dict)

    def of(self, host: str, port: int) -> tuple[Credential, ...]:
        """Return the credentials of a host, at most one for each place; the first policy wins.

        Shape: host is a name that TLS has to prove, or an address as text.
        """
        if not self.entries:
            return ()
        if (known := self._found.get((host, port))) is None:
            if len(self._found) >= _MAX_FOUND:
                self._found.clear()
            known = self._found[host, port] = self._look_up(host, port)
        return known

    def _look_up(self, host: str, port: int) -> tuple[Credential, ...]:
        if (plain := plain_host(host)) is None:
            return ()
        found: dict[tuple[str, str], Credential] = {}
        for reach, credential in self.entries:
            if reach.fits(plain, port):
                found.setdefault(credential.place, credential)
        return tuple(found.values())


def compile_credentials(gateway: EgressGateway | None, config: GatewayConfig, values: SecretValues) -> Credentials:
    """Compile the policies of a gateway's namespace, by their hostnames and by the gateway's routes."""
    if gateway is None:
        return Credentials(values)
    namespace = gateway.metadata.namespace
    policies = [policy for policy in config.credential_policies if policy.metadata.namespace == namespace]
    routes: list[Route] = [*config.routes, *config.ai_routes, *config.mcp_routes]
    there: dict[tuple[str, str], Route] = {
        (route.kind, route.metadata.name): route
        for route in routes
        if route.metadata.namespace == namespace and route.spec.gateway_ref.name == gateway.metadata.name
    }
    entries = tuple((_reach(policy, there), Credential.compile(policy)) for policy in policies)
    names = frozenset(name for _, credential in entries for name in credential.header_names)
    return Credentials(values, entries, names)


def update_values(values: SecretValues, config: GatewayConfig) -> None:
    """Bring the values of a new configuration: from now on, requests of every run go out with them."""
    credentials = [Credential.compile(policy) for policy in config.credential_policies]
    if any(credential.signs for credential in credentials):
        sigv4.load()  # now, and not while a call waits
    used = [(one.secret, key) for one in credentials for key in (*one.keys, *one.optional_keys)]
    proxies = [(gateway.metadata.namespace, gateway.spec.upstream_proxy) for gateway in config.gateways]
    used += [(f"{space}/{proxy.secret_ref.name}", "password") for space, proxy in proxies if proxy and proxy.secret_ref]
    values.replace(config.secrets, used)


def _reach(policy: CredentialInjectionPolicy, there: Mapping[tuple[str, str], Route]) -> _Reach:
    spec = policy.spec
    narrowed = Hosts.named(spec.hostnames) if spec.hostnames else None
    if not spec.target_refs:
        return _Reach((), True, narrowed)
    named = [
        hosts
        for ref in spec.target_refs
        if (ref.kind, ref.name) in there
        for hosts in _hosts_of(there[ref.kind, ref.name])
    ]
    return _Reach(tuple(hosts for hosts in named if hosts is not None), None in named, narrowed)


def _hosts_of(route: Route) -> list[Hosts | None]:
    """Return the hosts that a route names; None stands for every host."""
    match route:
        case EgressL4Route():
            return [Hosts.named(rule.hostnames, rule.ports) for rule in route.spec.rules if rule.hostnames]
        case MCPRoute():
            return [Hosts.named(route.spec.hostnames) if route.spec.hostnames else None]
        case AIProviderRoute():
            return [hosts for rule in route.spec.rules for hosts in _hosts_of_rule(rule)]


def _hosts_of_rule(rule: AIRule) -> list[Hosts | None]:
    found: list[Hosts | None] = [Hosts.named([backend.hostname], [backend.port]) for backend in rule.backend_refs]
    for match in rule.matches:
        if match.hostnames:
            found.append(Hosts.named(match.hostnames))
        elif match.provider is not None:
            found.append(Hosts(shapes=_PROVIDER_HOSTS[match.provider]))
        else:
            found.append(None)
    return found if rule.matches else [*found, None]
