"""Secret shapes, a gateway's own patterns and values, and every escape that hides one from a plain search."""

# ruff: noqa: E501 - tables of one case a line; the secrets are made up
from __future__ import annotations

import base64
import html
import json
import random
import uuid
from collections.abc import Callable
from functools import partial
from urllib.parse import quote, quote_plus

import pytest
from cost import assert_cheap, assert_proportional
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.redact import REDACTED, Redactor, redact_text, redact_url
from clrk.gateway.redact_values import MIN_VALUE_BYTES, HiddenValues

A = "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gH3jL5nP7rT9vX1zB3"
HEX = "0123456789abcdef0123456789abcdef"
SHAPES = {
    "AWS, access key": "AKIA" + "Q3EGRIAWZ7JHTNVX", "AWS, session": "ASIA" + "Q3EGRIAWZ7JHTNVX", "AWS, bearer": "ABIA" + "Q3EGRIAWZ7JHTNVX",
    "Bedrock": "ABSK" + A * 2, "Bedrock, short-lived": "bedrock-api-key-" + A,
    "Google, API key": "AIza" + A[:35], "Google, access": "ya29." + A, "Google, client": "GOCSPX-" + A[:28], "Google, refresh": "1//0" + A,
    "Azure, client secret": "abc8Q~" + A[:34], "Azure, storage": "AccountKey=" + A + "==", "Azure, bus": "SharedAccessKey=" + A + "=",
    "GitHub": "ghp_" + A[:36], "GitHub, app": "ghs_" + A[:36], "GitHub, fine": "github_pat_11" + A,
    "GitLab": "glpat-" + A[:20], "GitLab, runner": "glrt-" + A[:20], "GitLab, deploy": "gldt-" + A[:20], "GitLab, old runner": "GR1348941" + A[:20],
    "Slack": "xoxb-123456789012-123456789012-" + A[:24], "Slack, user": "xoxp-123456789012-abcdef", "Slack, refresh": "xoxe-1-" + A,
    "Slack, app": "xapp-1-A012-123-" + HEX, "Slack, legacy": "xoxs-1234-abcd",
    "Stripe": "sk_live_" + A[:24], "Stripe, restricted": "rk_live_" + A[:24], "Stripe, webhook": "whsec_" + A[:32],
    "OpenAI": "sk-proj-" + A, "OpenAI, service": "sk-svcacct-" + A, "Anthropic": "sk-ant-api03-" + A, "OpenRouter": "sk-or-v1-" + HEX * 2,
    "Hugging Face": "hf_" + A[:34], "Hugging Face, org": "api_org_" + A[:34], "Groq": "gsk_" + A, "xAI": "xai-" + A, "Perplexity": "pplx-" + A,
    "Replicate": "r8_" + A[:37], "Fireworks": "fw_" + A[:24], "Together": "tgp_v1_" + A, "Nvidia": "nvapi-" + A, "Tavily": "tvly-" + A[:32],
    "Pinecone": "pcsk_" + A, "LangSmith": "lsv2_pt_" + HEX + "_0123456789", "Jina": "jina_" + A, "E2B": "e2b_" + HEX,
    "npm": "npm_" + A[:36], "PyPI": "pypi-AgEIcHlwaS5vcmc" + A, "RubyGems": "rubygems_" + HEX, "Docker": "dckr_pat_" + A[:27],
    "SendGrid": "SG." + A[:22] + "." + A[:43], "Twilio": "SK" + HEX, "Mailgun": "key-" + HEX, "Brevo": "xkeysib-" + HEX + "-" + A[:16],
    "Resend": "re_" + A[:8] + "_" + A[:24], "Telegram": "123456789:AA" + A[:33],
    "Shopify": "shpat_" + HEX, "Square": "sq0atp-" + A[:22], "Square, access": "EAAA" + A, "DigitalOcean": "dop_v1_" + HEX * 2,
    "Databricks": "dapi" + HEX, "Grafana": "glsa_" + A[:32] + "_01234567", "Sentry": "sntrys_" + A, "PlanetScale": "pscale_tkn_" + A[:43],
    "Vault": "hvs." + A, "Pulumi": "pul-" + HEX, "Sourcegraph": "sgp_" + HEX, "Linear": "lin_api_" + A[:40], "Figma": "figd_" + A[:40],
    "Notion": "ntn_" + A, "CircleCI": "CCIPAT_" + A[:22] + "_" + HEX, "Buildkite": "bkua_" + HEX, "Netlify": "nfp_" + A[:36],
    "Supabase": "sbp_" + HEX, "Postman": "PMAK-" + HEX[:24] + "-" + HEX, "Atlassian": "ATATT3" + A, "Tailscale": "tskey-auth-" + A[:20],
    "Doppler": "dp.pt." + A[:43], "Dynatrace": "dt0c01." + A[:24].upper() + "." + A.upper(), "Alibaba": "LTAI" + A[:20], "Tencent": "AKID" + A[:32],
    "EasyPost": "EZAK" + A, "age": "AGE-SECRET-KEY-1" + A.upper(), "Swarm": "SWMTKN-1-" + HEX + "-" + A[:25], "Terraform": "atlasv1." + A,
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0." + A[:43], "JWE": "eyJhbGciOiJSU0EifQ.a1.b2.c3." + A,
    "PEM": "-----BEGIN EC PRIVATE KEY-----\n" + A + "\n-----END EC PRIVATE KEY-----",
    "OpenSSH": "-----BEGIN OPENSSH PRIVATE KEY-----\n" + A + "\n-----END OPENSSH PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n" + A + "\n-----END PGP PRIVATE KEY BLOCK-----",
    "PuTTY": "PuTTY-User-Key-File-3: ssh-ed25519\nComment: x\nPrivate-Lines: 1\n" + A + "\nPrivate-MAC: " + HEX,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("around", ["{}", "use {} now", '{{"x": "{}"}}', "a={}&b=1", "<{}>", "x_{}", "é{}\n"])
def test_every_shape_is_hidden_wherever_it_stands(name: str, around: str) -> None:
    secret = SHAPES[name]
    shown = redact_text(around.format(secret))
    assert shown == around.format(REDACTED) or shown.replace(REDACTED, "") in around.format(""), shown
    assert secret[-12:] not in shown


@pytest.mark.parametrize("name", [name for name in SHAPES if "\n" not in SHAPES[name]])
def test_every_shape_is_hidden_in_a_url(name: str) -> None:
    secret = SHAPES[name]
    for url in (f"https://host.test/x/{secret}/y?page=2", f"/x?page=2&q={secret}"):
        shown = redact_url(url)
        assert secret[-12:] not in shown
        assert "page=2" in shown or "=" in secret  # what has a name goes up to the next parameter


def _percent(text: str) -> str:
    return "".join(f"%{ord(char):02x}" for char in text)


ENCODINGS = {
    "percent, reserved only": lambda text: quote(text, safe=""),
    "percent, all": _percent,
    "percent, twice": lambda text: quote(_percent(text)),
    "percent, three times": lambda text: quote(quote(_percent(text))),
    "percent, every other": lambda text: "".join(
        f"%{ord(char):02X}" if at % 2 and char not in "\n" else char for at, char in enumerate(text)
    ),
    "JSON \\u": lambda text: "".join(f"\\u{ord(char):04x}" if char != "\n" else "\\n" for char in text),
    "JSON \\u in JSON": lambda text: json.dumps("".join(f"\\u{ord(char):04X}" for char in text))[1:-1],
    "HTML": lambda text: "".join(f"&#{ord(char)};" if char != "\n" else char for char in text),
    "HTML, hex": lambda text: "".join(f"&#x{ord(char):x};" if char != "\n" else char for char in text),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "name", ["OpenAI", "GitHub", "AWS, access key", "Slack", "JWT", "SendGrid", "Telegram", "GitLab"]
)
def test_no_encoding_hides_a_shape(encoding: str, name: str) -> None:
    coded = ENCODINGS[encoding](SHAPES[name])
    for around in ("{}", "x={}&page=2", '{{"note": "{}", "page": 2}}'):
        shown = redact_text(around.format(coded))
        assert coded not in shown
        assert coded[-30:] not in shown
        assert REDACTED in shown
        assert ("page" in around) == ("page" in shown)


@pytest.mark.parametrize("encoding", ["percent, all", "JSON \\u", "percent, twice"])
def test_no_encoding_hides_what_has_a_name(encoding: str) -> None:
    coded = ENCODINGS[encoding]
    shown = redact_text(coded('{"password": "hunter2", "page": 2}'))
    assert coded("hunter2") not in shown
    assert coded("page") in shown
    assert "hunter2" not in redact_text(f'{{"{coded("password")}": "hunter2", "page": 2}}')
    assert "hunter2" not in redact_text(f"{coded('api_key')}=hunter2&page=2")


NO_SECRETS = [
    str(uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF)), f"sha256:{HEX}{HEX}", HEX, f'"etag": "{HEX}"', "d41d8cd98f00b204e9800998ecf8427e",
    f"data:image/png;base64,iVBORw0KGgoAAAANSUhEUg{'AbCdEfGhIjKlMnOpQrStUvWxYz0123456789+/' * 20}==",
    "msg_01XFDUDYJgAACzvnptvVoYEL req_011CSHoEeqs5C35K2UUqR7Fy chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT call_DdmO9pD3xa9XTPNJ32zg2hcA",
    "resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b toolu_01D7FLrfh4GYq7yT1ULFeyMV vs_67d3bdaa file-BK7bzQj3FfZFXr7DbL6xJwfo",
    "task-force ask-me risk-averse basket-ball SKILL SK key-value key-0123 bot fw_x re_view re_turn_value core_re_use r8 SG. SG.x.y",
    "before_deadbeefdeadbeef_after_0123456789abcdef", "npm_config_cache hf_hub dapi LTAI AKID EAAA 1//0 hvs. dp.st. pul-se",
    "arn:aws:iam::123456789012:role/x ami-0abcdef1234567890 vpc-0123456789abcdef0 projects/my-project/locations/us-central1",
    "https://host.test/v1/projects/p-1/messages?page=2&limit=10&order=desc&after=msg_abc", "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@host", "12:AAbb 123456789:AAshort", "2026-11-28T18:00:00.123Z 198.51.100.7:443 [2001:db8::1]:80",
    "%20%41 \\u0041\\u0042 &#65; 100%25 done", "a~bQ~c 1Q~2", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----", "PuTTY-User-Key-File",
    '{"text_tokens": 5, "total_tokens": 7, "max_completion_tokens": 9}', "The keys are in the drawer; the code is good; the secrets stay.",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


def test_random_ids_and_hashes_and_images_stay() -> None:
    source = random.Random(11)
    for _ in range(300):
        for text in (
            str(uuid.UUID(int=source.getrandbits(128))),
            source.randbytes(32).hex(),
            str(source.getrandbits(60)),
        ):
            assert redact_text(f"id {text}.") == f"id {text}."
    images = [base64.b64encode(source.randbytes(9000)).decode() for _ in range(40)]
    assert sum(redact_text(image) != image for image in images) <= 2  # a prefix of four letters may stand behind a `/`


# --- a gateway's own -------------------------------------------------------------------------------------------------


def values(*hidden: str) -> Callable[[], HiddenValues]:
    known = HiddenValues(hidden)
    return lambda: known


OWN = Redactor(
    ["EMP-[0-9]{6}", "(?i)projekt [a-zü]+"],
    values('cr3d~ential/with "quotes" & stuff', "short", "abc", "pässwörter-ü"),
)


def test_patterns_of_the_gateway() -> None:
    assert OWN.text("EMP-123456 and EMP-12 of Projekt Übermut.") == f"{REDACTED} and EMP-12 of {REDACTED}."
    assert OWN.url("/staff/EMP-123456?x=EMP-654321") == "/staff/REDACTED?x=REDACTED"
    assert OWN.headers([("X-Staff", "EMP-123456, you")]) == {"x-staff": [f"{REDACTED}, you"]}
    assert OWN.text("%45MP%2d123456 E\\u004dP-123456") == f"{REDACTED} {REDACTED}"
    assert redact_text("EMP-123456") == "EMP-123456"
    assert Redactor(["x*"]).text("abc xx d") == f"abc {REDACTED} d"  # the empty match is none


@pytest.mark.parametrize("value", ['cr3d~ential/with "quotes" & stuff', "short", "pässwörter-ü"])
def test_values_are_hidden_in_every_form(value: str) -> None:
    forms = [
        value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1].replace("/", "\\/"),
        quote(value), quote(value, safe=""), quote(quote(value, safe="")), json.dumps(json.dumps(value))[3:-3],
        quote_plus(value), html.escape(value), html.escape(value, quote=False),
    ]  # fmt: skip
    for form in forms:
        assert OWN.text(f"<{form}> ok") == f"<{REDACTED}> ok", form
        assert "ntial" not in OWN.url(f"/x/{quote(form)}")
    if len(value) > 8:
        for ahead in range(4):
            coded = base64.b64encode(b"u" * ahead + value.encode() + b"!").decode()
            assert REDACTED in OWN.text(coded)
            assert coded[6:-6] not in OWN.text(coded)


