"""Runs with budgets, without connections: one gateway, several agents, a clock to turn."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from clrk.core.egress_resources import EgressGateway
from clrk.core.ids import SandboxId, new_invocation_id, new_span_id, new_trace_id
from clrk.core.resources import TaskAgent
from clrk.core.route_resources import AIProviderRoute
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.govern import Answer, Cut
from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm.budgets import Budgets, RunBudgets
from clrk.gateway.llm.cost import PriceList
from clrk.gateway.recognise import KnownHosts, find_error_writer, recognise
from clrk.gateway.run import Run
from clrk.gateway.telemetry.spans import Identity, TraceContext

JSON = (("Content-Type", "application/json"),)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def budget_rule(budget: dict[str, Any], *matches: dict[str, Any]) -> dict[str, Any]:
    return {"matches": list(matches), "filters": [{"type": "TokenBudget", "tokenBudget": budget}]}


def ai_route(*rules: dict[str, Any], name: str = "llm", namespace: str = "default", gateway: str = "default"):
    return AIProviderRoute.model_validate(
        {
            "kind": "AIProviderRoute",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"gatewayRef": {"name": gateway}, "rules": list(rules)},
        }
    )


class Office:
    """A gateway with routes, a ledger in memory and a clock."""

    def __init__(self, *routes: AIProviderRoute, ledger: BudgetLedger | None = None, **spec: Any) -> None:
        self.routes = routes
        self.now = at("2026-11-28T12:00:00")
        self.ledger = ledger or BudgetLedger(None)
        self.gateway = EgressGateway.model_validate(
            {"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": spec}
        )
        self.hosts = KnownHosts(self.gateway, routes)
        self.prices = PriceList(self.gateway.spec.prices)
        self.budgets = Budgets(self.ledger, find_error_writer, clock=lambda: self.now)

    def run(self, agent: str = "support", *, daemon: bool = False, **fields: str) -> RunBudgets:
        found = self.budgets.of_run(self._run(agent, daemon, fields), self.routes, self.hosts.provider)
        assert found is not None
        return found

    def _run(self, agent: str, daemon: bool, fields: dict[str, str]) -> Run:
        declared = TaskAgent.model_validate(
            {"kind": "TaskAgent", "metadata": {"name": agent}, "spec": {"template": {"spec": {"command": ["true"]}}}}
        )
        identity = Identity(
            new_invocation_id(), "TaskAgent", "default", agent, declared.uid, declared.revision,
            SandboxId(new_span_id()[:8]), "default", TraceContext(new_trace_id(), new_span_id()), tuple(fields.items()),
        )  # fmt: skip
        if daemon:
            identity = replace(identity, invocation_id="", agent_kind="DaemonAgent")
        return Run(identity, declared, self.gateway, 1, b"", b"", None)  # type: ignore[arg-type]  # no connections

    def entry(self, key: str = "agent:default/support", day: str = "2026-11-28"):
        return next(one.balance for one in self.ledger.entries(day, 100) if one.account.key == key)


class LlmExchange:
    """One call of one run, as the relay would carry it."""

    def __init__(self, office: Office, run: RunBudgets, body: bytes, head: RequestHead) -> None:
        self.interpreter = recognise(head, hosts=office.hosts, prices=office.prices)
        self.governor = run.govern(head, self.interpreter)
        self.answer: Answer | None = None
        self.sent = body
        if self.governor is not None:
            self.answer = self.governor.judge(body)
            self.sent = self.governor.rewrite_request(body)
        if self.interpreter is not None:
            self.interpreter.request_data(body)
            self.interpreter.request_end()

    @property
    def error(self) -> dict[str, Any]:
        assert self.answer is not None
        return json.loads(self.answer.body)["error"]

    def head(self, status: int = 200, content_type: str = "application/json") -> None:
        head = ResponseHead(status, (("Content-Type", content_type),))
        self.interpreter.response_head(head, 0.1)
        self.governor.response_head(head)

    def data(self, piece: bytes) -> bytes | Cut:
        return self.governor.response_data(self.interpreter.response_data(piece, 0.1))

    def end(self, *, complete: bool = True, sent: bool = True):
        rest = self.interpreter.response_end(complete=complete)
        if complete:
            if rest:
                self.governor.response_data(rest)
            self.governor.response_end(complete=True)
        return self.governor.settle(self.interpreter.facts(), sent=sent)

    def finish(self, status: int = 200, **document: Any):
        """The whole answer, well and good."""
        self.head(status)
        self.data(json.dumps(document).encode())
        return self.end()


def openai_call(office: Office, run: RunBudgets, *, host: str = "api.openai.com", text: str = "hi", **more: Any):
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **more}
    path = "/v1/chat/completions"
    return LlmExchange(office, run, json.dumps(body).encode(), RequestHead("POST", "https", host, 443, path, "", JSON))


def claude_call(office: Office, run: RunBudgets, *, text: str = "hi", max_tokens: int = 100, **more: Any):
    body = {"model": "claude-sonnet-4-5", "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
    head = RequestHead("POST", "https", "api.anthropic.com", 443, "/v1/messages", "", JSON)
    return LlmExchange(office, run, json.dumps({**body, **more}).encode(), head)


def usage(read: int, made: int) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "model": "gpt-4o",
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": read, "completion_tokens": made},
    }


def office_of(budget: dict, *matches: dict, **spec) -> Office:
    return Office(ai_route(budget_rule(budget, *matches)), **spec)


def estimate_of(**more) -> int:
    """What a call's input is taken for."""
    probe = office_of({"maxTokensPerDay": 10**9})
    call = openai_call(probe, probe.run(), **more)
    assert call.answer is None
    return probe.entry().reserved.tokens - more["max_tokens"]


def raw_call(office: Office, body: bytes, *headers: tuple[str, str], path: str = "/v1/chat/completions",
             host: str = "api.openai.com", method: str = "POST", query: str = "") -> LlmExchange:  # fmt: skip
    head = RequestHead(method, "https", host, 443, path, query, headers or JSON)
    return LlmExchange(office, office.run(), body, head)
