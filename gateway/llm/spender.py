"""What the budgets of one run share: who spends, where it is kept, and what stored answers stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.llm.spending import REFERENCE_TOKENS
from clrk.gateway.telemetry.spans import Identity


class Answers:
    """How many tokens an answer that the provider stores stands for; bounded, the oldest go."""

    LIMIT: Final = 1024

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def remember(self, answer_id: str | None, tokens: int) -> None:
        """Note an answer."""
        if answer_id is None:
            return
        self._tokens.pop(answer_id, None)
        if len(self._tokens) >= self.LIMIT:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[answer_id] = tokens

    def tokens(self, answer_id: str) -> int:
        """Return what is read again with it; an unknown one is as long as a context window."""
        return self._tokens.get(answer_id, REFERENCE_TOKENS)


@dataclass(frozen=True, slots=True)
class Spender:
    """What the governors of one run share.

    Shape: watches says that nothing is refused; clock returns the wall-clock time in seconds; answers has the tokens of
    stored answers, for requests that go on from them.
    """

    identity: Identity
    ledger: BudgetLedger
    clock: Callable[[], float]
    watches: bool = False
    answers: Answers = field(default_factory=Answers)
