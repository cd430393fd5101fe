"""Egress policy of requests: methods and paths, and every way to read a path that must not get out of its prefix."""

# ruff: noqa: E501, RUF001 - tables of hostile paths, in every script that looks like a slash
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_samples import API, NARROW, PUBLIC, brief, policy

from clrk.core.url_paths import path_readings
from clrk.gateway.interpret import RequestHead
from clrk.gateway.policy_paths import PathPattern
from clrk.gateway.policy_requests import other_meanings


def test_narrowed_rules_allow_connections_for_http_only() -> None:
    compiled = policy(NARROW)
    connect = compiled.connect("api.example.com", PUBLIC, 443)
    assert (connect.allowed, connect.needs_http, connect.rule) == (True, True, "EgressL4Route default/web rules[0]")
    # A rule that does not narrow wins wherever it stands.
    assert not policy(NARROW, API).connect("api.example.com", PUBLIC, 443).needs_http
    assert policy(NARROW, API).connect("api.example.com", PUBLIC, 80).needs_http
    assert not policy(NARROW, defaultPolicy="allow-all").connect("api.example.com", PUBLIC, 443).needs_http
    # An empty http narrows nothing.
    assert not policy({"hostnames": ["a.test"], "http": {}}).connect("a.test", None, 443).needs_http


@pytest.mark.parametrize(("method", "allowed"), [("GET", True), ("POST", False), ("get", False), ("GET ", False)])
def test_methods(method: str, allowed: bool) -> None:
    assert policy(NARROW).request("api.example.com", None, 443, method, "/public").allowed is allowed


def test_rules_add_up() -> None:
    compiled = policy(NARROW, {"hostnames": ["api.example.com"], "http": {"methods": ["POST"]}})
    assert compiled.request("api.example.com", None, 443, "GET", "/public").rule.endswith("rules[0]")
    assert compiled.request("api.example.com", None, 443, "POST", "/private").rule.endswith("rules[1]")
    assert not compiled.request("api.example.com", None, 443, "GET", "/private").allowed
    assert policy(NARROW, defaultPolicy="allow-all").request("api.example.com", None, 443, "PUT", "/x").allowed


BYPASSES = [
    "/private", "/publicx", "/Public/x", "/", "", "public", "*", "http://api.example.com/public",
    "/public/../private", "/public/..", "/public/../public/../private", "/public/./../private", "/public//../private",
    "/public/%2e%2e/private", "/public/%2E%2e/private", "/public/.%2e/private", "/public/%2e%2e%2fprivate",
    "/public/..%2fprivate", "/public/..%2Fprivate", "/public%2f..%2fprivate", "/public%2f../private",
    "/public/%252e%252e/private", "/public/..%252fprivate", "/public/%25252e%25252e/private",
    "/public/a%2fb/../../private", "/public/a%252fb%2f..%2f..%2fprivate", "/public/x/../../private",
    "/public/..;/private", "/public/..;x=1/private", "/public;/../private", "/public/;x/a%2fb/../../../private",
    "/public/..%3bx/private", "/public/%2e%2e;/private",
    "/public\\..\\private", "/public/..\\private", "/public/..%5cprivate", "/public/a\\b%2f..%2f..%2f..%2fprivate",
    "/public/%c0%ae%c0%ae/private", "/public/..%c0%afprivate", "/public/..%c1%9cprivate", "/public/%c0%ae./private",
    "/public/%00", "/public/..%00/private", "/public\x00", "/public/x\n/../private", "/public%0d%0a",
    "/public/..?/private", "/public/..%3f/private", "/public/..#/private",
    "//public/../private", "/./private", "//private", "/%70rivate", "/private%2f..%2fpublic", "/private/../public",
    "/private/..%2fpublic", "/private/%2e%2e/public", "//public", "/.//public", "/\\public", "/%2fpublic",
    "/public/%u002e%u002e/private", "/public/%U002E%u002e%u002fprivate", "/public/%25u002e./private",
    "/public/%e0%80%ae%e0%80%ae/private", "/public/..%e0%80%afprivate", "/public/%f0%80%80%ae%f0%80%80%ae/private",
    "/public/%ef%bc%8e%ef%bc%8e/private", "/public/..%ef%bc%8fprivate", "/public/%e2%80%a5/private", "/public/‥/private",
    "/public/..%e2%88%95private", "/public/..%20/private", "/public/..%09/private", "/public/..%e3%80%82%2f..%2fprivate",
    "/public/．．/private", "/public/..／private", "/public/..%c0%bb/private", "/public/..%ef%bc%9b/private",
    "/public%ef%bc%8f..%ef%bc%8fprivate", "/public/%c0%25ae%c0%ae/..",
    "/public%2fx", "/public%5cx", "/public;x", "/public/%" + "25" * 9 + "2e", "/public/" + "%25" * 9 + "2e%2e/..%2f",
]  # fmt: skip


