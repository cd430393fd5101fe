"""Which destinations and requests an agent may reach (CONTRACT sections 10 and 12). Pure: decides, never dials.

Rules only allow, so "first match wins" means: the first rule that fits the name or the address, the port and (where it
asks) the request allows; when none does, the gateway's defaultPolicy decides. Whatever can be read in two ways must be
allowed in both (paths), or is refused (names that are not host names).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, Literal

from clrk.core.egress_resources import EgressGateway, EgressL4Route, HttpMatch, L4Rule, is_rule_method
from clrk.core.url_paths import path_readings
from clrk.core.values import is_sandbox_itself
from clrk.core.wire import IPAddress, map_address, unmap
from clrk.gateway.policy_names import HostPattern, normalise_name, parse_ip
from clrk.gateway.policy_paths import PathPattern

IPNetwork = IPv4Network | IPv6Network
Mode = Literal["Enforce", "Shadow", "Record"]

NO_GATEWAY: Final = "no_gateway"
NO_RULE: Final = "no_rule"
BAD_NAME: Final = "bad_name"
PORT_NOT_ALLOWED: Final = "port_not_allowed"
HTTP_NOT_ALLOWED: Final = "http_not_allowed"
HTTP_ONLY: Final = "http_only"
NAME_NOT_ALLOWED: Final = "name_not_allowed"
BY_RULE: Final = "rule"
BY_DEFAULT: Final = "default_policy"

# What another rule would allow: these alone are let through where the mode only watches.
_LACKS_A_RULE: Final = frozenset((NO_RULE, PORT_NOT_ALLOWED, HTTP_NOT_ALLOWED, HTTP_ONLY, NAME_NOT_ALLOWED))
_MAX_HINT_PATH: Final = 1024
_MAPPED: Final = IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and how to change it.

    Shape: reason is one of the constants of this module; rule names the resource, and the rule in it, that decided or
    came closest; hint is a YAML list item for EgressL4Route spec.rules that would allow it, empty when allowed.
    needs_http: the connection is allowed for HTTP requests only, each of which request() judges; a raw tunnel would
    be a bypass.
    """

    allowed: bool
    reason: str
    rule: str
    hint: str
    needs_http: bool = False


@dataclass(frozen=True, slots=True)
class _Rule:
    """One compiled L4Rule; label is how it is named to people."""

    label: str
    hosts: tuple[HostPattern, ...]
    networks: tuple[IPNetwork, ...]
    ports: frozenset[int]
    methods: frozenset[str]
    paths: tuple[PathPattern, ...]
    narrowed: bool

    @classmethod
    def compile(cls, label: str, rule: L4Rule) -> _Rule:
        addresses = [(name, parse_ip(name)) for name in rule.hostnames]
        http = rule.http or HttpMatch()
        return cls(
            label=label,
            hosts=tuple(HostPattern.compile(name) for name, address in addresses if address is None),
            networks=(
                *(_plain_network(network) for network in rule.cidrs),
                *(ip_network(address) for _, address in addresses if address is not None),
            ),
            ports=frozenset(rule.ports),
            methods=frozenset(http.methods),
            paths=tuple(PathPattern.compile(path) for path in http.paths),
            narrowed=bool(http.methods or http.paths),
        )

    def fits_name(self, name: str) -> bool:
        return any(host.matches(name) for host in self.hosts)

    def fits_destination(self, name: str | None, address: IPAddress | None) -> bool:
        if name is not None and self.fits_name(name):
            return True
        return address is not None and any(address in network for network in self.networks)

    def fits_port(self, port: int) -> bool:
        return not self.ports or port in self.ports

    def fits_request(self, method: str, readings: tuple[str, ...]) -> bool:
        if self.methods and method not in self.methods:
            return False
        return not self.paths or any(path.matches(readings) for path in self.paths)