def test_a_value_that_stands_everywhere_is_not_looked_for() -> None:
    assert OWN.text("abc") == "abc"
    assert Redactor(values=values("", "x" * (MIN_VALUE_BYTES - 1))).text("x" * 9) == "x" * 9


@pytest.mark.parametrize("value", ["one value, with spaces and 'quotes' in it", "0123456789abcdef0123"])
def test_no_cut_shows_half_of_a_value(value: str) -> None:
    own = Redactor(values=values(value))
    text = f"before it {value} and after"
    for cut in range(text.index(value), text.index(value) + len(value) + 1):
        shown = own.text(text[:cut], cut_end=True) + own.text(text[cut:], cut_start=True)
        assert not any(value[at : at + 8] in shown for at in range(len(value) - 7)), (cut, shown)
        assert shown.startswith("before it")


def test_attributes_lose_their_secrets_and_nothing_else() -> None:
    kept = {"n": 1, "f": 0.5, "b": True, "url": "/x?token=REDACTED", "list": ["a", "b"], "text": "plain"}
    assert OWN.attributes(kept, {"url"}) == kept
    found = OWN.attributes({**kept, "list": ["a", "EMP-123456"], "uri": f"file:///{SHAPES['GitHub']}"}, {"url"})
    assert found == {**kept, "list": ["a", REDACTED], "uri": f"file:///{REDACTED}"}


