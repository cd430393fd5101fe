"""CredentialInjectionPolicies for tests, and what is not to be seen anywhere."""

from __future__ import annotations

from clrk.core.route_resources import CredentialInjectionPolicy

SECRET = "real-5f1c8e02d9b74a"  # of no shape that redaction knows by itself
AWS = {
    "accessKeyId": "AKIDEXAMPLE0000",
    "secretAccessKey": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE",
    "sessionToken": "IQoJb3JpZ2luX2VjEXAMPLE==",
}
BEARER = {"type": "Header", "headerName": "Authorization", "prefix": "Bearer "}
QUERY = {"type": "QueryParam", "queryParamName": "key"}
SIGV4 = {"type": "AwsSigV4"}


def policy(target: dict, *, name: str = "key", secret: str = "keys", **spec) -> CredentialInjectionPolicy:
    """One policy; spec has hostnames, targetRefs or secretKey."""
    found = {"targetRefs": [], "secretRef": {"name": secret}, "target": target} | spec
    return CredentialInjectionPolicy.model_validate(
        {"kind": "CredentialInjectionPolicy", "metadata": {"name": name}, "spec": found}
    )
