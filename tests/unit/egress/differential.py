"""Both ends of generated exchanges: a server and a client that write bytes and read with h11, and note what they saw.

h11 is the strict reader: it refuses what RFC 9112 forbids, and tells where chunks begin and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field

import h11
from differential_shapes import Exchange, Message

from clrk.gateway.egress.forward import CHANGED_IN_REQUESTS, CHANGED_IN_RESPONSES

STEP_S = 20.0  # of one exchange: a byte that is held back stops it
MAX_EVENT = 2**20


@dataclass
class Progress:
    """How much of one message its reader has seen."""

    seen: int = 0
    head: bool = False
    over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, *, size: int = 0, over: bool = False) -> None:
        self.seen += size
        self.head, self.over = True, self.over or over
        self.news.set()

    async def reached(self, size: int) -> None:
        while not self.over and not (self.head and self.seen >= size):
            self.news.clear()
            await self.news.wait()


@dataclass
class Run:
    """What both ends saw of one exchange. Shape: entries are (what, value…); chunks and bursts are told apart."""

    client: list[tuple] = field(default_factory=list)
    server: list[tuple] = field(default_factory=list)
    up: Progress = field(default_factory=Progress)
    down: Progress = field(default_factory=Progress)
    interim: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


class Reader:
    """Reads messages from a stream with h11; what it reads goes into a Run."""

    def __init__(self, reader: asyncio.StreamReader, role: type) -> None:
        self._reader, self._role = reader, role
        self._rest = b""
        self._parser: h11.Connection | None = None

    def begin(self, method: str = "") -> None:
        """Expect a new message; method is that of the request which it answers."""
        self._parser = h11.Connection(self._role, max_incomplete_event_size=MAX_EVENT)
        if self._role is h11.CLIENT:
            self._parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
            self._parser.send(h11.EndOfMessage())
        if self._rest:
            self._parser.receive_data(self._rest)
        self._rest = b""

    async def next(self) -> object:
        """Return the next event; ConnectionClosed at the end. Raises: OSError, h11.RemoteProtocolError."""
        assert self._parser is not None
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            self._parser.receive_data(await self._reader.read(65_536))
        if isinstance(event, h11.EndOfMessage):
            self._rest = self._parser.trailing_data[0]
        return event

    async def ends(self) -> bool:
        """Say whether the stream ends here, without another byte."""
        with contextlib.suppress(ConnectionResetError):
            return not self._rest and not await self._reader.read(1)
        return True

    async def body(self, into: list[tuple], progress: Progress, bursts: Message) -> None:
        """Read up to the end of the message. Data without chunks is told apart by its bursts."""
        ends = sorted(set(bursts.needed))
        piece, at, chunked = b"", 0, b"transfer-encoding: chunked" in bursts.head.lower()
        while not isinstance(event := await self.next(), h11.EndOfMessage | h11.ConnectionClosed):
            assert isinstance(event, h11.Data)
            piece += event.data
            at += len(event.data)
            progress.tell(size=len(event.data))
            if event.chunk_end or (not chunked and at in ends):
                into.append(("data", hash(piece), len(piece)))
                piece = b""
        if piece:
            into.append(("data", hash(piece), len(piece)))
        into.append(("trailers", _headers(event, frozenset()) if isinstance(event, h11.EndOfMessage) else None))
        progress.tell(over=True)


def _headers(event: object, without: frozenset[str]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in event.headers.raw_items() if name.lower().decode() not in without]


class Server:
    """Answers each request as its exchange says."""

    def __init__(self) -> None:
        self.exchanges: dict[int, Exchange] = {}
        self.runs: dict[int, Run] = {}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Reader(reader, h11.SERVER)
        try:
            await self._serve(stream, writer)
        except h11.RemoteProtocolError:
            return  # the other end broke off

    async def _serve(self, stream: Reader, writer: asyncio.StreamWriter) -> None:
        while True:
            stream.begin()
            event = await stream.next()
            if not isinstance(event, h11.Request):
                return
            number = next(int(value) for name, value in event.headers if name == b"x-exchange")
            exchange, run = self.exchanges[number], self.runs[number]
            run.server.append(("request", event.method, event.target, _headers(event, CHANGED_IN_REQUESTS)))
            if await self._answer(exchange, run, stream, writer):
                return

    async def _answer(self, exchange: Exchange, run: Run, stream: Reader, writer: asyncio.StreamWriter) -> bool:
        run.up.tell()
        for interim in exchange.interims:
            writer.write(interim)
            await run.interim.acquire()
        if exchange.expects and exchange.continues:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        reading = asyncio.ensure_future(stream.body(run.server, run.up, exchange.request))
        try:
            if exchange.continues and exchange.early is None:
                await reading
            elif exchange.early is not None:
                await run.up.reached(exchange.request.needed[exchange.early - 1])
            writer.write(exchange.response.head)
            await send(writer, exchange.response, run.down)
            if exchange.ending == "reset":
                await run.down.reached(exchange.response.needed[-1] if exchange.response.needed else 0)
                reset(writer)
                return True
            if exchange.continues and exchange.ending in ("keep", "close") and not exchange.is_open_ended:
                await reading
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        return exchange.ending != "keep"


async def send(
    writer: asyncio.StreamWriter, message: Message, progress: Progress, start: int = 0, end: int | None = None
) -> None:
    """Write bursts; each waits until the other end has read those before."""
    for index, burst in list(enumerate(message.bursts))[start:end]:
        if index:
            await progress.reached(message.needed[index - 1])
        writer.write(burst)
        await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def ask(exchange: Exchange, run: Run, stream: Reader, writer: asyncio.StreamWriter) -> bool:
    """Carry one exchange from the client's end; return whether the connection goes on."""
    stream.begin(exchange.method)
    writer.write(exchange.request.head)
    sending = asyncio.ensure_future(_upload(exchange, run, writer))
    try:
        await _receive(exchange, run, stream)
    except (h11.RemoteProtocolError, OSError):
        run.client.append(("broken",))
        run.down.tell(over=True)
    finally:
        run.go_on.set()
        if run.client[-1] == ("broken",) or exchange.ending in ("fin", "reset") or not exchange.continues:
            sending.cancel()  # nobody reads it
        await asyncio.gather(sending, return_exceptions=True)
    if exchange.ending == "keep":
        return True
    if run.client[-1] != ("broken",):
        run.client.append(("ended", await stream.ends()))
    return False


async def _upload(exchange: Exchange, run: Run, writer: asyncio.StreamWriter) -> None:
    if exchange.expects:
        await run.go_on.wait()
        if not exchange.continues:
            return
    await send(writer, exchange.request, run.up, 0, exchange.early)
    if exchange.early is not None:
        await run.down.reached(sum(exchange.response.needed[-1:]))  # the rest of the request follows the answer
        await send(writer, exchange.request, run.up, exchange.early)


async def _receive(exchange: Exchange, run: Run, stream: Reader) -> None:
    while isinstance(event := await stream.next(), h11.InformationalResponse):
        seen = _headers(event, CHANGED_IN_RESPONSES)
        run.client.append(("interim", event.status_code, bytes(event.reason), seen))
        if event.status_code == 100:
            run.go_on.set()
        else:
            run.interim.release()
    if not isinstance(event, h11.Response):
        raise h11.RemoteProtocolError("no answer")
    run.client.append(("head", event.status_code, bytes(event.reason), _headers(event, CHANGED_IN_RESPONSES)))
    run.down.tell()
    await stream.body(run.client, run.down, exchange.response)
