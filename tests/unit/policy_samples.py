"""Gateways and routes for the tests of policy, as short as they can be written."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.gateway.policy import EgressPolicy, Verdict


def gateway(namespace: str = "default", name: str = "default", **spec: Any) -> EgressGateway:
    return EgressGateway.model_validate(
        {"kind": "EgressGateway", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    )


def route(*rules: dict[str, Any], name: str = "web", namespace: str = "default", to: str = "default") -> EgressL4Route:
    return EgressL4Route.model_validate(
        {
            "kind": "EgressL4Route",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"gatewayRef": {"name": to}, "rules": list(rules)},
        }
    )


def policy(*rules: dict[str, Any], **spec: Any) -> EgressPolicy:
    return EgressPolicy.compile(gateway(**spec), [route(*rules)] if rules else [])


def brief(verdict: Verdict) -> tuple[bool, str]:
    return verdict.allowed, verdict.reason


PUBLIC = ip_address("198.51.100.7")
API = {"hostnames": ["api.example.com"], "ports": [443]}
NARROW = {"hostnames": ["api.example.com"], "http": {"methods": ["GET"], "paths": ["/public"]}}