def test_attributes_are_looked_through_one_by_one() -> None:
    """What holds for the beginning or the end of a text holds for that of each attribute."""
    own = Redactor(["^EMP-[0-9]+$"])
    assert own.attributes({"a": "EMP-1", "b": "plain"}) == {"a": REDACTED, "b": "plain"}
    assert own.attributes({"a": "\udc80 is no text", "b": "EMP-2"}) == {"a": "\udc80 is no text", "b": REDACTED}
    found = Redactor().attributes({"a": "<Secret>hunter2", "b": "<x"})
    assert found == {"a": f"<Secret>{REDACTED}", "b": "<x"}


SLOW = {
    "(a*)*b": "a", "(?s)x(.*y)?": "x", "EMP-[0-9]{6}": "EMP-123456", "(a|aa)+$": "a", "[a-z]+": "a ",
}  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_hostile_text_under_the_gateways_patterns_takes_time_in_proportion(pattern: str) -> None:
    text = SLOW[pattern] * (2**19 // len(SLOW[pattern]))
    redactor = Redactor([pattern], values("aaaa", "x" * 4096))
    assert_proportional(partial(redactor.text, cut_start=True, cut_end=True), text[: 2**16], text)


@pytest.mark.parametrize("size", [40, 1200])
def test_many_values_are_looked_for_in_one_pass(size: int) -> None:
    """Session keys that are rotated each hour are some hundred values after a few days."""
    source = random.Random(7)
    letters = "ABCDEFGHIJKLMNOPabcdefghijklmnop0123456789"
    many = HiddenValues("".join(source.choices(letters, k=size)) for _ in range(300))
    few = HiddenValues(["one-value-that-is-secret"])
    text = bytes(source.choices(letters.encode(), k=400))
    assert_cheap(
        lambda: [list(many.find(text)) for _ in range(100)], lambda: [list(few.find(text)) for _ in range(100)], 10
    )


@pytest.mark.parametrize("unit", ["%41", "\\u0041", "&#65;", "%2541", "%25" * 3, "\\" * 8 + "u0041", "-EAAA", " re_", ":AA", "Q~", "/1//0", "%22token%22%3a"])  # fmt: skip
def test_hostile_escapes_and_prefixes_take_time_in_proportion(unit: str) -> None:
    text = (unit * (2**20 // len(unit) + 1))[: 2**20]
    assert_proportional(partial(redact_text, cut_start=True, cut_end=True), text[: 2**17], text)


def test_behind_too_many_escapes_nothing_is_shown() -> None:
    text = "begin " + "%20" * 60_000 + _percent("sk-ant-" + A)
    shown = redact_text(text)
    assert shown.startswith("begin %20")
    assert shown.endswith(REDACTED)
    assert _percent(A)[-30:] not in shown


@given(st.text(alphabet='%25\\u0046&#x;"a:=skgp_- \n', max_size=60), st.sampled_from(sorted(SHAPES)))
def test_what_stands_beside_a_secret_does_not_show_it(around: str, name: str) -> None:
    secret = SHAPES[name]
    shown = redact_text(f"{around} {secret} {around}")
    assert secret[-12:] not in shown


def test_a_text_that_was_clean_is_looked_through_again_when_the_values_change() -> None:
    known = [HiddenValues(["first-value"])]
    own = Redactor(values=lambda: known[0])
    assert own.text("second-value") == own.url("second-value") == "second-value"
    assert own.attributes({"a": "second-value"}) == {"a": "second-value"}
    known[0] = HiddenValues(["second-value"])
    assert own.text("second-value") == REDACTED
    assert own.url("second-value") == "REDACTED"
    assert own.attributes({"a": "second-value"}) == {"a": REDACTED}


def test_what_is_remembered_is_bounded() -> None:
    own = Redactor()
    for number in range(5000):
        own.text(f"plain {number}")
    own.text("x" * 5000)
    assert len(own._clean) <= 512
    assert max(map(len, own._clean)) <= 128
