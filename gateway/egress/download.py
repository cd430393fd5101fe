"""The response body on its way down: captured, understood, governed, in this order. What comes out is the agent's."""

from __future__ import annotations

from collections.abc import Callable

from clrk.gateway.egress.admission import Admitted
from clrk.gateway.egress.capture import Capture
from clrk.gateway.egress.http1 import Body, Headers, Response
from clrk.gateway.govern import Cut, Inject
from clrk.gateway.interpret import ResponseHead


class Download:
    """Shows one response to everybody who follows it. Order: head, data*, end|broken. elapsed counts from the request.

    Shape: cut is set once the governor has ended the answer; what came out until then is all that the agent gets.
        trailers returns what the agent gets of a body's trailers, once it has ended.
    """

    def __init__(
        self,
        admitted: Admitted,
        capture: Capture | None,
        elapsed_s: Callable[[], float],
        trailers: Callable[[Body], Headers],
    ) -> None:
        self._interpreter, self._governor = admitted.interpreter, admitted.governor
        self._capture, self._elapsed_s = capture, elapsed_s
        self.trailers = trailers
        self.cut: Cut | None = None

    def head(self, response: Response, body: Body | None) -> None:
        """Take the final response head; body None: the connection becomes something else."""
        if self._capture is not None:
            self._capture.response(response, body)
        if body is None:
            return
        head = ResponseHead(response.status, response.headers)
        if self._interpreter is not None:
            self._interpreter.response_head(head, self._elapsed_s())
        if self._governor is not None:
            self._governor.response_head(head)

    def opened(self, inject: Inject) -> None:
        """The answer's head is written; inject puts bytes between what data() returns."""
        if self._governor is not None:
            self._governor.stream_opened(inject)

    @property
    def rewrites(self) -> bool:
        """Say whether the length of what comes out may be another; known after head."""
        return self._governor is not None and self._governor.rewrites_response

    @property
    def decodes(self) -> bool:
        """Say whether the content coding is undone; known after head."""
        return self._governor is not None and self._governor.decodes_response

    def data(self, piece: bytes) -> bytes:
        """Take body bytes, perhaps none; return what the agent gets."""
        if not piece:
            return piece
        if self._capture is not None:
            self._capture.response_data(piece)
        if self._interpreter is not None:
            piece = self._interpreter.response_data(piece, self._elapsed_s())
        return self._governed(piece)

    def end(self) -> bytes:
        """The body is complete; return what was withheld."""
        rest = self._interpreter.response_end(complete=True) if self._interpreter is not None else b""
        rest = self._governed(rest)
        if self._governor is not None and self.cut is None:
            rest += self._shown(self._governor.response_end(complete=True))
        return rest

    def broken(self) -> bytes:
        """The body broke off; return what was withheld."""
        return self._governed(self._interpreter.response_end(complete=False)) if self._interpreter is not None else b""

    def _governed(self, piece: bytes) -> bytes:
        if self._governor is None or not piece:
            return piece
        return self._shown(self._governor.response_data(piece))

    def _shown(self, found: bytes | Cut) -> bytes:
        if not isinstance(found, Cut):
            return found
        self.cut = found
        return found.last
