"""`clrk policy suggest`: what was recorded is allowed by the rules that come of it, and nothing else is."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from policy_samples import gateway

from clrk.core.egress_resources import EgressL4Route
from clrk.core.url_paths import path_readings
from clrk.gateway.egress.record import request_attributes
from clrk.gateway.interpret import RequestHead
from clrk.gateway.policy import EgressPolicy
from clrk.gateway.policy_names import normalise_name, parse_ip
from clrk.gateway.policy_suggest import gather, generalise, render
from clrk.gateway.redact import KNOWN_SECRETS


def span(name: str, host: str, port: int = 443, component: str = "gateway", **attributes: Any) -> dict[str, Any]:
    found = {"clrk.dst.name": host, "server.port": port} | {key.replace("__", "."): v for key, v in attributes.items()}
    return {"name": name, "attributes": found, "resource": {"clrk.component": component}}


def call(
    host: str, port: int = 443, method: str = "GET", path: str = "/", query: str = "", **more: Any
) -> dict[str, Any]:
    """The span of a request, with the attributes that the relay gives it."""
    head = RequestHead(method, "https", host, port, path, query, ())
    made = span(f"{method} {host}", host, port, **more)
    made["attributes"] |= request_attributes(head, KNOWN_SECRETS)
    return made


def rules(*spans: dict[str, Any], paths: bool = False) -> list[dict[str, Any]]:
    document = yaml.safe_load(text_of(*spans, paths=paths))
    return document["spec"]["rules"] if document else []


def text_of(*spans: dict[str, Any], paths: bool = False) -> str:
    return render(gather(spans), agent="support", namespace="team-b", gateway="main", paths=paths)


def policy_of(*spans: dict[str, Any], paths: bool = False) -> EgressPolicy:
    route = EgressL4Route.model_validate(yaml.safe_load(text_of(*spans, paths=paths)))
    return EgressPolicy.compile(gateway("team-b", "main"), [route])


def test_a_name_that_found_no_room_needs_no_rule() -> None:
    text = text_of(span("egress.dns.denied", "one-more.example.com", 0, clrk__egress__deny_reason="too_many_names"))
    assert "one-more" not in text


def test_the_text_is_a_route_that_can_be_applied_as_it_is() -> None:
    text = text_of(
        call("api.example.com"), call("api.example.com"), call("b.example.com"), span("egress.tcp", "db.internal", 5432),
        call("c.example.com", clrk__egress__would_deny="no_rule"),
        span("egress.dial.denied", "192.0.2.7", 22, clrk__egress__deny_reason="no_rule"),
        span("egress.dns.denied", "new.example.com", 0, clrk__egress__deny_reason="name_not_allowed"),
    )  # fmt: skip
    assert text == (
        "# What team-b/support did, as far as the store remembers. Read it before it is applied.\n"
        "apiVersion: clrk/v1alpha1\nkind: EgressL4Route\n"
        "metadata:\n  name: support-recorded\n  namespace: team-b\n"
        "spec:\n  gatewayRef: {name: main}\n  rules:\n"
        '    # 1 call, 1 denied now or when enforced\n    - cidrs: ["192.0.2.7/32"]\n      ports: [22]\n'
        "    # 4 calls, 1 denied now or when enforced\n"
        '    - hostnames: ["api.example.com", "b.example.com", "c.example.com"]\n      ports: [443]\n'
        '    # 1 call\n    - hostnames: ["db.internal"]\n      ports: [5432]\n'
        "# Names that were asked for and denied; nobody knows with which port they would have been dialled:\n"
        '#   - hostnames: ["new.example.com"]\n'
    )
    route = EgressL4Route.model_validate(yaml.safe_load(text))
    assert route.metadata.namespace == "team-b"


def test_nothing_recorded_is_no_route() -> None:
    assert yaml.safe_load(text_of()) is None
    assert "mode Record" in text_of()


def test_what_no_rule_should_allow_is_left_out() -> None:
    assert rules(
        call("a.test", clrk__egress__deny_reason="host_mismatch"),
        span("egress.dial.denied", "169.254.169.254", 80, clrk__egress__deny_reason="address_metadata"),
        span("egress.dial.denied", "b.test", 80, clrk__egress__deny_reason="bad_request_framing"),
        span("egress.proxy.malformed", "c.test", 80),
        span("GET d.test", "d.test", 80, component="agent"),  # an agent's own word
        span("invoke_agent", "e.test", 80, component="runtime"),
    ) == []  # fmt: skip


def test_paths_are_grouped_and_ids_become_wildcards() -> None:
    made = [
        *(call("api.test", path=f"/v1/items/{n}", query="page=1") for n in range(30)),
        call("api.test", path="/v1/items/550e8400-e29b-41d4-a716-446655440000"),
        call("api.test", method="POST", path="/v1/items"),
        call("api.test", path="/v1/items"),
        call("api.test", path="/v1/items/sub/list"),
        call("api.test", method="POST", path="/v1/messages"),
    ]
    assert rules(*made, paths=True) == [
        {"hostnames": ["api.test"], "ports": [443], "http": {"methods": ["GET"], "paths": ["/v1/items/sub/list", "/v1/items/*"]}},
        {"hostnames": ["api.test"], "ports": [443], "http": {"methods": ["GET", "POST"], "paths": ["/v1/items"]}},
        {"hostnames": ["api.test"], "ports": [443], "http": {"methods": ["POST"], "paths": ["/v1/messages"]}},
    ]  # fmt: skip
    assert rules(*made) == [{"hostnames": ["api.test"], "ports": [443]}]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("/v1/users/42", "/v1/users/*"),
        ("/v1/users/42/posts", "/v1/users/*/posts"),
        ("/u/deadbeef01", "/u/*"),
        ("/f/msg01XFDUDYJgAACzvnptv", "/f/*"),
        ("/v1beta/models/gemini-2.0-flash:generateContent", "/v1beta/models/gemini-2.0-flash:generateContent"),
        ("/v1/models/text-embedding-3-small", "/v1/models/text-embedding-3-small"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/bot/REDACTED/x", "/bot/*/x"),
        ("/", "/"),
        ("/a/..%2fb", None),
        ("*", None),
        ("", None),
    ],
)
def test_what_looks_like_an_id(path: str, pattern: str | None) -> None:
    assert generalise(path) == pattern


def test_a_host_with_a_tunnel_or_too_many_paths_is_not_narrowed() -> None:
    assert rules(call("a.test", path="/x"), span("egress.tcp", "a.test"), paths=True) == [
        {"hostnames": ["a.test"], "ports": [443]}
    ]
    many = [call("a.test", path=f"/{'x' * n}") for n in range(1, 150)]
    assert rules(*many, paths=True) == [{"hostnames": ["a.test"], "ports": [443]}]
    assert "not narrowed" in text_of(*many, paths=True)
    long = call("a.test", path="/" + "y" * 5000)
    assert policy_of(long, paths=True).request("a.test", None, 443, "GET", "/" + "y" * 5000).allowed
    assert not policy_of(long, paths=True).request("a.test", None, 443, "GET", "/" + "y" * 99).allowed


HOSTILE = [
    "a.test\nkind: x",
    'a"]\n- hostnames: ["**.test',
    "\x1b]0;x\x07.test",
    "# x",
    "é.test",
    "a..test",
    "{}",
    "x" * 300,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_in_no_rule_and_no_comment(name: str) -> None:
    text = text_of(call(name), span("egress.tcp", name, 22), span("egress.dns.denied", name, 0), call("a.test"))
    assert name not in text
    assert "\x1b" not in text
    assert yaml.safe_load(text)["spec"]["rules"] == [{"hostnames": ["a.test"], "ports": [443]}]


@given(st.text(alphabet="a/\n\"'\\{}[]:#%*\x1b\u2028é ,", max_size=30))
def test_hostile_paths_stay_inside_their_quotes(text: str) -> None:
    made = text_of(call("a.test", path="/" + text), call("a.test", path="/ok"), paths=True)
    assert "\x1b" not in made
    assert "\u2028" not in made
    for rule in yaml.safe_load(made)["spec"]["rules"]:
        assert set(rule) == {"hostnames", "ports", "http"}
        assert rule["hostnames"] == ["a.test"]
        assert rule["ports"] == [443]


HOSTS = st.sampled_from(
    ["api.example.com", "b.example.com", "192.0.2.7", "2001:db8::5", "xn--bcher-kva.example", "_x.y"]
)
PATHS = st.lists(
    st.sampled_from(
        ["v1", "users", "42", "deadbeef0123", "a.b", "x%20y", "%2F", "..", "*", "é", ";p=1", "", "REDACTED"]
    ),
    max_size=5,
).map(lambda parts: "/" + "/".join(parts))
CALLS = st.tuples(HOSTS, st.sampled_from([80, 443, 8443]), st.sampled_from(["GET", "POST", "DELETE", ""]), PATHS)


@given(st.lists(CALLS, min_size=1, max_size=12), st.booleans())
def test_what_was_recorded_is_allowed_and_another_host_and_port_are_not(calls: list[Any], paths: bool) -> None:
    spans = [
        call(host, port, method, path) if method else span("egress.tcp", host, port)
        for host, port, method, path in calls
    ]
    recorded = gather(spans)
    if not any(seen.requests or seen.tunnels for seen in recorded.hosts.values()):
        return  # nothing that a rule can name
    compiled = policy_of(*spans, paths=paths)
    ports: dict[str, set[int]] = {}
    for host, port, method, path in calls:
        address = parse_ip(host)
        name = None if address is not None else host
        ports.setdefault(host, set()).add(port)
        if not method:
            assert compiled.tunnel(name, address, port).allowed
        elif path_readings(path) or not paths:
            assert compiled.request(name, address, port, method, path).allowed, (host, port, method, path)
    for host in ("other.example.com", "example.com", "x.api.example.com"):
        assert not compiled.connect(host, None, 443).allowed
    assert not compiled.connect(None, ip_address("192.0.2.8"), 443).allowed
    for host, used in ports.items():
        if normalise_name(host) is not None:
            assert not any(compiled.connect(host, None, port).allowed for port in {80, 443, 8443, 22} - used)
