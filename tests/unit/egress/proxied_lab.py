"""A gateway behind a corporate proxy, and what its agents ask."""

from __future__ import annotations

import json
import socket
from ipaddress import ip_address

from egress_lab import answer, read_request

NAME = "api.example.com"
PROXY = "proxy.corp.example"
ALLOW = [{"hostnames": [NAME, "other.example.com"]}, {"cidrs": ["203.0.113.0/24"]}]
GET = f"GET /v1 HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode()
SECRET = {"default/proxy": {"username": "corp-user", "password": "S3cret:pass word"}}


async def hello(reader, writer):
    await read_request(reader)
    writer.write(answer(b"secure"))


async def only_the_proxy(name, port):
    """What a host behind a corporate proxy can resolve."""
    if name == PROXY:
        return [ip_address("127.0.0.1")]
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def through(proxy, **spec) -> dict:
    return {"upstreamProxy": {"url": f"http://{PROXY}:{proxy.port}"} | spec}


def signed_in(proxy, **spec) -> dict:
    return through(proxy, secretRef={"name": "proxy"}, **spec)


async def ask(lab, request: bytes = GET, name: str = NAME) -> tuple[bytes, object]:
    wire = await lab.dial_tls(name)
    raw = await wire.ask(request)
    return raw, (await lab.recorder.wait())[0]


async def failure(lab) -> tuple[str, str]:
    """The reason of the 502, and its detail; the span says the same."""
    raw, span = await ask(lab)
    assert raw.startswith(b"HTTP/1.1 502 "), raw
    body = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert (span.name, span.attributes["error.type"]) == ("egress.dial.failed", body["reason"])
    assert span.status.message == body["detail"]
    return body["reason"], body["detail"]
