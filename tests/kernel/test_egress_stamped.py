"""The gateway's egress on the kernel's own records and stamps: nothing here is a double but the upstream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import dns.rdtypes.IN.A  # dnspython loads it when it meets one, but the agent's uid may not enter a private checkout
import pytest
from harness import AGENT_UID, EGRESS_V4, FAR_V4, Sandbox, dial
from instances import DEADLINE_S

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/egress"))
from egress_lab import Authority, Lab, aliased, answer, read_request, upstream

from clrk.core import wire
from clrk.core.errors import HostError
from clrk.ebpf.loader import Stamp
from clrk.gateway.egress.flows import FlowMap
from clrk.gateway.egress.service import EgressService
from clrk.gateway.run import Run, SandboxSockets

pytestmark = pytest.mark.kernel

NAME = "api.example.com"
GET = b"GET / HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"
SYNTHETIC_V4, SYNTHETIC_V6 = "198.18.0.1", "fd00:c1:0:1::1"


def test_a_record_is_taken_once_and_by_its_key_only(sandbox: Sandbox, stamp: Stamp) -> None:
    child = sandbox.spawn(lambda: dial(FAR_V4, 443).sendall(b"x"))
    conn = sandbox.accept()
    child.result()
    flows = FlowMap(stamp.flows_fd)
    key = wire.pack_flow_key(sandbox.cookie, *conn.peer, conn.family)
    assert flows.take(wire.pack_flow_key(sandbox.cookie + 1, *conn.peer, conn.family)) is None
    record = flows.take(key)
    assert record is not None
    assert (record.dst, record.dst_port, record.uid) == (ip_address(FAR_V4), 443, AGENT_UID)
    assert flows.take(key) is None


def test_an_unprivileged_process_takes_records_through_the_descriptor(sandbox: Sandbox, stamp: Stamp) -> None:
    child = sandbox.spawn(lambda: dial(FAR_V4, 443).sendall(b"x"))
    conn = sandbox.accept()
    child.result()
    key = wire.pack_flow_key(sandbox.cookie, *conn.peer, conn.family)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresuid(AGENT_UID, AGENT_UID, AGENT_UID)
        os._exit(0 if FlowMap(stamp.flows_fd).take(key) is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_descriptor_that_is_no_map_is_an_error() -> None:
    with open("/dev/null") as no_map, pytest.raises(HostError):
        FlowMap(no_map.fileno()).take(bytes(wire.FLOW_KEY.size))


@contextlib.asynccontextmanager
async def serving(sandbox: Sandbox, stamp: Stamp, port: int, ca: str | None = None) -> AsyncIterator[Lab]:
    """An EgressService on the namespace's real listeners and the kernel's map."""
    lab = Lab(gateway=aliased(port, NAME), rules=[{"hostnames": [NAME]}], upstream_ca=ca)
    lab.sockets.close()
    names = ("egress4", "egress6", "metadata4", "metadata6", "dns_udp", "dns_tcp", "otlp")
    listeners = [sandbox.listeners[name] for name in names]
    for sock in listeners:
        sock.setblocking(False)
    service = EgressService(config=lab.config, flows_fd=stamp.flows_fd, recorder=lab.recorder)
    run = Run(
        lab.identity, lab.run.agent, lab.run.gateway, sandbox.cookie, *sandbox.templates, SandboxSockets(*listeners)
    )
    service.serve(run)
    try:
        yield lab
    finally:
        await service.close()


def ask(address: str, port: int, ca: str | None = None) -> Any:
    """An agent: resolve, connect, ask."""
    resolved = dns.query.udp(dns.message.make_query(NAME, "A"), EGRESS_V4, timeout=DEADLINE_S).answer[0][0].address
    sock = dial(address, port)
    peer = sock.getpeername()[0]
    if ca is not None:
        sock = ssl.create_default_context(cadata=ca).wrap_socket(sock, server_hostname=NAME)
    sock.sendall(GET)
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return resolved, peer, data, os.getpid()


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(answer(b"hello"))


async def in_sandbox(sandbox: Sandbox, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(sandbox.spawn(function, *args).result)


@pytest.mark.parametrize("address", [SYNTHETIC_V4, SYNTHETIC_V6, f"::ffff:{SYNTHETIC_V4}"], ids=["v4", "v6", "mapped"])
async def test_a_request_goes_through_and_is_attributed(sandbox: Sandbox, stamp: Stamp, address: str) -> None:
    async with upstream(hello) as port, serving(sandbox, stamp, port) as lab:
        resolved, peer, data, pid = await in_sandbox(sandbox, ask, address, 80)
        span = (await lab.recorder.wait())[0]
    assert resolved == SYNTHETIC_V4
    assert peer == address
    assert data.endswith(b"hello")
    assert span.name == f"GET {NAME}"
    assert span.attributes["process.pid"] == pid
    assert span.attributes["clrk.dst.name"] == NAME
    assert span.attributes["network.peer.port"] == port
    assert span.start_ns < span.end_ns


async def test_tls_is_opened_behind_the_stamp(sandbox: Sandbox, stamp: Stamp) -> None:
    theirs = Authority("upstream CA")
    async with (
        upstream(hello, theirs.server_context([NAME])) as port,
        serving(sandbox, stamp, port, theirs.cert_pem) as lab,
    ):
        _, _, data, _ = await in_sandbox(sandbox, ask, SYNTHETIC_V4, 443, lab.ca.cert_pem)
        span = (await lab.recorder.wait())[0]
    assert data.endswith(b"hello")
    assert span.attributes["url.full"] == f"https://{NAME}/"


async def test_a_denied_connection_is_reset(sandbox: Sandbox, stamp: Stamp) -> None:
    def agent() -> str:
        sock = dial(FAR_V4, 9999)
        sock.sendall(b"\x01\x02")
        try:
            return repr(sock.recv(1))
        except ConnectionResetError:
            return "reset"

    async with serving(sandbox, stamp, 9) as lab:
        assert await in_sandbox(sandbox, agent) == "reset"
        span = (await lab.recorder.wait())[0]
    assert span.name == "egress.dial.denied"
    assert span.attributes["network.peer.address"] == FAR_V4


async def test_many_connections_at_once_leave_no_record(sandbox: Sandbox, stamp: Stamp) -> None:
    def agent() -> list[bool]:
        return [ask(SYNTHETIC_V4, 80)[2].endswith(b"hello") for _ in range(25)]

    async with upstream(hello) as port, serving(sandbox, stamp, port) as lab:
        results = await asyncio.gather(*(in_sandbox(sandbox, agent) for _ in range(4)))
        assert results == [[True] * 25] * 4
        spans = await lab.recorder.wait(100)
    assert len({span.span_id for span in spans}) == 100
    assert stamp.entries()["flows"] == 0


async def test_a_stolen_and_edited_stamp_is_only_data(sandbox: Sandbox, stamp: Stamp) -> None:
    """An agent knows its header (it can read it back); sent again in mid-stream it is just a bad request."""

    def agent(header: bytes) -> bytes:
        sock = dial(SYNTHETIC_V4, 80)
        sock.sendall(header + GET)
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                data += piece
        return data

    async with upstream(hello) as port, serving(sandbox, stamp, port) as lab:
        await in_sandbox(sandbox, ask, SYNTHETIC_V4, 80)
        data = await in_sandbox(sandbox, agent, sandbox.templates[0])
        spans = await lab.recorder.wait(2)
    assert data.startswith(b"HTTP/1.1 400 ")
    assert spans[1].attributes["clrk.dst.name"] == NAME
