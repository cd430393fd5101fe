"""A sandbox for kernel tests: a lo-only namespace, the gateway's listeners in it, and unprivileged children as agents.

Independent of clrk.netns and clrk.runtime on purpose: these tests prove the kernel part alone. Namespaces have no name
and are held by a descriptor, so nothing of them can be left behind.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instances import DEADLINE_S, instance, remove_cgroups
from proxyprotocol.v2 import ProxyProtocolV2
from pyroute2 import IPRoute

from clrk.core import wire
from clrk.core.layout import HostLayout
from clrk.core.wire import FlowRecord
from clrk.ebpf import maps
from clrk.ebpf.header import HeaderFields, build_headers
from clrk.ebpf.loader import Stamp

EGRESS_V4, EGRESS_V6 = "169.254.0.1", "fd00:c1::1"
METADATA_V4, METADATA_V6 = "169.254.169.254", "fd00:ec2::254"
ADDRESSES_V4 = (EGRESS_V4, METADATA_V4, "100.64.0.1")
ADDRESSES_V6 = (EGRESS_V6, METADATA_V6, "fd00:c1::2")
FAR_V4, FAR_V6 = "93.184.216.34", "2606:2800:220:1::1"

AGENT_UID = 65534

SYSCTLS = {
    "net/ipv4/tcp_fastopen": "0",
    "net/mptcp/enabled": "0",
    "net/core/tstamp_allow_data": "0",
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/ip_local_port_range": "1024 65535",
    "net/ipv4/ip_local_reserved_ports": "53,80,4318,15001",
}

_SO_NETNS_COOKIE = 71
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def cgroup_v2_root() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise RuntimeError("no cgroup v2 tree")


@contextmanager
def instance_cgroup(name: str) -> Iterator[Path]:
    path = cgroup_v2_root() / name
    path.mkdir()
    try:
        yield path
    finally:
        remove_cgroups(path)


class Agent:
    """A forked child inside the sandbox; its function's result or exception comes back by pickle."""

    def __init__(self, pid: int, result_fd: int) -> None:
        self.pid = pid
        self.result_fd = result_fd
        self.reaped = False
        self._pickled = b""
        self._status = 0

    def result(self) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not self.reaped:
            if not select.select([self.result_fd], [], [], max(0, deadline - time.monotonic()))[0]:
                doing = self._doing()
                self.kill()
                raise TimeoutError(f"the agent did not end: {doing}")
            self.take()
        if not self._pickled:
            raise ChildProcessError(f"the agent said nothing and ended with {os.waitstatus_to_exitcode(self._status)}")
        ok, value = pickle.loads(self._pickled)
        if not ok:
            raise value
        return value

    def take(self) -> None:
        """Take more of the result, and at its end the process."""
        if chunk := os.read(self.result_fd, 65536):
            self._pickled += chunk
        else:
            self._reap()

    def kill(self) -> None:
        if not self.reaped:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _doing(self) -> dict[str, str]:
        """Where it waits: the number of its system call, and the kernel's functions."""
        return {name: Path(f"/proc/{self.pid}/{name}").read_text().strip() for name in ("syscall", "stack")}

    def _reap(self) -> None:
        _, self._status = os.waitpid(self.pid, 0)
        self.reaped = True
        os.close(self.result_fd)


@dataclass
class Accepted:
    """What the gateway sees of one connection."""

    sock: socket.socket
    peer: tuple[str, int]
    family: int

    def read(self, size: int) -> bytes:
        """Exactly size bytes, or what there was before EOF."""
        data = b""
        while len(data) < size:
            chunk = self.sock.recv(min(size - len(data), 1 << 20))
            if not chunk:
                break
            data += chunk
        return data

    def read_all(self) -> bytes:
        return self.read(1 << 40)


