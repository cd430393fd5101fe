"""TCP that is not HTTP: Debian's own servers and clients, and a peer that does what no proper one would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import real_servers
from instances import instance
from stack import RUN_PYTHON, RUN_SHELL, Daemon, agent, document, free_port, invoke
from tls_material import Authority

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

VOLUME = int(os.environ.get("CLRK_TUNNEL_MIB", "512")) << 20  # docs/protocols.md says what 10 GiB gave
GROWTH = 24 << 20  # of the gateway while VOLUME passes: buffers, and what Python's allocator keeps
PASSWORD = real_servers.PASSWORD
NAMES = {
    "ssh": [22],
    "smtp": [587],
    "smtps": [465],
    "mysql": [3306],
    "pg": [5432],
    "redis": [6379],
    "peer": [7, 22, 9999],
}


@dataclass(frozen=True)
class Host:
    """The daemon, and where its agents' TCP ends up."""

    daemon: Daemon
    peer_port: int
    servers: dict[str, real_servers.Server]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("tcp")
    authority = Authority("servers")
    certificate = folder / "server.pem"
    certificate.write_bytes(b"".join(authority.issue(names=[f"{name}.internal" for name in NAMES])))
    (folder / "ca.pem").write_bytes(authority.pem)
    peer_port = free_port()
    with contextlib.ExitStack() as stack:
        servers = {
            "ssh": stack.enter_context(real_servers.openssh()),
            "smtp": stack.enter_context(real_servers.smtp(certificate, "starttls")),
            "smtps": stack.enter_context(real_servers.smtp(certificate, "tls")),
            "mysql": stack.enter_context(real_servers.mariadb()),
            "pg": stack.enter_context(real_servers.postgresql(certificate)),
            "redis": stack.enter_context(real_servers.redis()),
        }
        (servers["ssh"].folder / "ca.pem").write_bytes(authority.pem)
        places = {name: server.address for name, server in servers.items()} | {"peer": f"127.0.0.1:{peer_port}"}
        keys = {"/agent/keys": servers["ssh"].folder}
        documents = [
            document(
                "EgressGateway", "default", upstreamTLS={"caFile": str(folder / "ca.pem")},
                requestTimeout="2s",  # no tunnel may end by it
                hostAliases=[{"hostnames": [f"{name}.internal"], "address": at} for name, at in places.items()],
            ),
            document(
                "EgressL4Route", "tcp",
                rules=[{"hostnames": [f"{name}.internal"], "ports": ports} for name, ports in NAMES.items()],
            ),
            agent("shell", ["/usr/bin/python3", "-I", "-c", RUN_SHELL], mounts=keys),
            agent("python", ["/usr/bin/python3", "-I", "-c", RUN_PYTHON], mounts=keys, timeout="280s"),
        ]  # fmt: skip
        daemon = Daemon(folder, instance("tc"), documents)
        daemon.start()
        stack.callback(lambda: stopped(daemon))
        yield Host(daemon, peer_port, servers)


def stopped(daemon: Daemon) -> None:
    assert daemon.stop() == 0, daemon.log()


async def run(caller: aiohttp.ClientSession, host: Host, name: str, source: str) -> tuple[str, list[dict[str, Any]]]:
    """Run an agent; return what it printed, and its egress spans."""
    text, invocation = await invoke(caller, host.daemon, name, source)
    spans = await asyncio.to_thread(host.daemon.spans_when_complete, invocation)
    return text, [span for span in spans if span["name"].startswith("egress.")]


def tunnel_of(spans: list[dict[str, Any]], name: str, port: int) -> dict[str, Any]:
    """The attributes of the only span: a tunnel that ended well."""
    assert [span["name"] for span in spans] == ["egress.tcp"], spans
    found: dict[str, Any] = spans[0]["attributes"]
    assert spans[0]["status"]["code"] == "STATUS_CODE_UNSET", spans
    assert (found["clrk.dst.name"], found["server.port"]) == (f"{name}.internal", port)
    return found


# --- Debian's servers -------------------------------------------------------------------------------------------------

SSH = (
    "ssh -F none -o BatchMode=yes -o UserKnownHostsFile=/agent/keys/known_hosts -i /agent/keys/id"
    f" {real_servers.USER}@ssh.internal"
)


