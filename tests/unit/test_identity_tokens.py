"""Bad tokens are 401 before anything runs, and nothing of them is echoed (CONTRACT section 12; RFC 8725)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import jwt
import pytest
from issuer import (
    AUDIENCE,
    EC,
    ED,
    ISSUER,
    KEYS,
    OTHER,
    RSA,
    agent,
    claims,
    config,
    jwks,
    jwt_extractor,
    pem,
    public_jwk,
    token,
)
from multidict import CIMultiDict

from clrk.core.jwks import holds_private_key, parse_jwks
from clrk.gateway.identity import Identities
from clrk.gateway.problem import Problem

AGENT = agent(jwt_extractor())


def b64(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def hand_made(header: object, payload: object, signature: bytes = b"") -> str:
    return f"{b64(header)}.{b64(payload)}.{b64(signature)}"


def signed(payload: object) -> str:
    """Whatever the payload is, the issuer has signed it."""
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return jwt.api_jws.encode(raw, EC, "ES256", headers={"kid": "ec"})


def confused(algorithm: str, secret: bytes) -> str:
    """A token whose HMAC secret is the issuer's public key: what PyJWT itself refuses to make."""
    head = hand_made({"alg": algorithm, "kid": "rsa", "typ": "JWT"}, claims()).removesuffix(".")
    return f"{head}.{b64(hmac.new(secret, head.encode(), hashlib.sha256).digest())}"


def swapped_payload() -> str:
    head, _, signature = token().split(".")
    return f"{head}.{b64(claims(sub='mallory'))}.{signature}"


BAD = {
    "alg none": hand_made({"alg": "none"}, claims()),
    "alg None": hand_made({"alg": "None", "kid": "ec"}, claims()),
    "alg none in disguise": hand_made({"alg": "nOnE", "kid": "ec"}, claims(), b"x"),
    "no alg": hand_made({"kid": "ec"}, claims(), b"x"),
    "alg that is no text": hand_made({"alg": ["ES256"], "kid": "ec"}, claims(), b"x"),
    "HS256 with the public key": confused("HS256", pem(RSA)),
    "HS256 with the key set": confused("HS256", KEYS.encode()),
    "wrong issuer": token(iss="https://issuer.test"),
    "issuer as a list": signed(claims(iss=[ISSUER])),
    "wrong audience": token(aud="clrk2"),
    "wrong audiences": token(aud=["a", "b"]),
    "no audience": token(aud=None),
    "no issuer": token(iss=None),
    "no expiry": token(exp=None),
    "expired": token(exp=time.time() - 31),
    "expiry that is no number": signed(claims(exp="soon")),
    "expiry infinite": token(exp=float("inf")),
    "expiry NaN": token(exp=float("nan")),
    "not valid yet": token(nbf=time.time() + 86_400),
    "issued in the future": token(iat=time.time() + 86_400),
    "unknown kid": token(kid="who"),
    "no kid, several keys": token(kid=None),
    "kid that is no text": hand_made({"alg": "ES256", "kid": {"a": 1}}, claims(), b"x"),
    "key of somebody else": token(OTHER),
    "algorithm of another key": token(EC, kid="rsa"),
    "algorithm of another curve": hand_made({"alg": "ES384", "kid": "ec"}, claims(), b"x" * 96),
    "changed payload": swapped_payload(),
    "cut signature": token()[:-4],
    "no signature": token().rpartition(".")[0] + ".",
    "key of its own": token(OTHER, header={"jwk": public_jwk(OTHER)}),
    "key at its own address": token(OTHER, header={"jku": "http://127.0.0.1:1/"}),
    "unknown extension": token(header={"crit": ["exp"]}),
    "payload not encoded": token(header={"b64": False}),
    "claim missing": token(sub=None),
    "claim empty": token(sub=""),
    "claim of two lines": token(sub="alice\nagent.identity.admin: true"),
    "claim of 257 characters": token(sub="a" * 257),
    "claim with a direction mark": token(sub="alice\u202eecila"),
    "garbage": "garbage",
    "two parts": "a.b",
    "five parts": "a.b.c.d.e",
    "not base64": "$$.%%.&&",
    "header that is no JSON": hand_made(b"{", claims()),
    "header that is a list": hand_made([], claims()),
    "header nested deep": hand_made(b"[" * 5000, claims()),
    "payload that is no object": signed([1]),
    "payload nested deep": signed(b"[" * 4000),
    "empty": "",
    "huge": "a" * 6000 + "." + "b" * 2000 + ".c" + "d" * 9000,
}


@pytest.fixture
async def identities():
    found = Identities(config(AGENT, files={"/keys.json": KEYS}))
    yield found
    await found.close()


def bearer(text: str, scheme: str = "Bearer") -> CIMultiDict[str]:
    return CIMultiDict({"Authorization": f"{scheme} {text}"})


async def refusal(identities: Identities, headers: CIMultiDict[str], which=AGENT) -> Problem:
    with pytest.raises(Problem) as caught:
        await identities.identify(which, headers, b"")
    return caught.value


