"""What an agent's LLM calls cost, by UTC day: a question to the embedded store, so as far back as it keeps spans."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.schema import Denial

DAYS: Final = 7
DAY_NS: Final = 86_400 * 10**9


class DaySpending(msgspec.Struct, frozen=True, rename="camel"):
    """One UTC day with calls. cost_usd sums the calls whose price is known; unpriced_calls counts the others."""

    day: str
    llm_calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    unpriced_calls: int


def _attribute(name: str) -> str:
    return f"""json_extract(CAST(json AS TEXT), '$.attributes."{name}"')"""


# The partial index finds the agent's calls; only of those are the rows read.
_SELECT: Final = f"""
SELECT date(start_ns / 1000000000, 'unixepoch') AS day, count(*), coalesce(sum(input_tokens), 0),
    coalesce(sum({_attribute(attr.GEN_AI_USAGE_OUTPUT_TOKENS)}), 0),
    coalesce(sum({_attribute(attr.CLRK_COST_USD)}), 0.0), coalesce(sum({_attribute(attr.CLRK_COST_UNKNOWN)}), 0)
FROM spans INDEXED BY spans_llm
WHERE llm AND start_ns >= ? AND agent_name = ? AND agent_namespace = ? AND denied != {Denial.DENIED:d}
GROUP BY day ORDER BY day DESC
"""  # noqa: S608 - names of attributes, all of them ours


def select_spending(connection: sqlite3.Connection, namespace: str, name: str, now_ns: int) -> list[DaySpending]:
    """Return the last DAYS days that had calls, the newest first; today is one of them.

    Cost: reads the row of each LLM call of these days; some hundred thousand a second.
    """
    since_ns = (now_ns // DAY_NS - DAYS + 1) * DAY_NS
    return [DaySpending(*row) for row in connection.execute(_SELECT, (since_ns, name, namespace))]