async def test_ssh(host: Host, caller: aiohttp.ClientSession) -> None:
    text, spans = await run(caller, host, "shell", f"echo from the sandbox | {SSH} 'id -un; cat'")
    assert text.splitlines() == [real_servers.USER, "from the sandbox"]
    found = tunnel_of(spans, "ssh", 22)
    assert found["process.executable.name"] == "ssh"
    assert found["clrk.req.bytes"] > 1000 < found["clrk.resp.bytes"]


async def test_ssh_is_silent_for_longer_than_any_request_may_take(host: Host, caller: aiohttp.ClientSession) -> None:
    text, spans = await run(caller, host, "shell", f"{SSH} 'echo one; sleep 6; echo two'")
    assert text.split() == ["one", "two"]
    tunnel_of(spans, "ssh", 22)
    lasted_ns = spans[0]["end_time_unix_nano"] - spans[0]["start_time_unix_nano"]
    assert lasted_ns > 6 * 10**9


async def test_ssh_carries_megabytes_both_ways(host: Host, caller: aiohttp.ClientSession) -> None:
    source = f"head -c 8000000 /dev/urandom > /tmp/a; {SSH} cat < /tmp/a > /tmp/b; cmp /tmp/a /tmp/b && wc -c < /tmp/b"
    text, spans = await run(caller, host, "shell", source)
    assert text.split() == ["8000000"]
    found = tunnel_of(spans, "ssh", 22)
    assert 8_000_000 < found["clrk.req.bytes"] < 8_500_000
    assert 8_000_000 < found["clrk.resp.bytes"] < 8_500_000


SMTP = """
import smtplib, ssl
{connect}
print(client.sendmail('a@clrk.example', ['b@clrk.example'], 'Subject: x\\r\\n\\r\\n' + ('y' * 70 + '\\r\\n') * 1500))
client.quit()
"""


async def test_smtp_with_starttls_is_the_clients_own_tls(host: Host, caller: aiohttp.ClientSession) -> None:
    connect = (
        "client = smtplib.SMTP('smtp.internal', 587, timeout=60)\n"
        "client.starttls(context=ssl.create_default_context(cafile='/agent/keys/ca.pem'))"
    )
    text, spans = await run(caller, host, "python", SMTP.format(connect=connect))
    assert text.strip() == "{}"
    assert json.loads(host.servers["smtp"].log().splitlines()[-1]) | {"size": 0} == {
        "to": ["b@clrk.example"], "tls": True, "size": 0,
    }  # fmt: skip
    assert tunnel_of(spans, "smtp", 587)["clrk.req.bytes"] > 100_000


async def test_smtp_inside_tls_is_opened_and_proven_upstream(host: Host, caller: aiohttp.ClientSession) -> None:
    connect = "client = smtplib.SMTP_SSL('smtps.internal', 465, timeout=60, context=ssl.create_default_context())"
    text, spans = await run(caller, host, "python", SMTP.format(connect=connect))
    assert text.strip() == "{}"
    assert json.loads(host.servers["smtps"].log().splitlines()[-1])["to"] == ["b@clrk.example"]
    assert tunnel_of(spans, "smtps", 465)["clrk.req.bytes"] > 100_000


async def test_mariadb(host: Host, caller: aiohttp.ClientSession) -> None:
    statements = "CREATE TABLE t (a INT); INSERT INTO t VALUES (40), (2); SELECT SUM(a), REPEAT('x', 70000) FROM t"
    source = f'mariadb --no-defaults -h mysql.internal -u app -p{PASSWORD} -N -e "{statements}" lamps'
    text, spans = await run(caller, host, "shell", source)
    assert text.split() == ["42", "x" * 70_000]
    assert tunnel_of(spans, "mysql", 3306)["clrk.resp.bytes"] > 70_000