@pytest.mark.parametrize("path", BYPASSES)
def test_no_path_gets_out_of_its_prefix(path: str) -> None:
    verdict = policy(NARROW).request("api.example.com", None, 443, "GET", path)
    assert brief(verdict) == (False, "http_not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/public", "/public/", "/public/x", "/public/x/y?z=/../private", "/public?next=/private", "/public#x",
        "/public/x.y", "/public/..x", "/public/x..", "/public/...", "/public//x", "/public/a/../b", "/public/%2e/x",
        "/%70ublic/x", "/public/%C3%BC", "/public/a%20b", "/public/a%2fb", "/public/a%252fb", "/public/a;v=1/b",
    ],
)  # fmt: skip
def test_paths_inside_the_prefix(path: str) -> None:
    assert policy(NARROW).request("api.example.com", None, 443, "GET", path).allowed


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("/", "/anything/at/all", True),
        ("/v1/", "/v1/x", True),
        ("/v1/", "/v1", False),
        ("/v1*", "/v1beta/x", True),
        ("/v1/*/read", "/v1/a/read", True),
        ("/v1/*/read", "/v1/a/b/read", True),
        ("/v1/*/read", "/v1/a/write", False),
        ("/v1/*/read", "/v1/read", False),
        ("/v1/*/read", "/v1/a/delete%2fread", False),
        ("/v1/*/read", "/v1/a/delete%3f/read", False),
        ("/v1/*/read", "/v1/a/../../admin/x/read", False),
        ("/v1/*/a*/z", "/v1/x/b/az/z", True),
        ("/v1/*/a*/z", "/v1/x/b/z", False),
        ("/ab*ba", "/aba", False),
        ("/ab*ba", "/abba", True),
        ("/*.json", "/x/y.json", True),
        ("/*.json", "/x/y.json/z", False),
        ("/@scope%2fname", "/@scope%2Fname", True),
        ("/@scope%2fname", "/@scope/name", False),
        ("/x", "/x/%zz", True),
        ("/%", "/%", True),
        ("/a/../b", "/b", False),
    ],
)
def test_path_patterns(pattern: str, path: str, fits: bool) -> None:
    assert PathPattern.compile(pattern).matches(path_readings(path)) is fits


def test_a_pattern_that_can_be_read_in_two_ways_fits_nothing() -> None:
    assert not PathPattern.compile("/a/..%2fb").matches(path_readings("/b"))


def test_globs_do_not_backtrack() -> None:
    pattern = PathPattern.compile("/" + "a*" * 50 + "b")
    assert not pattern.matches(path_readings("/" + "a" * 8000))


OVERRIDES = [
    [("X-HTTP-Method-Override", "DELETE")], [("x-http-method", "delete")], [("X_Method_Override", "POST")],
    [("X-HTTP-Method-Override", "GET, PUT")], [("X-Original-URL", "/private")], [("X-Rewrite-URL", "/public/../private")],
    [("X-Original-URL", "https://other.test/private")], [("X-Original-URL", "private")], [("X-Original-URL", "")],
    [("X-Original-URL", f"/public/{n}") for n in range(40)], [("X-HTTP-Method", f"M{n}") for n in range(40)],
]  # fmt: skip


def judged(headers: list[tuple[str, str]], query: str = "", method: str = "GET", path: str = "/public") -> bool:
    head = RequestHead(method, "https", "api.example.com", 443, path, query, tuple(headers))
    compiled = policy(NARROW)
    meanings = [(method, path), *other_meanings(head)]
    return all(compiled.request("api.example.com", None, 443, *meaning).allowed for meaning in meanings)


