"""One byte stream with backpressure: the only thing that relay and tunnels know of a connection, TLS or not.

Theory of operation: the event loop pushes bytes in; reading pauses above HIGH_WATER and resumes when the reader has
taken them. At most one task reads and one task writes. A failure (reset, idle timeout, abort) is terminal: it is
raised to whoever waits and to whoever comes later. Only a clean end of stream reads as b"".
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final, cast

HIGH_WATER: Final = 128 * 1024
# Two minutes of silence until the first probe, dead after two more. NATs forget no earlier (RFC 5382, REQ-5).
_KEEP_ALIVE: Final = {socket.TCP_KEEPIDLE: 120, socket.TCP_KEEPINTVL: 30, socket.TCP_KEEPCNT: 4}
LINGER_RESET: Final = struct.pack("ii", 1, 0)


class RaggedEndError(ConnectionResetError):
    """A TLS stream ended without its close_notify: nobody can tell whether that was its end (RFC 8446, section 6.1)."""

    def __init__(self) -> None:
        super().__init__("TLS ended without close_notify")


class RaggedlyEnding(ssl.SSLObject):
    """A TLS object that can end as a peer's did, without close_notify."""

    ragged = False

    def unwrap(self) -> None:
        """End the stream: asyncio and uvloop send what this leaves behind, and close."""
        if not self.ragged:
            super().unwrap()


