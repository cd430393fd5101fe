"""What stands in the ledger, as `clrk budgets`, the admin API and the page show it. Pure.

An item for each account of the day and of each run that goes on, and one for each budget that nobody has touched yet.
Money is in dollars, times in CLOCK_REALTIME nanoseconds, null: there is no limit, or no end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import AIProviderRoute, TokenBudget
from clrk.gateway.budget import NANO, Account, Balance, day_end_s, is_run, limit_to_nano
from clrk.gateway.budget_ledger import Entry
from clrk.gateway.llm.budget_rules import BudgetRule, compile_rules

MAX_ITEMS: Final = 2_000


def report(
    entries: Sequence[Entry], gateways: Iterable[EgressGateway], routes: Sequence[AIProviderRoute], day: str
) -> list[dict[str, Any]]:
    """Return the items: by route, rule and key; a run's below the day's."""
    rules: dict[tuple[str, str], tuple[BudgetRule, str]] = {}
    for gateway in gateways:
        for rule in compile_rules(gateway, routes):
            if rule.budgets:  # of two with the same matches the first is every call's
                name = f"{gateway.metadata.namespace}/{gateway.metadata.name}"
                rules.setdefault((rule.route, rule.digest), (rule, name))
    items = []
    touched: set[tuple[str, str, str]] = set()
    for entry in entries:
        account = entry.account
        found, of_gateway = rules.get((account.route, account.rule), (None, ""))
        budgets = _budgets_of(found, account.key, runs=is_run(account.window))
        touched.add((account.route, account.rule, _family(account.key)))
        items.append(_item(entry, found, of_gateway, budgets))
    items += _untouched(rules.values(), touched, day)
    return sorted(items, key=lambda item: (item["route"], -1 if item["rule"] is None else item["rule"], item["key"],
                                           item["execution"] or ""))  # fmt: skip


def _family(key: str) -> str:
    """Return the `key` of a tokenBudget that an account's key comes from."""
    return key.partition(":")[0]


def _budgets_of(rule: BudgetRule | None, key: str, *, runs: bool) -> list[TokenBudget]:
    if rule is None:
        return []
    return [one for one in rule.budgets if runs or one.key == _family(key)]


def _item(entry: Entry, rule: BudgetRule | None, gateway: str, budgets: list[TokenBudget]) -> dict[str, Any]:
    account, balance, runs = entry.account, entry.balance, is_run(entry.account.window)
    tokens = [one.max_tokens_per_execution if runs else one.max_tokens_per_day for one in budgets]
    usd = [limit_to_nano(one.max_usd_per_execution if runs else one.max_usd_per_day) for one in budgets]
    return {
        "gateway": gateway,
        "route": account.route,
        "rule": rule.index if rule is not None else None,
        "key": account.key,
        "agent": entry.agent if _family(account.key) == "agent" else "",
        "day": None if runs else account.window,
        "execution": account.window.partition(":")[2] if runs else None,
        "resetTimeUnixNano": None if runs else int(day_end_s(account.window) * NANO),
        "tokens": _counted(balance.used.tokens, balance.reserved.tokens, _least(tokens), 1),
        "usd": _counted(balance.used.nano_usd, balance.reserved.nano_usd, _least(usd), NANO),
    }


def _untouched(
    rules: Iterable[tuple[BudgetRule, str]], touched: set[tuple[str, str, str]], day: str
) -> Iterator[dict[str, Any]]:
    for rule, gateway in rules:
        for key in dict.fromkeys(one.key for one in rule.budgets):
            if (rule.route, rule.digest, key) not in touched:
                entry = Entry(Account(rule.route, rule.digest, key, day), Balance(), "")
                yield _item(entry, rule, gateway, _budgets_of(rule, key, runs=False))


def _counted(used: int, reserved: int, limit: int | None, unit: int) -> dict[str, Any]:
    left = None if limit is None else max(0, limit - used - reserved)
    numbers = {"used": used, "reserved": reserved, "limit": limit, "left": left}
    return {name: number if number is None or unit == 1 else number / unit for name, number in numbers.items()}


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
