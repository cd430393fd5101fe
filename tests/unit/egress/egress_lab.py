"""A sandbox without a kernel: real sockets, real TLS, a real EgressService. Only the flow map is a dictionary.

What the kernel does at connect() (flow record, stamp) is done here by `Lab.dial`, from the same wire constants.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace

from span_list import Span, SpanList
from tls_material import Authority

from clrk.core import wire
from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.gateway_config import GatewayConfig
from clrk.core.ids import SandboxId, new_invocation_id, new_span_id, new_trace_id
from clrk.core.resources import RuntimeSpec, TaskAgent
from clrk.core.wire import FlowRecord, IPAddress
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.egress.service import EgressService, RunEgress
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.proxyv2.expect import expected_header
from clrk.gateway.run import Run, SandboxSockets
from clrk.gateway.telemetry.spans import (
    Identity,
    Recorder,
    TraceContext,
)

NETNS_COOKIE = 77


class FlowTable:
    """The flow map as a dictionary: the kernel's map is tested in tests/kernel."""

    def __init__(self) -> None:
        self.records: dict[bytes, FlowRecord] = {}

    def take(self, key: bytes) -> FlowRecord | None:
        return self.records.pop(key, None)


def header_template(family: int) -> bytes:
    """A template as the C writer makes it: zeroed holes, NOOP to the end."""
    v4 = family == wire.FAMILY_V4
    offset = wire.V4_TLV_OFFSET if v4 else wire.V6_TLV_OFFSET
    kind = wire.PP2_FAMILY_TCP4 if v4 else wire.PP2_FAMILY_TCP6
    head = wire.SIGNATURE + struct.pack("!BBH", wire.PP2_VERSION_PROXY, kind, wire.HEADER_SIZE - wire.PP2_PREFIX_SIZE)
    head = head.ljust(offset, b"\0")
    head += struct.pack("!BH", wire.TLV_CONNECTION, wire.CONN_VALUE_SIZE) + bytes(wire.CONN_VALUE_SIZE)
    rest = wire.HEADER_SIZE - len(head) - wire.PP2_TLV_HEADER_SIZE
    return head + struct.pack("!BH", wire.TLV_NOOP, rest) + bytes(rest)


def _listener(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((host, 0))
    sock.listen(64)
    sock.setblocking(False)
    return sock


def _make_sockets() -> SandboxSockets:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    udp.setblocking(False)
    return SandboxSockets(
        egress_v4=_listener("127.0.0.1"), egress_v6=_listener("::1"), metadata_v4=_listener("127.0.0.1"),
        metadata_v6=_listener("::1"), dns_udp=udp, dns_tcp=_listener("127.0.0.1"), otlp=_listener("127.0.0.1"),
    )  # fmt: skip


class Wire:
    """The agent's end of a connection: a stream and the address that it came from."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stamp: bytes) -> None:
        self.reader, self.writer, self.stamp = reader, writer, stamp

    async def ask(self, data: bytes) -> bytes:
        """Send and return everything until the other side closes."""
        self.writer.write(data)
        async with asyncio.timeout(20):
            return await self.reader.read(-1)

    async def response(self) -> tuple[bytes, bytes]:
        """Read one response framed by Content-Length."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ),
                0,
            )
            return head, await self.reader.readexactly(length)

    def reset(self) -> None:
        """Leave with a reset."""
        _reset(self.writer)

    def close(self) -> None:
        self.writer.transport.abort()


