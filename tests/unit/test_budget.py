"""What may be spent: limits, several accounts at once, money and days. Pure."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway import budget
from clrk.gateway.budget import Account, Amount, Balance, Charge

DAY = Account("default/llm", "ab12", "agent:default/support", "2026-11-28")
RUN = Account("default/llm", "ab12", "agent:default/support", "run:0192")


def _at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(("asked", "fits"), [(39, True), (40, True), (41, False)])
def test_a_reservation_fits_up_to_the_limit_and_not_one_token_over(asked, fits):
    balances = {DAY: Balance(Amount(50), Amount(10))}
    short = budget.find_shortage([Charge(DAY, max_tokens=100)], balances, Amount(asked))
    assert (short is None) == fits
    if short is not None:
        assert (short.limit, short.used, short.reserved, short.asked, short.left) == ("maxTokensPerDay", 50, 10, 41, 40)


def test_the_first_limit_that_is_short_is_named():
    charges = [Charge(DAY, 100, 100), Charge(RUN, 10, 5)]
    assert budget.find_shortage(charges, {}, Amount(5, 5)) is None
    assert budget.find_shortage(charges, {}, Amount(11, 5)).limit == "maxTokensPerExecution"
    assert budget.find_shortage(charges, {}, Amount(5, 6)).limit == "maxUSDPerExecution"
    assert budget.find_shortage(charges, {}, Amount(5, 101)).limit == "maxUSDPerDay"
    assert budget.find_shortage(charges, {}, Amount(101, 101)).limit == "maxTokensPerDay"


def test_with_nothing_left_a_call_that_asks_for_nothing_is_refused():
    assert budget.find_shortage([Charge(DAY, max_tokens=0)], {}, Amount()) is not None
    assert budget.find_shortage([Charge(DAY, max_tokens=5)], {DAY: Balance(Amount(5))}, Amount()) is not None
    assert budget.find_shortage([Charge(DAY, max_nano_usd=5)], {DAY: Balance(Amount(0, 9))}, Amount()).left == 0
    assert budget.find_shortage([Charge(DAY)], {DAY: Balance(Amount(10**9))}, Amount(10**9)) is None


def test_two_budgets_with_one_key_count_once_and_the_tighter_limit_holds():
    merged = budget.merge_charges([Charge(DAY, 100, None), Charge(RUN, 7), Charge(DAY, 50, 9), Charge(RUN)])
    assert merged == (Charge(DAY, 50, 9), Charge(RUN, 7, None))


def test_what_is_left_is_the_least_of_all_accounts():
    balances = {DAY: Balance(Amount(50, 3), Amount(10, 1)), RUN: Balance(Amount(200))}
    assert budget.find_left([Charge(DAY, 100, 10)], balances) == (40, 6)
    assert budget.find_left([Charge(DAY, 100, 10), Charge(RUN, 100)], balances) == (0, 6)
    assert budget.find_left([Charge(DAY)], balances) == (None, None)


@pytest.mark.parametrize(
    ("usd", "nano"),
    [(0.0, 0), (1e-9, 1), (1.5e-9, 2), (0.1, 100_000_000), (-1.0, 0), (math.inf, budget.MAX_COUNT)],
)
def test_money_is_rounded_up(usd, nano):
    assert budget.to_nano(usd) == nano


def test_limits_in_money_are_rounded_down():
    assert budget.limit_to_nano(1.5e-9) == 1
    assert budget.limit_to_nano(0.1 + 0.2) == 300_000_000
    assert budget.limit_to_nano(1e12) == budget.MAX_COUNT
    assert budget.limit_to_nano(None) is None


@given(st.floats(0, 1e6))
def test_money_never_shrinks_on_the_way_into_the_ledger(usd):
    assert budget.to_nano(usd) >= usd * budget.NANO - 1e-3


def test_a_day_is_utc_and_ends_at_midnight():
    last = _at("2026-11-28T23:59:59.5")
    assert budget.day_of(last) == "2026-11-28"
    assert budget.day_of(last + 0.5) == "2026-11-29"
    assert budget.seconds_to_day_end(last, "2026-11-28") == 1
    assert budget.seconds_to_day_end(_at("2026-11-28T00:00:00"), "2026-11-28") == 86_400
    assert budget.seconds_to_day_end(_at("2026-11-29T10:00:00"), "2026-11-28") == 1  # past already: never 0 or less
    assert budget.day_of(_at("2028-02-28T23:59:59") + 1) == "2028-02-29"