@dataclass(frozen=True, slots=True)
class _Target:
    """A destination after normalisation; valid is False when the name is no host name, or spells another address."""

    name: str | None
    address: IPAddress | None
    port: int
    valid: bool

    @classmethod
    def of(cls, name: str | None, address: IPAddress | None, port: int) -> _Target:
        plain = unmap(map_address(address)) if address is not None else None
        if name is None:
            return cls(None, plain, port, True)
        literal = parse_ip(name)
        if literal is not None:
            # A name that is an address must be the address that is dialled: otherwise it would vouch for another.
            return cls(None, literal if plain is None else plain, port, plain is None or plain == literal)
        normal = normalise_name(name)
        return cls(normal, plain, port, normal is not None)


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What one EgressGateway allows. Immutable: a reload compiles a new one."""

    label: str
    allow_all: bool
    passthrough_all: bool
    passthrough: tuple[HostPattern, ...]
    aliases: tuple[tuple[HostPattern, str, int], ...]
    rules: tuple[_Rule, ...]
    mode: Mode = "Enforce"

    @classmethod
    def compile(cls, gateway: EgressGateway | None, routes: Sequence[EgressL4Route]) -> EgressPolicy:
        """Compile the routes of a namespace that name the gateway; without a gateway everything is denied."""
        if gateway is None:
            return cls("", False, False, (), (), ())
        meta, spec = gateway.metadata, gateway.spec
        return cls(
            label=f"EgressGateway {meta.namespace}/{meta.name} defaultPolicy",
            allow_all=spec.default_policy == "allow-all",
            passthrough_all=spec.tls.mode == "Passthrough",
            passthrough=tuple(HostPattern.compile(host) for host in spec.tls.passthrough_hosts),
            aliases=tuple(
                (HostPattern.compile(host), *_split_ip_port(alias.address))
                for alias in spec.host_aliases
                for host in alias.hostnames
            ),
            rules=tuple(
                _Rule.compile(f"EgressL4Route {route.metadata.namespace}/{route.metadata.name} rules[{index}]", rule)
                for route in routes
                if route.spec.gateway_ref.name == meta.name and route.metadata.namespace == meta.namespace
                for index, rule in enumerate(route.spec.rules)
            ),
            mode=spec.mode,
        )

    @property
    def enforces(self) -> bool:
        """Say whether what no rule allows is denied; else it goes out, and its span says what would have been."""
        return self.mode == "Enforce"

    def holds(self, verdict: Verdict) -> bool:
        """Say whether a denial is one in this mode: a missing rule is not where the gateway only watches."""
        return not verdict.allowed and (self.enforces or verdict.reason not in _LACKS_A_RULE)

    def name(self, name: str) -> Verdict:
        """Judge a name that the resolver is asked for: could some connection to it be allowed by its name?"""
        target = _Target(normalise_name(name), None, 0, normalise_name(name) is not None)
        if (early := self._before_rules(target)) is not None:
            return early
        normal = target.name or ""
        for rule in self.rules:
            if rule.fits_name(normal):
                return Verdict(True, BY_RULE, rule.label, "")
        if self.allow_all or any(host.matches(normal) for host in self.passthrough):
            return Verdict(True, BY_DEFAULT, self.label, "")
        return Verdict(False, NAME_NOT_ALLOWED, self.label, _hint(target, None))

    def may_allow_name(self, name: str) -> bool:
        """Say whether the resolver answers for a name."""
        return not self.holds(self.name(name))

    def tunnel(self, name: str | None, address: IPAddress | None, port: int) -> Verdict:
        """Judge a connection whose bytes nobody reads."""
        verdict = self.connect(name, address, port)
        if not verdict.needs_http:
            return verdict
        return Verdict(False, HTTP_ONLY, verdict.rule, _hint(_Target.of(name, address, port), None))

    def connect(self, name: str | None, address: IPAddress | None, port: int) -> Verdict:
        """Judge a connection: name as the agent asked for it, address as it was dialled or resolved."""
        target = _Target.of(name, address, port)
        if (early := self._before_rules(target)) is not None:
            return early
        fitting = [rule for rule in self.rules if rule.fits_destination(target.name, target.address)]
        on_port = [rule for rule in fitting if rule.fits_port(port)]
        for rule in on_port:
            if not rule.narrowed:
                return Verdict(True, BY_RULE, rule.label, "")
        if self.allow_all:
            return Verdict(True, BY_DEFAULT, self.label, "")
        if on_port:
            return Verdict(True, BY_RULE, on_port[0].label, "", needs_http=True)
        return self._denied(target, fitting, on_port, None)

    def request(self, name: str | None, address: IPAddress | None, port: int, method: str, path: str) -> Verdict:
        """Judge one HTTP request; path is the request target's path as the agent wrote it."""
        target = _Target.of(name, address, port)
        if (early := self._before_rules(target)) is not None:
            return early
        readings = path_readings(path)
        fitting = [rule for rule in self.rules if rule.fits_destination(target.name, target.address)]
        on_port = [rule for rule in fitting if rule.fits_port(port)]
        for rule in on_port:
            if rule.fits_request(method, readings):
                return Verdict(True, BY_RULE, rule.label, "")
        if self.allow_all:
            return Verdict(True, BY_DEFAULT, self.label, "")
        return self._denied(target, fitting, on_port, (method, readings))

    def names_address(self, address: IPAddress, port: int, refused: IPNetwork | None) -> bool:
        """Say whether a CIDR rule names an address that is refused otherwise (CONTRACT section 10).

        Shape: refused is the range for which it is refused, None for an address of the host's interfaces.
        `0.0.0.0/0` names nothing. An address of a refused range is named only by a network that lies wholly inside that
        range, or by itself: whoever allows 100.64.0.0/10 does not mean a metadata service in it, nor with 2000::/3 the
        loopback address that a 6to4 address holds.
        """
        plain = unmap(map_address(address))
        return any(
            rule.fits_port(port) and any(plain in network and _names(network, refused) for network in rule.networks)
            for rule in self.rules
        )

    def is_passthrough(self, name: str | None, address: IPAddress | None = None) -> bool:
        """Say whether TLS to this name, or to an address without one, is tunnelled unread. Does not allow anything."""
        if name is not None:
            host = normalise_name(name)
        else:
            host = str(unmap(map_address(address))) if address is not None else None
        return self.passthrough_all or (host is not None and any(one.matches(host) for one in self.passthrough))

    def alias(self, name: str) -> tuple[str, int] | None:
        """Return the address that the operator gave for a name. Does not allow anything."""
        normal = normalise_name(name)
        if normal is None:
            return None
        return next(((address, port) for host, address, port in self.aliases if host.matches(normal)), None)

    def _before_rules(self, target: _Target) -> Verdict | None:
        if not self.label:
            return Verdict(
                False, NO_GATEWAY, "", _hint(target, None, "declare the agent's EgressGateway, and in a route:")
            )
        if not target.valid:
            return Verdict(False, BAD_NAME, self.label, "")
        return None

    def _denied(
        self,
        target: _Target,
        fitting: Sequence[_Rule],
        on_port: Sequence[_Rule],
        request: tuple[str, tuple[str, ...]] | None,
    ) -> Verdict:
        if on_port:
            return Verdict(False, HTTP_NOT_ALLOWED, on_port[0].label, _hint(target, request))
        if fitting:
            return Verdict(False, PORT_NOT_ALLOWED, fitting[0].label, _hint(target, None))
        return Verdict(False, NO_RULE, self.label, _hint(target, None))


