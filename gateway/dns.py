"""The resolver inside a sandbox: names become synthetic addresses here, and no query ever leaves the host.

Theory of operation: `answer` is pure (query bytes in, reply bytes out); `SandboxResolver` moves packets between it and
the two listening sockets of one sandbox. An answer only says that a name *may* be dialled: the address it carries means
nothing outside this sandbox, and the gateway resolves the real one itself when the agent connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Protocol

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

from clrk.gateway._aio import spawn
from clrk.gateway.names import TOO_MANY_NAMES, NameTable, NameTableFullError
from clrk.gateway.policy import Verdict
from clrk.gateway.redact import KNOWN_SECRETS, Redactor
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import AttributeValue, Component, Identity, Recorder, SpanKind, Status, StatusCode

TTL_S: Final = 60
MAX_UDP_QUERY: Final = 4096
MAX_TCP_CONNECTIONS: Final = 32  # per sandbox
TCP_IDLE_S: Final = 10.0
DENIED_WINDOW_S: Final = 60.0  # in it a name is told once: resolvers ask for A and AAAA, and programs try again
MAX_DENIED_SPANS: Final = 256  # names of one sandbox in a window: a loop over random ones can not flood the store
_UDP_BATCH: Final = 64  # packets per loop turn, so that one sandbox can not hold the loop

_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_S: Final = 0.1

_LOCALHOST: Final = (IPv4Address("127.0.0.1"), IPv6Address("::1"))


class NamePolicy(Protocol):
    """What the resolver asks of the egress policy."""

    def name(self, name: str) -> Verdict:
        """Say whether any rule could allow a connection to this name."""

    def holds(self, verdict: Verdict) -> bool:
        """Say whether a denial is one: not where the gateway only watches."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply in wire format; denied is the name, and why, if it got no address."""

    wire: bytes
    denied: tuple[str, Verdict] | None = None


def answer(query: bytes, *, names: NameTable, policy: NamePolicy, max_size: int) -> Answer | None:
    """Answer one query, or return None for a packet that deserves no reply (not a query, or not DNS).

    Shape: query is a DNS message without TCP framing. max_size bounds the reply; a longer one is truncated (TC).
    Source: RFC 1035 section 4; RFC 6891 (EDNS); RFC 9460 (HTTPS and SVCB get NODATA: no ECH, no HTTP/3 hint).
    """
    try:
        message = dns.message.from_wire(query, ignore_trailing=False)
    except (dns.exception.DNSException, ValueError, IndexError):
        return None
    if message.flags & dns.flags.QR:
        return None
    reply = dns.message.make_response(message, recursion_available=True, our_payload=1232)
    denied = None
    if message.opcode() != dns.opcode.QUERY:
        reply.set_rcode(dns.rcode.NOTIMP)
    elif len(message.question) != 1:
        reply.set_rcode(dns.rcode.FORMERR)
    elif message.question[0].rdclass != dns.rdataclass.IN:
        reply.set_rcode(dns.rcode.REFUSED)
    else:
        denied = _resolve(message.question[0], reply, names, policy)
    limit = min(max_size, max(message.payload, 512)) if max_size < 65_535 else max_size
    try:
        return Answer(reply.to_wire(max_size=limit), denied)
    except dns.exception.TooBig:
        reply.flags |= dns.flags.TC
        reply.answer.clear()
        return Answer(reply.to_wire(), denied)


def _resolve(
    question: dns.rrset.RRset, reply: dns.message.Message, names: NameTable, policy: NamePolicy
) -> tuple[str, Verdict] | None:
    """Fill the reply for one question; return the name, and why, if it gets no address."""
    if question.rdtype == dns.rdatatype.PTR:
        _answer_pointer(question, reply, names)
        return None
    name = question.name.to_text(omit_final_dot=True).lower()
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761 section 6.3
        addresses = _LOCALHOST
    elif policy.holds(verdict := policy.name(name)):
        reply.set_rcode(dns.rcode.NXDOMAIN)
        return name, verdict
    else:
        try:
            addresses = names.bind(name)
        except NameTableFullError:
            reply.set_rcode(dns.rcode.SERVFAIL)
            return name, Verdict(False, TOO_MANY_NAMES, "", "")
    by_type = {dns.rdatatype.A: addresses[0], dns.rdatatype.AAAA: addresses[1]}
    if (address := by_type.get(question.rdtype)) is not None:  # every other type: NODATA
        reply.answer.append(dns.rrset.from_text(question.name, TTL_S, "IN", question.rdtype, str(address)))
    return None


def _answer_pointer(question: dns.rrset.RRset, reply: dns.message.Message, names: NameTable) -> None:
    try:
        name = names.name_of(ip_address(dns.reversename.to_address(question.name)))
    except (dns.exception.DNSException, ValueError):
        name = None
    if name is None:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    else:
        reply.answer.append(dns.rrset.from_text(question.name, TTL_S, "IN", "PTR", name + "."))


