"""What is valid, and will not work before somebody adds a Secret: its calls fail with a 502 until then."""

from __future__ import annotations

from collections.abc import Iterator

from clrk.runtime.config.declared import Resources


def missing_credentials(resources: Resources) -> Iterator[str]:
    """Yield what the CredentialInjectionPolicies miss, without any value."""
    for (namespace, name), policy in sorted(resources.credential_policies.items()):
        secret = policy.spec.secret_ref.name
        values = resources.secrets.get((namespace, secret))
        for key in policy.spec.required_keys:
            if values is None:
                what = f"there is no Secret {namespace}/{secret}"
            elif key not in values:
                what = f"Secret {namespace}/{secret} has no key {key!r}"
            elif not values[key]:
                what = f"Secret {namespace}/{secret}, key {key!r}, is empty"
            else:
                continue
            yield f"CredentialInjectionPolicy {namespace}/{name}: {what}, so calls to its hosts get a 502"
