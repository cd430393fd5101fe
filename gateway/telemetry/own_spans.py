"""The ids of clrk's own spans, so that no agent's span takes one: two spans of one id are one to a backend. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MAX_TRACES: Final = 16_384
_MAX_PER_TRACE: Final = 20_000


class OwnSpans:
    """Remembers ids by trace; the trace that was quiet for longest goes first. One per gateway process."""

    def __init__(self) -> None:
        self._traces: OrderedDict[str, set[str]] = OrderedDict()

    def add(self, trace_id: str, *span_ids: str) -> None:
        """Remember spans of ours."""
        known = self._traces.get(trace_id)
        if known is None:
            known = self._traces[trace_id] = set()
            if len(self._traces) > _MAX_TRACES:
                self._traces.popitem(last=False)
        else:
            self._traces.move_to_end(trace_id)
        if len(known) < _MAX_PER_TRACE:
            known.update(span_ids)

    def has(self, trace_id: str, span_id: str) -> bool:
        """Say whether a span is one of ours."""
        return span_id in self._traces.get(trace_id, ())
