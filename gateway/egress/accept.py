"""Accept a sandbox's connections: flow record, stamp, first bytes, then the protocol that they begin (CONTRACT 9, 10).

Nothing here trusts a byte of the agent: identity is the listener's, destination and process are the flow record's, and
the stamp only has to be the one that the record implies.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial
from typing import Final

from clrk.core import wire
from clrk.core.errors import ProtocolError
from clrk.gateway._aio import spawn
from clrk.gateway.ca import LeafIssuer
from clrk.gateway.egress.admission import allows_tunnel
from clrk.gateway.egress.channel import LINGER_RESET, Channel
from clrk.gateway.egress.flows import FlowSource
from clrk.gateway.egress.handshake import (
    NO_APPLICATION_PROTOCOL,
    HandshakeFailure,
    judge_early_end,
    judge_handshake,
    passthrough,
)
from clrk.gateway.egress.http import relay_http
from clrk.gateway.egress.origin import Exit, Origin
from clrk.gateway.egress.record import Call, Destination, connect_time_ns
from clrk.gateway.egress.stamped import StampError, admit_stamp, read_stamp
from clrk.gateway.egress.tcp import RUN_ENDED, carry_tunnel, dial_tunnel, is_client_first
from clrk.gateway.egress.tls import peek_client_hello, peek_until, wait_readable
from clrk.gateway.names import NameTable
from clrk.gateway.proxyv2.errors import ProxyV2Error
from clrk.gateway.proxyv2.expect import expected_header
from clrk.gateway.run import Run
from clrk.gateway.telemetry import attributes as attr

MAX_CONNECTIONS: Final = 256  # of one sandbox: one agent can not use up the gateway's descriptors
STAMP_TIMEOUT_S: Final = 3.0
SILENCE_S: Final = 0.5  # of a client that may be waiting for its server
FIRST_BYTES_TIMEOUT_S: Final = 10.0
HANDSHAKE_TIMEOUT_S: Final = 10.0
INSIDE_TLS_TIMEOUT_S: Final = 60.0  # clients open TLS connections in advance
LEFT_AT_ONCE_S: Final = 1.0  # GnuTLS clients (git, wget, apt) look at a certificate when the handshake is over
MAX_ADVISED: Final = 64  # log lines of one run; the spans have the rest
CLOSE_S: Final = 10.0
# FTP, SSH, Telnet, SMTP, NNTP, POP3, IMAP, submission, MySQL, ManageSieve, NATS, VNC, MySQL X: the server greets first.
SERVER_FIRST_PORTS: Final = frozenset((21, 22, 23, 25, 110, 119, 143, 587, 2525, 3306, 4190, 4222, 5900, 33060))
# SMTPS, NNTPS, IMAPS, POP3S: the server greets first, inside TLS.
SERVER_FIRST_TLS_PORTS: Final = frozenset((465, 563, 993, 995))
CLIENT_FIRST_PORTS: Final = frozenset((80, 443))  # nobody is dialled before they have spoken

_LOG: Final = logging.getLogger(__name__)
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TLS_HANDSHAKE: Final = 0x16
# The well-known methods, or any that is followed by what begins a target. CONNECT is also a word of STOMP.
_HTTP_START: Final = re.compile(
    rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE)[ \t]|[A-Z][A-Z-]{1,19} (?:/|\*|[Hh][Tt][Tt][Pp])|\r?\n|"
    rb"CONNECT [^ ]+ HTTP/1"
)
_HTTP_PREFIX: Final = re.compile(rb"[A-Z][A-Z-]{0,19}(?: [Hh]?[Tt]{0,2})?|\r|CONNECT [^ \r\n]{0,270}(?: [HTP/1]{0,6})?")


@dataclass(slots=True)
class EgressCounters:
    """What happened to connections that got no span. Exported by the admin side."""

    no_record: int = 0
    closed_unused: int = 0


def classify(peeked: bytes) -> str | None:
    """Return tls, http or tcp for the first bytes of a client; None when more are needed."""
    if not peeked:
        return None
    if peeked[0] == _TLS_HANDSHAKE:
        return "tls"
    if _HTTP_START.match(peeked) is not None:
        return "http"
    return None if _HTTP_PREFIX.fullmatch(peeked) is not None else "tcp"


class Acceptor:
    """Serves the egress listeners of one run until its tasks are cancelled."""

    def __init__(
        self,
        *,
        run: Run,
        flows: FlowSource,
        names: NameTable,
        issuer: LeafIssuer,
        way_out: Exit,
        counters: EgressCounters,
    ) -> None:
        self._run, self._flows, self.names, self._issuer = run, flows, names, issuer
        self._exit = way_out
        self._counters = counters
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._advised: set[str] = set()

    async def accept_forever(self, listener: socket.socket, family: int) -> None:
        """Accept until cancelled, or until the listener is shut down."""
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as exc:
                self._slots.release()
                if exc.errno in _NO_DESCRIPTORS:
                    _LOG.warning("accept in sandbox %s: %s", self._run.identity.sandbox_id, exc)
                    await asyncio.sleep(0.1)  # the only thing that helps is somebody else's close
                elif exc.errno != errno.ECONNABORTED:
                    return
                continue
            except BaseException:
                self._slots.release()
                raise
            task = spawn(self._serve(sock, peer[0], peer[1], family), name=f"egress-{self._run.identity.sandbox_id}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    @property
    def way_out(self) -> Exit:
        """The rules of now."""
        return self._exit

    def use(self, way_out: Exit) -> None:
        """Judge new connections and requests by other rules, and end the tunnels that they do not allow."""
        self._exit = way_out
        way_out.tunnels.judge(way_out)

    async def close(self) -> None:
        """End every connection; each records its span."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel(RUN_ENDED)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    async def _serve(self, sock: socket.socket, src: str, src_port: int, family: int) -> None:
        """Carry one connection from accept to its end. Owns the socket."""
        with sock:
            flow = self._flows.take(wire.pack_flow_key(self._run.netns_cookie, src, src_port, family))
            if flow is None:
                self._counters.no_record += 1
                return
            name = self.names.name_of(flow.dst)
            origin = Origin(flow, Destination(name, flow.dst, flow.dst_port), connect_time_ns(flow))
            try:
                expected = expected_header(self._run.header_v4, self._run.header_v6, flow, src, src_port)
                if flow.dst_port in SERVER_FIRST_PORTS:
                    await self._serve_server_first(sock, origin, expected, None)
                elif await self._expects_server(sock, origin):
                    await self._serve_server_first(sock, origin, expected, STAMP_TIMEOUT_S - SILENCE_S)
                elif (kind := await self._first_bytes(sock, expected)) is not None:
                    await self._serve_kind(sock, origin, kind)
                else:
                    self._counters.closed_unused += 1
            except (StampError, ProxyV2Error) as exc:
                self._exit.spans.malformed(origin.call(origin.connect_ns), exc.code)
            except OSError:
                self._counters.closed_unused += 1  # reset before it was used for anything

    # --- client speaks first ----------------------------------------------------------------------------------------

    async def _first_bytes(self, sock: socket.socket, expected: bytes) -> str | None:
        """Consume the stamp, and return tls, http or tcp; None when the client left without a word.

        Raises: StampError.
        """
        try:
            async with asyncio.timeout(STAMP_TIMEOUT_S):
                stamped = await read_stamp(sock, expected)
        except TimeoutError:
            raise StampError("timeout") from None
        if not stamped:
            return None
        try:
            async with asyncio.timeout(FIRST_BYTES_TIMEOUT_S):
                return await peek_until(sock, classify)
        except TimeoutError:
            return "tcp"  # it began like HTTP and went no further

    async def _serve_kind(self, sock: socket.socket, origin: Origin, kind: str) -> None:
        if kind == "tls":
            await self._serve_tls(sock, origin)
        else:
            await self._serve_plain(sock, origin, kind)

    async def _serve_plain(self, sock: socket.socket, origin: Origin, kind: str) -> None:
        agent = await _open(sock, None)
        await self._end_with(agent, self._speak(agent, origin, kind))

    async def _serve_tls(self, sock: socket.socket, origin: Origin) -> None:
        """Open the TLS connection and serve what is inside, or tunnel it unread."""
        call = origin.call(origin.connect_ns)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                hello = await peek_client_hello(sock)
        except (ProtocolError, TimeoutError) as exc:
            self._exit.spans.denied(call, "bad_client_hello", str(exc))
            return
        name, sni = origin.destination.name, hello.server_name
        if self._exit.policy.is_passthrough(name or sni, origin.destination.address):
            if name is not None and sni is not None and name != sni:
                self._exit.spans.denied(call, "sni_mismatch", f"dialled {name}, but TLS asked for {sni}")
                return
            agent = await _open(sock, None)
            await self._end_with(agent, self._tunnel(agent, origin, sni=sni))
            return
        if hello.only_http2:
            await self._refuse_http2(sock, call)
            return
        secure = Origin(origin.flow, origin.destination, origin.connect_ns, is_tls=True, server_name=sni)
        try:
            agent = await _open(sock, self._issuer.context(sni or origin.destination.host))
        except OSError as exc:
            self._handshake_failed(call, judge_handshake(exc, call.destination.host))
            return
        await self._end_with(agent, self._serve_inside(agent, secure, call))

    async def _serve_inside(self, agent: Channel, origin: Origin, call: Call) -> None:
        """Serve what is spoken inside TLS; a client that leaves without a word may not have liked our certificate."""
        if origin.destination.port in SERVER_FIRST_TLS_PORTS:
            await self._speak_server_first(agent, origin)
            return
        loop = asyncio.get_running_loop()
        opened_s, problem = loop.time(), None
        resumed = agent.ssl_object is not None and agent.ssl_object.session_reused
        try:
            kind = await _classify_channel(agent)
        except OSError as exc:
            kind, problem = None, exc
        if kind is not None:
            await self._speak(agent, origin, kind)
        elif isinstance(problem, ssl.SSLError) or (not resumed and loop.time() - opened_s < LEFT_AT_ONCE_S):
            self._handshake_failed(call, judge_early_end(problem, call.destination.host))
        else:
            self._counters.closed_unused += 1

    def _handshake_failed(self, call: Call, failure: HandshakeFailure) -> None:
        """The agent did not take our certificate, or left."""
        host = call.destination.host
        if failure.rejected_ca:
            call.attributes[attr.CLRK_TLS_CLIENT_REJECTED_CA] = True
        if failure.rejected_ca is not False and host not in self._advised and len(self._advised) < MAX_ADVISED:
            self._advised.add(host)
            extra = {"sandbox_id": self._run.identity.sandbox_id}
            message = self._exit.spans.redactor.text(failure.message)
            _LOG.warning("agent %s: %s", self._run.identity.agent_name, message, extra=extra)
        self._exit.spans.failed(call, failure.error_type, failure.message)

    async def _refuse_http2(self, sock: socket.socket, call: Call) -> None:
        """Say no in the handshake (RFC 7301, section 3.2), where every client looks for it."""
        host = call.destination.host
        why = "the client offers HTTP/2 only, and clrk reads HTTP/1.1: have it offer http/1.1"
        message = f"{host}:{call.destination.port}: {why}, {passthrough(host)}"
        self._exit.spans.denied(call, "alpn_http2_only", message)
        agent = await _open(sock, None)
        await self._end_with(agent, _send_alert(agent))

    async def _speak(self, agent: Channel, origin: Origin, kind: str) -> None:
        if kind == "http":
            await relay_http(lambda: self._exit, origin, agent)
        else:
            await self._tunnel(agent, origin)

    async def _end_with(self, agent: Channel, work: Awaitable[None]) -> None:
        """Run the work, then see the connection gone."""
        try:
            await work
        except BaseException:
            agent.reset()
            raise
        await agent.finish(CLOSE_S)

    # --- tunnels ----------------------------------------------------------------------------------------------------

    async def _expects_server(self, sock: socket.socket, origin: Origin) -> bool:
        """Say whether the client waits for the server to speak, on a port of which nobody knows that it does."""
        if origin.destination.port in CLIENT_FIRST_PORTS or not allows_tunnel(self._exit, origin, None):
            return False
        try:
            async with asyncio.timeout(SILENCE_S):
                await wait_readable(sock)
        except TimeoutError:
            return True
        return False

    async def _serve_server_first(
        self, sock: socket.socket, origin: Origin, expected: bytes, limit_s: float | None
    ) -> None:
        """Dial at once, and see who speaks: a client that does is served as anywhere else, whatever the port.

        After a server that spoke first it is a tunnel; the stamp is demanded whenever the client's first byte comes.
        """
        call = origin.call(origin.connect_ns)
        if (upstream := await dial_tunnel(self._exit, origin, call)) is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            return
        try:
            kind = None
            if early := await is_client_first(wait_readable(sock), upstream.wait_readable(), limit_s):
                kind = await self._first_bytes(sock, expected)
            agent = await _open(sock, None) if kind not in ("tls", "http") else None
        except TimeoutError:
            upstream.abort()
            raise StampError("timeout") from None
        except BaseException:
            upstream.abort()
            raise
        if agent is None:
            upstream.abort()
            await self._serve_kind(sock, origin, kind or "tcp")
            return
        admission = None if early else partial(admit_stamp, agent, expected)
        await self._end_with(agent, carry_tunnel(self._exit, origin, call, (agent, upstream), admission=admission))

    async def _speak_server_first(self, agent: Channel, origin: Origin) -> None:
        """The same inside TLS."""
        call = origin.call(origin.connect_ns)
        if (upstream := await dial_tunnel(self._exit, origin, call)) is None:
            agent.reset()
            return
        try:
            early = await is_client_first(agent.wait_readable(), upstream.wait_readable(), None)
            is_http = early and await _classify_channel(agent) == "http"
        except BaseException:
            upstream.abort()
            raise
        if is_http:
            upstream.abort()
            await relay_http(lambda: self._exit, origin, agent)
        else:
            await carry_tunnel(self._exit, origin, call, (agent, upstream))

    async def _tunnel(self, agent: Channel, origin: Origin, *, sni: str | None = None) -> None:
        """Dial and carry bytes, if a rule allows it without looking at requests. Records one span."""
        call = origin.call(origin.connect_ns)
        if sni is not None:
            call.attributes[attr.TLS_CLIENT_SERVER_NAME] = sni
        if (upstream := await dial_tunnel(self._exit, origin, call, sni)) is None:
            agent.reset()
        else:
            await carry_tunnel(self._exit, origin, call, (agent, upstream), sni=sni)


