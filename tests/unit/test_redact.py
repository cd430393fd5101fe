"""No secret is shown: shapes, names, headers, URLs, cut edges; and no text takes long."""

# ruff: noqa: E501 - tables of one case a line; the secrets are made up
from __future__ import annotations

import json
import random
from functools import partial

import pytest
from cost import assert_proportional

from clrk.gateway.redact import REDACTED, is_secret_header, redact_headers, redact_text, redact_url

PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7bq1\n" * 20 + "-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLXNpZ25hdHVyZQ"
SHAPES = {
    "Anthropic": "sk-ant-api03-Zx81hQw0-_aaBBccDDee",
    "OpenAI": "sk-proj-Zx81hQw0aaBBccDDee",
    "OpenAI, old": "sk-Zx81hQw0aaBBccDDee",
    "Stripe": "sk_live_Zx81hQw0aaBB",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "AWS, session": "ASIAIOSFODNN7EXAMPLE",
    "GitHub": "ghp_Zx81hQw0aaBBccDDeeFF11223344",
    "GitHub, fine": "github_pat_11AAAA_Zx81hQw0aaBB",
    "GitLab": "glpat-Zx81hQw0aaBB",
    "Slack": "xoxb-123456789-abcdef",
    "Slack, app": "xapp-1-A1-123",
    "Google": "AIzaSyA-Zx81hQw0aaBBccDDeeFF1122334",
    "Hugging Face": "hf_Zx81hQw0aaBBccDDeeFF",
    "JWT": JWT,
    "PEM": PEM,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "around", ["{}", "key {} end", '{{"x": "{}"}}', "a={}&b", "<{}>", "é{}é", "x:{},y", "({})", "\n{}\n"]
)
def test_shapes_wherever_they_stand(name, around):
    shown = redact_text(around.format(SHAPES[name]))
    assert SHAPES[name][-12:] not in shown
    assert shown == around.format(REDACTED)


