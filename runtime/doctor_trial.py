"""The doctor's throw-away sandbox: one stamped round trip, and attempts to get out that must all fail."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from clrk.core import wire
from clrk.core.errors import ClrkError, HostError
from clrk.core.layout import HostLayout
from clrk.core.messages import StartedFd
from clrk.core.resources import RuntimeSpec, TaskAgent
from clrk.ebpf.header import HeaderFields, build_headers
from clrk.ebpf.loader import Stamp
from clrk.runtime.cgroup import Cgroups
from clrk.runtime.doctor import Finding
from clrk.runtime.pool import SandboxPool
from clrk.runtime.reconcile import InstanceLock, remove_leftovers
from clrk.runtime.sandbox import Sandbox
from clrk.runtime.spawner import Spawner
from clrk.runtime.view import HostView

_DESTINATION: Final = ("203.0.113.7", 443)  # TEST-NET-3 (RFC 5737): nobody's
_GREETING: Final = b"stamped?"
_DEADLINE_S: Final = 20.0
_PLACEHOLDER_CA: Final = "-----BEGIN CERTIFICATE-----\ndoctor\n-----END CERTIFICATE-----\n"
_INVOCATION: Final = "00000000-0000-7000-8000-000000000000"

# Runs in the sandbox. One line per attempt: its name, and the error that stopped it.
_AGENT: Final = """
import ctypes, errno, os, socket
def note(name, attempt):
    try:
        attempt()
        print(name, "OPEN", flush=True)
    except OSError as exc:
        print(name, errno.errorcode.get(exc.errno, str(exc)), flush=True)
def unshare():
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare")
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.7", 123))
def steal():
    socket.socket().bind(("0.0.0.0", 15001))
