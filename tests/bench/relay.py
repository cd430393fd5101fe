"""What one call costs the gateway, by kind of call: microseconds of its own processor time, by thread.

    .venv/bin/python -P tests/bench/relay.py [--calls 4000] [--rounds 3] [--against OTHER_CHECKOUT] [--count]

The gateway has this process to itself, on uvloop and with its real store, as in production; the agent and the upstream
are processes of their own, so that their time is not counted. What the kernel does at connect() is done by the agent.
Processor time is what a busy machine does not change much; with --against, each round measures another checkout's code
as well, in turn, and the ratio of the two is what counts. --count counts the calls of functions in the event loop's
thread instead: coarse, but the same on every machine, however busy.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import multiprocessing
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import uvloop

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit" / "egress"), str(TESTS / "unit"), str(TESTS)]

CONNECTIONS: Final = 8
WARM_UP: Final = 40  # calls of one connection: handshakes, caches
HOST: Final = "api.openai.com"
JSON: Final = "application/json"
EVENTS: Final = 50
BUDGET: Final = {"maxTokensPerDay": 10**12, "maxTokensPerExecution": 10**12, "maxUSDPerDay": 10**6}


@dataclass(frozen=True)
class Kind:
    """One kind of call: what is asked, the pieces of the answer, and whether something governs it.

    Shape: reconnects opens a connection for each call, where others carry all of theirs.
    """

    request: bytes
    answer: tuple[bytes, ...]
    budget: bool = False
    reconnects: bool = False


def _kinds() -> dict[str, Kind]:
    plain = f"GET /files/report?page=2 HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()
    kilobyte = _answer("text/plain", b"x" * 1024)
    usage = {"prompt_tokens": 9, "completion_tokens": 6}
    told = {"id": "c", "model": "gpt-5.4-mini", "choices": [{"index": 0, "message": {"content": "word " * 20}}]}
    asked = {"model": "gpt-5.4-mini", "messages": [{"role": "user", "content": "Where is my lamp? "}]}
    document = _answer(JSON, json.dumps(told | {"usage": usage}).encode())
    delta = {"id": "c", "model": "gpt-5.4-mini", "choices": [{"index": 0, "delta": {"content": "word after word "}}]}
    end = {"id": "c", "model": "gpt-5.4-mini", "choices": [], "usage": usage}
    pieces = [f"data: {json.dumps(one)}\r\n\r\n".encode() for one in (*[delta] * EVENTS, end)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    stream = (head, *chunks, b"0\r\n\r\n")
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "HTTP": Kind(plain, kilobyte),
        "HTTP, connection of its own": Kind(plain, kilobyte, reconnects=True),
        "LLM": Kind(_post(asked), document),
        "LLM, with a budget": Kind(_post(asked), document, budget=True),
        f"LLM, {EVENTS} events": Kind(_post(streamed), stream),
        f"LLM, {EVENTS} events, with a budget": Kind(_post(streamed), stream, budget=True),
    }


def _answer(media_type: str, body: bytes) -> tuple[bytes, ...]:
    return (f"HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body,)


def _post(asked: dict[str, Any]) -> bytes:
    raw = json.dumps(asked).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: {HOST}", "Authorization: Bearer sk-" + "x" * 40,
             f"Content-Type: {JSON}", f"Content-Length: {len(raw)}", "", "")  # fmt: skip
    return "\r\n".join(lines).encode() + raw


# --- the upstream ---------------------------------------------------------------------------------------------------


class _Answerer(asyncio.Protocol):
    """Answers whatever has a whole head in it; each piece of the answer goes out by itself."""

    def __init__(self, pieces: tuple[bytes, ...]) -> None:
        self._pieces, self._answers = pieces, set[asyncio.Task[None]]()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if b"\r\n\r\n" in data:
            task = asyncio.ensure_future(self._say())
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _say(self) -> None:
        for number, piece in enumerate(self._pieces):
            if number:
                await asyncio.sleep(0.0005)  # else they arrive as one
            self._transport.write(piece)


def _serve(pieces: tuple[bytes, ...], cert: bytes, key: bytes, told: Connection) -> None:
    async def serve() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            both = Path(folder) / "both.pem"
            both.write_bytes(key + cert)
            context.load_cert_chain(both)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Answerer(pieces), "127.0.0.1", 0, ssl=context, backlog=1024)
        told.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, told.poll, None)  # until the other end is closed

    uvloop.run(serve())


# --- the agent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How the agent reaches its gateway: what the kernel would know of it."""

    listener: tuple[str, int]
    header_v4: bytes
    header_v6: bytes
    address: str
    ca_pem: str


