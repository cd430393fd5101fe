"""What a budget adds to a call: `budget.py FOLDER`. The ledgers are in FOLDER; a number is one call, read to its end.

CPU time of the thread, as the gateway's event loop would spend it: reading the request, reserving on disk, settling.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from budget_runs import LlmExchange, Office, ai_route, budget_rule, openai_call, usage

from clrk.gateway.budget import Account, Amount, Charge
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.interpret import ResponseHead

CALLS = 2_000
HEAD = ResponseHead(200, (("Content-Type", "application/json"),))
TOKENS = {"maxTokensPerDay": 10**12, "maxTokensPerExecution": 10**12}
MONEY = TOKENS | {"maxUSDPerDay": 10**6}


def main() -> None:
    """Print one line for each way to spend."""
    folder = Path(sys.argv[1])
    print(f"{'':44} {'median µs':>10} {'p99 µs':>10} {'slowest µs':>11}")
    ledger = BudgetLedger(folder / "bench-accounts.db")
    charges = [Charge(Account("r", "d", "agent:x", window), 10**12) for window in ("2026-11-28", "run:1")]
    accounts = [charge.account for charge in charges]

    def entry() -> None:
        ledger.reserve(charges, Amount(1_000, 1_000))
        ledger.settle(accounts, Amount(1_000, 1_000), Amount(10, 10))

    measure("ledger alone: reserve and settle, 2 accounts", entry)
    counted = Office(ai_route(budget_rule(TOKENS)), ledger=BudgetLedger(folder / "bench-tokens.db"))
    priced = Office(ai_route(budget_rule(MONEY)), ledger=BudgetLedger(folder / "bench-money.db"))
    no_rule = Office(ai_route(budget_rule(TOKENS, {"provider": "anthropic"})))
    free, tokens, money = no_rule.run(), counted.run(), priced.run()
    for size in (100, 10_000, 1_000_000):
        text = "hello world " * (size // 12)
        measure(f"call of {size:>9,} bytes, without a budget", lambda text=text: ungoverned(no_rule, free, text))
        measure(f"call of {size:>9,} bytes, tokens limited", lambda text=text: governed(counted, tokens, text))
        measure(f"call of {size:>9,} bytes, and dollars", lambda text=text: governed(priced, money, text))


def governed(office: Office, run, text: str) -> None:
    """One call, to its end."""
    openai_call(office, run, text=text, max_tokens=100).finish(**usage(10, 5))


def ungoverned(office: Office, run, text: str) -> None:
    """The same without a governor: what reading it costs anyway."""
    call: LlmExchange = openai_call(office, run, text=text, max_tokens=100)
    assert call.governor is None
    call.interpreter.response_head(HEAD, 0.1)
    call.interpreter.response_data(json.dumps(usage(10, 5)).encode(), 0.1)
    call.interpreter.response_end(complete=True)
    call.interpreter.facts()


def measure(name: str, call: Callable[[], None]) -> None:
    """Time each call by itself."""
    call()
    times = []
    until = time.perf_counter() + 10
    while len(times) < CALLS and time.perf_counter() < until:
        start = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - start) / 1e3)
    times.sort()
    p99 = times[int(len(times) * 0.99) - 1]
    print(f"{name:44} {statistics.median(times):10.0f} {p99:10.0f} {times[-1]:11.0f}")


if __name__ == "__main__":
    main()
