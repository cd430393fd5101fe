"""A body that the agent signed (AWS SigV4) goes out as it is, or not at all."""

from __future__ import annotations

import json

import pytest
from budget_runs import ai_route
from egress_lab import aliased, answer, laboratory, read_request, upstream
from tls_material import Authority

HOST = "bedrock-runtime.us-east-1.amazonaws.com"
LIMITED = {"filters": [{"type": "TokenBudget", "tokenBudget": {"maxOutputTokensPerRequest": 100}}]}
SIGNATURE = "AWS4-HMAC-SHA256 Credential=AKIAPLACEHOLDER00000/20261128/us-east-1/bedrock/aws4_request"


def _request(authorization: str, **more) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": [{"text": "hi"}]}], **more}).encode()
    head = (
        f"POST /model/us.amazon.nova-lite-v1%3A0/converse HTTP/1.1\r\nHost: {HOST}\r\n"
        f"Authorization: {authorization}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize(
    ("authorization", "more", "status", "limit"),
    [
        (SIGNATURE, {}, 400, None),
        (SIGNATURE, {"inferenceConfig": {"maxTokens": 50}}, 200, 50),
        ("Bearer key", {}, 200, 100),
    ],
)
async def test_a_limit_is_not_written_into_a_signed_body(authorization, more, status, limit):
    authority, seen = Authority("upstream"), []

    async def serve(reader, writer):
        _, body = await read_request(reader)
        seen.append(json.loads(body))
        writer.write(
            answer(b'{"usage":{"inputTokens":1,"outputTokens":1}}', headers="Content-Type: application/json\r\n")
        )
        await writer.drain()

    async with (
        upstream(serve, authority.server_context([HOST])) as port,
        laboratory(
            gateway=aliased(port, HOST), rules=[{"hostnames": [HOST]}], recognise="real",
            upstream_ca=authority.cert_pem, config={"ai_routes": [ai_route(LIMITED)]},
        ) as lab,
    ):  # fmt: skip
        wire = await lab.dial_tls(HOST)
        wire.writer.write(_request(authorization, **more))
        head, body = await wire.response()
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert [request["inferenceConfig"]["maxTokens"] for request in seen] == ([limit] if limit else [])
        (span,) = await lab.recorder.wait(1)
        if status == 400:
            assert json.loads(body)["reason"] == "signed_body"
            assert span.attributes["clrk.egress.deny_reason"] == "signed_body"
