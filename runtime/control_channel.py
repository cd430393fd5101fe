"""The runtime's end of the control socket on the event loop: ordered sends with a deadline, hostile input refused."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from typing import Final

import msgspec

from clrk.core.control import GATEWAY_MESSAGES, receive, send
from clrk.core.errors import HostError, ProtocolError
from clrk.core.messages import GatewayMessage

SEND_DEADLINE_S: Final = 10.0  # a gateway that does not read its control socket for this long is stuck


class ChannelClosedError(HostError):
    """The gateway is gone, or has to go: nothing more can be said to it."""


class ControlChannel:
    """One connection to one life of the gateway. Owns its socket.

    Theory of operation: sends from several tasks take turns, so packets keep the order of the calls; fds belong to the
    caller, who must keep them open until send() returns. fds that the gateway sends are never taken: closing the last
    one of a TCP socket waits for its far end, for as long as the gateway has set (SO_LINGER).
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lock = asyncio.Lock()
        self._closed = asyncio.Event()

    async def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send one packet.

        Raises: ChannelClosedError when the gateway is gone or does not read; the channel is closed then.
        """
        try:
            async with asyncio.timeout(SEND_DEADLINE_S), self._lock:
                while not self._closed.is_set():
                    try:
                        send(self._sock, message, fds)
                    except BlockingIOError:
                        await self._wait(writable=True)
                    else:
                        return
        except (OSError, TimeoutError) as exc:
            self.close()
            why = "it does not read" if isinstance(exc, TimeoutError) else exc.strerror
            raise ChannelClosedError(f"send {type(message).__name__} to the gateway: {why}") from exc
        raise ChannelClosedError(f"send {type(message).__name__} to the gateway: it is gone")

    async def receive(self) -> GatewayMessage | None:
        """Return the next message, or None when the gateway is gone.

        Raises: ProtocolError for anything malformed, fds included: the gateway has none to give.
        """
        while not self._closed.is_set():
            try:
                _, _, flags, _ = self._sock.recvmsg(1, 0, socket.MSG_PEEK)
                if flags & socket.MSG_CTRUNC:  # fds; they stay in the queue
                    raise ProtocolError("control_fds", "a packet of the gateway came with fds")
                received = receive(self._sock, GATEWAY_MESSAGES)
            except BlockingIOError:
                await self._wait(writable=False)
                continue
            except OSError:  # reset: as good as the end
                return None
            if received is None:
                return None
            message: GatewayMessage = received[0]
            return message
        return None

    def close(self) -> None:
        """Close the socket; whoever waits on it is woken. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock.fileno())
            loop.remove_writer(self._sock.fileno())
            # What is still in its queue goes with it, fds included: not on this thread.
            threading.Thread(target=self._sock.close, name="close control socket", daemon=True).start()

    async def _wait(self, *, writable: bool) -> None:
        """Wait until the socket is ready in one direction, or closed. One waiter for each direction."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        fd = self._sock.fileno()
        add(fd, lambda: None if ready.done() else ready.set_result(None))
        closed = loop.create_task(self._closed.wait())  # ends with this call
        try:
            await asyncio.wait((ready, closed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
            if not self._closed.is_set():
                remove(fd)