def _flow(address: str) -> Any:
    from clrk.core import wire

    return wire.FlowRecord(ip_address(address), 443, wire.FAMILY_V4, 4242, 1, 1234, 2000001, b"agent")


def _ask(way: Way, kind: Kind, calls: int, told: Connection) -> None:
    from clrk.gateway.proxyv2.expect import expected_header

    context = ssl.create_default_context(cadata=way.ca_pem)
    expects = sum(map(len, kind.answer))
    flow = _flow(way.address)

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.create_connection(way.listener)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(expected_header(way.header_v4, way.header_v6, flow, *sock.getsockname()))
        return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=HOST)

    async def one(count: int, wire: list[Any]) -> None:
        for _ in range(count):
            if not wire or kind.reconnects:
                wire[:] = await connect()
            reader, writer = wire
            writer.write(kind.request)
            answer = await reader.readexactly(expects) if not kind.budget else await _governed(reader, kind)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            if kind.reconnects:
                writer.close()

    async def ask() -> None:
        wires: list[list[Any]] = [[] for _ in range(CONNECTIONS)]
        for count in (WARM_UP, calls // CONNECTIONS):
            await asyncio.gather(*(one(count, wire) for wire in wires))
            told.send(None)
            await asyncio.get_running_loop().run_in_executor(None, told.recv)

    uvloop.run(ask())


async def _governed(reader: asyncio.StreamReader, kind: Kind) -> bytes:
    """What governors rewrite ends where its framing says."""
    if len(kind.answer) > 1:
        return await reader.readuntil(b"\r\n0\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    if b"chunked" in lower:
        return head + await reader.readuntil(b"\r\n0\r\n\r\n")
    return head + await reader.readexactly(int(lower.partition(b"content-length:")[2].split()[0]))


# --- the gateway ----------------------------------------------------------------------------------------------------


class _OneFlow:
    """The kernel's map, of an agent that always connects alike."""

    def __init__(self, address: str) -> None:
        self._flow = _flow(address)

    def take(self, key: bytes) -> Any:
        return self._flow


class _Spent:
    """What work takes: microseconds of the event loop's thread and of the others, or its calls of functions."""

    def __init__(self, *, count: bool) -> None:
        self._counted: collections.Counter[str] = collections.Counter()
        self._began = time.thread_time(), time.process_time()
        if count:
            sys.setprofile(self._count)

    def _count(self, _frame: Any, event: str, _arg: Any) -> None:
        self._counted[event] += 1

    def a_call(self, calls: int) -> dict[str, float]:
        """End it."""
        sys.setprofile(None)
        if self._counted:
            return {"python": self._counted["call"] / calls, "native": self._counted["c_call"] / calls}
        on_loop, in_all = time.thread_time() - self._began[0], time.process_time() - self._began[1]
        return {"loop": on_loop / calls * 1e6, "threads": (in_all - on_loop) / calls * 1e6}


async def measure(kind: Kind, calls: int, folder: Path, *, count: bool) -> dict[str, float]:
    """Return what one call takes; see _Spent."""
    from budget_runs import ai_route, budget_rule
    from egress_lab import aliased, laboratory
    from tls_material import Authority

    from clrk.gateway.budget_ledger import BudgetLedger
    from clrk.gateway.telemetry.pipeline import Telemetry
    from clrk.gateway.telemetry.store import TraceStore

    spawn, loop = multiprocessing.get_context("spawn"), asyncio.get_running_loop()
    authority = Authority("upstream")
    hear_upstream, tell_upstream = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(kind.answer, *authority.issue(HOST, names=[HOST]), tell_upstream))
    server.start()
    port = await loop.run_in_executor(None, hear_upstream.recv)
    telemetry = Telemetry(TraceStore(folder / "traces.db", retention_s=3600.0), {})
    config = {"ai_routes": [ai_route(budget_rule(BUDGET))]} if kind.budget else {}
    async with laboratory(
        gateway=aliased(port, HOST), rules=[{"hostnames": [HOST]}], recognise="real", recorder=telemetry,
        upstream_ca=authority.cert_pem, config=config, ledger=BudgetLedger(folder / "budgets.db"),
    ) as lab:  # fmt: skip
        address = await lab.resolve(HOST)
        lab.egress._acceptor._flows = _OneFlow(address)
        way = Way(
            lab.sockets.egress_v4.getsockname(), lab.run.header_v4, lab.run.header_v6, address, lab.ca.cert_pem
        )  # fmt: skip
        hear_agent, tell_agent = spawn.Pipe()
        agent = spawn.Process(target=_ask, args=(way, kind, calls, tell_agent))
        agent.start()
        await loop.run_in_executor(None, hear_agent.recv)
        spent = _Spent(count=count)
        hear_agent.send(None)
        await loop.run_in_executor(None, hear_agent.recv)
        found = spent.a_call(calls)
        hear_agent.send(None)
        agent.join()
    assert telemetry.store.counters["spans"] == calls + CONNECTIONS * WARM_UP, telemetry.store.counters
    await telemetry.close()
    hear_upstream.close()
    server.join()
    return found


def run_child(checkout: Path, name: str, calls: int, *, count: bool) -> dict[str, float]:
    """Measure a checkout's code in a process of its own."""
    command = [sys.executable, "-P", __file__, "--calls", str(calls), "--only", name, "--json"]
    command += ["--count"] if count else []
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def compare(names: list[str], calls: int, rounds: int, against: Path | None, *, count: bool) -> None:
    """Print a table."""
    here = Path(__file__).parents[2]
    parts = ("python", "native") if count else ("loop", "threads")
    heads = "Python functions | native ones" if count else "event loop, µs | other threads, µs"
    print(f"| call | {heads} |" + (" before, both | ratio | quartiles |" if against else ""))
    print("|---|---|---|" + ("---|---|---|" if against else ""))
    for name in names:
        pairs = []
        for number in range(rounds):
            order = [here, against or here] if number % 2 else [against or here, here]
            found = {path: run_child(path, name, calls, count=count) for path in dict.fromkeys(order)}
            pairs.append((found[here], found[against or here]))
        ours = [statistics.median(one[part] for one, _ in pairs) for part in parts]
        line = f"| {name} | {ours[0]:.0f} | {ours[1]:.0f} |"
        if against:
            before = statistics.median(sum(other.values()) for _, other in pairs)
            ratios = sorted(sum(one.values()) / sum(other.values()) for one, other in pairs)
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            line += f" {before:.0f} | **{middle:.2f}** | {low:.2f} to {high:.2f} |"
        print(line, flush=True)


def main() -> None:
    """Measure here for a parent that compares, else compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000, help=f"a multiple of {CONNECTIONS}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", action="append", help="a kind of call")
    parser.add_argument("--count", action="store_true", help="calls of functions, not time")
    parser.add_argument("--json", action="store_true", help="one measurement in this process")
    given = parser.parse_args()
    if given.calls % CONNECTIONS:
        parser.error(f"--calls: {given.calls} can not be shared by {CONNECTIONS} connections")
    kinds = _kinds()
    names = given.only or list(kinds)
    if not given.json:
        compare(names, given.calls, given.rounds, given.against, count=given.count)
        return
    with tempfile.TemporaryDirectory(prefix="clrk-relay-") as folder:
        print(json.dumps(uvloop.run(measure(kinds[names[0]], given.calls, Path(folder), count=given.count))))


if __name__ == "__main__":
    main()
