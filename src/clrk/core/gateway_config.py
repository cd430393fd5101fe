"""What the runtime tells the gateway: the configuration of one generation, as JSON in a sealed memfd."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import Field

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.resources import DaemonAgent, RuntimeSpec, TaskAgent
from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.core.values import Model


class IssuingCa(Model):
    """A certificate authority as PEM text."""

    cert_pem: str
    key_pem: str = Field(repr=False)


def ca_id(cert_pem: str) -> str:
    """Return how runtime and gateway name a CA to each other."""
    return hashlib.sha256(cert_pem.encode()).hexdigest()[:16]


class GatewayConfig(Model):
    """What the runtime hands to the gateway: no secrets of agents, no commands it could run.

    Shape: secrets has the values, by namespace/name and key, of the Secrets that go out in calls (credential policies
    and upstream proxies), and of no others. ca_cert_pem and ca_key_pem are the per-host CA, former_cas those before it
    that sandboxes of now may still have in their bundles; upstream_ca_pem maps
    namespace/name of an EgressGateway to the PEM text of its upstreamTLS.caFile, jwks_files a JwtExtractor's file to
    its text, environment_files the path in an OTEL_EXPORTER_OTLP_*CERTIFICATE or *CLIENT_KEY variable to its text (all
    read by the runtime, since the gateway sees no host files).
    """

    runtime: RuntimeSpec
    agents: list[TaskAgent]
    daemons: list[DaemonAgent] = []
    gateways: list[EgressGateway]
    routes: list[EgressL4Route]
    ai_routes: list[AIProviderRoute] = []
    mcp_routes: list[MCPRoute] = []
    credential_policies: list[CredentialInjectionPolicy] = []
    secrets: dict[str, dict[str, str]] = Field(default={}, repr=False)
    ca_cert_pem: str
    ca_key_pem: str = Field(repr=False)
    former_cas: list[IssuingCa] = []
    upstream_ca_pem: dict[str, str] = {}
    jwks_files: dict[str, str] = {}
    host_addresses: list[str] = []
    environment: dict[str, Any] = Field(default={}, repr=False)
    environment_files: dict[str, str] = Field(default={}, repr=False)