class SandboxResolver:
    """Serves the DNS sockets of one sandbox until close(). The sockets stay the caller's."""

    def __init__(
        self,
        *,
        identity: Identity,
        policy: Callable[[], NamePolicy],
        names: NameTable,
        recorder: Recorder,
        redactor: Callable[[], Redactor] = lambda: KNOWN_SECRETS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity, self._redactor, self._clock = identity, redactor, clock
        self._policy = policy
        self._names = names
        self._recorder = recorder
        self._denied: set[str] = set()
        self._denied_since_s = clock()
        self._udp: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def start(self, udp: socket.socket, tcp: socket.socket) -> None:
        """Begin to answer on both sockets; both are non-blocking."""
        self._udp = udp
        asyncio.get_running_loop().add_reader(udp.fileno(), self._on_datagrams, udp)
        self._accepting = spawn(self._accept(tcp), name=f"dns-accept-{self._identity.sandbox_id}")

    async def close(self) -> None:
        """Stop answering; idempotent."""
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp.fileno())
            self._udp = None
        tasks = [task for task in (self._accepting, *self._connections) if task is not None]
        self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _answer(self, query: bytes, max_size: int) -> bytes | None:
        result = answer(query, names=self._names, policy=self._policy(), max_size=max_size)
        if result is None:
            return None
        if result.denied is not None:
            self._record_denied(*result.denied)
        return result.wire

    def _record_denied(self, name: str, verdict: Verdict) -> None:
        if (now_s := self._clock()) - self._denied_since_s >= DENIED_WINDOW_S:
            self._denied.clear()
            self._denied_since_s = now_s
        if name in self._denied or len(self._denied) >= MAX_DENIED_SPANS:
            return
        self._denied.add(name)
        redactor = self._redactor()
        attributes: dict[str, AttributeValue] = {
            attr.CLRK_DST_NAME: name,
            attr.DNS_QUESTION_NAME: name,
            attr.CLRK_EGRESS_DENY_REASON: verdict.reason,
            attr.ERROR_TYPE: verdict.reason,
        }
        if verdict.rule:
            attributes[attr.CLRK_EGRESS_ROUTE] = verdict.rule
        if verdict.hint:
            attributes[attr.CLRK_EGRESS_ADD_RULE] = verdict.hint
        message = f"{name} is not allowed ({verdict.reason})"
        if verdict.reason == TOO_MANY_NAMES:
            message = f"{name}: the run has asked for more names than one run may have addresses for"
        now = time.time_ns()
        parent = self._identity.call_context()
        self._recorder.record(
            self._identity,
            component=Component.GATEWAY,
            name=attr.SPAN_EGRESS_DNS_DENIED,
            kind=SpanKind.CLIENT,
            start_ns=now,
            end_ns=now,
            attributes=redactor.attributes(attributes),
            status=Status(StatusCode.ERROR, redactor.text(message)),
            parent_span_id=parent.span_id,
            trace_id=parent.trace_id,
        )

    def _on_datagrams(self, udp: socket.socket) -> None:
        for _ in range(_UDP_BATCH):
            try:
                query, peer = udp.recvfrom(MAX_UDP_QUERY)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error of an earlier reply: that client is gone
                continue
            if (reply := self._answer(query, MAX_UDP_QUERY)) is not None:
                with contextlib.suppress(
                    OSError
                ):  # the client's socket buffer or the client itself is gone: it asks again
                    udp.sendto(reply, peer)

    async def _accept(self, tcp: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(tcp)
            except OSError as exc:
                if exc.errno in _NO_DESCRIPTORS:
                    await asyncio.sleep(_RETRY_S)  # the only thing that helps is somebody else's close
                elif exc.errno != errno.ECONNABORTED:
                    return  # the listener is gone, and the run with it
                continue
            if len(self._connections) >= MAX_TCP_CONNECTIONS:
                connection.close()
                continue
            connection.setblocking(False)
            task = spawn(self._serve(connection), name=f"dns-tcp-{self._identity.sandbox_id}")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket) -> None:
        """Answer queries of one TCP connection: two bytes of length, then the message (RFC 1035 section 4.2.2)."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            while True:
                async with asyncio.timeout(TCP_IDLE_S):
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    query = await reader.readexactly(size)
                    reply = self._answer(query, 65_535)
                    if reply is None:
                        return
                    writer.write(len(reply).to_bytes(2, "big") + reply)
                    await writer.drain()
        except (asyncio.IncompleteReadError, TimeoutError, OSError):
            return  # the client closed, idled or vanished: nothing is owed to it
        finally:
            writer.transport.abort()
