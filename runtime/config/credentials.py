"""What is valid, and will not work before somebody adds a secret: its calls fail with a 502 until then."""

from __future__ import annotations

from collections.abc import Iterator

from clrk.runtime.config.declared import Key, Resources


def missing_credentials(resources: Resources) -> Iterator[str]:
    """Yield what CredentialInjectionPolicies and proxies miss, and what Secrets miss for nobody; never a value."""
    told: set[str] = set()
    for who, lack in _lacks(resources):
        told.add(lack)
        yield f"{who}: {lack}, so calls to its hosts get a 502"
    for key in sorted(resources.unread):
        for lack in (_lack(resources, key, name) for name in resources.unread[key]):
            if lack not in told:
                yield f"{lack}; nobody uses it"


def _lacks(resources: Resources) -> Iterator[tuple[str, str]]:
    for (namespace, name), policy in sorted(resources.credential_policies.items()):
        secret = (namespace, policy.spec.secret_ref.name)
        declared = resources.secrets.get(secret, {}).keys() | resources.unread.get(secret, {}).keys()
        given = (key for key in policy.spec.optional_keys if key in declared)
        for key in (*policy.spec.required_keys, *given):
            if lack := _lack(resources, secret, key):
                yield f"CredentialInjectionPolicy {namespace}/{name}", lack
    for (namespace, name), gateway in sorted(resources.gateways.items()):
        if (proxy := gateway.spec.upstream_proxy) is not None and proxy.secret_ref is not None:
            secret = (namespace, proxy.secret_ref.name)
            for key in ("username", "password"):
                if key not in resources.secrets.get(secret, {}):
                    yield f"upstreamProxy of EgressGateway {namespace}/{name}", _lack(resources, secret, key)


def _lack(resources: Resources, secret: Key, key: str) -> str:
    """Return why a key of a Secret has no value; empty where it has one."""
    label = f"Secret {'/'.join(secret)}"
    if secret not in resources.secrets:
        return f"there is no {label}"
    if (why := resources.unread.get(secret, {}).get(key)) is not None:
        return f"{label}: {why}"
    if (value := resources.secrets[secret].get(key)) is None:
        return f"{label} has no key {key!r}"
    return "" if value else f"{label}, key {key!r}, is empty"
