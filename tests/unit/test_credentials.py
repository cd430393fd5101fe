"""Which host gets which credential, and what becomes of a head: nothing of the agent's stands beside a secret."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from credential_policies import AWS, BEARER, QUERY, SECRET, SIGV4, policy
from hypothesis import given
from hypothesis import strategies as st

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.gateway_config import GatewayConfig
from clrk.core.resources import RuntimeSpec
from clrk.core.route_resources import AIProviderRoute, HeaderTarget, MCPRoute
from clrk.gateway import sigv4
from clrk.gateway.credential_hosts import Credentials, compile_credentials, update_values
from clrk.gateway.credentials import (
    CredentialError,
    OutgoingHead,
    apply_all,
    fill,
    replace_header,
    replace_parameter,
)
from clrk.gateway.redact import Redactor
from clrk.gateway.secret_values import SecretValues

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/standin"))
from aws_signature import find_fault

GATEWAY = EgressGateway.model_validate({"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": {}})
BEDROCK = "bedrock-runtime.eu-central-1.amazonaws.com"
L4 = {"rules": [{"hostnames": ["api.openai.com"], "ports": [443]}, {"hostnames": ["*.tools.internal"]}]}


def compiled(*policies, secrets=None, l4=None, ai=None, mcp=None, gateway=GATEWAY) -> Credentials:
    """Compile policies beside one route of each kind, called `r`."""

    def route(kind, spec):
        return [kind.model_validate({"kind": kind.__name__, "metadata": {"name": "r"}, "spec": spec})] if spec else []

    config = GatewayConfig(
        runtime=RuntimeSpec(), agents=[], gateways=[GATEWAY], ca_cert_pem="", ca_key_pem="",
        routes=route(EgressL4Route, l4), ai_routes=route(AIProviderRoute, ai), mcp_routes=route(MCPRoute, mcp),
        credential_policies=list(policies), secrets={"default/keys": secrets or {"token": SECRET}},
    )  # fmt: skip
    values = SecretValues()
    update_values(values, config)
    return compile_credentials(gateway, config, values)


def ref(kind: str) -> dict:
    return {"targetRefs": [{"kind": kind, "name": "r"}]}


def sent(credentials: Credentials, head: OutgoingHead, body: bytes = b"", host: str = "api.openai.com") -> OutgoingHead:
    return apply_all(fill(credentials.of(host, 443), credentials.values, head.host), head, body)


def head(*headers: tuple[str, str], query: str = "", host: str = "api.openai.com", path: str = "/v1/x") -> OutgoingHead:
    return OutgoingHead("POST", host, path, query, [("Host", host), *headers])


# --- which host -----------------------------------------------------------------------------------------------------


L4_REF, AI_REF, MCP_REF = ref("EgressL4Route"), ref("AIProviderRoute"), ref("MCPRoute")
OPENAI = ("api.openai.com", 443)


def ai(*matches: dict, **rule) -> dict:
    return {"ai": {"rules": [{"matches": list(matches)} | rule]}}


@pytest.mark.parametrize(
    ("spec", "routes", "yes", "no"),
    [
        (
            {"hostnames": ["api.openai.com", "**.corp.example"]}, {},
            [OPENAI, ("a.b.corp.example", 8443)],
            [("corp.example", 443), ("xapi.openai.com", 443), ("api.openai.com.evil.example", 443)],
        ),
        ({"hostnames": ["10.0.0.7"]}, {}, [("10.0.0.7", 443)], [("10.0.0.8", 443)]),
        (
            L4_REF, {"l4": L4},
            [OPENAI, ("a.tools.internal", 9)],
            [("api.openai.com", 8443), ("a.b.tools.internal", 443), ("tools.internal", 443)],
        ),
        (L4_REF, {"l4": {"rules": [{"cidrs": ["10.0.0.0/8"]}]}}, [], [("10.0.0.1", 443), ("a.example", 443)]),
        (L4_REF, {"l4": L4 | {"gatewayRef": {"name": "other"}}}, [], [OPENAI]),
        (L4_REF | {"hostnames": ["api.openai.com"]}, {"l4": L4}, [OPENAI], [("a.tools.internal", 443)]),
        (L4_REF | {"hostnames": ["evil.example"]}, {"l4": L4}, [], [("evil.example", 443), OPENAI]),
        (
            AI_REF, ai({"provider": "openai"}, {"hostnames": ["llm.internal"]}),
            [OPENAI, ("llm.internal", 8000)],
            [("api.groq.com", 443), ("api.deepseek.com", 443), ("api.openai.com.evil.example", 443)],
        ),
        (
            AI_REF, ai({"provider": "aws_bedrock"}),
            [(BEDROCK, 443), ("bedrock-runtime-fips.us-gov-west-1.amazonaws.com", 443)],
            [("bedrock-runtime.s3.amazonaws.com", 443), (f"{BEDROCK}.evil.example", 443)],
        ),
        (
            AI_REF, ai({"provider": "azure_openai"}, {"provider": "google_genai"}),
            [("acme.openai.azure.com", 443), ("generativelanguage.googleapis.com", 443)],
            [("openai.azure.com", 443), ("storage.googleapis.com", 443), ("evil.example", 443)],
        ),
        # hostnames of a match are the hosts; its provider then only says what they speak
        (AI_REF, ai({"provider": "openai", "hostnames": ["llm.internal"]}), [("llm.internal", 443)], [OPENAI]),
        # a rule for every host names none, unless the policy does
        (AI_REF, ai(), [], [OPENAI, ("evil.example", 443)]),
        (AI_REF | {"hostnames": ["api.openai.com"]}, ai({"models": ["gpt-*"]}), [OPENAI], [("evil.example", 443)]),
        (
            AI_REF, ai({"provider": "openai"}, backendRefs=[{"hostname": "llm.internal", "port": 8443}]),
            [("llm.internal", 8443), OPENAI], [("llm.internal", 443)],
        ),
        (MCP_REF, {"mcp": {"hostnames": ["mcp.internal"], "rules": [{}]}}, [("mcp.internal", 443)], [OPENAI]),
        (MCP_REF, {"mcp": {"rules": [{}]}}, [], [("mcp.internal", 443)]),
    ],
)  # fmt: skip
def test_hosts(spec, routes, yes, no):
    credentials = compiled(policy(BEARER, **spec), **routes)
    assert [where for where in yes if not credentials.of(*where)] == []
    assert [where for where in no if credentials.of(*where)] == []


def test_a_name_is_the_same_in_every_spelling():
    credentials = compiled(policy(BEARER, hostnames=["api.openai.com"]))
    assert credentials.of("API.OpenAI.com.", 443)
    assert not credentials.of("api.openai.com\0.evil.example", 443)


def test_without_a_gateway_or_in_another_namespace_there_are_none():
    mine = policy(BEARER, hostnames=["api.openai.com"])
    assert compiled(mine, gateway=None).of("api.openai.com", 443) == ()
    theirs = mine.model_copy(update={"metadata": mine.metadata.model_copy(update={"namespace": "team-b"})})
    assert compiled(theirs).of("api.openai.com", 443) == ()


def test_many_hosts_are_not_kept_for_ever():
    credentials = compiled(policy(BEARER, hostnames=["**.corp.example"]))
    for number in range(5000):
        credentials.of(f"h{number}.corp.example", 443)
    assert len(credentials._found) <= 1024


def test_of_two_policies_for_one_place_the_first_wins_and_different_places_add_up():
    first = policy(BEARER, name="first", hostnames=["api.openai.com"])
    second = policy({"type": "Header", "headerName": "AUTHORIZATION"}, name="second", hostnames=["**.openai.com"])
    third = policy({"type": "Header", "headerName": "OpenAI-Organization"}, name="third", hostnames=["api.openai.com"])
    fourth = policy(QUERY, name="fourth", hostnames=["api.openai.com"])
    found = compiled(first, second, third, fourth).of("api.openai.com", 443)
    assert [one.policy for one in found] == ["default/first", "default/third", "default/fourth"]


# --- what becomes of the head ---------------------------------------------------------------------------------------


def test_a_header_is_overwritten_where_it_stood():
    before = head(("A", "1"), ("aUTHORIZATION", "Bearer placeholder"), ("B", "2"))
    after = sent(compiled(policy(BEARER, hostnames=["api.openai.com"])), before)
    expected = [("Host", "api.openai.com"), ("A", "1"), ("aUTHORIZATION", f"Bearer {SECRET}"), ("B", "2")]
    assert after.headers == expected
    assert sent(compiled(policy(BEARER, hostnames=["api.openai.com"])), head()).headers[-1] == (
        "Authorization", f"Bearer {SECRET}",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["x-api-key", "X-API-KEY", "x_api_key", "X_Api-Key"])
def test_no_spelling_of_the_name_goes_out_beside_it(name):
    headers = [(name, "mine"), ("x-api-key", "mine"), ("X-Api-Key", "mine"), ("Y", "z"), ("X_API_KEY", "mine")]
    after = replace_header(headers, "X-Api-Key", "real")
    assert [value for _, value in after] == ["real", "z"]
    assert after[0][0].lower() == "x-api-key"


@pytest.mark.parametrize(
    ("query", "left"),
    [
        ("", ""),
        ("key=mine", ""),
        ("a=1&key=mine&b=2&key=mine", "a=1&b=2"),
        ("KEY=mine&%6bey=mine&k%65%79=mine&a=1", "a=1"),
        ("a=1;key=mine;b=2", "a=1;b=2"),
        ("key=mine;a=1&key", "a=1"),
        ("key[]=mine&key[0]=mine&+key=mine&key%00x=mine&key%5B%5D=mine", ""),
        ("a=%ff&keys=1&monkey=2&a=key=3", "a=%ff&keys=1&monkey=2&a=key=3"),
        ("&&a=1&", "&&a=1&"),
    ],
)
def test_a_parameter_is_overwritten_in_every_spelling(query, left):
    assert replace_parameter(query, "key", "s/e c&r=t") == f"{left}{'&' if left else ''}key=s%2Fe%20c%26r%3Dt"


@given(st.text(alphabet="keyKEY%65=&;a1[]+.", max_size=40))
def test_whatever_the_query_is_one_value_is_left(query):
    for separators in ("&", ";"):  # servers that split at both, and those that only know `&`
        found = parse_qsl(replace_parameter(query, "key", "real").replace(separators, "&"), keep_blank_values=True)
        assert [value for name, value in found if name.lower() == "key"] == ["real"]


@pytest.mark.parametrize(
    ("secrets", "code"),
    [
        ({"other": "x"}, "credential_missing"),
        ({"token": ""}, "credential_missing"),
        ({"token": "top\nsecret"}, "credential_unusable"),
        ({"token": "topsecret\r\nX: y"}, "credential_unusable"),
        ({"token": "geheimüber"}, "credential_unusable"),
    ],
)
def test_what_is_missing_is_named_and_never_shown(secrets, code):
    with pytest.raises(CredentialError) as caught:
        sent(compiled(policy(BEARER, hostnames=["api.openai.com"]), secrets=secrets), head())
    assert caught.value.code == code
    assert "Secret default/keys, key 'token'" in str(caught.value)
    assert "CredentialInjectionPolicy default/key" in str(caught.value)
    assert not any(value and value in str(caught.value) for value in secrets.values())


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "connection", "traceparent"])
def test_framing_is_no_credential(name):
    with pytest.raises(ValueError, match="how the request is carried"):
        HeaderTarget.model_validate({"type": "Header", "headerName": name})


def test_values_are_in_no_repr():
    credentials = compiled(policy(BEARER, hostnames=["api.openai.com"]))
    filled = fill(credentials.of("api.openai.com", 443), credentials.values, "api.openai.com")
    assert SECRET not in repr(filled) + repr(credentials) + repr(sigv4.AwsKeys("a", SECRET, SECRET))


# --- AWS ------------------------------------------------------------------------------------------------------------

MODEL = "/model/anthropic.claude-haiku-4-5-20251001-v1%3A0/converse"


def signed(
    body: bytes = b'{"a":1}', *, secrets=AWS, query: str = "", target=SIGV4, host: str = BEDROCK
) -> OutgoingHead:
    before = head(
        ("Content-Type", "application/json"),
        ("X-Amz-Date", "20200101T000000Z"),
        ("authorization", "AWS4-HMAC-SHA256 Credential=placeholder/20200101/x/y/aws4_request, Signature=00"),
        ("X-Amz-Security-Token", "placeholder"), ("x-amz-content-sha256", "00"), ("amz-sdk-request", "attempt=1"),
        query=query, host=host, path=MODEL,
    )  # fmt: skip
    return sent(compiled(policy(target, hostnames=[host]), secrets=secrets), before, body, host)


@pytest.mark.parametrize("body", [b"", b'{"a":1}', bytes(range(256)) * 5000])
@pytest.mark.parametrize("query", ["", "b=2&a=1&a=0", "X-Amz-Signature=00&x=%20y&X-Amz-Credential=placeholder"])
@pytest.mark.parametrize("secrets", [AWS, {key: AWS[key] for key in ("accessKeyId", "secretAccessKey")}])
def test_an_independent_server_believes_the_signature(body, query, secrets):
    out = signed(body, query=query, secrets=secrets)
    target = f"{out.path}?{out.query}" if out.query else out.path
    keys = {AWS["accessKeyId"]: AWS["secretAccessKey"]}
    assert find_fault("POST", target, out.headers, body, keys) is None
    assert find_fault("POST", target, out.headers, body + b"x", keys) == "InvalidSignature"
    assert find_fault("POST", target + "x", out.headers, body, keys) == "InvalidSignature"
    assert find_fault("POST", target, out.headers, body, {AWS["accessKeyId"]: "other"}) == "InvalidSignature"
    assert "placeholder" not in repr(out)
    assert AWS["secretAccessKey"] not in repr(out)
    assert len([name for name, _ in out.headers if name.lower() == "authorization"]) == 1


def test_the_signature_is_that_of_boto3_for_the_same_headers(monkeypatch):
    import botocore.auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as AwsCredentials

    now = datetime.datetime(2026, 11, 28, 12, 0, 0)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_: now)
    out = signed()
    theirs = AWSRequest("POST", f"https://{BEDROCK}{MODEL}", {"Content-Type": "application/json"}, b'{"a":1}')
    keys = AwsCredentials(AWS["accessKeyId"], AWS["secretAccessKey"], AWS["sessionToken"])
    botocore.auth.SigV4Auth(keys, "bedrock", "eu-central-1").add_auth(theirs)
    assert dict(out.headers)["Authorization"] == theirs.headers["Authorization"]


def test_the_region_is_in_the_name_or_in_the_policy():
    assert "/eu-central-1/bedrock/aws4" in dict(signed().headers)["Authorization"]
    given = signed(target=SIGV4 | {"region": "us-east-1", "service": "s3"}, host="objects.internal")
    assert "/us-east-1/s3/aws4" in dict(given.headers)["Authorization"]
    assert "X-Amz-Content-SHA256" in dict(given.headers)
    with pytest.raises(CredentialError, match=r"spec\.target\.region"):
        signed(host="bedrock.internal")


def test_botocore_does_not_log_what_it_signs(caplog):
    caplog.set_level("DEBUG")
    signed()
    assert AWS["sessionToken"] not in caplog.text
    assert "CanonicalRequest" not in caplog.text


def shown_by(values: SecretValues) -> Redactor:
    return Redactor(values=lambda: values.known)


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_rotated_value_is_used_at_once_and_the_former_one_still_redacted():
    values = SecretValues()
    values.replace({"default/keys": {"token": "first-value", "unused": "lamp"}}, [("default/keys", "token")])
    assert values.get("default/keys", "token") == "first-value"
    assert values.get("default/keys", "unused") is None
    values.replace({"default/keys": {"token": "second/value"}}, [("default/keys", "token")])
    assert values.get("default/keys", "token") == "second/value"
    text = "a first-value, second/value, second%2Fvalue, lamp"
    assert shown_by(values).text(text) == "a [redacted], [redacted], [redacted], lamp"
    values.replace({}, [("default/keys", "token")])
    assert values.get("default/keys", "token") is None
    assert "value" not in shown_by(values).text(text)


def test_former_values_are_bounded_and_short_ones_leave_texts_alone():
    values = SecretValues()
    for number in range(300):
        values.replace({"s": {"k": f"value-{number:06}"}}, [("s", "k")])
    assert len(values._former) <= 256
    assert "299" not in shown_by(values).text("value-000299")
    values.replace({"s": {"k": "abc"}}, [("s", "k")])
    assert shown_by(values).text("abc abcdef") == "abc abcdef"


def test_one_secret_inside_another_and_in_json():
    values = SecretValues()
    values.replace(
        {"s": {"a": "longer-secret", "b": "longer-secret-and-more", "c": 'qu"ote\\d'}}, [("s", k) for k in "abc"]
    )
    assert shown_by(values).text("x longer-secret-and-more y") == "x [redacted] y"
    assert shown_by(values).text('{"k": "qu\\"ote\\\\d"}') == '{"k": "[redacted]"}'
    found = shown_by(values).attributes({"a": "longer-secret", "b": ["x", "longer-secret"], "n": 3, "t": True})
    assert found == {"a": "[redacted]", "b": ["x", "[redacted]"], "n": 3, "t": True}
