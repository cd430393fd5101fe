"""connect() + first byte, stamped against plain: the same client and server in one namespace, with and without BPF."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from clrk.core import wire
from clrk.core.ids import NetnsName, new_sandbox_id
from clrk.core.layout import HostLayout
from clrk.ebpf.header import HeaderFields, build_headers
from clrk.ebpf.loader import Stamp
from clrk.netns import namespace, plan
from clrk.runtime.cgroup import Cgroups

CONNECTIONS = 1500
DIALLED = ("203.0.113.7", 443)  # RFC 5737: documentation
NAME = "connect() + first byte"
UNIT = "1/s"


def measure(folder: Path, rounds: int) -> tuple[str, str, list[tuple[float, float]]]:
    """Return name, unit and (plain, stamped) connections per second of each round."""
    del folder
    with _namespace() as (layout, space, procs_files):
        with Stamp.attach(layout, procs_files[0].parent) as stamp:
            stamp.register(space.cookie, *_headers(space.name))
            pairs = []
            for number in range(rounds + 1):
                plain = _rate(space, (plan.EGRESS_V4, wire.PORT_EGRESS), 1, [])
                stamped = _rate(space, DIALLED, wire.HEADER_SIZE + 1, procs_files)
                if number:
                    pairs.append((plain, stamped))
            assert stamp.counters()["stamped"] == CONNECTIONS * (rounds + 1), stamp.counters()
            return NAME, UNIT, pairs


@contextlib.contextmanager
def _namespace() -> Iterator[tuple[HostLayout, namespace.Namespace, list[Path]]]:
    """A sandbox's namespace and cgroup, of an instance of their own."""
    layout = HostLayout(f"bc{os.getpid() % 1_000_000}")
    namespace.ensure_netns_dir()
    cgroups = Cgroups.open(layout)
    maker = namespace.NamespaceMaker()
    name = NetnsName(layout.netns_prefix + new_sandbox_id())
    space = maker.submit(name).result()
    try:
        yield layout, space, [cgroups.v2_dir / "cgroup.procs"]
    finally:
        space.close()
        namespace.remove(name)
        maker.close()
        cgroups.close()


def _headers(name: str) -> tuple[bytes, bytes]:
    return build_headers(
        HeaderFields(
            kind=wire.KIND_TASK_AGENT,
            namespace="default",
            name="bench",
            uid="00000000-0000-0000-0000-000000000000",
            revision="000000000000",
            invocation_id="01a20405-7948-73dc-aec9-3683ce98518d",
            sandbox_id=name[-8:],
            netns_name=name,
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
    )


def _rate(space: namespace.Namespace, address: tuple[str, int], expected: int, procs_files: list[Path]) -> float:
    """Connections per second of a child in the namespace: connect, send one byte, read one byte, close."""
    listener = space.listeners[0].dup()
    listener.setblocking(True)
    server = threading.Thread(target=_serve, args=(listener, expected))
    server.start()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _client(space, address, procs_files, writer)
    os.close(writer)
    with os.fdopen(reader) as report:
        text = report.read()
    os.waitpid(child, 0)
    server.join()
    listener.close()
    return CONNECTIONS / float(text)


def _serve(listener: socket.socket, expected: int) -> None:
    for _ in range(CONNECTIONS):
        connection, _peer = listener.accept()
        with connection:
            connection.recv(expected, socket.MSG_WAITALL)
            connection.sendall(b"y")


def _client(space: namespace.Namespace, address: tuple[str, int], procs_files: list[Path], report: int) -> None:
    """Runs in the forked child and never returns."""
    import ctypes

    try:
        for path in procs_files:
            path.write_text(str(os.getpid()))
        if ctypes.CDLL(None).setns(space.handle, 0x40000000) != 0:
            os._exit(1)
        start = time.monotonic()
        for _ in range(CONNECTIONS):
            with socket.create_connection(address) as connection:
                connection.sendall(b"x")
                connection.recv(1)
        os.write(report, str(time.monotonic() - start).encode())
    finally:
        os._exit(0)
