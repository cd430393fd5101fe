"""Header and body extractors, hostile values and bodies among them; and what the loader says about extractors."""

# ruff: noqa: E501 - tables of one case a line
from __future__ import annotations

import asyncio
import json
import threading

import pytest
import yaml
from issuer import EC, KEYS, agent, config, jwks, jwt_extractor, public_jwk
from jwt.algorithms import ECAlgorithm
from multidict import CIMultiDict, CIMultiDictProxy

from clrk.core.errors import ConfigError
from clrk.gateway import identity
from clrk.gateway.identity import MAX_READ_BYTES, MAX_SEARCHED_BYTES, Identities
from clrk.gateway.problem import Problem
from clrk.runtime.config.load import load

JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def identities():
    found = Identities(config())
    yield found
    await found.close()


def header(name: str = "X-User", field: str = "user") -> dict:
    return {"type": "Header", "name": name, "field": field}


def body(path: str, field: str = "user") -> dict:
    return {"type": "Body", "jsonPath": path, "field": field}


async def test_header(identities):
    headers = CIMultiDictProxy(CIMultiDict({"x-uSER": " alice ", "ce-x-user": "mallory"}))
    assert await identities.identify(agent(header()), headers, b"") == (("user", "alice"),)


@pytest.mark.parametrize("headers", [{}, {"X-User": ""}, {"X-User": " \t"}, {"ce-X-User": "a"}, {"CE-User": "a"}])
async def test_header_that_says_nothing_gives_no_field(identities, headers):
    assert await identities.identify(agent(header()), CIMultiDict(headers), b"") == ()


@pytest.mark.parametrize("value", ["a" * 257, "a\tb", "a\x85b", "a\u2028b", "a\u202eb", "a\udc80b", "\x7f"])
async def test_header_values_that_are_refused(identities, value):
    with pytest.raises(Problem, match="400: X-User: not one printable line"):
        await identities.identify(agent(header()), CIMultiDict({"X-User": value}), b"")


async def test_header_given_twice_is_refused_even_with_one_value(identities):
    headers = CIMultiDict([("X-User", "alice"), ("x-user", "alice")])
    with pytest.raises(Problem, match="400: X-User: given more than once"):
        await identities.identify(agent(header()), headers, b"")


@pytest.mark.parametrize(
    ("path", "document", "found"),
    [
        ("$.user", {"user": "alice"}, "alice"),
        ("$['user']['name']", {"user": {"name": "älice"}}, "älice"),
        ("$.n", {"n": 7}, "7"),
        ("$.n", {"n": 1.5}, "1.5"),
        ("$.b", {"b": False}, "false"),
        ("$.users[0]", {"users": ["first", "second"]}, "first"),
        ("$.users[-1:]", {"users": ["first", "second"]}, "second"),
        ("$..id", {"a": {"id": "one"}, "b": {"id": "two"}}, "one"),
        ("$.users[?@.role == 'owner'].name", {"users": [{"role": "x", "name": "n"}, {"role": "owner", "name": "alice"}]}, "alice"),
        ("$[*]", [{"an": "object"}, None, ["list"], "", "scalar", "another"], "scalar"),
        ("$", "text", "text"),
        ("$.user", {"user": {"name": "alice"}}, None),
        ("$.user", {"user": ["alice"]}, None),
        ("$.user", {"user": None}, None),
        ("$.user", {"user": ""}, None),
        ("$.user", {}, None),
        ("$.user", [], None),
        ("$.user", 7, None),
    ],
)  # fmt: skip
async def test_body(identities, path, document, found):
    fields = await identities.identify(agent(body(path)), CIMultiDict(JSON), json.dumps(document).encode())
    assert fields == ((("user", found),) if found is not None else ())


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/octet-stream", "a b"])
async def test_bodies_that_are_not_json_are_not_looked_at(identities, content_type):
    headers = CIMultiDict({"Content-Type": content_type})
    assert await identities.check_body(agent(body("$.user")), headers, b'{"user": "alice"}') == ()
    assert await identities.check_body(agent(body("$.user")), CIMultiDict(JSON), b"") == ()


@pytest.mark.parametrize(
    ("path", "raw", "status"),
    [
        ("$.user", b'{"user": "a\\nb"}', 400),
        ("$.user", b'{"user": "%s"}' % (b"a" * 257), 400),
        ("$.user", b'{"user": "\\ud800"}', 400),
        ("$.user", b'{"user": "\xff"}', 400),
        ("$.user", b'{"user": ', 400),
        ("$.user", b'{"user": %s}' % (b"1" * 5000), 400),
        ("$.user", b"[" * 200_000, 400),
        ("$..user", b"[" * 500 + b"]" * 500, 400),
        ("$..user", b'{"a": "%s"}' % (b"a" * MAX_SEARCHED_BYTES), 413),
        ("$.user", b'{"a": "%s"}' % (b"a" * MAX_READ_BYTES), 413),
    ],
)
async def test_bodies_that_are_refused(identities, path, raw, status):
    with pytest.raises(Problem) as caught:
        await identities.identify(agent(body(path)), CIMultiDict(JSON), raw)
    assert caught.value.status == status


async def test_a_large_body_is_fine_for_an_expression_that_needs_no_search(identities):
    raw = b'{"pad": "%s", "user": "alice"}' % (b"a" * (MAX_READ_BYTES - 100))
    assert await identities.identify(agent(body("$.user")), CIMultiDict(JSON), raw) == (("user", "alice"),)