@pytest.mark.parametrize("tls", ["disable", "verify-full"])
async def test_postgresql(host: Host, caller: aiohttp.ClientSession, tls: str) -> None:
    target = (
        f"host=pg.internal user=app password={PASSWORD} dbname=postgres sslmode={tls} sslrootcert=/agent/keys/ca.pem"
    )
    query = "select ssl, repeat('x', 70000) from pg_stat_ssl where pid = pg_backend_pid()"
    text, spans = await run(caller, host, "shell", f"HOME=/tmp psql '{target}' -XAtc \"{query}\"")
    assert text.strip() == f"{'f' if tls == 'disable' else 't'}|{'x' * 70_000}"
    (span,) = spans
    if span["status"]["code"] == "STATUS_CODE_UNSET":
        found = tunnel_of(spans, "pg", 5432)
    else:  # PostgreSQL leaves at the client's Terminate, often before it has read the goodbye of TLS: then it resets
        found = span["attributes"]
        assert (span["name"], tls, found["error.type"]) == ("egress.tcp", "verify-full", "connection_reset"), span
    assert found["process.executable.name"] == "psql"
    assert found["clrk.resp.bytes"] > 70_000


async def test_redis(host: Host, caller: aiohttp.ClientSession) -> None:
    commands = "SET lamp cracked\nAPPEND lamp ' shade'\nGET lamp\n"
    client = f"redis-cli -h redis.internal -a {PASSWORD} --no-auth-warning"
    text, spans = await run(caller, host, "shell", f'printf "{commands}" | {client}')
    assert text.splitlines()[-1] == "cracked shade"
    tunnel_of(spans, "redis", 6379)


async def test_redis_is_counted_to_the_byte(host: Host, caller: aiohttp.ClientSession) -> None:
    source = (
        "import socket; s = socket.create_connection(('redis.internal', 6379), 60)\n"
        f"s.sendall(b'AUTH {PASSWORD}\\r\\nPING\\r\\nQUIT\\r\\n')\n"
        "data = b''\nwhile piece := s.recv(99): data += piece\nprint(data)"
    )
    text, spans = await run(caller, host, "python", source)
    assert text.strip() == repr(b"+OK\r\n+PONG\r\n+OK\r\n")
    found = tunnel_of(spans, "redis", 6379)
    assert found["clrk.req.bytes"] == len(f"AUTH {PASSWORD}\r\nPING\r\nQUIT\r\n")
    assert found["clrk.resp.bytes"] == len(b"+OK\r\n+PONG\r\n+OK\r\n")


# --- a peer that does as the test says --------------------------------------------------------------------------------

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CONNECT = "import socket, time\ns = socket.create_connection(('peer.internal', {port}), 60)\n"


@contextlib.asynccontextmanager
async def peer(host: Host, handler: Handler) -> AsyncIterator[list[BaseException | None]]:
    """Listen as peer.internal; yields how each connection ended."""
    ends: list[BaseException | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
            ends.append(None)
        except OSError as exc:
            ends.append(exc)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", host.peer_port, limit=2**20)
    try:
        yield ends
    finally:
        server.close()


async def test_a_client_that_has_said_everything_still_gets_everything(
    host: Host, caller: aiohttp.ClientSession
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.read(-1)  # until the agent's half is closed
        for _ in range(5):
            writer.write(received)
            await writer.drain()
            await asyncio.sleep(0.1)  # the agent's half has been closed for a while when the last one comes
        writer.write_eof()

    source = CONNECT.format(port=7) + "s.sendall(b'x' * 1000); s.shutdown(socket.SHUT_WR)\n"
    source += "n = 0\nwhile piece := s.recv(65536): n += len(piece)\nprint(n)"
    async with peer(host, handle) as ends:
        text, spans = await run(caller, host, "python", source)
    assert text.strip() == "5000"
    assert ends == [None]
    found = tunnel_of(spans, "peer", 7)
    assert (found["clrk.req.bytes"], found["clrk.resp.bytes"]) == (1000, 5000)


async def test_a_server_that_has_said_everything_still_gets_everything(
    host: Host, caller: aiohttp.ClientSession
) -> None:
    got: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readexactly(5))
        writer.write(b"bye")
        writer.write_eof()
        got.append(await reader.read(-1))

    source = CONNECT.format(port=7) + "s.sendall(b'hello'); data = b''\nwhile piece := s.recv(99): data += piece\n"
    source += "for _ in range(5): s.sendall(b'y' * 1000); time.sleep(0.1)\ns.close(); print(data)"
    async with peer(host, handle) as ends:
        text, spans = await run(caller, host, "python", source)
    assert text.strip() == repr(b"bye")
    assert (got, ends) == ([b"hello", b"y" * 5000], [None])
    found = tunnel_of(spans, "peer", 7)
    assert (found["clrk.req.bytes"], found["clrk.resp.bytes"]) == (5005, 3)


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_reset_by_the_server_is_a_reset_for_the_agent(host: Host, caller: aiohttp.ClientSession) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        reset(writer)

    source = CONNECT.format(port=7) + "s.sendall(b'hello')\ntry: print(s.recv(9))\nexcept OSError as e: print(e.errno)"
    async with peer(host, handle):
        text, (span,) = await run(caller, host, "python", source)
    assert text.strip() == "104"
    assert (span["name"], span["attributes"]["error.type"]) == ("egress.tcp", "connection_reset")
    assert span["attributes"]["clrk.req.bytes"] == 5


async def test_a_reset_by_the_agent_is_a_reset_for_the_server(host: Host, caller: aiohttp.ClientSession) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))
        await reader.read(-1)

    source = CONNECT.format(port=7) + "import struct\ns.sendall(b'hello'); s.recv(5)\n"
    source += "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close(); print('gone')"
    async with peer(host, handle) as ends:
        text, (span,) = await run(caller, host, "python", source)
    assert text.strip() == "gone"
    assert [type(end) for end in ends] == [ConnectionResetError]
    assert tunnel_of([span], "peer", 7)["clrk.req.bytes"] == 5