def _plain_network(network: IPNetwork) -> IPNetwork:
    """Return a v4-mapped network as IPv4: addresses are compared unmapped."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def _names(network: IPNetwork, refused: IPNetwork | None) -> bool:
    if network.prefixlen in (0, network.max_prefixlen):
        return network.prefixlen != 0
    if refused is None:
        return True
    if isinstance(network, IPv4Network):
        return isinstance(refused, IPv4Network) and network.subnet_of(refused)
    return isinstance(refused, IPv6Network) and network.subnet_of(refused)


def _split_ip_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _hint(target: _Target, request: tuple[str, tuple[str, ...]] | None, comment: str = "") -> str:
    """Return the rule to add. JSON strings are YAML strings, so that hostile bytes stay inside their quotes."""
    lines = [f"# {comment}"] if comment else []
    if target.name is not None and is_sandbox_itself(target.name):
        return "# no rule can allow this name, which is the sandbox itself: use another, with hostAliases\n"
    if target.name is not None:
        lines.append(f"- hostnames: [{json.dumps(target.name)}]")
    elif target.address is not None:
        lines.append(f'- cidrs: ["{ip_network(target.address)}"]')
    else:
        return ""
    if target.port:
        lines.append(f"  ports: [{target.port}]")
    if request is not None:
        method, readings = request
        if not is_rule_method(method):
            return "# no rule can name this method: rules name those in capitals; send it so, or leave http out\n"
        if not readings or not PathPattern.compile(readings[0]).matches(readings):
            return "# no rule can allow this path: it can be read in more than one way; send it without detours\n"
        if len(readings[0]) > _MAX_HINT_PATH:
            return f"# the path is over {_MAX_HINT_PATH} characters: allow a prefix of it, with http.paths\n"
        lines.append(f"  http: {{methods: [{json.dumps(method)}], paths: [{json.dumps(readings[0])}]}}")
    return "\n".join(lines) + "\n"