class Channel(asyncio.Protocol):
    """A connected stream. Made by connect_accepted_socket() and create_connection()."""

    __slots__ = (
        "_chunks", "_drained", "_due", "_eof", "_error", "_idle_s", "_last", "_loop", "_on_lost", "_paused", "_reading",
        "_size", "_tail", "_timer", "_transport", "_waiter", "received_bytes", "sent_bytes", "ssl_object",
    )  # fmt: skip

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.ssl_object: ssl.SSLObject | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._eof = False
        self._tail = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self._reading = True
        self._on_lost: Callable[[], None] | None = None
        self._idle_s = 0.0
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self.received_bytes = 0
        self.sent_bytes = 0

    # --- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; a TLS handshake is over by now."""
        self._transport = cast(asyncio.Transport, transport)
        self.ssl_object = transport.get_extra_info("ssl_object")

    def data_received(self, data: bytes) -> None:
        """Keep bytes for the reader."""
        self._chunks.append(data)
        self._size += len(data)
        self.received_bytes += len(data)
        if self._idle_s:
            self._last = self._loop.time()
        self._pause_if_full()
        self._wake()

    def eof_received(self) -> bool:
        """Note the end; a plain TCP stream stays open for writing (TLS can not)."""
        if self._said_goodbye():
            self._eof = True
            self._wake()
        return not self.is_tls

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._error is None and (exc is not None or not self._eof):
            ended = RaggedEndError() if exc is None and self.is_tls else ConnectionResetError(str(exc or "closed"))
            self._error = exc if isinstance(exc, OSError) else ended
        self._transport = None
        self._tail = True
        self._stop_timer()
        self._wake()
        self._release_writer()
        if self._on_lost is not None:
            self._on_lost()

    def pause_writing(self) -> None:
        """Make writers wait."""
        self._paused = True

    def resume_writing(self) -> None:
        """Let the writer go on."""
        self._paused = False
        self._release_writer()

    # --- reading ----------------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Return what has arrived, at least one byte; b"" at the end of the stream.

        Raises: OSError when the connection broke, TimeoutError when it was idle for too long.
        """
        while not self._size:
            if self._eof:
                return b""
            self._check()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._take()

    async def wait_readable(self) -> None:
        """Return when read() would: there is something, the end, or an error."""
        while not (self._size or self._eof or self._error or self._tail):
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def read_nowait(self) -> bytes:
        """Return what has arrived, perhaps nothing."""
        return self._take() if self._size else b""

    def unread(self, data: bytes) -> None:
        """Put bytes back in front."""
        if data:
            self._chunks.insert(0, data)
            self._size += len(data)
            self._pause_if_full()  # before anything more can arrive

    def _pause_if_full(self) -> None:
        transport = self._transport
        if self._size > HIGH_WATER and self._reading and transport is not None and not transport.is_closing():
            self._reading = False
            transport.pause_reading()

    def _take(self) -> bytes:
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._size = 0
        if not self._reading and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()
        return data

    # --- writing ----------------------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the peer does not keep up. Raises: OSError when the connection is gone."""
        self.write_nowait(data)
        if self._paused:
            await self.drain()

    def write_nowait(self, data: bytes) -> None:
        """Send bytes without waiting. Raises: OSError when the connection is gone."""
        transport = self._transport
        if transport is None or self._error is not None or transport.is_closing():
            raise self._error or ConnectionResetError("connection closed")
        transport.write(data)
        self.sent_bytes += len(data)
        if self._idle_s:
            self._last = self._loop.time()

    async def drain(self) -> None:
        """Wait until the peer has taken enough of what was written. Raises: OSError when the connection is gone."""
        while self._paused:
            self._check()
            self._drained = self._loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None
        if self._idle_s:
            self._last = self._loop.time()

    def write_eof(self) -> None:
        """End our direction; where TLS can not half-close, the connection is closed after what was written."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # ENOTCONN: the peer has reset it, as the reader is about to hear
                self._transport.write_eof()
        else:
            self.close()

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close after what was written has gone out; a reader sees the end of the stream."""
        self._eof = True
        if self._transport is not None:
            self._transport.close()
        self._wake()

    def close_raggedly(self) -> None:
        """Close as close() does, but a TLS stream without its close_notify."""
        if isinstance(self.ssl_object, RaggedlyEnding):
            self.ssl_object.ragged = True
        self.close()

    async def finish(self, limit_s: float) -> None:
        """Close, and return when the connection is gone; what can not be delivered within the limit is dropped."""
        self.close()
        if self._transport is None:
            return
        gone = self._loop.create_future()

        def tell() -> None:
            if not gone.done():
                gone.set_result(None)

        self._on_lost = tell
        try:
            async with asyncio.timeout(limit_s):
                await gone
        except TimeoutError:
            self.abort()
        finally:
            self._on_lost = None

    def abort(self) -> None:
        """Close at once."""
        self.fail(ConnectionAbortedError("aborted by the gateway"))

    def reset(self) -> None:
        """Close at once, so that the peer sees a reset and never a clean end."""
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.abort()

    def fail(self, error: Exception) -> None:
        """Break the connection with an error that readers and writers will see."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        self._wake()
        self._release_writer()

    def set_idle_timeout(self, seconds: float) -> None:
        """Fail with TimeoutError when nothing moves for that long; 0 stops the clock.

        Cost: a look at the clock, as a rule: a timer that is not too late is left to run, and judges when it is due.
        """
        self._idle_s = seconds
        if not seconds or self._transport is None:
            return
        self._last = now = self._loop.time()
        if self._timer is None or now + seconds < self._due:
            self._stop_timer()
            self._start_timer(seconds)

    def keep_alive(self) -> None:
        """Probe a silent peer: a dead one is found out, and no middlebox forgets the connection (RFC 9293, 3.8.4)."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Call back once when the connection is gone; None takes it back."""
        self._on_lost = callback

    # --- what it becomes --------------------------------------------------------------------------------------------

    def begin_again(self, rest: bytes) -> None:
        """Forget what was exchanged up to here, a proxy's handshake; rest came behind it."""
        self.sent_bytes, self.received_bytes = 0, len(rest)
        self.unread(rest)

    async def start_tls(self, context: ssl.SSLContext, server_name: str) -> Channel:
        """Return the channel inside TLS to the peer; this one is over. Raises: OSError, and then it is closed."""
        transport = self._transport
        if transport is None or self._error is not None:
            raise self._error or ConnectionResetError("connection closed")
        inner = Channel()
        secure = await self._loop.start_tls(transport, inner, context, server_hostname=server_name)
        if secure is None:
            raise ConnectionResetError("connection closed")
        inner.connection_made(secure)
        return inner

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def is_tls(self) -> bool:
        """Say whether the stream is encrypted."""
        return self.ssl_object is not None

    @property
    def is_idle_and_open(self) -> bool:
        """Say whether the connection can carry a new exchange: open, nothing unread, no end in sight."""
        return not (self._eof or self._tail or self._size or self._error) and self._transport is not None

    @property
    def has_unread(self) -> bool:
        """Say whether read() would return at once with bytes."""
        return self._size > 0

    @property
    def is_paused(self) -> bool:
        """Say whether the peer does not keep up with what is written."""
        return self._paused

    @property
    def is_at_end(self) -> bool:
        """Say whether the other side has said everything and all was read; in TLS, with its goodbye or without."""
        ended = self._eof if self._error is None else isinstance(self._error, RaggedEndError)
        return ended and not self._size

    @property
    def is_broken(self) -> bool:
        """Say whether nothing more can be written: it failed, is gone, or is about to be, as TLS behind a goodbye."""
        return self._error is not None or self._transport is None or self._transport.is_closing()

    @property
    def peer(self) -> tuple[str, int]:
        """Return address and port of the other end; ("", 0) when it is gone."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return (name[0], name[1]) if name else ("", 0)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._tail:
            raise ConnectionResetError("connection closed")

    def _said_goodbye(self) -> bool:
        """Say whether the end is an end: asyncio calls a TLS stream ended also when its connection just is no more."""
        try:
            return self.ssl_object is None or not self.ssl_object.read(1)
        except ssl.SSLError:
            return False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _release_writer(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _start_timer(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        if not self._idle_s:
            return
        rest = self._last + self._idle_s - self._loop.time()
        if rest <= 0:
            self.fail(TimeoutError(f"nothing moved for {self._idle_s:g} s"))
        else:
            self._start_timer(rest)
