"""The gateway's end of the control socket: typed messages in, typed messages out, nothing ever blocks.

The runtime is the only peer. When it is gone, or breaks the protocol, the gateway has no reason to live: on_gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from typing import Final, Protocol

from clrk.core.control import RUNTIME_MESSAGES, receive, send
from clrk.core.errors import ClrkError, ProtocolError
from clrk.core.messages import GatewayMessage, RuntimeMessage

_LOG: Final = logging.getLogger(__name__)
_MAX_QUEUED: Final = 4096  # messages to a runtime that does not read; each is under 1 KiB
_PACKETS_PER_WAKEUP: Final = 64  # then the event loop gets its turn


class ControlError(ClrkError):
    """The control socket can not take a message: the runtime is gone, or has not read for too long."""


class ControlHandler(Protocol):
    """Takes what the runtime says."""

    def on_message(self, message: RuntimeMessage, fds: list[int]) -> None:
        """Take one message; the fds belong to the handler from now on."""

    def on_gone(self, reason: str) -> None:
        """The connection is over. Called once."""


class ControlClient:
    """Reads and writes one SEQPACKET socket on the running loop.

    Side effects: owns sock and closes it.
    """

    def __init__(self, sock: socket.socket, handler: ControlHandler) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._queue: deque[GatewayMessage] = deque()
        self._closed = False

    def start(self) -> None:
        """Begin to dispatch messages."""
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def send(self, message: GatewayMessage) -> None:
        """Send now, or as soon as the runtime reads again.

        Raises: ControlError when the socket is closed or the queue is full.
        """
        if self._closed:
            raise ControlError("the runtime is gone")
        if self._queue:
            if len(self._queue) >= _MAX_QUEUED:
                raise ControlError("the runtime does not read its control socket")
            self._queue.append(message)
            return
        try:
            send(self._sock, message)
        except BlockingIOError:
            self._queue.append(message)
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        except OSError as exc:
            self._gone(f"send: {exc}")
            raise ControlError("the runtime is gone") from exc

    def close(self) -> None:
        """Stop reading and close the socket. Does not call on_gone."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    def _on_writable(self) -> None:
        try:
            while self._queue:
                send(self._sock, self._queue[0])
                self._queue.popleft()
        except BlockingIOError:
            return
        except OSError as exc:
            self._gone(f"send: {exc}")
            return
        self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        for _ in range(_PACKETS_PER_WAKEUP):
            if self._closed:
                return
            try:
                received = receive(self._sock, RUNTIME_MESSAGES)
            except BlockingIOError:
                return
            except (OSError, ProtocolError) as exc:
                self._gone(f"receive: {exc}")
                return
            if received is None:
                self._gone("the runtime closed the control socket")
                return
            self._dispatch(*received)

    def _dispatch(self, message: RuntimeMessage, fds: list[int]) -> None:
        try:
            self._handler.on_message(message, fds)
        except ProtocolError as exc:
            close_fds(fds)
            self._gone(f"{type(message).__name__}: {exc}")

    def _gone(self, reason: str) -> None:
        if not self._closed:
            _LOG.info("control connection over: %s", reason)  # the handler says whether that is bad
            self.close()
            self._handler.on_gone(reason)


def close_fds(fds: list[int]) -> None:
    """Close fds that nobody wants; those already closed are passed over."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:  # EBADF: somebody took and closed it before the error
            continue
