"""Signatures: what boto3 sends is signed anew as boto3 itself signed it, whatever is odd about its path and query."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.auth
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from credential_policies import AWS

from clrk.core.route_resources import AwsSigV4Target
from clrk.gateway.credentials import Credential, Filled, OutgoingHead

REGION = "eu-central-1"
KEYS = (AWS["accessKeyId"], AWS["secretAccessKey"], AWS["sessionToken"])
EMPTY_MD5 = "1B2M2Y8AsgTpgAmY7PhCfg=="
ODD = "a b/ü~+&=;%2F//.."
ARN = "arn:aws:bedrock:eu-central-1:123456789012:inference-profile/eu.anthropic.claude"


def say(client: Any, model: str) -> None:
    client.converse(modelId=model, messages=[{"role": "user", "content": [{"text": "ü"}]}])


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a model": ("bedrock-runtime", lambda client: say(client, "anthropic.claude-v2:1")),
    "an ARN": ("bedrock-runtime", lambda client: say(client, ARN)),
    "an odd name": ("bedrock-runtime", lambda client: say(client, "a b~+ü")),
    "an odd prefix": ("s3", lambda client: client.list_objects_v2(Bucket="bkt", Prefix=ODD, StartAfter="")),
    "an odd key": ("s3", lambda client: client.get_object(Bucket="bkt", Key=f"{ODD}/./x%41")),
    "a body": ("s3", lambda client: client.put_object(Bucket="bkt", Key="k", Body=b"y", Metadata={"a": "  x   y "})),
    "a file": ("s3", lambda client: client.put_object(Bucket="bkt", Key="k", Body=io.BytesIO(b"y" * 70_000))),
    "a digest": ("s3", lambda client: client.put_object(Bucket="bkt", Key="k", Body=b"", ContentMD5=EMPTY_MD5)),
    "a token": ("sts", lambda client: client.get_caller_identity()),
}  # fmt: skip


def sent(service: str, call: Callable[[Any], Any]) -> AWSPreparedRequest:
    """Return the request that boto3 would send."""
    seen: list[AWSPreparedRequest] = []

    def keep(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        seen.append(request)
        raise ConnectionAbortedError

    session = boto3.Session(KEYS[0], KEYS[1], KEYS[2], region_name=REGION)
    client = session.client(service)
    client.meta.events.register("before-send", keep)
    with pytest.raises(ConnectionAbortedError):
        call(client)
    return seen[0]


def body_of(request: AWSPreparedRequest) -> bytes:
    body = request.body
    if isinstance(body, str):
        return body.encode()
    return bytes(body.read() if hasattr(body, "read") else body or b"")


@pytest.mark.parametrize("name", CALLS)
def test_what_boto3_signed_is_signed_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service, call = CALLS[name]
    now = datetime.datetime(2026, 11, 28, 12, 0, 0)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_: now)
    theirs = sent(service, call)
    url = urlsplit(theirs.url)
    headers = [(key, value if isinstance(value, str) else value.decode()) for key, value in theirs.headers.items()]
    target = AwsSigV4Target(type="AwsSigV4", service="bedrock" if service == "bedrock-runtime" else service)
    values = dict(zip(("accessKeyId", "secretAccessKey", "sessionToken"), KEYS, strict=True))
    filled = Filled(Credential("p", "s", (), (), target), values, REGION)
    ours = filled.apply(OutgoingHead(theirs.method, url.netloc, url.path, url.query, headers), body_of(theirs))
    assert (ours.path, ours.query) == (url.path, url.query)
    assert dict(sorted((key.lower(), value) for key, value in ours.headers)) == dict(
        sorted((key.lower(), value) for key, value in headers)
    )
