"""One exchange under two governors: it goes out only if both let it, and each sees what is let through. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from clrk.gateway.govern import Answer, Cut, Governor, Inject
from clrk.gateway.interpret import Facts, ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue


class JointGovernor:
    """Implements Governor over two: the first is asked first, and sees the answer first."""

    def __init__(self, first: Governor, second: Governor) -> None:
        self._first, self._second = first, second

    @property
    def wants_plain_response(self) -> bool:
        """See Governor."""
        return self._first.wants_plain_response or self._second.wants_plain_response

    @property
    def rewrites_response(self) -> bool:
        """See Governor."""
        return self._first.rewrites_response or self._second.rewrites_response

    @property
    def decodes_response(self) -> bool:
        """See Governor."""
        return self._first.decodes_response or self._second.decodes_response

    def judge(self, body: bytes) -> Answer | None:
        """See Governor. Both are asked: where the gateway only watches, the second counts what the first would deny."""
        first, second = self._first.judge(body), self._second.judge(body)
        return first or second

    def rewrite_request(self, body: bytes) -> bytes:
        """See Governor."""
        return self._second.rewrite_request(self._first.rewrite_request(body))

    def response_head(self, head: ResponseHead) -> None:
        """See Governor. What the first decodes is plain to the second."""
        self._first.response_head(head)
        if self._first.decodes_response:
            plain = tuple(pair for pair in head.headers if pair[0].lower() != "content-encoding")
            head = ResponseHead(head.status, plain)
        self._second.response_head(head)

    def stream_opened(self, inject: Inject) -> None:
        """See Governor. Only the first may put something in: what the second does to bytes would break its events."""
        self._first.stream_opened(inject)

    def response_data(self, chunk: bytes) -> bytes | Cut:
        """See Governor."""
        shown = self._first.response_data(chunk)
        return self._second.response_data(shown) if isinstance(shown, bytes) and shown else shown

    def response_end(self, *, complete: bool) -> bytes | Cut:
        """See Governor."""
        held = self._first.response_end(complete=complete)
        shown = self._second.response_data(held) if isinstance(held, bytes) and held else held
        if isinstance(shown, Cut):
            return shown
        last = self._second.response_end(complete=complete)
        return last if isinstance(last, Cut) else shown + last

    def settle(self, facts: Facts | None, *, sent: bool) -> Mapping[str, AttributeValue]:
        """See Governor. Both settle, whatever becomes of one."""
        try:
            found = self._first.settle(facts, sent=sent)
        finally:
            also = self._second.settle(facts, sent=sent)
        return {**found, **also}
