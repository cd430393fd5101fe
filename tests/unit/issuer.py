"""A token issuer: keys, tokens, and a real server for its key set."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from clrk.core.gateway_config import GatewayConfig
from clrk.core.resources import RuntimeSpec, TaskAgent

ISSUER, AUDIENCE = "https://issuer.test/", "clrk"
RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
OTHER = ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the public half as a JWK."""
    match key:
        case rsa.RSAPrivateKey():
            found = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case ec.EllipticCurvePrivateKey():
            found = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case _:
            found = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    found.pop("key_ops", None)
    return {**found, **({"kid": kid} if kid else {}), **more}


def jwks(*keys: dict[str, Any]) -> str:
    """Return a key set."""
    return json.dumps({"keys": keys})


KEYS = jwks(public_jwk(RSA, "rsa"), public_jwk(EC, "ec"), public_jwk(ED, "ed"))


def claims(**changed: Any) -> dict[str, Any]:
    """Return good claims with changes; None takes one away."""
    now = time.time()
    found = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 86_400, "sub": "alice", "tier": 3, "admin": True} | changed
    return {name: value for name, value in found.items() if value is not None}


def token(key: Any = EC, algorithm: str = "ES256", kid: str | None = "ec", header: Any = None, **changed: Any) -> str:
    """Return a signed token."""
    headers = ({"kid": kid} if kid else {}) | (header or {})
    return jwt.encode(claims(**changed), key, algorithm, headers=headers)


def pem(key: Any) -> bytes:
    """Return the public key as PEM: the secret of the algorithm confusion."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def agent(*extractors: dict[str, Any]) -> TaskAgent:
    """Return an agent with extractors."""
    spec = {"template": {"spec": {"command": ["true"]}}, "identity": {"extractors": list(extractors)}}
    return TaskAgent.model_validate({"kind": "TaskAgent", "metadata": {"name": "a"}, "spec": spec})


def jwt_extractor(claim: str = "sub", field: str = "user", location: str = "/keys.json") -> dict[str, Any]:
    """Return a JWT extractor."""
    return {
        "type": "JWT", "claim": claim, "field": field, "jwks": location, "issuer": ISSUER, "audience": AUDIENCE,
    }  # fmt: skip


def config(*agents: TaskAgent, files: dict[str, str] | None = None) -> GatewayConfig:
    """Return a configuration of agents and key files."""
    return GatewayConfig(
        runtime=RuntimeSpec(), agents=list(agents), gateways=[], routes=[], ca_cert_pem="", ca_key_pem="",
        jwks_files=files or {},
    )  # fmt: skip


class KeyServer:
    """Answers with `answer` (a whole HTTP response); counts who asked, and wakes who waits for that."""

    def __init__(self) -> None:
        self.answer = b""
        self.url = ""
        self.asked = 0
        self._news = asyncio.Condition()
        self.hold: asyncio.Event | None = None

    def serve(self, body: str, status: str = "200 OK", headers: str = "") -> None:
        raw = body.encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n{headers}\r\n"
        self.answer = head.encode() + raw

    async def asked_times(self, count: int) -> None:
        async with asyncio.timeout(25), self._news:
            await self._news.wait_for(lambda: self.asked >= count)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            async with self._news:
                self.asked += 1
                self._news.notify_all()
            if self.hold is not None:
                await self.hold.wait()
            writer.write(self.answer)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def key_server(body: str = KEYS) -> AsyncIterator[KeyServer]:
    """Serve a key set on loopback."""
    found = KeyServer()
    found.serve(body)
    server = await asyncio.start_server(found.handle, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys?x=1"
    try:
        yield found
    finally:
        server.close()