async def _open(sock: socket.socket, context: ssl.SSLContext | None) -> Channel:
    """Hand the socket to the loop. Raises: OSError, ssl.SSLError among them, when the handshake fails."""
    timeout = HANDSHAKE_TIMEOUT_S if context is not None else None
    channel = Channel()  # not what the call returns: with TLS, uvloop returns its own protocol there
    await asyncio.get_running_loop().connect_accepted_socket(
        lambda: channel, sock, ssl=context, ssl_handshake_timeout=timeout
    )
    return channel


async def _send_alert(agent: Channel) -> None:
    """Take the ClientHello, so that closing is no reset, and answer it."""
    agent.set_idle_timeout(CLOSE_S)
    await agent.read()
    await agent.write(NO_APPLICATION_PROTOCOL)


async def _classify_channel(agent: Channel) -> str | None:
    """Return http or tcp for what is spoken inside TLS; None when the agent left without a word."""
    agent.set_idle_timeout(INSIDE_TLS_TIMEOUT_S)
    seen = b""
    kind = None
    while kind is None:
        data = await agent.read()
        seen += data
        kind = classify(seen) if data else ("tcp" if seen else None)
        if not data:
            break
    agent.set_idle_timeout(0)
    agent.unread(seen)
    return "tcp" if kind == "tls" else kind
