"""What both listings, of spans and of invocations, may ask about calls. Pure values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Empty fields do not filter.

    Shape: agent is `name` (any namespace) or `namespace/name`; system and model match whole values, model also with
    the wildcards `*` and `?`; denied and would_deny together find either. Units: since_ns inclusive, until_ns
    exclusive, CLOCK_REALTIME.
    """

    agent: str = ""
    since_ns: int | None = None
    until_ns: int | None = None
    system: str = ""
    model: str = ""
    denied: bool = False
    would_deny: bool = False
    errors: bool = False
    min_input_tokens: int | None = None

    def by_model(self) -> tuple[str, tuple[str, str]]:
        """Return the SQL condition of a call to `model`, requested or answering, and its values."""
        operator = "GLOB" if set(self.model) & set("*?") else "="
        return f"(model {operator} ? OR response_model {operator} ?)", (self.model, self.model)