async def test_what_no_rule_allows_is_reset_and_reaches_nobody(host: Host, caller: aiohttp.ClientSession) -> None:
    async def handle(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        return

    source = (
        CONNECT.format(port=8) + "try: s.sendall(b'\\x00hello'); print(s.recv(9))\nexcept OSError as e: print(e.errno)"
    )
    async with peer(host, handle) as ends:
        text, (span,) = await run(caller, host, "python", source)
    assert text.strip() == "104"
    assert ends == []
    assert span["name"] == "egress.dial.denied"
    assert span["attributes"]["clrk.egress.deny_reason"] == "port_not_allowed"
    assert span["status"]["code"] == "STATUS_CODE_ERROR"


async def test_a_large_volume_does_not_make_the_gateway_grow(host: Host, caller: aiohttp.ClientSession) -> None:
    """VOLUME down, and a sixteenth of it up at the same time, past an agent that is slower than the server."""
    block = os.urandom(1 << 20)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def count() -> int:
            received = 0
            while piece := await reader.read(1 << 20):
                received += len(piece)
            return received

        counting = asyncio.create_task(count())
        for _ in range(VOLUME >> 20):
            writer.write(block)
            await writer.drain()
        writer.write_eof()
        up.append(await counting)

    up: list[int] = []
    source = CONNECT.format(port=7) + (
        "s.settimeout(60); s.sendall(b'\\x00' * 1024); n = 0; last = 0; buffer = bytearray(1 << 20)\n"
        "while size := s.recv_into(buffer):\n"
        "    n += size\n"
        "    if n - last >= 1 << 20: s.sendall(bytes(65536)); last += 1 << 20\n"
        "s.close(); print(n)"
    )
    before = await asyncio.to_thread(resident, host.daemon)
    async with peer(host, handle) as ends:
        text, spans = await run(caller, host, "python", source)
    peak = resident(host.daemon, "VmHWM")
    assert int(text) == VOLUME
    assert ends == [None]
    found = tunnel_of(spans, "peer", 7)
    assert (found["clrk.req.bytes"], found["clrk.resp.bytes"]) == (up[0], VOLUME)
    seconds = (spans[0]["end_time_unix_nano"] - spans[0]["start_time_unix_nano"]) / 1e9
    print(f"{VOLUME >> 20} MiB in {seconds:.1f} s; the gateway grew by {(peak - before) / 2**20:.1f} MiB at its peak")
    assert peak - before < GROWTH


def resident(daemon: Daemon, field: str = "VmRSS") -> int:
    """Bytes of the gateway; asking for VmRSS also begins a new peak (proc(5), clear_refs)."""
    folder = Path(f"/proc/{daemon.gateway_pid()}")
    if field == "VmRSS":
        (folder / "clear_refs").write_text("5")
    line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
