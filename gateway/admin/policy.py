"""`/v1/policy/…/explain` of the admin API: what would happen to a call of an agent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from clrk.gateway.admin.parameters import ParameterError
from clrk.gateway.policy_explain import PlannedCall, UnreadableCallError

_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")  # a token, as the relay takes it
ExplainCall = Callable[[str, str, PlannedCall], dict[str, Any] | None]  # namespace, name of an agent; None: none such


def no_policy(_namespace: str, _name: str, _call: PlannedCall) -> dict[str, Any] | None:
    """Know no agent."""
    return None


class PolicyView:
    """Answers GET with query parameters method and url."""

    def __init__(self, explain: ExplainCall) -> None:
        self._explain = explain

    async def __call__(self, request: web.Request) -> web.Response:
        """Return the document. Raises: ParameterError, 404."""
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        method, url = request.query.get("method", "GET"), request.query.get("url", "")
        if _METHOD.fullmatch(method) is None:
            raise ParameterError(f"method: write one such as GET, not {method[:40]!r}")
        try:
            call = PlannedCall.parse(method, url)
        except UnreadableCallError as exc:
            raise ParameterError(f"url: {exc}") from None
        found = self._explain(namespace, name, call)
        if found is None:
            raise web.HTTPNotFound(reason=f"no agent {json.dumps(f'{namespace}/{name}')}")
        return web.json_response({"agent": f"{namespace}/{name}", **found})
