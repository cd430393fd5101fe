"""What the soak holds clrk to: what callers and the upstream know, against the records and spans that it has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from soak_upstream import Upstream

FINAL = {"Succeeded", "Failed", "Timeout", "Rejected", "Cancelled"}


@dataclass
class Attempt:
    """One request of a caller, and what came of it on the caller's side."""

    invocation: str
    agent: str
    plan: dict[str, Any]
    caller: str  # patient, hasty or slow
    status: int | None = None
    body: bytes = b""
    failure: str = ""


@dataclass
class Verdict:
    """What the checks found; problems is empty when everything is accounted for."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)


def judge(
    attempts: list[Attempt], seen: Upstream, records: list[dict[str, Any]], spans: list[dict[str, Any]]
) -> Verdict:
    """Hold what callers and the upstream know against what clrk tells."""
    verdict = Verdict()
    by_id = {record["invocation"]: record for record in records}
    verdict.expect(len(by_id) == len(records), "an invocation has two records")
    names: dict[str, Counter[str]] = {}
    calls: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        invocation = span["attributes"].get("invocation.id", "")
        names.setdefault(invocation, Counter())[span["name"].partition(" ")[0]] += 1
        query = parse_qs(urlsplit(str(span["attributes"].get("url.full", ""))).query)
        for call in query.get("call", []):
            calls.setdefault(call, []).append(span)
    called = Counter(seen.seen.values())
    for this in attempts:
        judge_attempt(verdict, this, by_id.get(this.invocation), names.get(this.invocation, Counter()), called)
    verdict.expect(not set(by_id) - {this.invocation for this in attempts}, "a record of nobody's invocation")
    for call, invocation in seen.seen.items():
        found = [span["attributes"].get("invocation.id") for span in calls.get(call, [])]
        verdict.expect(found == [invocation], f"call {call} of {invocation}: spans of {found}")
        # A pooled connection that dies under a safe request: sent again once, and its span says so (RFC 9110, 9.2.2).
        resent = [span["attributes"].get("http.request.resend_count", 0) for span in calls.get(call, [])]
        verdict.expect(
            resent == [seen.twice.count(call)], f"call {call}: resent {resent}, seen {seen.twice.count(call)}"
        )
    verdict.facts |= {
        "attempts": len(attempts),
        "records": len(records),
        "phases": dict(Counter(record["phase"] for record in records)),
        "callers_without_answer": dict(Counter(this.failure for this in attempts if this.failure)),
        "unheard": sum(this.invocation not in by_id for this in attempts),
        "upstream_calls": len(seen.seen),
        "spans": len(spans),
        "spans_of_a_lost_gateway": sum(span["attributes"].get("error.type") == "gateway_lost" for span in spans),
    }
    return verdict


def judge_attempt(
    verdict: Verdict, this: Attempt, record: dict[str, Any] | None, names: Counter[str], called: Counter[str]
) -> None:
    who = f"{this.invocation} ({this.agent}, {this.caller}, {this.plan['end']}, {this.status or this.failure})"
    if record is None:
        verdict.expect(this.status is None, f"{who}: answered, and no record")
        verdict.expect(called[this.invocation] == 0, f"{who}: it called, and there is no record")
        verdict.expect(not names, f"{who}: spans without a record: {dict(names)}")
        return
    verdict.expect(record["phase"] in FINAL, f"{who}: {record['phase']}")
    verdict.expect(names["ingress.dispatch"] == 1, f"{who}: {names['ingress.dispatch']} ingress.dispatch")
    ran = int(record["startTimeUnixNano"] is not None)
    verdict.expect(names["invoke_agent"] <= 1, f"{who}: {names['invoke_agent']} invoke_agent")
    verdict.expect(names["invoke_agent"] >= ran, f"{who}: {record['phase']}, started, and no invoke_agent")
    if this.status == 200 and not this.failure and this.agent != "meta":
        verdict.expect(this.body.endswith(b"done\n"), f"{who}: a clean end of {len(this.body)} bytes without its end")
        verdict.expect(record["phase"] == "Succeeded", f"{who}: a clean 200, and phase {record['phase']}")
