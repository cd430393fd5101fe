"""An upstream behind TLS, and CredentialInjectionPolicies for it."""

from __future__ import annotations

import asyncio
import contextlib

from credential_policies import BEARER, SECRET, policy
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

NAME, OTHER = "api.example.com", "other.example.com"
BEDROCK = "bedrock-runtime.eu-central-1.amazonaws.com"
ALLOW = [{"hostnames": [NAME, OTHER, BEDROCK]}, {"cidrs": ["127.0.0.0/8"]}]
HEAD = b"GET /v1?x=1 HTTP/1.1\r\nHost: api.example.com\r\nAuthorization: Bearer placeholder\r\n"
GET = HEAD + b"\r\n"


@contextlib.asynccontextmanager
async def serving(
    *policies, reply=None, secrets=None, gateway=None, secure: bool = True, recognise=None, read=read_request
):
    """A lab whose names all live at one upstream; yields (lab, requests seen)."""
    authority, seen = Authority("upstream CA"), []

    async def handle(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                seen.append(await read(reader))
                writer.write(reply(*seen[-1]) if reply else answer(b"fine"))

    context = authority.server_context([NAME, OTHER, BEDROCK, "127.0.0.1"]) if secure else None
    config = {"credential_policies": list(policies)}
    values = {"default/keys": secrets or {"token": SECRET}}
    async with upstream(handle, context) as port:
        spec = aliased(port, NAME, OTHER, BEDROCK) | (gateway or {})
        async with laboratory(
            gateway=spec,
            rules=ALLOW,
            upstream_ca=authority.cert_pem,
            config=config,
            secrets=values,
            recognise=recognise,
        ) as lab:
            lab.upstream_port = port
            yield lab, seen


def bearer(**spec):
    return policy(BEARER, **({"hostnames": [NAME]} | spec))


def shown(lab) -> str:
    """Everything that the recorder was told."""
    return repr(lab.recorder.spans) + repr(lab.recorder.begun)


async def ask(lab, request: bytes = GET, **where) -> bytes:
    wire = await lab.dial_tls(NAME, **where)
    wire.writer.write(request)
    head, body = await wire.response()
    return head + body
