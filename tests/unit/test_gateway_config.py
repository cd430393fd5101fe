"""What is declared arrives at the gateway as it was read: kinds with the least and with the most that they may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from resource_files import HEAD, documents

from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.app import read_config
from clrk.gateway.credential_hosts import compile_credentials, update_values
from clrk.gateway.credentials import CredentialError, fill
from clrk.gateway.secret_values import SecretValues
from clrk.runtime.ca import Authorities, HostCa
from clrk.runtime.config.load import load
from clrk.runtime.gateway_config import build_gateway_config, open_memfd


def declared(kind: str, name: str, spec: str) -> str:
    return f"{HEAD}kind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def credential(target: str) -> str:
    return f"{{hostnames: [a.example], secretRef: {{name: s}}, target: {{{target}}}}}"


RUN = "{template: {spec: {command: [/bin/true]}}}"
TOOLS = "{allowedTools: [a], deniedTools: [b], allowedToolsRegex: a+, deniedToolsRegex: b+, maxCallsPerExecution: 0}"
CAPTURE = "{endpoint: 'http://127.0.0.1:4318', headers: {a: b}, captureBody: {}}"
EVERY_KIND = (
    declared("Runtime", "r", "{}"),
    declared("TaskAgent", "task", RUN),
    declared("DaemonAgent", "daemon", RUN),
    declared("EgressGateway", "default", "{}"),
    declared("EgressGateway", "most", f"{{mode: Record, otlp: {CAPTURE}, redact: {{patterns: [x]}}, tls: {{}}}}"),
    declared("EgressL4Route", "hosts", "{rules: [{hostnames: [a.example]}]}"),
    declared("EgressL4Route", "http", "{rules: [{hostnames: [a.example], http: {methods: [GET], paths: [/x]}}]}"),
    declared("AIProviderRoute", "least", "{rules: [{}]}"),
    declared(
        "AIProviderRoute",
        "most",
        "{rules: [{matches: [{provider: openai}], filters: [{type: TokenBudget, tokenBudget: {maxUSDPerDay: 1.5}}]}]}",
    ),
    declared("MCPRoute", "least", "{rules: [{matches: [{}], filters: [{type: ToolPolicy, toolPolicy: {}}]}]}"),
    declared("MCPRoute", "most", f"{{rules: [{{filters: [{{type: ToolPolicy, toolPolicy: {TOOLS}}}]}}]}}"),
    declared("CredentialInjectionPolicy", "header", credential("type: Header")),
    declared("CredentialInjectionPolicy", "query", credential("type: QueryParam, queryParamName: k")),
    declared("CredentialInjectionPolicy", "aws", credential("type: AwsSigV4")),
    HEAD + "kind: Secret\nmetadata: {name: s}\ndata: {token: t, accessKeyId: a, secretAccessKey: b}\n",
)  # fmt: skip


def test_every_kind_arrives_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(documents(*EVERY_KIND))
    found = load([tmp_path / "all.yaml"])
    sent = GatewayConfig(
        runtime=found.runtime, agents=list(found.agents.values()), daemons=list(found.daemons.values()),
        gateways=list(found.gateways.values()), routes=list(found.routes.values()),
        ai_routes=list(found.ai_routes.values()), mcp_routes=list(found.mcp_routes.values()),
        credential_policies=list(found.credential_policies.values()), ca_cert_pem="c", ca_key_pem="k",
    )  # fmt: skip
    assert len(sent.credential_policies) == 3
    assert read_config(open_memfd(sent)) == sent


def test_secrets_that_can_not_be_read_are_missing_and_no_call_does_without_one(tmp_path: Path) -> None:
    """CONTRACT section 12: the call fails with a 502. A session token that is declared is not left out either."""
    files = "fromFile: {token: gone, sessionToken: gone}\ndata: {accessKeyId: a, secretAccessKey: b}\n"
    (tmp_path / "all.yaml").write_text(
        documents(*EVERY_KIND[:-1], HEAD + "kind: Secret\nmetadata: {name: s}\n" + files)
    )
    sent = build_gateway_config(load([tmp_path / "all.yaml"]), Authorities(HostCa("certificate", "key")))
    assert sent.secrets == {"default/s": {"accessKeyId": "a", "secretAccessKey": "b", "sessionToken": ""}}
    values = SecretValues()
    update_values(values, sent)
    found = compile_credentials(sent.gateways[0], sent, values)
    for credential in found.of("a.example", 443):
        with pytest.raises(CredentialError, match=r"has no value|is empty") as caught:
            fill([credential], values, "bedrock.us-east-1.amazonaws.com")
        assert caught.value.code == "credential_missing"
