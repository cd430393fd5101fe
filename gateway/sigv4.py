"""AWS Signature Version 4 of one request, by botocore. Pure, but for the clock: a signature holds its time.

Source: AWS Identity and Access Management, "Create a signed AWS API request".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from clrk.gateway.header_names import fold_header

# What carries a signature: an agent's own goes, whether it signed by headers or by query (a presigned URL).
HEADERS: Final = ("authorization", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256")
PARAMETERS: Final = (
    "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature",
    "X-Amz-Security-Token",
)  # fmt: skip
_UNSIGNED_STREAM: Final = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"  # a body in frames (aws-chunked) that no key signs
_HASHES_BY_HEADER: Final = ("s3", "s3-express")
# What says how the body is to be read; of other headers, a hop may change some, and none has to be signed.
_SIGNED: Final = frozenset(("content-type", "content-encoding", "content-md5"))


@dataclass(frozen=True, slots=True)
class AwsKeys:
    """An access key; session_token is "" for one that does not expire."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


def stream_of(headers: Sequence[tuple[str, str]]) -> str | None:
    """Return how a body in frames (Content-Encoding: aws-chunked) is signed; None for any other body."""
    said = (value.strip().upper() for name, value in headers if fold_header(name) == "x_amz_content_sha256")
    return next((value for value in said if value.startswith("STREAMING-")), None)


def is_signed_stream(service: str, headers: Sequence[tuple[str, str]]) -> bool:
    """Say whether a body is in frames that only who has the key can write."""
    stream = stream_of(headers)
    return stream is not None and not (stream == _UNSIGNED_STREAM and service in _HASHES_BY_HEADER)


def load() -> None:
    """Import what signs: a quarter of a second that no call should wait for."""
    import botocore.auth  # noqa: F401 - for its side effect

    # It logs what it signs at DEBUG, session tokens among it.
    logging.getLogger("botocore").setLevel(logging.WARNING)


def sign(
    keys: AwsKeys,
    scope: tuple[str, str],
    *,
    method: str,
    host: str,
    target: str,
    headers: Sequence[tuple[str, str]],
    body: bytes | None,
) -> list[tuple[str, str]]:
    """Return the headers to add.

    Shape: scope is (service, region); host the Host header, target path and query, body what goes out, out of its
        chunks, or None for one in frames that no key signs. Host, x-amz-* and what says how to read the body are
        signed: what a hop may add or change must not break it.
    """
    load()
    from botocore.auth import S3SigV4Auth, SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest(method=method, url=f"https://aws{target}", data=body)  # the Host header counts, not the URL's
    request.headers["Host"] = host
    for name, value in headers:
        if name.lower() in _SIGNED or name.lower().startswith("x-amz-"):
            request.headers.add_header(name, value)
    if body is None:
        request.context["checksum"] = {"request_algorithm": {"in": "trailer"}}
    before = len(request.headers.items())
    service, region = scope
    signer = S3SigV4Auth if service in _HASHES_BY_HEADER else SigV4Auth  # S3 takes the path as it stands
    credentials = Credentials(keys.access_key_id, keys.secret_access_key, keys.session_token or None)
    signer(credentials, service, region).add_auth(request)
    return [(str(name), str(value)) for name, value in request.headers.items()[before:]]
