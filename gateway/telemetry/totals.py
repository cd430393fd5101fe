"""What the spans of a batch add to the totals of their invocations. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.items import SpanItem, is_agents_own
from clrk.gateway.telemetry.schema import is_denied
from clrk.gateway.telemetry.spans import AttributeValue, SpanKind, SpanRecord, StatusCode

# The row may not be there yet, or not any more: the totals then wait in one without a phase.
ADD_TOTALS: Final = """
INSERT INTO invocations (invocation_id, created_ns, llm_calls, calls, input_tokens, output_tokens, cost_usd,
    denials, errors, error_spans)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (invocation_id) DO UPDATE SET
    llm_calls = llm_calls + excluded.llm_calls, calls = calls + excluded.calls,
    input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens,
    cost_usd = CASE WHEN excluded.cost_usd IS NULL THEN cost_usd ELSE coalesce(cost_usd, 0) + excluded.cost_usd END,
    denials = denials + excluded.denials, errors = errors + excluded.errors,
    error_spans = error_spans + excluded.error_spans
"""
_MAX_TOKENS: Final = 2**40  # of one span: what a provider reports beyond that is a mistake, and sums must fit 64 bits


@dataclass(slots=True)
class Sum:
    """What one invocation gained. start_ns is the earliest start seen."""

    start_ns: int
    llm_calls: int = 0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    denials: int = 0
    errors: int = 0
    error_spans: int = 0

    def row(self, invocation_id: str) -> tuple[object, ...]:
        """Return the values of ADD_TOTALS."""
        return (
            invocation_id, self.start_ns, self.llm_calls, self.calls, self.input_tokens, self.output_tokens,
            self.cost_usd, self.denials, self.errors, self.error_spans,
        )  # fmt: skip


class Totals:
    """Sums by invocation. A call is a CLIENT span that nothing denied; a failed one is an error."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    def add(self, item: SpanItem) -> None:
        """Count a span, unless it is an agent's own or belongs to no invocation."""
        record = item.record
        invocation_id = record.attributes.get(attr.INVOCATION_ID)
        if not isinstance(invocation_id, str) or not invocation_id or is_agents_own(item):
            return
        total = self.sums.setdefault(invocation_id, Sum(record.start_time_unix_nano))
        total.start_ns = min(total.start_ns, record.start_time_unix_nano)
        failed = record.status.code is StatusCode.ERROR
        total.error_spans += failed
        if is_denied(record):
            total.denials += 1
        elif record.kind is SpanKind.CLIENT:
            total.calls += 1
            total.errors += failed
            self._add_usage(total, record)

    @staticmethod
    def _add_usage(total: Sum, record: SpanRecord) -> None:
        attributes = record.attributes
        total.llm_calls += (
            attr.GEN_AI_SYSTEM in attributes
            or attr.GEN_AI_PROVIDER_NAME in attributes
            or (attr.GEN_AI_REQUEST_MODEL in attributes)
        )
        total.input_tokens += _tokens(attributes.get(attr.GEN_AI_USAGE_INPUT_TOKENS))
        total.output_tokens += _tokens(attributes.get(attr.GEN_AI_USAGE_OUTPUT_TOKENS))
        cost = attributes.get(attr.CLRK_COST_USD)
        if isinstance(cost, int | float) and not isinstance(cost, bool):
            total.cost_usd = (total.cost_usd or 0.0) + cost


def _tokens(value: AttributeValue | None) -> int:
    return max(0, min(value, _MAX_TOKENS)) if isinstance(value, int) and not isinstance(value, bool) else 0