class Sandbox:
    """One namespace with listeners. Register it to let its agents do anything."""

    def __init__(self, stamp: Stamp, cgroup: Path, sysctls: dict[str, str] | None = None, backlog: int = 1024) -> None:
        self.stamp = stamp
        self.cgroup = cgroup
        self.listeners: dict[str, socket.socket] = {}
        self._agents: list[Agent] = []
        self._accepted: list[socket.socket] = []
        failure: list[BaseException] = []

        def make() -> None:
            try:
                self._make(SYSCTLS | (sysctls or {}), backlog)
            except BaseException as exc:
                failure.append(exc)

        maker = threading.Thread(target=make)  # unshare moves the calling thread alone
        maker.start()
        maker.join()
        if failure:
            raise failure[0]
        self.fields = HeaderFields(
            wire.KIND_TASK_AGENT,
            "default",
            "tester",
            "7f9d3a34-6c0e-5d0a-9f0c-0d7b8a2f5c11",
            "0123456789ab",
            "01987654-3210-7abc-8def-0123456789ab",
            f"{self.cookie & 0xFFFFFFFF:08x}",
            f"clrkk-{self.cookie & 0xFFFFFFFF:08x}",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        self.templates = build_headers(self.fields)

    def _make(self, sysctls: dict[str, str], backlog: int) -> None:
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        self.netns_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with IPRoute() as ip:
            ip.link("set", index=1, state="up")
            for address in ADDRESSES_V4:
                ip.addr("add", index=1, address=address, prefixlen=32)
            for address in ADDRESSES_V6:
                ip.addr("add", index=1, address=address, prefixlen=128, flags=2)
            ip.route("add", dst="0.0.0.0/0", oif=1, scope="link")
            ip.route("add", dst="::/0", oif=1, family=socket.AF_INET6)
        for name, value in sysctls.items():
            path = Path("/proc/sys") / name
            if path.exists():
                path.write_text(value)
        for name, address, port, kind in (
            ("egress4", EGRESS_V4, 15001, socket.SOCK_STREAM),
            ("egress6", EGRESS_V6, 15001, socket.SOCK_STREAM),
            ("metadata4", METADATA_V4, 80, socket.SOCK_STREAM),
            ("metadata6", METADATA_V6, 80, socket.SOCK_STREAM),
            ("dns_udp", EGRESS_V4, 53, socket.SOCK_DGRAM),
            ("dns_tcp", EGRESS_V4, 53, socket.SOCK_STREAM),
            ("otlp", EGRESS_V4, 4318, socket.SOCK_STREAM),
        ):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen(backlog)
            sock.settimeout(DEADLINE_S)
            self.listeners[name] = sock
        raw = self.listeners["egress4"].getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        self.cookie: int = struct.unpack("=Q", raw)[0]

    def register(self) -> None:
        self.stamp.register(self.cookie, *self.templates)

    def spawn(self, function: Callable[..., Any], *args: Any, uid: int = AGENT_UID) -> Agent:
        """Fork a child in the cgroup and the namespace that runs the function as uid."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write_end)
            agent = Agent(pid, read_end)
            self._agents.append(agent)
            return agent
        try:
            os.close(read_end)
            (self.cgroup / "cgroup.procs").write_text("0")
            self._enter(uid)
            die_with_parent()
            try:
                outcome = (True, function(*args))
            except BaseException as exc:
                exc.add_note(f"in the agent:\n{traceback.format_exc()}")
                outcome = (False, exc)
            with open(write_end, "wb") as pipe:
                pipe.write(pickle.dumps(outcome))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def run(self, function: Callable[..., Any], *args: Any, uid: int = AGENT_UID) -> Any:
        return self.spawn(function, *args, uid=uid).result()

    def _enter(self, uid: int) -> None:
        if _libc.setns(self.netns_fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: a test may look at its own /proc files

    def accept(self, listener: str = "egress4") -> Accepted:
        """Accept one connection.

        Raises: what an agent failed with meanwhile; TimeoutError.
        """
        self._await_caller(self.listeners[listener])
        sock, peer = self.listeners[listener].accept()
        sock.settimeout(DEADLINE_S)
        self._accepted.append(sock)
        family = wire.FAMILY_V6 if listener.endswith("6") else wire.FAMILY_V4
        return Accepted(sock, (peer[0], peer[1]), family)

    def _await_caller(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while (left_s := deadline - time.monotonic()) > 0:
            agents = {agent.result_fd: agent for agent in self._agents if not agent.reaped}
            ready = select.select([listener, *agents], [], [], left_s)[0]
            if listener in ready:
                return
            for fd in ready:
                agents[fd].take()
                if agents[fd].reaped:
                    agents[fd].result()

    def nothing_waits(self, listener: str = "egress4") -> bool:
        return not select.select([self.listeners[listener]], [], [], 0)[0]

    def take(self, conn: Accepted) -> FlowRecord | None:
        """The gateway's step at accept: look up and delete the flow record."""
        flows = maps.Map(self.stamp.flows_fd, wire.FLOW_KEY.size, wire.FLOW.size)
        key = wire.pack_flow_key(self.cookie, *conn.peer, conn.family)
        raw = flows.lookup(key)
        if raw is None:
            return None
        flows.delete(key)
        return FlowRecord.unpack(raw)

    def expected_header(self, conn: Accepted, record: FlowRecord) -> bytes:
        """The one header that the record implies, put together here without any of the product's writers."""
        header = bytearray(self.templates[conn.family == wire.FAMILY_V6])
        family = socket.AF_INET6 if conn.family == wire.FAMILY_V6 else socket.AF_INET
        size = 16 if family == socket.AF_INET6 else 4
        header[16 : 16 + size] = socket.inet_pton(family, conn.peer[0])
        header[16 + size : 16 + 2 * size] = socket.inet_pton(family, str(record.dst))
        at = 16 + 2 * size
        header[at : at + 4] = struct.pack("!HH", conn.peer[1], record.dst_port)
        value = struct.pack("!QQII16s", record.cookie, record.connect_ns, record.tgid, record.uid, record.comm)
        assert header[at + 4 : at + 7] == b"\xeb\x00\x28"
        header[at + 7 : at + 47] = value
        return bytes(header)

    def accept_stamped(self, listener: str = "egress4") -> tuple[Accepted, FlowRecord]:
        """Accept, take the record, read the header and require it to be what the record implies."""
        conn = self.accept(listener)
        record = self.take(conn)
        assert record is not None
        header = conn.read(wire.HEADER_SIZE)
        assert header == self.expected_header(conn, record)
        return conn, record

    def close(self) -> None:
        self.stamp.unregister(self.cookie)
        for agent in self._agents:
            agent.kill()
        for sock in (*self.listeners.values(), *self._accepted):
            sock.close()
        os.close(self.netns_fd)


def parse_with_oracle(header: bytes) -> Any:
    """Parse by the proxy-protocol package, which knows nothing of us."""
    return ProxyProtocolV2().unpack(header)


def dial(address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.settimeout(DEADLINE_S)
    sock.connect((address, port))
    return sock


def errno_of(function: Callable[..., Any], *args: Any) -> int | None:
    """The errno that the function fails with, or None."""
    try:
        function(*args)
    except OSError as exc:
        return exc.errno
    return None


@contextmanager
def compiled(source: Path, *flags: str) -> Iterator[Path]:
    """Compile one C file of the tests into a folder that the agent's uid can reach."""
    folder = Path(tempfile.mkdtemp(prefix=f"{instance('k')}-"))
    folder.chmod(0o755)
    try:
        program = folder / source.stem
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-pthread", str(source), "-o", str(program), *flags], check=True
        )
        yield program
    finally:
        shutil.rmtree(folder)


def layout_for_this_process(suffix: str = "") -> HostLayout:
    """An instance of our own, so that two test runs on one machine do not meet."""
    return HostLayout(instance(f"k{suffix}"))


def die_with_parent() -> None:
    """In a forked child, after any change of its uid: SIGKILL when the parent is killed."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