NAMED = [
    ('{"password": "hunter2"}', '{"password": "[redacted]"}'),
    ('{"password":"hun\\"ter2", "x": 1}', '{"password":"[redacted]", "x": 1}'),
    ('{"Password" : "hunter2"}', '{"Password" : "[redacted]"}'),
    ('{"db_password":"hunter2"}', '{"db_password":"[redacted]"}'),
    ('{"clientSecret":"hunter2"}', '{"clientSecret":"[redacted]"}'),
    ('{"secretAccessKey":"hunter2"}', '{"secretAccessKey":"[redacted]"}'),
    ('{"secret_key":"hunter2"}', '{"secret_key":"[redacted]"}'),
    ('{"access_token":"hunter2"}', '{"access_token":"[redacted]"}'),
    ('{"apiKey":"hunter2"}', '{"apiKey":"[redacted]"}'),
    ('{"api-key":"hunter2"}', '{"api-key":"[redacted]"}'),
    ('{"x_api_key":"hunter2"}', '{"x_api_key":"[redacted]"}'),
    ('{"credentials":{"user":"a","hunter":2}}', '{"credentials":[redacted]}'),
    ('{"secrets":["hunter2", "hunter3"], "x": 1}', '{"secrets":[redacted], "x": 1}'),
    ('{"token": 1234567}', '{"token": [redacted]}'),
    ("{'password': 'hunter2'}", "{'password': '[redacted]'}"),
    (json.dumps({"arguments": json.dumps({"password": "hunter2"})}), r'{"arguments": "{\"password\": \"[redacted]\"}"}'),
    (json.dumps(json.dumps(json.dumps({"token": "hunter2"}))), r'"\"{\\\"token\\\": \\\"[redacted]\\\"}\""'),
    ("grant_type=password&password=hunter2&x=1", "grant_type=password&password=[redacted]&x=1"),
    ("OPENAI_API_KEY=hunter2 ./run", "OPENAI_API_KEY=[redacted] ./run"),
    ("password: hunter2\nuser: alice", "password: [redacted]\nuser: alice"),
    ("Authorization: Basic aHVudGVyMg==\r\nX: 1", "Authorization: [redacted]\r\nX: 1"),
    ("Cookie: a=hunter2; b=hunter3\nX: 1", "Cookie: [redacted]\nX: 1"),
    ("-H 'Authorization: Bearer hunter2hunter2'", "-H 'Authorization: [redacted]'"),
    ("Bearer hunter2hunter2", "Bearer [redacted]"),
    ("https://me:hunter2@host.test/x", "https://[redacted]@host.test/x"),
    ("see https://host.test/x?key=hunter2&a=1", "see https://host.test/x?key=[redacted]&a=1"),
    (r'"https://host.test/x?a=1\u0026sig=hunter2"', r'"https://host.test/x?a=1\u0026sig=[redacted]"'),
    ("https://host.test/?a=1&amp;code=hunter2", "https://host.test/?a=1&amp;code=[redacted]"),
    ("redirect=https%3A%2F%2Fhost%2F%3Ftoken%3Dhunter2", "redirect=https%3A%2F%2Fhost%2F%3Ftoken%3D[redacted]"),
    ("<Password>hunter2</Password>", "<Password>[redacted]</Password>"),
    ("<SecretAccessKey>hunter2/x</SecretAccessKey>", "<SecretAccessKey>[redacted]</SecretAccessKey>"),
    ('<w:Password Type="x#PasswordText">hunter2</w:Password>', '<w:Password Type="x#PasswordText">[redacted]</w:Password>'),
    ("<token><![CDATA[hunter<2]]></token>", "<token><![CDATA[[redacted]]]></token>"),
    ("<token>hunter2", "<token>[redacted]"),
    ('password: "hunter 2"\nuser: alice', 'password: "[redacted]"\nuser: alice'),
    ("password = 'hunter2' # x", "password = '[redacted]' # x"),
    ("password = hunter2", "password = [redacted]"),
    ('"password" => "hunter2", "x" => 1', '"password" => "[redacted]", "x" => 1'),
    (r'{"query": "mutation { login(password: \"hunter2\") { id } }"}', r'{"query": "mutation { login(password: \"[redacted]\") { id } }"}'),
    ("payload=%7B%22token%22%3A%22hunter2%22%2C%22x%22%3A1%7D", "payload=%7B%22token%22%3A%22[redacted]%22%2C%22x%22%3A1%7D"),
    ("payload=%7B%22token%22%3A+%7B%22a%22%3A%22hunter2%22%7D%7D&x=1", "payload=%7B%22token%22%3A+[redacted]%7D&x=1"),
    ("&quot;password&quot;: &quot;hunter2&quot;, x", "&quot;password&quot;: &quot;[redacted]&quot;, x"),
    ('Content-Disposition: form-data; name="password"\r\n\r\nhunter2\r\n--b--', 'Content-Disposition: form-data; name="password"\r\n\r\n[redacted]\r\n--b--'),
    ('[{"name": "API_TOKEN", "value": "hunter2"}, 1]', '[{"name": "API_TOKEN", "value": "[redacted]"}, 1]'),
    ('{"credentials":{"a":{"b":"}"},"hunter":"hunter2"},"x":1}', '{"credentials":[redacted],"x":1}'),
    ('{"secrets":[["a"],"hunter2"],"x":1}', '{"secrets":[redacted],"x":1}'),
    ('{"secrets":[["a"],"hunter2"', '{"secrets":[redacted]'),
    ("Server=db;Uid=me;Pwd=hunter2;", "Server=db;Uid=me;Pwd=[redacted];"),
    ('{"primaryMasterKey": "hunter2", "subscription_key": "hunter2", "primary_key": "id"}', '{"primaryMasterKey": "[redacted]", "subscription_key": "[redacted]", "primary_key": "id"}'),
    ("user[name]=al&user[password]=hunter2&x=1", "user[name]=al&user[password]=[redacted]&x=1"),
    ("user%5Bpassword%5D=hunter2&tokens[api_token][]=hunter2", "user%5Bpassword%5D=[redacted]&tokens[api_token][]=[redacted]"),
    ('Content-Disposition: form-data; name="user[password]"\r\n\r\nhunter2\r\n--b--', 'Content-Disposition: form-data; name="user[password]"\r\n\r\n[redacted]\r\n--b--'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/bot123456789:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw-/getMe", "/REDACTED/getMe"),
        ("/services/T0000AAAA/B0000BBBB/XXXXhunter2XXXXhunter2XX", "/REDACTED"),
        ("/api/webhooks/123456789012345678/hunter2hunter2hunter2hunter2hunter2", "/api/REDACTED"),
        ("/bot/1:2/services/TEAM/webhooks/7/list", "/bot/1:2/services/TEAM/webhooks/7/list"),
    ],
)
def test_paths_that_are_credentials(path, shown):
    assert redact_url(f"https://host.test{path}") == f"https://host.test{shown}"
    assert redact_url(path) == shown


