"""AWS Signature Version 4 as a server checks it, written from AWS's description and not with its SDK.

Source: AWS Identity and Access Management User Guide, "Create a signed AWS API request".
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections.abc import Iterable
from urllib.parse import quote

_FORM = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)
_MAX_SKEW = datetime.timedelta(minutes=5)


def find_fault(
    method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes, keys: dict[str, str]
) -> str | None:
    """Return why AWS would refuse the request; None when its signature is right.

    Shape: target is the request target as it stood on the wire; keys maps access key ids to secret access keys.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    if len(values.get("authorization", [])) != 1:
        return "MissingAuthenticationToken"
    found = _FORM.fullmatch(values["authorization"][0])
    if found is None:
        return "IncompleteSignature"
    key_id, day, region, service, signed, signature = found.groups()
    if key_id not in keys:
        return "UnrecognizedClient"
    names = signed.split(";")
    if names != sorted(names) or "host" not in names or not all(name in values for name in names):
        return "IncompleteSignature"
    if unsigned := [name for name in values if name.startswith("x-amz-") and name not in names]:
        return f"InvalidSignature: not signed: {', '.join(unsigned)}"
    stamp = values.get("x-amz-date", [""])[0]
    now = datetime.datetime.now(datetime.UTC)
    at = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    if not stamp.startswith(day) or abs(now - at) > _MAX_SKEW:
        return "RequestExpired"
    path, _, query = target.partition("?")
    canonical = "\n".join(
        [
            method,
            quote(path, safe="/~"),
            "&".join("=".join(pair) for pair in sorted(part.partition("=")[::2] for part in query.split("&") if part)),
            *(f"{name}:{','.join(' '.join(value.split()) for value in values[name])}" for name in names),
            "",
            signed,
            hashlib.sha256(body).hexdigest(),
        ]
    )
    scope = f"{day}/{region}/{service}/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + keys[key_id].encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    wanted = hmac.new(key, to_sign.encode(), "sha256").hexdigest()
    return None if hmac.compare_digest(wanted, signature) else "InvalidSignature"
