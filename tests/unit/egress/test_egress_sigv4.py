"""Requests that the gateway signs for AWS, as a server that checks signatures sees them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from credential_policies import AWS, SIGV4, policy
from credentials_lab import BEDROCK, NAME, ask, serving, shown
from egress_lab import answer

from clrk.gateway.govern import MAX_GOVERNED_BYTES

sys.path.insert(0, str(Path(__file__).parents[3] / "examples/standin"))
from aws_signature import find_fault


def bedrock_request(body: bytes, *, chunked: bool) -> bytes:
    head = (
        b"POST /model/a.b-v1%%3A0/converse?b=2&a=1 HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
        b"Authorization: AWS4-HMAC-SHA256 Credential=placeholder/20200101/eu-central-1/bedrock/aws4_request, "
        b"SignedHeaders=host, Signature=00\r\nX-Amz-Date: 20200101T000000Z\r\nUser-Agent: Boto3\r\n" % BEDROCK.encode()
    )
    if chunked:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [1, 300_000])
async def test_bedrock_believes_the_signature(chunked, size):
    faults = []

    def reply(head, body):
        lines = head.decode().split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = [tuple(line.split(": ", 1)) for line in lines[1:] if line]
        plain = body.split(b"\r\n", 1)[1][:size] if chunked else body
        faults.append(find_fault(method, target, headers, plain, {AWS["accessKeyId"]: AWS["secretAccessKey"]}))
        return answer(b"{}")

    async with serving(policy(SIGV4, hostnames=[BEDROCK]), secrets=AWS, reply=reply) as (lab, seen):
        wire = await lab.dial_tls(BEDROCK)
        wire.writer.write(bedrock_request(b"x" * size, chunked=chunked))
        assert (await wire.response())[1] == b"{}"
        await lab.recorder.wait()
    assert faults == [None]
    assert b"placeholder" not in seen[0][0]
    assert not any(value in shown(lab) for value in AWS.values())


S3 = "Content-Encoding: aws-chunked\r\nX-Amz-Trailer: x-amz-checksum-crc32\r\nX-Amz-Decoded-Content-Length: 1\r\n"


@pytest.mark.parametrize("payload", ["STREAMING-UNSIGNED-PAYLOAD-TRAILER", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"])
async def test_a_body_that_is_chunked_for_aws_is_signed_as_one_or_goes_nowhere(payload):
    """Signed as plain bytes, the chunks' frames would be stored with them; chunks that are signed are the agent's."""
    body = b"1\r\ny\r\n0\r\nx-amz-checksum-crc32:+9smFQ==\r\n\r\n"
    target = SIGV4 | {"service": "s3", "region": "eu-central-1"}
    async with serving(policy(target, hostnames=[NAME]), secrets=AWS) as (lab, seen):
        head = f"PUT /k HTTP/1.1\r\nHost: {NAME}\r\n{S3}X-Amz-Content-SHA256: {payload}\r\n"
        raw = await ask(lab, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        (span,) = await lab.recorder.wait()
    if "UNSIGNED" in payload:
        assert seen[0][1] == body
        assert f"\r\nX-Amz-Content-SHA256: {payload}\r\n".encode() in seen[0][0]
        assert b"content-encoding;host;x-amz-content-sha256;" in seen[0][0]
    else:
        assert raw.startswith(b"HTTP/1.1 400 ")
        assert span.attributes["clrk.egress.deny_reason"] == "signed_stream"
        assert seen == []


async def test_a_body_that_can_not_be_signed_as_a_whole_goes_nowhere():
    async with serving(policy(SIGV4, hostnames=[BEDROCK]), secrets=AWS) as (lab, seen):
        wire = await lab.dial_tls(BEDROCK)
        head = bedrock_request(b"", chunked=False).replace(b"th: 0", b"th: %d" % (MAX_GOVERNED_BYTES + 2**22))
        wire.writer.write(head)
        with contextlib.suppress(OSError):
            for _ in range(MAX_GOVERNED_BYTES // 2**20 + 2):
                wire.writer.write(bytes(2**20))
                await wire.writer.drain()
        response, _ = await wire.response()
        (span,) = await lab.recorder.wait()
    assert response.startswith(b"HTTP/1.1 413 ")
    assert span.attributes["clrk.egress.deny_reason"] == "body_too_large"
    assert seen == []