note("raw-socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
note("packet-socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
note("udp", udp)
note("unstamped-connection", lambda: socket.create_connection(("169.254.0.1", 15001), 3))
note("listener-port", steal)
note("new-network-namespace", unshare)
note("shadow", lambda: open("/etc/shadow"))
call = socket.create_connection(("203.0.113.7", 443), 10)
call.sendall(b"stamped?")
print("answer", call.recv(16).decode(), call.getpeername()[0], flush=True)
"""
_ATTEMPTS: Final = (
    "raw-socket", "packet-socket", "udp", "unstamped-connection", "listener-port", "new-network-namespace", "shadow",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trip:
    """What came of the trial: what the listener received, the template it must fit, and what the agent printed."""

    header: bytes
    greeting: bytes
    template: bytes
    uid: int
    lines: list[str]
    errors: str


def try_sandbox(layout: HostLayout, spec: RuntimeSpec) -> Iterator[Finding]:
    """Make a sandbox, try it, remove it; yields what was found.

    Privileges: root.
    """
    try:
        lock = InstanceLock.take(layout)
        try:
            trip = _run(layout, spec)
        finally:
            lock.release()
    except (ClrkError, OSError, ExceptionGroup) as exc:
        yield Finding("sandbox", ok=False, found=f"{type(exc).__name__}: {exc}", fix="the message names the part")
        return
    yield Finding("sandbox", ok=True, found="made, run and removed")
    yield judge_stamp(trip)
    yield judge_escapes(trip)


def _run(layout: HostLayout, spec: RuntimeSpec) -> Trip:
    spawner = Spawner.start()  # before any thread, event loop or BPF fd exists: it forks
    try:
        return asyncio.run(_try(layout, spec, spawner))
    finally:
        spawner.close()


async def _try(layout: HostLayout, spec: RuntimeSpec, spawner: Spawner) -> Trip:
    async with AsyncExitStack() as stack:
        cgroups = Cgroups.open(layout)
        stack.callback(cgroups.close)
        remove_leftovers(layout, cgroups)
        view = HostView.prepare(layout, ca_cert_pem=_PLACEHOLDER_CA)
        stack.callback(view.remove)
        stamp = Stamp.attach(layout, cgroups.v2_dir)
        stack.callback(stamp.close)
        pool = SandboxPool(
            layout=layout, spec=spec, cgroups=cgroups, spawner=spawner, view=view, stamp=stamp, ready=0
        )  # fmt: skip
        stack.push_async_callback(pool.close)
        await pool.start()
        sandbox = await pool.acquire()
        stack.push_async_callback(sandbox.remove)
        async with asyncio.timeout(_DEADLINE_S):
            return await _round_trip(sandbox)


async def _round_trip(sandbox: Sandbox) -> Trip:
    agent = TaskAgent.model_validate(
        {
            "kind": "TaskAgent",
            "metadata": {"name": "doctor"},
            "spec": {"template": {"spec": {"command": ["/usr/bin/python3", "-I", "-c", _AGENT]}}},
        }
    )
    header_v4, header_v6 = build_headers(
        HeaderFields(
            kind=wire.KIND_TASK_AGENT, namespace="default", name="doctor", uid=agent.uid, revision=agent.revision,
            invocation_id=_INVOCATION, sandbox_id=sandbox.sandbox_id, netns_name=sandbox.netns_name, traceparent=None,
        )
    )  # fmt: skip
    sandbox.register_stamp(header_v4, header_v6)
    stdin, stdout, stderr = sandbox.open_stdio()
    os.close(stdin)
    with socket.socket(fileno=os.dup(sandbox.listener_fds[StartedFd.EGRESS_V4])) as listener:
        listener.setblocking(False)
        output, errors = asyncio.create_task(_read_all(stdout)), asyncio.create_task(_read_all(stderr))
        await sandbox.spawn(agent=agent, environment={})
        header, greeting = await _answer(listener)
        await sandbox.wait()
        lines = (await output).decode("utf-8", "replace").splitlines()
        return Trip(header, greeting, header_v4, sandbox.uid, lines, (await errors).decode("utf-8", "replace"))


async def _answer(listener: socket.socket) -> tuple[bytes, bytes]:
    """Accept one connection, take the header and the greeting, answer."""
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(listener)
    with connection:
        connection.setblocking(False)
        received = b""
        async for piece in _pieces(connection):
            received += piece
            if len(received) >= wire.HEADER_SIZE + len(_GREETING):
                break
        await loop.sock_sendall(connection, b"yes")
        return received[: wire.HEADER_SIZE], received[wire.HEADER_SIZE :]


async def _pieces(connection: socket.socket) -> AsyncIterator[bytes]:
    while piece := await asyncio.get_running_loop().sock_recv(connection, 4096):
        yield piece


async def _read_all(fd: int) -> bytes:
    os.set_blocking(fd, True)

    def read() -> bytes:
        with open(fd, "rb") as stream:
            return stream.read(65_536)

    return await asyncio.to_thread(read)


def judge_stamp(trip: Trip) -> Finding:
    """Require the registered header, with the kernel's part filled in, in front of the agent's first byte."""
    behind = wire.V4_TLV_OFFSET + wire.PP2_TLV_HEADER_SIZE + wire.CONN_VALUE_SIZE
    connection = trip.header[wire.V4_TLV_OFFSET + wire.PP2_TLV_HEADER_SIZE : behind]
    try:
        if len(trip.header) != wire.HEADER_SIZE:
            raise HostError(f"{len(trip.header)} bytes came instead of a header of {wire.HEADER_SIZE}")
        _, _, _, uid, comm = wire.CONNECTION_VALUE.unpack(connection)
        same = trip.header[:16] == trip.template[:16] and trip.header[behind:] == trip.template[behind:]
        address = trip.header[wire.V4_DST_OFFSET : wire.V4_DST_OFFSET + 4]
        if not same or address != ip_address(_DESTINATION[0]).packed or uid != trip.uid or trip.greeting != _GREETING:
            raise HostError(f"the header is not the one that was registered: {trip.header[:64].hex()}")
        if f"answer yes {_DESTINATION[0]}" not in trip.lines:
            raise HostError(f"the agent did not see its answer: {' '.join(trip.lines[-1:])} {trip.errors[-200:]}")
    except HostError as exc:
        return Finding(
            "stamped round trip", ok=False, found=str(exc), fix="report it with `uname -a`; do not run agents"
        )
    found = f"{_DESTINATION[0]}:{_DESTINATION[1]}, uid {uid}, {comm.rstrip(bytes(1)).decode('ascii', 'replace')}"
    return Finding("stamped round trip", ok=True, found=found)


def judge_escapes(trip: Trip) -> Finding:
    """Require an error for each attempt: one that was not even tried proves nothing."""
    outcomes = dict(line.split(" ", 1) for line in trip.lines if " " in line)
    codes = set(errno.errorcode.values())
    bad = [f"{name}: {outcomes.get(name, 'not tried')}" for name in _ATTEMPTS if outcomes.get(name) not in codes]
    if bad:
        fix = "do not run agents here; report it with `uname -a`"
        return Finding("escape attempts", ok=False, found="; ".join(bad), fix=fix)
    return Finding("escape attempts", ok=True, found=", ".join(f"{name} {outcomes[name]}" for name in _ATTEMPTS))
