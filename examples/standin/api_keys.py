"""What a provider does first: look at the key. Without `--keys` any key will do."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from pathlib import Path

from aiohttp import web


class ApiKeys:
    """The keys that the providers' hosts demand, each in a header of its own way."""

    def __init__(self, by_host: Mapping[str, str]) -> None:
        self._by_host = by_host

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Read a JSON object: host name → key."""
        return cls(json.loads(path.read_text()) if path is not None else {})

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return the provider's own 401; None when the key is right, or none is demanded."""
        key = self._by_host.get(request.host)
        if key is None:
            return None
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
