"""What a provider does first: look at the key. Without `--keys` any key will do."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from pathlib import Path

from aiohttp import web
from aws_signature import find_fault


class ApiKeys:
    """The keys that the providers' hosts demand, each in a header of its own way."""

    def __init__(self, by_host: Mapping[str, str]) -> None:
        self._by_host = by_host

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Read a JSON object: host name → key."""
        return cls(json.loads(path.read_text()) if path is not None else {})

    async def refusal(self, request: web.Request) -> web.Response | None:
        """Return the provider's own 401 or 403; None when the key is right, or none is demanded.

        For AWS a key is `access key id:secret access key`, and the signature is checked.
        """
        key = self._by_host.get(request.host)
        if key is None:
            return None
        if request.host.endswith(".amazonaws.com"):
            return await _check_signature(request, key)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("x-api-key") or request.headers.get("x-goog-api-key") or bearer
        if hmac.compare_digest(given.encode(), key.encode()):
            return None
        error: dict[str, object] = {"type": "authentication_error", "message": "invalid x-api-key"}
        if request.host == "api.openai.com":
            # as it does, but for the middle that the real one hides: a gateway must not write this down
            message = f"Incorrect API key provided: {given}."
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        return web.json_response({"type": "error", "error": error}, status=401)


async def _check_signature(request: web.Request, key: str) -> web.Response | None:
    key_id, _, secret = key.partition(":")
    headers = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
    fault = find_fault(request.method, request.raw_path, headers, await request.read(), {key_id: secret})
    if fault is None:
        return None
    kind = fault.partition(":")[0] + "Exception"
    return web.json_response({"message": fault}, status=403, headers={"x-amzn-errortype": kind})
