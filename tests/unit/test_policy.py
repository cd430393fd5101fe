"""Egress policy: which connections are allowed, and above all which must not be."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from policy_samples import API, NARROW, PUBLIC, brief, gateway, policy, route

from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.policy import EgressPolicy, Verdict
from clrk.gateway.policy_names import normalise_name, plain_host

# --- Which rules count ----------------------------------------------------------------------------------------------


def test_without_a_gateway_everything_is_denied() -> None:
    nothing = EgressPolicy.compile(None, [route(API)])
    assert not nothing.may_allow_name("api.example.com")
    assert nothing.alias("api.example.com") is None
    assert not nothing.is_passthrough("api.example.com")
    assert not nothing.names_address(PUBLIC, 443, None)
    for verdict in (
        nothing.connect("api.example.com", PUBLIC, 443),
        nothing.request("api.example.com", PUBLIC, 443, "GET", "/"),
    ):
        assert brief(verdict) == (False, "no_gateway")
        assert "EgressGateway" in verdict.hint
        assert "api.example.com" in verdict.hint


def test_routes_of_other_gateways_and_namespaces_do_not_count() -> None:
    routes = [route(API, to="other"), route(API, namespace="theirs"), route({"hostnames": ["b.example.com"]}, name="b")]
    compiled = EgressPolicy.compile(gateway(), routes)
    assert not compiled.connect("api.example.com", None, 443).allowed
    assert compiled.connect("b.example.com", None, 1).allowed
    assert compiled.connect("b.example.com", None, 1).rule == "EgressL4Route default/b rules[0]"


def test_default_policy() -> None:
    assert brief(policy().connect("a.example.com", PUBLIC, 443)) == (False, "no_rule")
    assert policy().connect("a.example.com", PUBLIC, 443).rule == "EgressGateway default/default defaultPolicy"
    everything = policy(defaultPolicy="allow-all")
    assert everything.connect("a.example.com", PUBLIC, 443) == Verdict(
        True, "default_policy", "EgressGateway default/default defaultPolicy", ""
    )
    assert everything.request("a.example.com", PUBLIC, 443, "GET", "/").allowed
    assert everything.connect(None, PUBLIC, 22).allowed
    assert everything.may_allow_name("a.example.com")
    # Even then no CIDR rule names anything that is refused otherwise.
    assert not everything.names_address(ip_address("127.0.0.1"), 80, ip_network("127.0.0.0/8"))


def test_reasons_name_the_closest_rule() -> None:
    compiled = policy({"hostnames": ["other.example.com"]}, API, {**API, "http": {"methods": ["GET"]}, "ports": [80]})
    port = compiled.connect("api.example.com", None, 8443)
    assert (brief(port), port.rule) == ((False, "port_not_allowed"), "EgressL4Route default/web rules[1]")
    http = compiled.request("api.example.com", None, 80, "POST", "/")
    assert (brief(http), http.rule) == ((False, "http_not_allowed"), "EgressL4Route default/web rules[2]")
    assert compiled.connect("api.example.com", None, 443).rule == "EgressL4Route default/web rules[1]"


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("api.example.com", "api.example.com", True),
        ("api.example.com", "API.Example.COM.", True),
        ("api.example.com", "api.example.com..", False),
        ("api.example.com", "api.example.co", False),
        ("api.example.com", "xapi.example.com", False),
        ("api.example.com", "api.example.com.evil.test", False),
        ("api.example.com", "api.example.com\0.evil.test", False),
        ("api.example.com", "api.example.com%00", False),
        ("api.example.com", "api.example.com@evil.test", False),
        ("api.example.com", "api.example.com:443", False),
        ("api.example.com", "api\u3002example\u3002com", True),  # IDNA's other dots
        ("api.example.com", "ap\u0456.example.com", False),  # Cyrillic i
        ("api.example.com", "\uff41pi.example.com", True),  # full-width a is a
        ("xn--bcher-kva.example", "b\u00fccher.example", True),
        ("xn--bcher-kva.example", "B\u00dcCHER.example", True),
        ("xn--bcher-kva.example", "bucher.example", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", ".example.com", False),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", "aexample.com", False),
        ("*.example.com", "a.example.com.evil.test", False),
        ("**.example.com", "a.example.com", True),
        ("**.example.com", "a.b.c.example.com", True),
        ("**.example.com", "example.com", False),
        ("**.example.com", "badexample.com", False),
        ("*.com", "*.com", False),
        ("_dmarc.example.com", "_dmarc.example.com", True),
    ],
)
def test_host_patterns(pattern: str, name: str, fits: bool) -> None:
    compiled = policy({"hostnames": [pattern]}, tls={"passthroughHosts": [pattern]})
    assert compiled.may_allow_name(name) is fits
    assert compiled.connect(name, PUBLIC, 443).allowed is fits
    assert compiled.request(name, PUBLIC, 443, "GET", "/").allowed is fits
    assert compiled.is_passthrough(name) is fits


@pytest.mark.parametrize("pattern", ["*.b\u00fccher.example", "**.B\u00fccher.example", "www.b\u00fccher.example"])
def test_a_rule_may_be_written_in_either_spelling(pattern: str) -> None:
    compiled = policy({"hostnames": [pattern]})
    assert compiled.connect("www.xn--bcher-kva.example", None, 443).allowed
    assert compiled.connect("WWW.b\u00fccher.example.", None, 443).allowed
    assert not compiled.connect("www.bucher.example", None, 443).allowed
    assert not compiled.connect("xn--bcher-kva.example", None, 443).allowed
    with pytest.raises(ValueError, match="not a host name"):
        policy({"hostnames": ["a..b\u00fccher"]})


@pytest.mark.parametrize(
    "name", ["127.1", "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "10.0.0.1.", "a.0x", "1"]
)
def test_addresses_in_odd_spellings_are_no_names(name: str) -> None:
    everything = policy({"cidrs": ["127.0.0.0/8"]}, defaultPolicy="allow-all")
    assert not everything.may_allow_name(name)
    if name != "10.0.0.1.":
        assert brief(everything.connect(name, ip_address("127.0.0.1"), 80)) == (False, "bad_name")
    assert brief(everything.connect(name, PUBLIC, 80)) == (False, "bad_name")
    assert not everything.connect("fe80::1%25eth0", PUBLIC, 80).allowed
    assert not everything.connect("fe80::1%eth0", ip_address("fe80::1"), 80).allowed


@pytest.mark.parametrize(
    "name",
    ["", ".", "a..b", "a b", "-a.test", "a-.test", "a" * 64, "a." * 127 + "ab", "\u2603\ufe0f..", "a\n", "*", "a/b"],
)
def test_what_is_no_host_name_is_never_allowed(name: str) -> None:
    everything = policy({"hostnames": ["**.test"], "cidrs": ["0.0.0.0/0"]}, defaultPolicy="allow-all")
    assert normalise_name(name) is None
    assert brief(everything.connect(name, PUBLIC, 443)) == (False, "bad_name")
    assert brief(everything.request(name, PUBLIC, 443, "GET", "/")) == (False, "bad_name")
    assert not everything.may_allow_name(name)
    assert not everything.is_passthrough(name)
    assert everything.alias(name) is None


def test_longest_names() -> None:
    assert normalise_name("a" * 63 + ".test") is not None
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(longest) == 253
    assert normalise_name(longest + ".") == longest
    assert normalise_name(longest + "b") is None


@given(st.text(max_size=40))
def test_any_text_as_a_name_is_answered(name: str) -> None:
    normal = normalise_name(name)
    assert normal is None or normalise_name(normal) == normal


def test_the_resolver_answers_for_names_that_could_be_allowed() -> None:
    compiled = policy(
        {"hostnames": ["*.example.com"], "ports": [443], "http": {"methods": ["GET"]}},
        {"cidrs": ["10.0.0.0/8"]},
        tls={"passthroughHosts": ["pinned.test"]},
        hostAliases=[{"hostnames": ["alias.test"], "address": "127.0.0.1:8443"}],
    )
    assert compiled.may_allow_name("a.example.com")
    assert compiled.may_allow_name("pinned.test")
    assert not compiled.may_allow_name("alias.test")
    assert not compiled.may_allow_name("other.test")


# --- Addresses ------------------------------------------------------------------------------------------------------


def test_cidrs_hold_for_names_that_resolve_into_them_and_for_bare_addresses() -> None:
    compiled = policy({"cidrs": ["10.1.0.0/16", "2001:db8::/32", "::ffff:192.0.2.0/120"], "ports": [5432]})
    for inside in ("10.1.2.3", "2001:db8::5", "::ffff:10.1.2.3", "192.0.2.9"):
        assert compiled.connect(None, ip_address(inside), 5432).allowed
        assert compiled.connect("db.internal", ip_address(inside), 5432).allowed
        assert brief(compiled.connect(None, ip_address(inside), 22)) == (False, "port_not_allowed")
    for outside in ("10.2.0.1", "2001:db9::1", "192.0.3.1"):
        assert brief(compiled.connect(None, ip_address(outside), 5432)) == (False, "no_rule")
    assert brief(compiled.connect("db.internal", None, 5432)) == (False, "no_rule")
    assert brief(compiled.connect(None, None, 5432)) == (False, "no_rule")
    assert compiled.connect(None, None, 5432).hint == ""


def test_a_name_that_is_an_address_stands_for_itself_only() -> None:
    compiled = policy({"cidrs": ["10.0.0.0/8"]}, {"hostnames": ["192.0.2.1"]})
    assert compiled.connect("10.0.0.1", None, 443).allowed
    assert compiled.connect("10.0.0.1", ip_address("10.0.0.1"), 443).allowed
    assert compiled.connect("[::ffff:10.0.0.1]", ip_address("10.0.0.1"), 443).allowed
    assert compiled.connect("192.0.2.1", None, 443).allowed
    assert brief(compiled.connect("10.0.0.1", PUBLIC, 443)) == (False, "bad_name")
    assert brief(compiled.request("10.0.0.1", PUBLIC, 443, "GET", "/")) == (False, "bad_name")
    assert not compiled.connect("8.8.8.8", None, 443).allowed


@pytest.mark.parametrize(
    ("cidr", "address", "named"),
    [
        ("127.0.0.1/32", "127.0.0.1", True),
        ("127.0.0.0/8", "127.9.9.9", True),
        ("127.0.0.1/32", "::ffff:127.0.0.1", True),
        ("::1/128", "::1", True),
        ("169.254.169.254/32", "169.254.169.254", True),
        ("fe80::/10", "fe80::1", True),
        ("224.0.0.0/4", "239.1.1.1", True),
        ("10.0.0.0/8", "10.0.0.1", True),
        ("127.0.0.1/32", "127.0.0.2", False),
        ("0.0.0.0/0", "127.0.0.1", False),
        ("0.0.0.0/0", "10.0.0.1", False),
        ("::/0", "::1", False),
        ("::/1", "::1", False),
        ("0.0.0.0/1", "127.0.0.1", False),
        ("64.0.0.0/2", "127.0.0.1", False),
        ("128.0.0.0/1", "169.254.169.254", False),
        ("169.0.0.0/8", "169.254.169.254", False),
        ("192.0.0.0/2", "239.1.1.1", False),
        ("::ffff:0:0/96", "127.0.0.1", False),
        ("::/64", "127.0.0.1", False),
        ("100.64.0.0/10", "100.100.100.200", False),  # a metadata service inside a range that has other uses
        ("100.100.100.200/32", "100.100.100.200", True),
        ("169.254.0.0/16", "169.254.169.254", False),
        ("169.254.0.0/16", "169.254.7.7", True),
        ("fd00::/8", "fd00:ec2::254", False),
        ("fd00:ec2::254/128", "fd00:ec2::254", True),
        ("64:ff9b::/96", "64:ff9b::7f00:1", False),  # NAT64, 6to4 and Teredo hold an IPv4 address
        ("64:ff9b::7f00:1/128", "64:ff9b::7f00:1", True),
        ("2000::/3", "2002:7f00:1::1", False),
        ("2000::/3", "2002:a9fe:a9fe::1", False),
        ("::/96", "::127.0.0.1", False),
        ("198.18.0.0/16", "198.18.0.1", True),
        ("198.0.0.0/8", "198.18.0.1", False),
    ],
)
def test_only_a_rule_that_means_it_names_a_refused_address(cidr: str, address: str, named: bool) -> None:
    compiled = policy({"cidrs": [cidr], "ports": [80]})
    refusal = AddressGuard((), lambda _: False).refusal(ip_address(address))
    refused = refusal[1] if refusal is not None else None
    assert compiled.names_address(ip_address(address), 80, refused) is named
    assert not compiled.names_address(ip_address(address), 81, refused)


def test_a_host_rule_names_no_address() -> None:
    assert not policy({"hostnames": ["**.example.com"]}).names_address(ip_address("127.0.0.1"), 443, None)


# --- Passthrough and aliases ----------------------------------------------------------------------------------------


def test_passthrough_is_not_permission() -> None:
    compiled = policy(tls={"passthroughHosts": ["pinned.test"]})
    assert compiled.is_passthrough("pinned.test.")
    assert not compiled.is_passthrough(None)
    assert not compiled.connect("pinned.test", PUBLIC, 443).allowed
    listed = policy(tls={"passthroughHosts": ["192.0.2.1"]})
    assert listed.is_passthrough(None, ip_address("::ffff:192.0.2.1"))
    assert not listed.is_passthrough(None, ip_address("192.0.2.2"))
    tunnel = policy(tls={"mode": "Passthrough"})
    assert tunnel.is_passthrough("a.test")
    assert tunnel.is_passthrough(None)
    assert not tunnel.may_allow_name("a.test")


def test_aliases() -> None:
    compiled = policy(
        hostAliases=[
            {"hostnames": ["api.test", "*.api.test"], "address": "127.0.0.1:8443"},
            {"hostnames": ["**.test"], "address": "[::1]:9000"},
        ]
    )
    assert compiled.alias("API.test.") == ("127.0.0.1", 8443)
    assert compiled.alias("v1.api.test") == ("127.0.0.1", 8443)
    assert compiled.alias("x.y.test") == ("::1", 9000)
    assert compiled.alias("test") is None
    assert not compiled.connect("api.test", None, 443).allowed


# --- Hints ----------------------------------------------------------------------------------------------------------


@given(
    name=st.one_of(st.none(), st.from_regex(r"[a-z0-9]{1,8}(\.[a-z0-9]{1,8}){1,3}", fullmatch=True)),
    address=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    port=st.integers(1, 65535),
    method=st.sampled_from(["GET", "POST", "get"]),
    path=st.from_regex(r"(/[a-z\"'{}:#%20é*]{1,6}){1,3}", fullmatch=True),
)
def test_a_hint_pasted_into_a_route_allows_what_was_denied(
    name: str | None, address: Any, port: int, method: str, path: str
) -> None:
    taken = name if name and plain_host(name) else "x"
    for rules in ((), ({"hostnames": [taken], "cidrs": [str(address)], "http": {"paths": ["/only/this"]}},)):
        denying = policy(*rules)
        denied = denying.request(name, address, port, method, path)
        if denied.allowed or denied.reason == "bad_name" or denied.hint.startswith("# no rule can"):
            continue
        mended = policy(*rules, *yaml.safe_load(denied.hint))
        assert mended.request(name, address, port, method, path).allowed
        assert mended.connect(name, address, port).allowed


def test_what_no_rule_can_name_is_never_in_a_hint() -> None:
    """A rule that `clrk-runtime check` refuses is no help."""
    assert "the sandbox itself" in policy().request("localhost", None, 8000, "GET", "/").hint
    assert "the sandbox itself" in policy().connect("api.localhost", None, 8000).hint
    for method in ("CONNECT", "A" * 33, "get"):  # an overriding header may say so
        assert "no rule can name this method" in policy(NARROW).request("api.example.com", None, 443, method, "/").hint


def test_a_hint_is_short_and_says_when_nothing_helps() -> None:
    hint = policy(NARROW).request("api.example.com", None, 443, "POST", "/public/x").hint
    assert hint == (
        '- hostnames: ["api.example.com"]\n  ports: [443]\n  http: {methods: ["POST"], paths: ["/public/x"]}\n'
    )
    assert policy().connect(None, PUBLIC, 22).hint == '- cidrs: ["198.51.100.7/32"]\n  ports: [22]\n'
    twisted = policy(NARROW).request("api.example.com", None, 443, "GET", "/public/..%2fprivate")
    assert "more than one way" in twisted.hint
    assert yaml.safe_load(twisted.hint) is None
