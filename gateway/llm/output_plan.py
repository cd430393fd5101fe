"""How much a call may generate: by its own limit, by the rule's, or else by what is left. Pure.

A stream without a limit is reserved a first portion and asks for more as it goes. A document without one can not be
stopped, so it is reserved as much as any model generates, or all that is left: two of them never pass a limit together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from clrk.gateway.budget import MAX_TOKENS_PER_CALL
from clrk.gateway.llm.budget_denial import Denial
from clrk.gateway.llm.budget_rules import BudgetRule
from clrk.gateway.llm.completion import Provider
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.spending import Demand, write_limit
from clrk.gateway.telemetry import attributes as attr

FIRST_PORTION_TOKENS: Final = 4_096  # of a choice that streams
LONGEST_ANSWER_TOKENS: Final = 128_000  # of a choice: GPT-5 and Claude Opus 4.6 generate no more
NO_OUTPUT: Final = frozenset((attr.OPERATION_EMBEDDINGS,))
_RENAMED: Final = frozenset(("openai", "azure"))  # price_id


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What a call may generate.

    Shape: tokens of all choices together; usual: those that a whole answer counts for which reports none, where that is
    less; limited: the provider is told so, by the request or by written, which is its body with the limit; refused: why
    the call does not go out.
    """

    tokens: int
    limited: bool
    usual: int | None = None
    written: bytes | None = None
    refused: Denial | None = None


def plan_output(
    rule: BudgetRule, demand: Demand, dialect: Dialect, provider: Provider, *, is_coded: bool
) -> OutputPlan:
    """Return what a call of a rule may generate. is_coded: nothing can be written into its body."""
    if dialect.operation in NO_OUTPUT:
        return OutputPlan(0, limited=True)
    choices = max(demand.choices, dialect.choices)
    limits = [limit for limit in (demand.output_limit, dialect.max_output_tokens) if limit is not None]
    cap = rule.max_output_tokens
    if not limits:
        if cap is None:
            return _open_ended(rule, demand, choices, streams=dialect.streams)
        name = None if is_coded else _limit_name(demand, dialect, provider)
        return _told(rule, demand, choices, cap, name)
    tokens = min(max(limits) * choices, MAX_TOKENS_PER_CALL)
    if cap is None or tokens <= cap:
        return OutputPlan(tokens, limited=True)
    text = (
        f"{rule.label}: maxOutputTokensPerRequest is {cap}, and this request asks for up to {tokens} "
        f"({max(limits)} for each of {choices}); ask for less, or have the limit raised"
    )
    return OutputPlan(tokens, limited=True, refused=Denial(429, "budget_output_limit", text, rule))


def _open_ended(rule: BudgetRule, demand: Demand, choices: int, *, streams: bool) -> OutputPlan:
    portion = min(FIRST_PORTION_TOKENS * choices, MAX_TOKENS_PER_CALL)
    tokens = portion if streams else min(LONGEST_ANSWER_TOKENS * choices, MAX_TOKENS_PER_CALL)
    if (later := demand.members.get("background")) is None or not later.value:
        return OutputPlan(tokens, limited=False, usual=None if streams else portion)
    text = f"{rule.label} has a budget, and a call in the background ends before it is counted: limit its output"
    return OutputPlan(tokens, limited=False, refused=Denial(400, "budget_output_limit", text, rule))


def _told(rule: BudgetRule, demand: Demand, choices: int, cap: int, name: str | None) -> OutputPlan:
    """Give the request the rule's limit by a name; it is all choices' together."""
    each = cap // choices
    if each == 0 or name is None:
        text = f"{rule.label}: maxOutputTokensPerRequest is {cap}; say in the request how many tokens it may have"
        return OutputPlan(cap, limited=False, refused=Denial(429, "budget_output_limit", text, rule))
    return OutputPlan(each * choices, limited=True, written=write_limit(demand, name, each))


def _limit_name(demand: Demand, dialect: Dialect, provider: Provider) -> str | None:
    """Return how the output is limited in this API; OpenAI's newer models do not take what all others do."""
    name = dialect.output_limit_name
    if name != "max_completion_tokens":
        return name
    is_own = provider.price_id in _RENAMED and "max_tokens" not in demand.members
    return name if is_own or name in demand.members else "max_tokens"