@pytest.mark.parametrize("headers", OVERRIDES)
def test_a_request_that_may_mean_another_is_judged_as_that_too(headers: list[tuple[str, str]]) -> None:
    assert judged([("Accept", "*/*")])
    assert not judged(headers)


def test_what_overrides_nothing_new_passes() -> None:
    assert judged([("X-HTTP-Method-Override", "GET"), ("X-Original-URL", "/public/x?y=1")])
    assert judged([("X-Method", "DELETE"), ("X-Url", "/private")], "method=DELETE&x=_method")


@pytest.mark.parametrize(
    "query", ["_method=DELETE", "a=1&_METHOD=put", "%5fmethod=DELETE", "x-http-method-override=POST"]
)
def test_a_method_in_the_query_counts(query: str) -> None:
    assert not judged([], query)


@pytest.mark.parametrize("path", ["/x?y=1", "/x#y", "x"])
def test_a_path_rule_with_a_query_is_an_error_and_not_a_wider_rule(path: str) -> None:
    with pytest.raises(ValueError, match="paths"):
        policy({"hostnames": ["a.test"], "http": {"paths": [path]}})


SEGMENT = st.sampled_from(
    [
        "public",
        "private",
        "..",
        ".",
        "",
        "%2e%2e",
        "..%2f",
        "%2f",
        "%5c",
        "\\",
        ";",
        ";x",
        "..;",
        "a",
        "%252f",
        "%252e",
        "?",
        "%u002e%u002e",
        "..%e0%80%af",
        "%c0%ae%c0%ae",
        "%ef%bc%8e.",
        "%e2%80%a5",
        "..%ef%bc%8f",
        "..%20",
    ]
)
SLOPPY = {
    "%u002e": ".", "%c0%ae": ".", "%e0%80%af": "/", "%ef%bc%8e": ".", "%e2%80%a5": "..", "%ef%bc%8f": "/", "%20/": "/",
}  # fmt: skip


@given(st.lists(SEGMENT, max_size=8), st.lists(st.sampled_from(["/", "", "%2f", "//"]), min_size=8, max_size=8))
def test_what_is_allowed_stays_inside_however_it_is_read(segments: list[str], joints: list[str]) -> None:
    """Every server is a choice of: decode 0 to 2 times, how sloppily, backslash is slash, parameters dropped, …"""
    path = "/" + "".join(segment + joint for segment, joint in zip(segments, joints, strict=False))
    if not PathPattern.compile("/public").matches(path_readings(path)):
        return
    for decodings in range(3):
        for options in range(16):
            seen = path.partition("?")[0]
            for found, means in SLOPPY.items() if options & 8 else ():
                seen = seen.replace(found, means)
            served = _serve(seen, decodings, bool(options & 1), bool(options & 2), bool(options & 4))
            assert served[:1] == ["public"], (path, decodings, options, served)


def _serve(path: str, decodings: int, backslash: bool, parameters: bool, merge: bool) -> list[str]:
    for _ in range(decodings):
        for escape, char in (("%2e", "."), ("%2f", "/"), ("%5c", "\\"), ("%25", "%")):
            path = path.replace(escape, "\0" + char)
        path = path.replace("\0", "")
    if backslash:
        path = path.replace("\\", "/")
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        plain = segment.partition(";")[0] if parameters else segment
        if plain == "..":
            del kept[-1:]
        elif plain != "." and not (merge and plain == ""):
            kept.append(plain)
    return kept


@given(st.from_regex(r"(/[A-Za-z0-9._~-]{0,6}){1,6}/?", fullmatch=True))
def test_the_short_way_for_plain_paths_is_the_long_way(path: str) -> None:
    """An escaped unreserved character takes the long way, and means the same."""
    at = next((at for at, char in enumerate(path) if char.isalnum()), None)
    if at is not None and ".." not in path:
        escaped = f"{path[:at]}%{ord(path[at]):02x}{path[at + 1 :]}"
        assert path_readings(escaped)[0] == path_readings(path)[0]
        assert path_readings(escaped)[2] == path_readings(path)[2]
