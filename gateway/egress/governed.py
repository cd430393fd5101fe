"""A governor that can not fail open: whatever goes wrong in one denies the call, or ends its answer (CONTRACT 12)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from clrk.gateway.egress.guarded import GuardedInterpreter
from clrk.gateway.egress.refusal import RefusedError
from clrk.gateway.govern import Answer, Cut, Govern, Governor, Inject
from clrk.gateway.interpret import Facts, Interpreter, RequestHead, ResponseHead
from clrk.gateway.telemetry.spans import AttributeValue

_LOG: Final = logging.getLogger(__name__)
_REASON: Final = "governor_failed"
_MESSAGE: Final = "the gateway could not judge this call, so it did not go out; its log says why"


def govern_guarded(
    govern: Govern, head: RequestHead, interpreter: Interpreter | None, *, enforces: bool = True
) -> Governor | None:
    """Return the governor of a request, guarded; None for a call that nothing governs."""
    inner = interpreter.inner if isinstance(interpreter, GuardedInterpreter) else interpreter
    try:
        governor = govern(head, inner)
    except Exception:  # a bug of ours, met in somebody's call: nobody knows what would have been decided
        _LOG.exception("finding the governor of a %s failed: it is denied", head.method)
        return GuardedGovernor(None, enforces=enforces)
    return None if governor is None else GuardedGovernor(governor, enforces=enforces)


class GuardedGovernor:
    """Implements Governor over another one; after that one's first exception everything is denied.

    It also keeps the order that Governor promises: who was never asked to judge has nothing to settle. enforces False:
    the gateway only watches, so a bug changes nothing.
    """

    def __init__(self, inner: Governor | None, *, enforces: bool = True) -> None:
        self._inner, self._enforces = inner, enforces
        self._judged = False

    @property
    def wants_plain_response(self) -> bool:
        """See Governor."""
        return self._inner is not None and self._inner.wants_plain_response

    @property
    def rewrites_response(self) -> bool:
        """See Governor."""
        return self._inner is not None and self._inner.rewrites_response

    @property
    def decodes_response(self) -> bool:
        """See Governor."""
        return self._inner is not None and self._inner.decodes_response

    def judge(self, body: bytes) -> Answer | None:
        """See Governor. Raises: RefusedError; where the gateway only watches, an Answer that nobody is given."""
        if self._inner is not None:
            self._judged = True
            try:
                return self._inner.judge(body)
            except Exception:  # as above
                self._failed("judging a call")
        if self._enforces:
            raise RefusedError(503, _REASON, _MESSAGE)
        return Answer(503, "", b"", _REASON, _MESSAGE)

    def rewrite_request(self, body: bytes) -> bytes:
        """See Governor. Raises: RefusedError; nothing has gone out yet."""
        if self._inner is None:
            return body
        try:
            return self._inner.rewrite_request(body)
        except Exception as exc:  # as above
            self._failed("rewriting a request")
            if not self._enforces:
                return body
            raise RefusedError(503, _REASON, _MESSAGE) from exc

    def response_head(self, head: ResponseHead) -> None:
        """See Governor."""
        if self._inner is not None:
            try:
                self._inner.response_head(head)
            except Exception:  # as above
                self._failed("reading a response head")

    def stream_opened(self, inject: Inject) -> None:
        """See Governor."""
        if self._inner is not None:
            try:
                self._inner.stream_opened(inject)
            except Exception:  # as above
                self._failed("opening an answer")

    def response_data(self, chunk: bytes) -> bytes | Cut:
        """See Governor."""
        if self._inner is not None:
            try:
                return self._inner.response_data(chunk)
            except Exception:  # as above
                self._failed("following an answer")
        return Cut(b"", _REASON, _MESSAGE) if self._enforces else chunk

    def response_end(self, *, complete: bool) -> bytes | Cut:
        """See Governor."""
        if self._inner is not None:
            try:
                return self._inner.response_end(complete=complete)
            except Exception:  # as above
                self._failed("ending an answer")
        return Cut(b"", _REASON, _MESSAGE) if self._enforces else b""

    def settle(self, facts: Facts | None, *, sent: bool) -> Mapping[str, AttributeValue]:
        """See Governor."""
        if self._inner is not None and self._judged:
            try:
                return self._inner.settle(facts, sent=sent)
            except Exception:  # as above; what was reserved stays spent
                self._failed("settling a call")
        return {}

    def _failed(self, what: str) -> None:
        name = type(self._inner).__name__
        self._inner = None
        _LOG.exception("%s failed in %s: the call is denied", what, name)
