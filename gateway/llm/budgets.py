"""Budgets of one gateway and of its runs: which calls have a governor, and what stands in the ledger for people.

A call that an interpreter reads as an LLM call gets a BudgetGovernor if some rule may be its own. A request to a host
that has a budget, but which nobody can meter, is refused unless it is known to cost nothing: batches, files, realtime
sessions, APIs that nobody has heard of. So is a tunnel to such a host, whatever is spoken in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import AIProviderRoute
from clrk.gateway.budget import day_of
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.govern import Answer, Cut, ErrorWriter, Governor, Inject
from clrk.gateway.interpret import Facts, Interpreter, RequestHead, ResponseHead
from clrk.gateway.llm.budget_denial import Denial, answer_of
from clrk.gateway.llm.budget_report import MAX_ITEMS, report
from clrk.gateway.llm.budget_rules import BudgetRule, LlmCall, compile_rules, run_window
from clrk.gateway.llm.completion import Provider
from clrk.gateway.llm.governor import BudgetGovernor
from clrk.gateway.llm.harmless import carries_nothing, is_harmless
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.spender import Spender
from clrk.gateway.policy_names import normalise_name
from clrk.gateway.run import Run
from clrk.gateway.telemetry.spans import AttributeValue, Identity

UNMETERED: Final = "budget_unmetered"

FindProvider = Callable[[str], Provider | None]
FindErrorWriter = Callable[[Provider | None, RequestHead], ErrorWriter]


class Budgets:
    """What the budgets of all runs share. find_error_writer returns who words a provider's errors."""

    def __init__(
        self, ledger: BudgetLedger, find_error_writer: FindErrorWriter, clock: Callable[[], float] = time.time
    ) -> None:
        self.ledger, self.clock = ledger, clock
        self._find_error_writer = find_error_writer
        self._live: set[str] = set()  # windows of runs that go on
        ledger.is_live = self._live.__contains__

    def report(
        self, gateways: Sequence[EgressGateway], routes: Sequence[AIProviderRoute], day: str | None
    ) -> dict[str, Any]:
        """Return what stands in the ledger for a UTC day, today if none is named. Raises: LedgerError."""
        day = day or day_of(self.clock())
        return {"day": day, "items": report(self.ledger.entries(day, MAX_ITEMS), gateways, routes, day)}

    def of_run(self, run: Run, routes: Sequence[AIProviderRoute], find_provider: FindProvider) -> RunBudgets | None:
        """Return the budgets of a run, None when it has none."""
        rules = compile_rules(run.gateway, routes) if run.gateway is not None else ()
        if run.gateway is None or not any(rule.budgets for rule in rules):
            return None
        watches = run.gateway.spec.mode != "Enforce"
        spender = Spender(run.identity, self.ledger, self.clock, watches)
        self._live.add(run_window(run.identity))
        return RunBudgets(spender, rules, find_provider, self._find_error_writer)

    def end_run(self, identity: Identity) -> None:
        """Take note that a run is over: its accounts are shown no more, and may be forgotten. Idempotent."""
        self._live.discard(run_window(identity))


class RunBudgets:
    """Finds the governor of each call of one run."""

    def __init__(
        self,
        spender: Spender,
        rules: tuple[BudgetRule, ...],
        find_provider: FindProvider,
        find_error_writer: FindErrorWriter,
    ) -> None:
        self._spender, self._rules = spender, rules
        self._asks_path = any(match.endpoints for rule in rules for match in rule.matches)
        self._find_provider, self._find_error_writer = find_provider, find_error_writer

    def govern(self, head: RequestHead, interpreter: Interpreter | None) -> Governor | None:
        """Return the governor of an exchange; None when no budget is concerned."""
        host_is = self._find_provider(head.host)
        if isinstance(interpreter, LlmInterpreter):
            call = self._call(head, interpreter.provider, recognised=True)
            rules = tuple(rule for rule in self._rules if rule.may_fit(call))
            if not any(rule.budgets for rule in rules):
                return None
            known = host_is is not None or any(rule.names_host(call.host) for rule in rules)
            return BudgetGovernor(self._spender, call, rules, interpreter, known=known)
        if head.method != "POST" and carries_nothing(head) and is_harmless(head, b""):
            return None
        rule = _covering(self._rules, self._call(head, host_is, recognised=False))
        return None if rule is None else Unmetered(head, rule, self._find_error_writer(host_is, head))

    def _call(self, head: RequestHead, provider: Provider | None, *, recognised: bool) -> LlmCall:
        return LlmCall.of(head.host, head.path if self._asks_path else "", provider, recognised=recognised)

    def refuses_tunnel(self, host: str) -> bool:
        """Say whether nobody may tunnel to a host unread: what goes through a tunnel can not be metered."""
        return not self._spender.watches and tunnel_rule(self._rules, self._find_provider, host) is not None


def tunnel_rule(rules: Sequence[BudgetRule], find_provider: FindProvider, host: str) -> BudgetRule | None:
    """Return a rule with a budget that what goes through a tunnel to a host may fall under."""
    return _covering(rules, LlmCall(normalise_name(host) or host, (), find_provider(host), recognised=False))


def _covering(rules: Sequence[BudgetRule], call: LlmCall) -> BudgetRule | None:
    """Return a rule with a budget that a request may fall under: its model is not known, so it may be any."""
    for rule in rules:
        if rule.may_fit(call):
            if rule.budgets:
                return rule
            if rule.fits_any_model(call):
                return None
    return None


class Unmetered:
    """Refuses a request that may cost something which nobody can count."""

    wants_plain_response = rewrites_response = decodes_response = False

    def __init__(self, head: RequestHead, rule: BudgetRule, errors: ErrorWriter) -> None:
        self._head, self._rule, self._errors = head, rule, errors

    def judge(self, body: bytes) -> Answer | None:
        """See Governor."""
        if is_harmless(self._head, body):
            return None
        what = f"{self._head.method} {self._head.host}{self._head.path}"[:256]
        text = (
            f"{self._rule.label} has a budget for this host, and what {what} costs can not be metered: use an API that "
            "reports its usage, or have the rule's endpoints leave this one out"
        )
        return answer_of(Denial(403, UNMETERED, text, self._rule), self._errors)

    def rewrite_request(self, body: bytes) -> bytes:
        """See Governor."""
        return body

    def response_head(self, head: ResponseHead) -> None:
        """See Governor."""

    def stream_opened(self, inject: Inject) -> None:
        """See Governor."""

    def response_data(self, chunk: bytes) -> bytes | Cut:
        """See Governor."""
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        """See Governor."""
        return b""

    def settle(self, facts: Facts | None, *, sent: bool) -> Mapping[str, AttributeValue]:
        """See Governor."""
        return {}
