"""The ClientHello peek: a hello, the wish for more, or an error, and the same one however the bytes arrive."""

from __future__ import annotations

from splits import ways_to_arrive

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.client_hello import MAX_HELLO_SIZE, parse_client_hello


def client_hello(data: bytes) -> None:
    """Every way to arrive ends in the verdict of the whole; what follows a hello does not change it."""
    verdicts = {_verdict(pieces) for pieces in ways_to_arrive(data)}
    assert len(verdicts) == 1, verdicts


def _verdict(pieces: list[bytes]) -> str:
    received = b""
    for piece in pieces:
        received += piece
        try:
            found = parse_client_hello(received)
        except ProtocolError as exc:
            return exc.code
        if found is not None:
            name = found.server_name
            assert name is None or (name == name.lower() and name.isascii() and 0 < len(name) <= 255)
            assert sum(map(len, found.alpn)) <= MAX_HELLO_SIZE
            assert all(found.alpn)
            return repr(found)
    return "more"


TARGETS = {"client_hello": client_hello}
