"""What would happen to one call of an agent, step by step, by the code that decides about calls. Pure.

Nothing is dialled or resolved: the address that a name has at an upstream is judged when it is dialled, so only an
address that is written, or given by hostAliases, can be judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from clrk.core.egress_resources import EgressGateway
from clrk.core.errors import ClrkError
from clrk.core.gateway_config import GatewayConfig
from clrk.core.wire import IPAddress
from clrk.gateway.credential_hosts import compile_credentials
from clrk.gateway.governance import is_http_only
from clrk.gateway.interpret import RequestHead
from clrk.gateway.llm.budget_rules import LlmCall, compile_rules
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.policy import HTTP_ONLY, EgressPolicy, Verdict
from clrk.gateway.policy_names import HostPattern, normalise_name, parse_ip
from clrk.gateway.policy_requests import judge_request
from clrk.gateway.recognise import KnownHosts, recognise
from clrk.gateway.secret_values import SecretValues

_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_TUNNEL: Final = ("tcp", "tls")  # bytes that nobody reads
_JSON: Final = (("Content-Type", "application/json"),)
_NO_TARGET: Final = re.compile(r"[\x00-\x20\x7f]")  # a request line with these is a 400


class UnreadableCallError(ClrkError):
    """The call can not be understood; the message says what to write."""


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One call. name is normalised; one of name and address is there. method is "" for a tunnel."""

    method: str
    scheme: str
    name: str | None
    address: IPAddress | None
    port: int
    path: str
    query: str = ""

    @classmethod
    def parse(cls, method: str, url: str) -> PlannedCall:
        """Read what a user typed: a method and http(s)://host[:port]/path, or tcp://host:port.

        Raises: UnreadableCallError.
        """
        try:
            parts = urlsplit(url if "://" in url else f"https://{url}")
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as exc:
            raise UnreadableCallError(f"{url!r} is no URL: {exc}") from None
        if parts.username is not None:
            raise UnreadableCallError("a URL with credentials in it is refused; leave them out")
        if not parts.hostname or parts.port == 0:
            raise UnreadableCallError(f"{url!r} names no {'port' if parts.hostname else 'host'} that can be dialled")
        if _NO_TARGET.search(url):
            raise UnreadableCallError(f"{url!r} holds a blank or a control character: write it as %20 and the like")
        if method == "CONNECT":
            raise UnreadableCallError(
                "the gateway is no proxy, so CONNECT is a 400; write tcp://host:port for a tunnel"
            )
        if port is None or parts.scheme not in (*_PORTS, *_TUNNEL):
            raise UnreadableCallError(f"{url!r}: write http://…, https://…, or tcp://host:port for any other TCP")
        address = parse_ip(parts.hostname)
        name = normalise_name(parts.hostname) if address is None else None
        if name is None and address is None:
            raise UnreadableCallError(f"{parts.hostname!r} is no host name: no rule can allow it")
        method = "" if parts.scheme in _TUNNEL else method
        return cls(method, parts.scheme, name, address, port, parts.path or "/", parts.query)

    @property
    def host(self) -> str:
        """Return the name, else the address."""
        return self.name or str(self.address)

    @property
    def head(self) -> RequestHead:
        """Return the request without headers."""
        return RequestHead(self.method, self.scheme, self.host, self.port, self.path, self.query, ())


def explain(
    config: GatewayConfig,
    gateway: EgressGateway | None,
    call: PlannedCall,
    refusal: Callable[[IPAddress], tuple[str, Any] | None],
) -> dict[str, Any]:
    """Return what decides about the call, in the order in which it is asked.

    Shape: gateway is the agent's, None when there is none. refusal is AddressGuard's.
    """
    policy = EgressPolicy.compile(gateway, config.routes)
    steps = _steps(policy, call, is_http_only=gateway is not None and is_http_only(config, gateway, call.host))
    if (step := _address(policy, call, refusal)) is not None:
        steps.append(step)
    failed = next((step for step in steps if not step["allowed"]), None)
    holds = failed is not None and (failed["step"] == "address" or policy.holds(_verdict(failed)))
    decided = failed or next((step for step in reversed(steps) if step["rule"]), steps[-1])
    meta = gateway.metadata if gateway is not None else None
    return {
        "gateway": f"{meta.namespace}/{meta.name}" if meta is not None else None,
        "mode": policy.mode,
        "method": call.method,
        "host": call.host,
        "port": call.port,
        "path": call.path if call.method else "",
        "allowed": not holds,
        "wouldDeny": failed["reason"] if failed is not None and not holds else None,
        "reason": decided["reason"],
        "rule": decided["rule"],
        "addRule": _rule_to_add(steps),
        "tls": _tls(policy, call),
        "steps": steps,
        **_applied(config, gateway, policy, call),
    }


