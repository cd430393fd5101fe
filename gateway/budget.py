"""What may be spent and what is left: accounts, windows, limits. Pure; the ledger (budget_ledger.py) keeps the numbers.

Theory of operation: before a call goes out, what it can use at most is reserved in every account that it is charged to,
all of them or none; afterwards the reservation is exchanged for what was used. A reservation never takes `used +
reserved` past a limit, so calls that run at the same time can not overshoot together. Money is counted in nano-dollars,
rounded up: sums of floats would drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

NANO: Final = 1_000_000_000
MAX_COUNT: Final = 2**62 - 1  # what a column holds, with room for one addition; 4.6 billion dollars in nano-dollars
MAX_TOKENS_PER_CALL: Final = 2**40  # what claims to be more is a mistake, and sums have to fit a column
RUN_PREFIX: Final = "run:"

LimitName = Literal["maxTokensPerDay", "maxTokensPerExecution", "maxUSDPerDay", "maxUSDPerExecution"]


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens and nano-dollars. Never negative."""

    tokens: int = 0
    nano_usd: int = 0

    def __add__(self, other: Amount) -> Amount:
        """Add both; a sum stays within what the ledger can hold."""
        return Amount(
            min(self.tokens + other.tokens, MAX_COUNT),
            min(self.nano_usd + other.nano_usd, MAX_COUNT),
        )

    def less(self, other: Amount) -> Amount:
        """Subtract both, down to nothing."""
        return Amount(max(0, self.tokens - other.tokens), max(0, self.nano_usd - other.nano_usd))


NOTHING: Final = Amount()


@dataclass(frozen=True, slots=True)
class Account:
    """Where something is counted.

    Shape: route is namespace/name of the AIProviderRoute; rule names the set of calls (a digest of the rule's matches,
    so that moving a rule or changing its limits forgets nothing); key says who shares the account (`agent:ns/name`,
    `route`, `identity.tenant:acme`); window is a UTC day (`2026-11-28`), or `run:` and the invocation (a daemon's:
    the sandbox).
    """

    route: str
    rule: str
    key: str
    window: str


@dataclass(frozen=True, slots=True)
class Charge:
    """An account that a call is charged to, with what may be spent there. None: no limit, only counted."""

    account: Account
    max_tokens: int | None = None
    max_nano_usd: int | None = None


@dataclass(frozen=True, slots=True)
class Balance:
    """What stands in an account."""

    used: Amount = NOTHING
    reserved: Amount = NOTHING

    @property
    def taken(self) -> Amount:
        """What is not there for another call."""
        return self.used + self.reserved


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a reservation was refused: asked does not fit below limit any more, in tokens or in nano-dollars."""

    account: Account
    limit: LimitName
    maximum: int
    used: int
    reserved: int
    asked: int

    @property
    def is_usd(self) -> bool:
        """Say whether the numbers are nano-dollars."""
        return self.limit in ("maxUSDPerDay", "maxUSDPerExecution")

    @property
    def left(self) -> int:
        """What is there for another call."""
        return max(0, self.maximum - self.used - self.reserved)


def find_shortage(charges: Iterable[Charge], balances: Mapping[Account, Balance], amount: Amount) -> Shortage | None:
    """Return the first limit that the amount does not fit below; None when all hold."""
    for charge in charges:
        balance = balances.get(charge.account, Balance())
        per_day = not is_run(charge.account.window)
        limits: tuple[tuple[LimitName, int | None, int, int, int], ...] = (
            (
                "maxTokensPerDay" if per_day else "maxTokensPerExecution",
                charge.max_tokens, balance.used.tokens, balance.reserved.tokens, amount.tokens,
            ),
            (
                "maxUSDPerDay" if per_day else "maxUSDPerExecution",
                charge.max_nano_usd, balance.used.nano_usd, balance.reserved.nano_usd, amount.nano_usd,
            ),
        )  # fmt: skip
        for name, maximum, used, reserved, asked in limits:
            # With nothing left even a call that asks for nothing is refused: what it will use is not known.
            if maximum is not None and (used + reserved + asked > maximum or used + reserved >= maximum):
                return Shortage(charge.account, name, maximum, used, reserved, asked)
    return None


def find_left(charges: Iterable[Charge], balances: Mapping[Account, Balance]) -> tuple[int | None, int | None]:
    """Return how many tokens and nano-dollars fit into every account; None: no account limits them."""
    tokens: int | None = None
    nano_usd: int | None = None
    for charge in charges:
        taken = balances.get(charge.account, Balance()).taken
        if charge.max_tokens is not None:
            here = max(0, charge.max_tokens - taken.tokens)
            tokens = here if tokens is None else min(tokens, here)
        if charge.max_nano_usd is not None:
            here = max(0, charge.max_nano_usd - taken.nano_usd)
            nano_usd = here if nano_usd is None else min(nano_usd, here)
    return tokens, nano_usd


def merge_charges(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """Return each account once, with its tightest limits: two budgets with one key count the same calls once."""
    merged: dict[Account, Charge] = {}
    for charge in charges:
        known = merged.get(charge.account)
        merged[charge.account] = charge if known is None else Charge(
            charge.account,
            _tighter(known.max_tokens, charge.max_tokens),
            _tighter(known.max_nano_usd, charge.max_nano_usd),
        )  # fmt: skip
    return tuple(merged.values())


def _tighter(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


# --- money and time -------------------------------------------------------------------------------------------------


def to_nano(usd: float) -> int:
    """Return nano-dollars, rounded up, within what the ledger can hold."""
    if not math.isfinite(usd):
        return MAX_COUNT
    return max(0, min(math.ceil(round(usd * NANO, 6)), MAX_COUNT))


def limit_to_nano(usd: float | None) -> int | None:
    """Return a limit in nano-dollars, rounded down: the odd fraction is not to be spent."""
    return None if usd is None else min(math.floor(round(usd * NANO, 6)), MAX_COUNT)


def is_run(window: str) -> bool:
    """Say whether a window is a run, and not a day."""
    return window.startswith(RUN_PREFIX)


def day_of(now_s: float) -> str:
    """Return the UTC day of a wall-clock time."""
    return f"{datetime.fromtimestamp(now_s, UTC):%Y-%m-%d}"


def day_end_s(day: str) -> float:
    """Return the wall-clock time at which a UTC day ends."""
    return (datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1)).timestamp()


def seconds_to_day_end(now_s: float, day: str) -> int:
    """Return whole seconds until the day is over, at least one."""
    return max(1, math.ceil(day_end_s(day) - now_s))