class Lab:
    """One sandbox behind one EgressService."""

    def __init__(
        self,
        *,
        gateway: dict | None,
        rules: list[dict],
        resolver=None,
        recognise=None,
        govern=None,
        upstream_ca: str | None = None,
        secrets: dict[str, dict[str, str]] | None = None,
        host_addresses: Sequence[str] = (),
        daemon: bool = False,
        config: dict | None = None,
        ledger: BudgetLedger | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.ca = Authority("clrk test CA")
        self.recorder = recorder or SpanList()
        self.flows = FlowTable()
        self.sockets = _make_sockets()
        self.wires: list[Wire] = []
        declared = None
        if gateway is not None:
            declared = EgressGateway.model_validate(
                {"kind": "EgressGateway", "metadata": {"name": "default"}, "spec": gateway}
            )
        routes = [{"kind": "EgressL4Route", "metadata": {"name": "out"}, "spec": {"rules": rules}}] if rules else []
        agent = TaskAgent.model_validate(
            {"kind": "TaskAgent", "metadata": {"name": "agent"}, "spec": {"template": {"spec": {"command": ["true"]}}}}
        )
        self.config = GatewayConfig(
            runtime=RuntimeSpec(), agents=[agent], gateways=[declared] if declared else [],
            routes=[EgressL4Route.model_validate(route) for route in routes],
            ca_cert_pem=self.ca.cert_pem, ca_key_pem=self.ca.key_pem,
            upstream_ca_pem={"default/default": upstream_ca} if upstream_ca else {},
            host_addresses=list(host_addresses), secrets=secrets or {}, **(config or {}),
        )  # fmt: skip
        self.identity = Identity(
            new_invocation_id(), "TaskAgent", "default", "agent", agent.uid, agent.revision, SandboxId("0badcafe"),
            "default", TraceContext(new_trace_id(), new_span_id(), 1, "vendor=1", "user=alice"),
        )  # fmt: skip
        if daemon:
            context = TraceContext(new_trace_id(), new_span_id())
            self.identity = replace(self.identity, invocation_id="", agent_kind="DaemonAgent", context=context)
        self.run = Run(
            self.identity, agent, declared, NETNS_COOKIE, header_template(wire.FAMILY_V4),
            header_template(wire.FAMILY_V6), self.sockets,
        )  # fmt: skip
        options = {"resolver": resolver} if resolver else {}
        options |= {} if recognise == "real" else {"recognise": recognise or _nothing}
        self.service = EgressService(
            config=self.config, flows_fd=-1, recorder=self.recorder, flows=self.flows, ledger=ledger, **options
        )
        if govern is not None:
            self.service._governance.of_run = lambda *_: SimpleNamespace(
                govern=govern, http_only=lambda *_: False, is_mcp_host=lambda _: False
            )
        self.egress: RunEgress | None = None

    def renew_sockets(self, ca_id: str) -> None:
        """Serve another sandbox, one whose bundle has that CA."""
        self.sockets = _make_sockets()
        self.run = replace(self.run, sockets=self.sockets, ca_id=ca_id)
        self.egress = self.service.serve(self.run)

    @property
    def spans(self) -> list[Span]:
        return self.recorder.spans

    async def resolve(self, name: str) -> str:
        """Ask the sandbox's resolver, as an agent would."""
        import dns.asyncquery
        import dns.message

        host, port = self.sockets.dns_udp.getsockname()
        answer = await dns.asyncquery.udp(dns.message.make_query(name, "A"), host, port=port, timeout=5)
        return answer.answer[0][0].address

    async def dial(
        self,
        destination: str,
        port: int,
        *,
        stamp: bool | bytes = True,
        record: bool = True,
        family: int = wire.FAMILY_V4,
    ) -> Wire:
        """connect() as a sandboxed program does it. destination is a name or an address."""
        address = _address(destination) or ip_address(await self.resolve(destination))
        listener = self.sockets.egress_v4 if family == wire.FAMILY_V4 else self.sockets.egress_v6
        sock = socket.socket(listener.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind((listener.getsockname()[0], 0))
        src, src_port = sock.getsockname()[:2]
        flow = FlowRecord(
            address, port, wire.FAMILY_V4 if address.version == 4 else wire.FAMILY_V6, 4242,
            time.clock_gettime_ns(time.CLOCK_BOOTTIME), 1234, 2000001, b"agent",
        )  # fmt: skip
        if record:
            self.flows.records[wire.pack_flow_key(NETNS_COOKIE, src, src_port, family)] = flow
        expected = expected_header(self.run.header_v4, self.run.header_v6, flow, src, src_port)
        await asyncio.get_running_loop().sock_connect(sock, listener.getsockname()[:2])
        reader, writer = await asyncio.open_connection(sock=sock)
        if stamp:
            writer.write(expected if stamp is True else stamp)
        found = Wire(reader, writer, expected)
        self.wires.append(found)
        return found

    async def dial_tls(self, destination: str, port: int = 443, *, sni: str | None = None, context=None) -> Wire:
        """TLS through the gateway, verified against its CA."""
        found = await self.dial(destination, port)
        async with asyncio.timeout(25):
            await found.writer.start_tls(context or self.ca.client_context(), server_hostname=sni or destination)
        return found

    async def forwarder(self, destination: str, port: int) -> int:
        """Listen for programs that can not be in the sandbox (curl); what they send goes out stamped."""

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            out = await self.dial(destination, port)
            await asyncio.gather(_copy(reader, out.writer), _copy(out.reader, writer))

        server = await asyncio.start_server(carry, "127.0.0.1", 0)
        self._servers.append(server)
        return server.sockets[0].getsockname()[1]

    _servers: list[asyncio.Server]


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()
    except OSError:
        _reset(writer)


def _address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _nothing(head: RequestHead) -> Interpreter | None:
    return None


@contextlib.asynccontextmanager
async def laboratory(**options) -> AsyncIterator[Lab]:
    """Run a lab; everything is closed afterwards."""
    lab = Lab(**options)
    lab._servers = []
    lab.egress = lab.service.serve(lab.run)
    try:
        yield lab
    finally:
        for wire_ in lab.wires:
            wire_.close()
        for server in lab._servers:
            server.close()
        await lab.service.close()
        lab.sockets.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def upstream(
    handler: Handler, context: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """A server on loopback; yields its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, host, 0, ssl=context, limit=2**20)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def aliased(port: int, *names: str) -> dict:
    """An EgressGateway spec that sends names to a loopback port."""
    return {"hostAliases": [{"hostnames": list(names), "address": f"127.0.0.1:{port}"}]}


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one request: head with its empty line, and the body as it stands on the wire."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.readuntil(b"\r\n")
        return head, body
    length = next((int(line.split(b":")[1]) for line in lower.split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return head, await reader.readexactly(length)


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A response with Content-Length."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