@pytest.mark.parametrize(("text", "shown"), NAMED)
def test_names_that_say_what_follows_is_secret(text, shown):
    assert redact_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        '{"max_tokens": 100, "usage": {"input_tokens": 5, "output_tokens": 7}, "tokens": [1, 2]}',
        '{"token": null, "password": false, "secret": ""}',
        "https://host.test/x?author=1&bypass=2&compass=3 [token]: see below, tokens[0] is first",
        "The token is short. Use a password manager, tokenize, and keep secrets.",
        "task-force desk-lamp risk-averse https://host.test/x?page=2&country_code=de",
        "monkey=banana keyboard: yes; key: value; asky-x: 1",
        "eyJust a word. ASIA is a continent, AKIA too",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "<tokenCount>5</tokenCount> <b>token</b> Vec<Token> and <i>x</i>, if token < 3",
        "mail me@host.test, ssh git@github.com:x/y",
        "",
    ],
)
def test_ordinary_text_stays(text):
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "name",
    """Authorization Proxy-Authorization Cookie Set-Cookie x-api-key api-key X-Goog-Api-Key X-Auth-Token X-Amz-Security-Token
    X-Vault-Token Private-Token PRIVATE-TOKEN X-CSRF-Token Ocp-Apim-Subscription-Key x-functions-key apikey X-ApiKey-Secret
    X-Hub-Signature Authentication-Info X-My-Key token Secret x.auth X-Goog-Iam-Authorization DD-APPLICATION-KEY
    X-Hub-Signature-256 X-Api-Key-2 X-Access-Token-v2 X-Honeycomb-Team""".split(),
)
def test_secret_headers(name):
    assert is_secret_header(name)
    assert redact_headers([(name, "hunter2")]) == {name.lower(): [REDACTED]}


@pytest.mark.parametrize(
    "name",
    "Host Content-Type Accept WWW-Authenticate x-ratelimit-remaining-tokens Idempotency-Key Sec-WebSocket-Key Keep-Alive mcp-session-id Author".split(),
)
def test_headers_that_are_shown(name):
    assert redact_headers([(name, "plain"), (name, "again")]) == {name.lower(): ["plain", "again"]}


def test_other_headers_lose_the_secrets_in_their_values():
    found = redact_headers(
        [("Location", "https://a:hunter2@h/?code=hunter2#x"), ("X-Debug", f"used {SHAPES['OpenAI']}")]
    )
    assert found == {"location": [f"https://{REDACTED}@h/?code={REDACTED}#x"], "x-debug": [f"used {REDACTED}"]}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/x?api_key=1&a=2", "/x?api_key=REDACTED&a=2"),
        ("/x?KEY=1", "/x?KEY=REDACTED"),
        ("/x?X-Amz-Signature=1&X-Amz-Credential=2&X-Amz-Security-Token=3&X-Amz-Date=4", "/x?X-Amz-Signature=REDACTED&X-Amz-Credential=REDACTED&X-Amz-Security-Token=REDACTED&X-Amz-Date=4"),
        ("/x?AWSAccessKeyId=1&Signature=2&Expires=3", "/x?AWSAccessKeyId=REDACTED&Signature=REDACTED&Expires=3"),
        ("/x?sv=1&sig=2", "/x?sv=1&sig=REDACTED"),
        ("/x?X-Goog-Signature=1", "/x?X-Goog-Signature=REDACTED"),
        ("/login?code=1&state=2", "/login?code=REDACTED&state=2"),
        ("/x?password=a+b&q=1", "/x?password=REDACTED&q=1"),
        ("/x?key=", "/x?key="),
        ("/x.json?auth=1&hmac=2&jwt=3&pass=4&pw=5", "/x.json?auth=REDACTED&hmac=REDACTED&jwt=REDACTED&pass=REDACTED&pw=REDACTED"),
        ("/x?client_assertion=1&SAMLResponse=2", "/x?client_assertion=REDACTED&SAMLResponse=REDACTED"),
        ("/x?token[]=1&password%5B0%5D=2", "/x?token[]=REDACTED&password%5B0%5D=REDACTED"),
        (f"/hooks/{SHAPES['Slack']}/y", "/hooks/REDACTED/y"),
        ("https://u:p@host/x", "https://REDACTED@host/x"),
        ("/v1/messages?max_tokens=5", "/v1/messages?max_tokens=5"),
    ],
)  # fmt: skip
def test_urls(url, shown):
    assert redact_url(url) == shown


# --- cut edges ------------------------------------------------------------------------------------------------------

SECRETS = [*SHAPES.values(), "hunter2-hunter2-hunter2"]


