"""The stamp that a connection begins with: exactly the bytes that its flow record implies, or it is none."""

from __future__ import annotations

import asyncio
import socket

from clrk.core.errors import ClrkError
from clrk.gateway.egress.channel import Channel


class StampError(ClrkError):
    """The connection did not begin with its stamp. Shape: code is stable."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


async def read_stamp(sock: socket.socket, expected: bytes) -> bool:
    """Consume exactly the stamp; return False when the stream ended before its first byte. Raises: StampError."""
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < len(expected):
        piece = await loop.sock_recv(sock, len(expected) - len(received))
        if not piece:
            if received:
                raise StampError("truncated")
            return False
        received += piece
        if not expected.startswith(received):
            raise StampError("mismatch")
    return True


async def admit_stamp(agent: Channel, expected: bytes) -> None:
    """Consume exactly the stamp; nothing at all is a client that had nothing to say. Raises: StampError."""
    received = b""
    while len(received) < len(expected):
        piece = await agent.read()
        if not piece and not received:
            return
        received += piece
        if not piece or not expected.startswith(received[: len(expected)]):
            raise StampError("mismatch" if piece else "truncated")
    agent.unread(received[len(expected) :])