def _rule_to_add(steps: list[dict[str, Any]]) -> str:
    """Return the smallest rule: what a name's denial says knows no port, what follows it does."""
    denied = [step["addRule"] for step in steps if not step["allowed"]]
    return next((rule for rule in denied if "ports:" in rule), denied[0] if denied else "")


def _steps(policy: EgressPolicy, call: PlannedCall, *, is_http_only: bool) -> list[dict[str, Any]]:
    found = [_step("name", policy.name(call.name))] if call.name is not None else []
    where = (call.name, call.address, call.port)
    if not call.method or (call.scheme in ("https", "wss") and policy.is_passthrough(call.name, call.address)):
        tunnel = policy.tunnel(*where)
        if tunnel.allowed and is_http_only:
            tunnel = Verdict(False, HTTP_ONLY, "an MCPRoute or a budget, which judge HTTP only", "")
        return [*found, _step("tunnel", tunnel)]
    connect = policy.connect(*where)
    request, _ = judge_request(policy, call.name, call.address, call.head)
    return [*found, _step("connection", connect), _step("request", request)]


def _step(step: str, verdict: Verdict) -> dict[str, Any]:
    decided = {"allowed": verdict.allowed, "reason": verdict.reason, "rule": verdict.rule, "addRule": verdict.hint}
    return {"step": step, **decided}


def _verdict(step: dict[str, Any]) -> Verdict:
    return Verdict(step["allowed"], step["reason"], step["rule"], step["addRule"])


def _address(
    policy: EgressPolicy, call: PlannedCall, refusal: Callable[[IPAddress], tuple[str, Any] | None]
) -> dict[str, Any] | None:
    """Judge the address that is dialled, where that is known."""
    if call.address is None:
        alias = policy.alias(call.name or "")
        return _step("address", Verdict(True, f"hostAliases: {alias[0]}:{alias[1]}", "", "")) if alias else None
    refused = refusal(call.address)
    if refused is None or policy.names_address(call.address, call.port, refused[1]):
        return None
    hint = f'- cidrs: ["{call.address}/{call.address.max_prefixlen}"]\n  ports: [{call.port}]\n'
    return _step("address", Verdict(False, f"address_{refused[0]}", "", hint))


def _tls(policy: EgressPolicy, call: PlannedCall) -> str:
    if call.scheme not in ("https", "wss", "tls"):
        return "none"
    return "passthrough" if policy.is_passthrough(call.name, call.address) else "intercept"


def _applied(
    config: GatewayConfig, gateway: EgressGateway | None, policy: EgressPolicy, call: PlannedCall
) -> dict[str, list[str]]:
    """Return the names of what else applies to the call; which rule for models, its body decides."""
    if gateway is None or not call.method or _tls(policy, call) == "passthrough":
        return {"aiProviderRoutes": [], "mcpRoutes": [], "credentials": []}
    host = call.host
    mine = (gateway.metadata.namespace, gateway.metadata.name)
    mcp = [
        route.metadata.name
        for route in config.mcp_routes
        if (route.metadata.namespace, route.spec.gateway_ref.name) == mine and _fits(route.spec.hostnames, host)
    ]
    is_read = _tls(policy, call) == "intercept"
    credentials = compile_credentials(gateway, config, SecretValues()).of(host, call.port) if is_read else ()
    return {
        "aiProviderRoutes": _ai_rules(config, gateway, call, host),
        "mcpRoutes": mcp,
        "credentials": [one.policy for one in credentials],
    }


def _ai_rules(config: GatewayConfig, gateway: EgressGateway, call: PlannedCall, host: str) -> list[str]:
    hosts = KnownHosts(gateway, config.ai_routes)
    read = recognise(replace(call.head, headers=_JSON), hosts=hosts)
    provider = read.provider if isinstance(read, LlmInterpreter) else hosts.provider(host)
    planned = LlmCall.of(host, call.path, provider, recognised=isinstance(read, LlmInterpreter))
    rules = compile_rules(gateway, config.ai_routes)
    return [f"{rule.route} rules[{rule.index}]" for rule in rules if rule.may_fit(planned)]


def _fits(hostnames: list[str], host: str) -> bool:
    return not hostnames or any(HostPattern.compile(name).matches(host) for name in hostnames)