@pytest.mark.timeout(60)
async def test_bodies_of_many_nodes_are_searched_in_bounded_time(identities):
    raw = b"[" + b"[]," * 80_000 + b"[]]"
    searches = (identities.identify(agent(body("$..user")), CIMultiDict(JSON), raw) for _ in range(3))
    assert await asyncio.gather(*searches) == [(), (), ()]


async def test_fields_of_all_kinds_together(identities):
    which = agent(body("$.tenant", "tenant"), header())
    headers = CIMultiDict(JSON | {"X-User": "alice"})
    assert await identities.identify(which, headers, b'{"tenant": "acme"}') == (("user", "alice"), ("tenant", "acme"))


# --- loading --------------------------------------------------------------------------------------------------------


def written(tmp_path, *extractors: dict) -> None:
    document = {
        "apiVersion": "clrk/v1alpha1", "kind": "TaskAgent", "metadata": {"name": "a"},
        "spec": {"template": {"spec": {"command": ["/bin/true"]}}, "identity": {"extractors": list(extractors)}},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))


def problems(tmp_path, *extractors: dict) -> str:
    written(tmp_path, *extractors)
    with pytest.raises(ConfigError) as caught:
        load([tmp_path])
    return "\n".join(caught.value.problems)


def test_key_file_is_read_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "keys.json").write_text(KEYS)
    written(tmp_path, jwt_extractor(location="keys.json"), jwt_extractor("x", "x", location=f"{tmp_path}/./keys.json"))
    loaded = load([tmp_path])
    assert loaded.jwks_files == {f"{tmp_path}/keys.json": KEYS}
    extractors = loaded.agents["default", "a"].spec.identity.extractors
    assert [extractor.jwks for extractor in extractors] == [f"{tmp_path}/keys.json"] * 2


@pytest.mark.parametrize(
    "url", ["https://issuer.test/keys", "http://127.0.0.1:1/k", "http://[::1]/k", "http://localhost/k"]
)
def test_key_urls(tmp_path, url):
    written(tmp_path, jwt_extractor(location=url))
    loaded = load([tmp_path])
    assert loaded.agents["default", "a"].spec.identity.extractors[0].jwks == url
    assert loaded.jwks_files == {}


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("http://issuer.test/keys", "jwks: must be https"),
        ("http://127.0.0.1.issuer.test/keys", "jwks: must be https"),
        ("http://10.0.0.1/keys", "jwks: must be https"),
        ("file:///etc/passwd", "jwks: is not a URL"),
        ("https://", "jwks: is not a URL"),
        ("https://[::1/", "jwks: is not a URL"),
        ("https://me:secret@issuer.test/", "jwks: holds credentials"),
        ("https://issuer.test/#x", "jwks: holds credentials or a fragment"),
        ("missing.json", "jwks: No such file or directory: "),
        ("/dev/zero", "jwks: not a regular file: /dev/zero"),
    ],
)
def test_key_locations_that_are_refused(tmp_path, location, problem):
    found = problems(tmp_path, jwt_extractor(location=location))
    assert f"spec.identity.extractors[0].{problem}" in found
    assert "secret" not in found


def test_key_files_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text('{"keys": []}')
    private = json.loads(ECAlgorithm.to_jwk(EC)) | {"kid": "private"}
    (tmp_path / "b.json").write_text(jwks(public_jwk(EC, "ec"), private))
    found = problems(tmp_path, jwt_extractor(location="a.json"), jwt_extractor("x", "x", location="b.json"))
    assert "extractors[0].jwks: no public key in it" in found
    assert "extractors[1].jwks: holds a key to sign with" in found
    assert private["d"] not in found


@pytest.mark.parametrize(
    ("extractor", "problem"),
    [
        (body("$.a,"), "jsonPath: '$.a,' is not a JSONPath"),
        (body("$..a..b"), "jsonPath: '$..a..b' has more than one `..`"),
        (body("$['a','b']"), "selects several things"),
        (body("$.a[?@..b]"), "a filter that looks at more than one value"),
        (body("$.a[?match(@.b, '(a+)+$')]"), "uses match()"),
        (body("$.a[?(count(@.*) > 1)]"), "uses count()"),
        (body("$" + "[?@.a" * 150 + "]" * 150), "jsonPath: "),
        (header("Authorization"), "name: 'Authorization' holds a secret"),
        (header("cookie"), "name: 'cookie' holds a secret"),
        (header("CE-User"), "name: 'CE-User': ce-* headers"),
    ],
)
def test_extractors_that_are_refused(tmp_path, extractor, problem):
    assert problem in problems(tmp_path, extractor)


async def test_a_body_that_takes_a_while_is_not_searched_in_the_event_loop(identities, monkeypatch):
    """64 KiB of `0,` took 130 ms, in which nobody else was served."""
    threads = []
    search = identity.body_fields
    monkeypatch.setattr(
        identity, "body_fields", lambda *given: (threads.append(threading.get_ident()), search(*given))[1]
    )
    for count in (100, 4000):
        raw = b"[" + b"0," * count + b'{"a": "alice"}]'
        assert await identities.identify(agent(body("$..[?@.a].a")), CIMultiDict(JSON), raw) == (("user", "alice"),)
    assert threads[0] == threading.get_ident() != threads[1]