@pytest.mark.parametrize("secret", SECRETS, ids=[*SHAPES, "no shape"])
def test_no_cut_shows_half_of_a_secret(secret):
    """Whatever byte the end of the capture falls on, the text holds no 5 characters of the secret in a row."""
    text = f'{{"model": "m", "note": "before", "password": "{secret}", "after": "it is a plain text"}}\nnext line "x"\n'
    if "\n" in secret:
        text = text.replace(secret, json.dumps(secret)[1:-1])
        secret = json.dumps(secret)[1:-1]
    start = text.index(secret)
    for cut in range(start, start + len(secret) + 2):
        first = redact_text(text[:cut], cut_end=True)
        last = redact_text(text[cut:], cut_start=True)
        for at in range(0, len(secret) - 5):
            if secret[at : at + 5] not in ("-----", " PRIV"):
                assert secret[at : at + 5] not in first, (cut, first)
                assert secret[at : at + 5] not in last, (cut, last)


@pytest.mark.parametrize("name", ["OpenAI", "GitHub", "JWT", "AWS", "Slack"])
def test_no_cut_shows_half_of_a_secret_that_stands_in_plain_text(name):
    secret = SHAPES[name]
    text = f"the key is {secret} and that is it"
    for cut in range(text.index(secret), text.index(secret) + len(secret) + 1):
        shown = redact_text(text[:cut], cut_end=True) + redact_text(text[cut:], cut_start=True)
        assert not any(secret[at : at + 6] in shown for at in range(len(secret) - 6)), (cut, shown)
        assert shown.startswith("the key is ")
        assert shown.endswith(" and that is it")


def test_the_end_of_a_private_key_goes_too():
    shown = redact_text(PEM[200:] + "\nafter\n", cut_start=True)
    assert shown == REDACTED + "\nafter\n"
    assert redact_text("before\n" + PEM[:300]) == "before\n" + REDACTED


# --- time -----------------------------------------------------------------------------------------------------------

SLOW = {
    "quotes": '"', "sk-": "sk-", "query": "?key=", "and": "&key=", "schemes": "bearer+", "jwt": "eyJ-", "urls": "://",
    "named": 'token":"', "list": 'token":[', "map": 'secret":{', "pairs": "password=", "line": "cookie:", "plain": "token: ",
    "escaped": "token" + "\\" * 8, "begin": "-----BEGIN PRIVATE KEY-----", "end": "-----END PRIVATE KEY-----",
    "words": "access_key", "colon": 'token"' + " " * 60, "userinfo": "://" + "a" * 500, "encoded": "token%3d", "space": " ",
    "tags": "<token>a", "attributes": "<token " + "a" * 200, "values": "<token>xyz<", "cdata": "<token><![CDATA[", "spaces": "token   =   ",
    "parts": 'token"\r\na\r\nb\r\nc\r\nd\r\n', "html": "token&quot;", "forms": "secret%22+%20+", "members": '"token","value"',
    "lines": "token: 'a\n", "nested": '"secret":{"', "nested2": '"secret":' + "[" * 30 + "]" * 30 + ",", "slashes": "token" + "%5c" * 8,
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_hostile_text_takes_time_in_proportion_to_its_size(name):
    text = (SLOW[name] * (2**20 // len(SLOW[name]) + 1))[: 2**20]
    assert_proportional(partial(redact_text, cut_start=True, cut_end=True), text[: 2**17], text)


def test_a_text_with_too_many_places_shows_nothing_behind_the_first_that_was_not_looked_at():
    for word in ("token ", "sk- ", "://", "eyJ ", "-----BEGIN ", "?key= "):
        text = "begin " + word * 50_000
        shown = redact_text(text + SHAPES["GitHub"] + ' password: "hunter2"')
        assert shown.startswith("begin ")
        assert shown.endswith(REDACTED)
        assert "hunter2" not in shown
        assert SHAPES["GitHub"] not in shown
    calls = ",".join(f'{{"token": "t{number}", "logprob": -0.1, "bytes": [1, 2, 3]}}' for number in range(900))
    assert redact_text(calls).endswith('{"token": "[redacted]", "logprob": -0.1, "bytes": [1, 2, 3]}')


def test_random_text_never_fails():
    source = random.Random(7)
    pieces = [*SLOW.values(), *SHAPES.values(), "é", "\U0001f600", "\udc80", "\0", "\n", "=", "}", "a" * 9]
    for _ in range(300):
        text = " ".join(source.choices(pieces, k=40))
        shown = redact_text(text, cut_start=source.random() < 0.5, cut_end=source.random() < 0.5)
        assert SHAPES["GitHub"][4:] not in shown
        assert redact_text(shown).encode()
