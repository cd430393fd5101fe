"""The head of the answer: what comes before the final response is passed on, an unasked change of protocol is not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.channel import Channel
from clrk.gateway.egress.http1 import HeadReader, Response, parse_response

MAX_INTERIM: Final = 64  # responses before the final one: an endless row of them would be no answer, at full speed

PassOn = Callable[[Response], Awaitable[None]]


async def read_final_head(upstream: Channel, upgrade: str, pass_on: PassOn) -> Response:
    """Return the final response head; each one before it (RFC 9110, section 15.2) goes to pass_on at once.

    Shape: upgrade is the protocol that the request asked for, "" for none.
    Raises: OSError, ProtocolError.
    Side effects: what follows the head is unread into the upstream.
    """
    reader, interim = HeadReader(), 0
    while True:
        data = await upstream.read()
        if not data:
            raise ConnectionResetError("the upstream closed the connection without an answer")
        while (found := reader.feed(data)) is not None:
            head, data = found
            response = parse_response(head)
            if response.status >= 200 or response.status == 101:
                if response.status == 101:
                    _check_switch(response, upgrade)
                upstream.unread(data)
                return response
            interim += 1
            if interim > MAX_INTERIM:
                raise ProtocolError("interim", f"over {MAX_INTERIM} responses before the final one")
            await pass_on(response)
            if not data:
                break


def _check_switch(response: Response, upgrade: str) -> None:
    """Refuse a change to anything but what was asked for: behind it nobody reads what is said."""
    if not upgrade:
        raise ProtocolError("upgrade", "the upstream switched protocols unasked")
    if response.tokens("upgrade") != [upgrade] or "upgrade" not in response.tokens("connection"):
        raise ProtocolError("upgrade", f"the upstream was asked for {upgrade} and did not say that it switched to it")
