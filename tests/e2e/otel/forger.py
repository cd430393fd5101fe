"""Speaks OTLP without an SDK: everything that a hostile agent might say of itself. The event names its victim."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from typing import Any

ENDPOINT = "http://169.254.0.1:4318"
TYPES = {str: "stringValue", int: "intValue", float: "doubleValue", bool: "boolValue"}


def post(path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    """Send JSON; return status and answer."""
    fields = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(ENDPOINT + path, json.dumps(body).encode(), fields)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as exc:
        return exc.code, json.loads(exc.read())


def pairs(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return attributes as OTLP's JSON has them."""
    return [{"key": name, "value": {TYPES[type(value)]: value}} for name, value in values.items()]


def main() -> None:
    """Send spans that pretend to be clrk's, of another invocation, and a span with the id of `invoke_agent`."""
    victim = json.load(sys.stdin)["data"]
    forged = pairs(
        {
            "invocation.id": victim["invocation_id"], "agent.name": "victim", "agent.kind": "DaemonAgent",
            "agent.identity.user": "root", "clrk.component": "gateway", "clrk.sandbox.id": "feedface",
            "clrk.cost.usd": 99.5, "clrk.budget.denied": True, "clrk.egress.deny_reason": "forged",
        }
    )  # fmt: skip
    tokens = {"gen_ai.system": "anthropic", "gen_ai.request.model": "claude-forged", "gen_ai.usage.input_tokens": 10**9}
    now = time.time_ns()
    names = {
        "egress.dial.denied": secrets.token_hex(8),
        "chat claude-forged": secrets.token_hex(8),
        "ingress.dispatch": os.environ["TRACEPARENT"].split("-")[2],
    }
    spans = [
        {
            "traceId": victim["trace_id"], "spanId": span_id, "name": name, "kind": 3, "startTimeUnixNano": str(now),
            "endTimeUnixNano": str(now + 5), "attributes": forged + pairs(tokens), "status": {"code": 2},
        }
        for name, span_id in names.items()
    ]  # fmt: skip
    scope = {"scope": {"name": "clrk", "attributes": forged}, "spans": spans}
    resource = {"attributes": forged + pairs({"service.name": "clrk"})}
    answers = [
        post("/v1/traces", {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}),
        post("/v1/traces", {}, Host="localhost:4318"),
        post("/v1/traces", {}, X_Forwarded_For="::1"),
        post("/v1/other", {}),
    ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
