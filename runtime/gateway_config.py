"""What the gateway is told at Configure: a sealed memfd with the JSON of GatewayConfig."""

from __future__ import annotations

import fcntl
import os

from pyroute2 import IPRoute

from clrk.core.errors import HostError
from clrk.core.gateway_config import GatewayConfig
from clrk.runtime.ca import Authorities
from clrk.runtime.config.declared import Key, Resources


def build_gateway_config(resources: Resources, authorities: Authorities) -> GatewayConfig:
    """Select what the gateway may know: of the Secrets those that go out in calls, not those that agents are given."""
    return GatewayConfig(
        runtime=resources.runtime,
        agents=list(resources.agents.values()),
        daemons=list(resources.daemons.values()),
        gateways=list(resources.gateways.values()),
        routes=list(resources.routes.values()),
        ai_routes=list(resources.ai_routes.values()),
        mcp_routes=list(resources.mcp_routes.values()),
        credential_policies=list(resources.credential_policies.values()),
        secrets=_outgoing_secrets(resources),
        ca_cert_pem=authorities.current.cert_pem,
        ca_key_pem=authorities.current.key_pem,
        former_cas=authorities.former(),
        upstream_ca_pem=dict(resources.upstream_ca_pem),
        jwks_files=dict(resources.jwks_files),
        host_addresses=list_host_addresses(),
        environment={name: value for name, value in os.environ.items() if name.startswith("OTEL_")},
        environment_files=dict(resources.environment_files),
    )


def _outgoing_secrets(resources: Resources) -> dict[str, dict[str, str]]:
    """Return the values that go out in calls. One that may be left out, and can not be read, is empty: calls fail."""
    named: dict[Key, set[str]] = {}
    for (space, _), policy in resources.credential_policies.items():
        named.setdefault((space, policy.spec.secret_ref.name), set()).update(policy.spec.optional_keys)
    for (space, _), gateway in resources.gateways.items():
        proxy = gateway.spec.upstream_proxy
        if proxy is not None and proxy.secret_ref is not None:
            named.setdefault((space, proxy.secret_ref.name), set())
    return {
        "/".join(key): {**resources.secrets[key], **dict.fromkeys(optional & resources.unread.get(key, {}).keys(), "")}
        for key, optional in sorted(named.items())
        if key in resources.secrets
    }


def open_memfd(config: GatewayConfig) -> int:
    """Return a sealed memfd; the caller closes it. It never touches a disk and can not be changed by its reader."""
    content = config.model_dump_json(by_alias=True).encode()
    fd = os.memfd_create("clrk-config", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as exc:
        os.close(fd)
        raise HostError(f"write the gateway's configuration: {exc.strerror}") from exc
    return fd


def list_host_addresses() -> list[str]:
    """Return every address of the host's interfaces; agents may reach none of them unless a CIDR rule says so.

    Raises: HostError.
    """
    try:
        with IPRoute() as netlink:
            found = {message.get_attr("IFA_ADDRESS") for message in netlink.get_addr()}
            found |= {message.get_attr("IFA_LOCAL") for message in netlink.get_addr()}
    except OSError as exc:
        raise HostError(f"list the host's addresses: {exc.strerror}") from exc
    return sorted(address for address in found if address)
