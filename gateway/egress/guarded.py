"""An interpreter that can not break a call: telemetry fails open, bytes go on (CONTRACT section 11).

Interpreters promise not to raise. Should one do so all the same, on bytes that a stranger chose, the call goes on as a
plain HTTP call whose usage is not visible, and the log says which parser failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from clrk.gateway.egress.http1 import Request
from clrk.gateway.egress.origin import Exit, Origin, Recognise
from clrk.gateway.govern import ErrorWriter
from clrk.gateway.interpret import Facts, Interpreter, RequestHead, ResponseHead
from clrk.gateway.telemetry import attributes as attr

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
_NOT_UNDERSTOOD: Final = Facts(name="", attributes={attr.CLRK_BODY_USAGE_VISIBLE: False})


def recognise_guarded(recognise: Recognise, head: RequestHead) -> Interpreter | None:
    """Return the interpreter for a request, guarded; None for a plain call, and when recognition itself fails."""
    try:
        inner = recognise(head)
    except Exception:  # as below
        _LOG.exception("recognising %s failed: its call goes on uninterpreted", head.method)
        return None
    return None if inner is None else GuardedInterpreter(inner)


def find_client_errors_guarded(way_out: Exit, origin: Origin, request: Request) -> ErrorWriter | None:
    """Return who words an error for the agent's SDK; None where none is known, and when finding it fails."""
    host, path = origin.name or str(origin.destination.address), request.target.partition("?")[0]
    head = RequestHead(request.method, origin.scheme, host, origin.destination.port, path, "", request.headers)
    try:
        return way_out.find_client_errors(head)
    except Exception:  # as below
        _LOG.exception("finding the words for a %s failed: its error has none", request.method)
        return None


class GuardedInterpreter:
    """Implements Interpreter over another one; after that one's first exception it is not asked again."""

    def __init__(self, inner: Interpreter) -> None:
        self._inner = inner
        self._failed = False

    @property
    def inner(self) -> Interpreter:
        """The interpreter itself, for whoever guards its own questions."""
        return self._inner

    @property
    def wants_whole_request(self) -> bool:
        """See Interpreter."""
        return self._ask(lambda: self._inner.wants_whole_request, False)

    def rewrite_request(self, body: bytes) -> bytes:
        """See Interpreter."""
        return self._ask(lambda: self._inner.rewrite_request(body), body)

    def request_data(self, chunk: bytes) -> None:
        """See Interpreter."""
        self._ask(lambda: self._inner.request_data(chunk), None)

    def request_end(self) -> None:
        """See Interpreter."""
        self._ask(self._inner.request_end, None)

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """See Interpreter."""
        self._ask(lambda: self._inner.response_head(head, elapsed_s), None)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """See Interpreter."""
        return self._ask(lambda: self._inner.response_data(chunk, elapsed_s), chunk)

    def response_end(self, *, complete: bool) -> bytes:
        """See Interpreter."""
        return self._ask(lambda: self._inner.response_end(complete=complete), b"")

    def facts(self) -> Facts:
        """See Interpreter."""
        return self._ask(self._inner.facts, _NOT_UNDERSTOOD)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        if self._failed:
            return otherwise
        try:
            return question()
        except Exception:  # a bug of ours, met in the middle of somebody's call
            self._failed = True
            _LOG.exception("interpreter %s failed: its call goes on uninterpreted", type(self._inner).__name__)
            return otherwise
