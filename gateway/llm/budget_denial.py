"""What an agent is told when a budget refuses its call: what, which limit, how much is left, what to do. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from clrk.gateway.budget import NANO, Account, Balance, Charge, Shortage, day_end_s, is_run, seconds_to_day_end
from clrk.gateway.govern import Answer, ErrorWriter
from clrk.gateway.llm.budget_rules import BudgetRule
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import AttributeValue

EXCEEDED: Final = "budget_exceeded"
_RETRIED_S: Final = 60  # up to this the SDKs of OpenAI and Anthropic wait as long as they are told


@dataclass(frozen=True, slots=True)
class Denial:
    """A call that does not go out.

    Shape: reason is stable and low-cardinality; wait_s is how long the limit lasts, None: it does not end by itself.
    """

    status: int
    reason: str
    message: str
    rule: BudgetRule
    wait_s: int | None = None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asks:
    """The tokens that a call may use, at most. limited: it says itself how much output it may have."""

    input: int
    output: int
    limited: bool


class DeniedError(Exception):
    """Carries a denial to where it becomes an answer."""

    def __init__(self, denial: Denial) -> None:
        super().__init__(denial.message)
        self.denial = denial


def answer_of(denial: Denial, errors: ErrorWriter) -> Answer:
    """Return the answer in the provider's schema; x-should-retry is what its SDKs go by where waiting is no use."""
    content_type, body = errors.error_body(denial.status, denial.reason, denial.message)
    headers = list(errors.error_headers(denial.status))
    if denial.wait_s is not None:
        headers.append(("Retry-After", str(denial.wait_s)))
    if denial.wait_s is None or denial.wait_s > _RETRIED_S:
        headers.append(("x-should-retry", "false"))
    found: dict[str, AttributeValue] = {attr.CLRK_BUDGET_DENIED: True, attr.CLRK_BUDGET_ROUTE: denial.rule.route}
    found.update(denial.attributes)
    return Answer(
        denial.status, content_type, body, denial.reason, denial.message, denial.rule.label, tuple(headers), found
    )


def describe_shortage(
    rule: BudgetRule,
    shortage: Shortage,
    charges: tuple[Charge, ...],
    balances: Mapping[Account, Balance],
    *,
    now_s: float,
    asks: Asks,
) -> Denial:
    """Return the denial for a limit that is reached."""
    account = shortage.account
    who = f"run {account.window.partition(':')[2]}" if is_run(account.window) else account.key
    held = f", {_show(shortage, shortage.reserved)} reserved by calls under way" if shortage.reserved else ""
    price = f", {_show(shortage, shortage.asked)}" if shortage.is_usd else ""
    wait_s = None if is_run(account.window) else seconds_to_day_end(now_s, account.window)
    less = "Ask for less output" if asks.limited else "Say in the request how much output it may have"
    if wait_s is None:
        what_to_do = f"{less}, or have it raised; it does not come back within this run."
    else:
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(day_end_s(account.window)))
        what_to_do = f"{less}, wait until {end}, or have it raised."
    message = (
        f"budget of {rule.label} for {who}: {shortage.limit} is {_show(shortage, shortage.maximum)}, "
        f"{_show(shortage, shortage.used)} used{held}, {_show(shortage, shortage.left)} left; this call may use up to "
        f"{asks.input + asks.output} tokens{price} (input about {asks.input}, output up to {asks.output}). {what_to_do}"
    )
    found: dict[str, AttributeValue] = {attr.CLRK_BUDGET_LIMIT: shortage.limit, attr.CLRK_BUDGET_KEY: account.key}
    found.update(_daily(shortage, charges, balances))
    return Denial(429, EXCEEDED, message, rule, wait_s, found)


def _daily(
    shortage: Shortage, charges: tuple[Charge, ...], balances: Mapping[Account, Balance]
) -> dict[str, AttributeValue]:
    """Return what the day's account says: the one that was short, else the first; in the unit that was short."""
    days = [charge for charge in charges if not is_run(charge.account.window)]
    day = next((charge for charge in days if charge.account == shortage.account), days[0])
    used = balances.get(day.account, Balance()).used
    if shortage.is_usd:
        found: dict[str, AttributeValue] = {attr.CLRK_BUDGET_DAILY_USED: used.nano_usd / NANO}
        if day.max_nano_usd is not None:
            found[attr.CLRK_BUDGET_DAILY_MAX] = day.max_nano_usd / NANO
        return found
    found = {attr.CLRK_BUDGET_DAILY_USED: used.tokens}
    if day.max_tokens is not None:
        found[attr.CLRK_BUDGET_DAILY_MAX] = day.max_tokens
    return found


def _show(shortage: Shortage, number: int) -> str:
    return f"${number / NANO:.6f}".rstrip("0").rstrip(".") if shortage.is_usd else str(number)