@pytest.mark.parametrize("name", BAD)
async def test_bad_token(identities, name):
    problem = await refusal(identities, bearer(BAD[name]))
    assert (problem.status, problem.headers) == (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    said = problem.response("some-invocation").body.decode()
    parts = [part for part in BAD[name].split(".") if len(part) > 8]
    assert not any(part in said for part in parts), said
    assert "mallory" not in said


GOOD = {
    "EC": token,
    "RSA": lambda: token(RSA, "RS256", "rsa"),
    "RSA with PSS": lambda: token(RSA, "PS384", "rsa"),
    "Ed25519": lambda: token(ED, "EdDSA", "ed"),
    "several audiences": lambda: token(aud=["x", AUDIENCE]),
    "a clock that is a little late": lambda: token(exp=time.time() - 5, nbf=time.time() + 10),
}


@pytest.mark.parametrize("name", GOOD)
async def test_good_token(identities, name):
    assert await identities.identify(AGENT, bearer(GOOD[name]()), b"") == (("user", "alice"),)
    assert await identities.check_headers(AGENT, bearer(GOOD[name](), "bEaReR")) == (("user", "alice"),)


async def test_missing_token_is_asked_for(identities):
    problem = await refusal(identities, CIMultiDict())
    assert (problem.status, problem.headers) == (401, {"WWW-Authenticate": "Bearer"})


@pytest.mark.parametrize("scheme", ["Basic", "DPoP", "", "Bearer Bearer"])
async def test_other_schemes(identities, scheme):
    assert (await refusal(identities, bearer(GOOD["EC"](), scheme))).status == 401


async def test_two_authorization_headers_are_refused_even_if_both_are_good(identities):
    headers = bearer(GOOD["EC"]())
    headers.add("authorization", f"Bearer {GOOD['EC']()}")
    assert (await refusal(identities, headers)).status == 401


async def test_two_tokens_in_one_header(identities):
    assert (await refusal(identities, bearer(f"{GOOD['EC']()}, Bearer {GOOD['RSA']()}"))).status == 401


async def test_every_extractor_of_the_agent_must_be_satisfied(identities):
    both = agent(jwt_extractor(), jwt_extractor(claim="team", field="team"))
    assert (await refusal(identities, bearer(GOOD["EC"]()), both)).status == 401
    assert await identities.identify(both, bearer(token(team="red")), b"") == (("user", "alice"), ("team", "red"))


async def test_an_extractor_of_another_issuer_refuses_the_token_of_the_first(identities):
    other = agent(jwt_extractor(), jwt_extractor(field="other") | {"issuer": "https://other.test/"})
    assert (await refusal(identities, bearer(GOOD["EC"]()), other)).status == 401


async def test_types_of_claims(identities):
    found = await identities.identify(
        agent(jwt_extractor("tier", "tier"), jwt_extractor("admin", "admin")), bearer(token()), b""
    )
    assert found == (("tier", "3"), ("admin", "true"))


@pytest.mark.parametrize("value", [["alice"], {"name": "alice"}])
async def test_claim_that_is_no_scalar(identities, value):
    assert (await refusal(identities, bearer(token(roles=value)), agent(jwt_extractor("roles")))).status == 401


async def test_claims_are_top_level_names(identities):
    nested = token(**{"user": {"name": "alice"}})
    assert (await refusal(identities, bearer(nested), agent(jwt_extractor("user.name")))).status == 401
    flat = token(**{"user.name": "alice"})
    assert await identities.identify(agent(jwt_extractor("user.name")), bearer(flat), b"") == (("user", "alice"),)


async def test_one_key_needs_no_name():
    one = Identities(config(AGENT, files={"/keys.json": jwks(public_jwk(EC, "ec"))}))
    assert await one.identify(AGENT, bearer(token(kid=None)), b"") == (("user", "alice"),)
    assert (await refusal(one, bearer(token(OTHER, kid=None)))).status == 401
    await one.close()


async def test_the_keys_own_algorithm_decides():
    strict = Identities(config(AGENT, files={"/keys.json": jwks(public_jwk(RSA, "rsa", alg="PS256"))}))
    assert (await refusal(strict, bearer(token(RSA, "RS256", "rsa")))).status == 401
    assert await strict.identify(AGENT, bearer(token(RSA, "PS256", "rsa")), b"") == (("user", "alice"),)
    await strict.close()


async def test_keys_in_a_file_change_with_the_configuration(identities):
    identities.reconfigure(config(AGENT, files={"/keys.json": jwks(public_jwk(OTHER, "ec"))}))
    assert (await refusal(identities, bearer(GOOD["EC"]()))).status == 401
    assert await identities.identify(AGENT, bearer(token(OTHER)), b"") == (("user", "alice"),)


async def test_agent_of_an_older_configuration_whose_keys_are_gone(identities):
    identities.reconfigure(config())
    assert (await refusal(identities, bearer(GOOD["EC"]()))).status == 503


# --- key sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JWK set"),
        ('{"keys": {}}', "not a JWK set"),
        ('{"keys": []}', "no public key"),
        ('{"keys": [1, null, {}, {"kty": "RSA"}, {"kty": "EC", "crv": "P-256"}]}', "no public key"),
        (jwks({"kty": "oct", "k": "c2VjcmV0"}), "no public key"),
        (jwks(public_jwk(EC, use="enc")), "no public key"),
        (jwks(public_jwk(EC, key_ops=["sign"])), "no public key"),
        (jwks(public_jwk(EC, alg="HS256")), "no public key"),
        (jwks(public_jwk(EC, alg="RS256")), "no public key"),
        (jwks(public_jwk(EC) | {"d": "AA"}), "no public key"),
        (jwks(public_jwk(EC) | {"x": "AA"}), "no public key"),
        (jwks(public_jwk(EC) | {"kid": 7}), "no public key"),
        (jwks(public_jwk(RSA) | {"n": "AQAB"}), "no public key"),
        (jwks(*[public_jwk(EC)] * 65), "over 64 keys"),
    ],
)
def test_key_sets_that_are_none(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_jwks(text)


def test_keys_for_other_purposes_are_passed_over():
    text = jwks({"kty": "oct", "k": "AA"}, public_jwk(RSA, "enc", use="enc"), public_jwk(ED, "ed", use="sig"))
    assert [key.kid for key in parse_jwks(text).keys] == ["ed"]
    assert holds_private_key(text)
    assert not holds_private_key(KEYS)
