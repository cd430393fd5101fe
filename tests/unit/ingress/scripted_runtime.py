"""A runtime for tests of the gateway: real control socket, real processes with pipes, no sandbox.

Speaks the control protocol as clrk-runtime does, and can be told to misbehave. Listeners are on loopback.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp

from clrk.core.control import GATEWAY_MESSAGES, receive, send
from clrk.core.gateway_config import GatewayConfig
from clrk.core.messages import (
    PROTOCOL_VERSION,
    AgentKind,
    Configure,
    Drained,
    Exited,
    ExitReason,
    Ready,
    Removed,
    Spawned,
    Started,
    StartedFd,
    StartFailed,
    StartFailure,
    StartRun,
    StopRun,
)
from clrk.core.resources import DaemonAgent, RuntimeSpec, TaskAgent
from clrk.gateway.app import App

METADATA_HOST = {"Host": "169.254.169.254"}


def agent(name, command, *, namespace="default", mode="Stdin", content_type=None, **spec):
    """Return a TaskAgent that runs a bash script."""
    delivery = {"mode": mode} | ({"contentType": content_type} if content_type else {})
    return TaskAgent.model_validate(
        {
            "kind": "TaskAgent",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"template": {"spec": {"command": ["bash", "-c", command]}}, "delivery": delivery, **spec},
        }
    )


def daemon(name, command, **spec):
    """Return a DaemonAgent that runs a bash script."""
    template = {"spec": {"command": ["bash", "-c", command]}}
    return DaemonAgent.model_validate(
        {"kind": "DaemonAgent", "metadata": {"name": name}, "spec": {"template": template, **spec}}
    )


CURL = "curl -sS --max-time 20 -H 'Host: 169.254.169.254'"
JSON = "-H 'Content-Type: application/json'"
AGENTS = [
    agent("echo", "cat", content_type="application/json"),
    agent("echo", "echo in team", namespace="team"),
    agent("text", "printf hello", content_type="text/plain"),
    agent("silent", "true"),
    agent("fails", "echo why >&2; exit 3"),
    agent("cut", "printf part; sleep 0.05; exit 4"),
    agent("crash", "kill -SEGV $$"),
    agent("slow", "sleep 60", timeout=0.3),
    agent("slowtalk", "printf part; sleep 60", timeout=0.3),
    agent("forever", "echo ready; sleep 600"),
    agent("mute", "sleep 600"),
    agent("deaf", "exec 0</dev/null; echo done"),
    agent("deafopen", "sleep 0.2; echo done"),
    agent("flood", "head -c 200000000 /dev/zero"),
    agent("stderrflood", "head -c 300000 /dev/zero | tr '\\0' x >&2; echo ok >&2; echo out"),
    agent("lines", "yes '' | head -c 2000000"),
    agent("one", "cat >/dev/null; read -r < \"$GATE\"; echo ok", maxConcurrent=1),
    agent("env", "echo $TRACEPARENT $CLRK_INVOCATION_ID"),
    agent("poolless", "true"),
    agent("broken", "true"),
    agent("gone", "true"),
    agent("unstarted", "true"),
    agent("unspawned", "true"),
    agent("post", f"{CURL} -d '{{}}' {JSON} -H 'X-Clrk-Status: 201' $URL/v1/response", mode="Metadata"),
    agent("postlate", f"{CURL} -d early $URL/v1/response; read -r < \"$GATE\"; echo late; exit 5", mode="Metadata"),
    agent("postnone", "true", mode="Metadata"),
    agent("postfails", "exit 6", mode="Metadata"),
    agent("postslow", "sleep 60", mode="Metadata", timeout=0.3),
    agent("post204", f"{CURL} -X POST -H 'X-Clrk-Status: 204' $URL/v1/response", mode="Metadata"),
    agent("probe", "echo $URL $URL6; cat >/dev/null; read -r < \"$GATE\""),
    agent("probemeta", "echo $URL > \"$GATE.url\"; read -r < \"$GATE\"", mode="Metadata"),
]  # fmt: skip


@dataclass
class _Process:
    popen: subprocess.Popen
    reason: ExitReason = ExitReason.EXITED


class NoEgress:
    """Stands where EgressService does: these agents call nobody."""

    def __init__(self):
        self.served = []
        self.closed = []

    def serve(self, run):
        self.served.append(run)
        return _NoRunEgress(self, run)

    def reconfigure(self, config):
        self.config = config

    async def close(self):
        pass


class _NoRunEgress:
    def __init__(self, egress, run):
        self._egress, self._run = egress, run

    async def close(self):
        self._egress.closed.append(self._run.identity.invocation_id)


class ScriptedRuntime:
    """The far end of the control socket. `refuse` and `ignore_stop` are the knobs."""

    def __init__(self, agents, state_dir):
        self.config = GatewayConfig(
            runtime=RuntimeSpec(), agents=agents, gateways=[], routes=[], ca_cert_pem="", ca_key_pem="secret key"
        )
        self.state_dir = state_dir
        self.gate = state_dir / "gate"
        self.egress = NoEgress()
        self.refuse = {
            "poolless": StartFailure.POOL_EXHAUSTED,
            "broken": StartFailure.SANDBOX_FAILED,
            "gone": StartFailure.UNKNOWN_AGENT,
        }
        self.grace_share = 1.0  # of StopRun.grace_s, for tests that wait for its end
        self.received = []
        self.crashes = []
        self.runs = {}
        self.ready = asyncio.Event()
        self.drained = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks = set()
        self._pipes_before = Counter()

    async def start(self):
        os.mkfifo(self.gate)
        self._gate_fd = os.open(self.gate, os.O_RDWR)  # keeps readers blocked until a line is written
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.crashes.append(str(context)))
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        asyncio.get_running_loop().add_reader(self.control.fileno(), self._on_readable)
        self.app = App(theirs, self.state_dir, self._make_egress)
        self.running = asyncio.create_task(self.app.run())
        self.configure(1)
        async with asyncio.timeout(10):
            await self.ready.wait()
        self._pipes_before = _pipes()

    def _make_egress(self, config, flows_fd, recorder):
        os.close(flows_fd)
        return self.egress

    def configure(self, generation):
        fds = [self._config_fd()]
        if generation == 1:
            ingress, admin, health = socket.socket(), socket.socket(socket.AF_UNIX), socket.socket()
            ingress.bind(("127.0.0.1", 0))
            health.bind(("127.0.0.1", 0))
            admin.bind(str(self.state_dir / "admin.sock"))
            for sock in (ingress, admin, health):
                sock.listen()
            self.ingress_port, self.health_port = ingress.getsockname()[1], health.getsockname()[1]
            fds += [os.open("/dev/null", os.O_RDONLY), ingress.detach(), admin.detach(), health.detach()]
        self.send(Configure(PROTOCOL_VERSION, generation), fds)

    def _config_fd(self):
        fd = os.memfd_create("config")
        os.write(fd, self.config.model_dump_json(by_alias=True).encode())
        return fd

    def send(self, message, fds=()):
        with contextlib.suppress(BrokenPipeError):  # a test has ended the gateway
            send(self.control, message, fds)
        for fd in fds:
            os.close(fd)

    async def stop(self):
        """End as a runtime does that dies: the gateway must end by itself."""
        daemons = self.app._parts.daemons
        daemons.drain()  # else they start again when they are killed
        for run in self.runs.values():
            run.popen.kill()
        async with asyncio.timeout(20):
            await self.until(lambda: not self.runs)
            await asyncio.gather(*self._tasks)
            await self.until(lambda: not self.app._parts.invocations._live and not daemons._runs)
        self.left_open = sorted((_pipes() - self._pipes_before).elements())
        asyncio.get_running_loop().remove_reader(self.control.fileno())
        self.control.close()
        os.close(self._gate_fd)
        async with asyncio.timeout(20):
            await self.running

    async def until(self, condition):
        """Wait for a condition that a message, or the gateway's own work, makes true."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    def open_gate(self):
        """Let one agent that reads its gate go on."""
        os.write(self._gate_fd, b"\n")

    # --- messages -----------------------------------------------------------------------------------------------

    def _on_readable(self):
        while True:
            try:
                found = receive(self.control, GATEWAY_MESSAGES)
            except (BlockingIOError, ConnectionResetError):
                return
            if found is None:
                return
            message, fds = found
            assert fds == []
            self.received.append(message)
            self._on_message(message)

    def _on_message(self, message):
        match message:
            case Ready():
                self.ready.set()
            case Drained():
                self.drained.set()
            case StartRun() if message.agent.name in self.refuse:
                self.send(StartFailed(message.run_id, self.refuse[message.agent.name], "scripted"))
            case StartRun() if message.agent.name != "unstarted":
                task = asyncio.create_task(self._run(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case StopRun() if message.run_id in self.runs:
                self._stop(message)

    def _stop(self, message):
        run = self.runs[message.run_id]
        if not message.grace_s:
            self._kill(message.run_id, ExitReason.STOPPED)
        elif run.popen.returncode is None:
            run.reason = ExitReason.STOPPED
            run.popen.terminate()
            grace_s = message.grace_s * self.grace_share
            asyncio.get_running_loop().call_later(grace_s, self._kill, message.run_id, ExitReason.STOPPED)

    def _kill(self, invocation_id, reason):
        run = self.runs.get(invocation_id)
        if run is not None and run.popen.returncode is None:
            run.reason = reason
            os.killpg(run.popen.pid, signal.SIGKILL)

    async def _run(self, message):
        wanted = (message.agent.namespace, message.agent.name)
        declared = next(a for a in [*self.config.agents, *self.config.daemons] if a.key == wanted)
        invocation_id, start_ns = message.run_id, time.time_ns()
        listeners = _listeners()
        (stdin_r, stdin_w), (stdout_r, stdout_w), (stderr_r, stderr_w) = os.pipe(), os.pipe(), os.pipe()
        environment = os.environ | {
            "URL": f"http://127.0.0.1:{listeners[StartedFd.METADATA_V4].getsockname()[1]}",
            "URL6": f"http://[::1]:{listeners[StartedFd.METADATA_V6].getsockname()[1]}",
            "GATE": str(self.gate),
            "CLRK_INVOCATION_ID": invocation_id,
            "TRACEPARENT": message.traceparent,
        }
        self.send(
            Started(invocation_id, "0badcafe", "clrk-0badcafe", 1, 1, b"4", b"6", True, start_ns, time.time_ns()),
            [*(sock.detach() for sock in listeners), stdin_w, stdout_r, stderr_r],
        )
        if message.agent.name == "unspawned":
            for fd in (stdin_r, stdout_w, stderr_w):
                os.close(fd)
            self.send(StartFailed(invocation_id, StartFailure.SANDBOX_FAILED, "scripted"))
            return
        spawn_ns = time.time_ns()
        popen = subprocess.Popen(
            declared.spec.template.spec.command,
            stdin=stdin_r,
            stdout=stdout_w,
            stderr=stderr_w,
            env=environment,
            start_new_session=True,
        )
        run = _Process(popen)
        for fd in (stdin_r, stdout_w, stderr_w):
            os.close(fd)
        self.runs[message.run_id] = run
        self.send(Spawned(message.run_id, run.popen.pid, spawn_ns, time.time_ns()))
        timers = []
        if message.kind is AgentKind.TASK:
            timeout_s = message.timeout_s or declared.spec.timeout
            loop = asyncio.get_running_loop()
            timers.append(loop.call_later(timeout_s, self._kill, message.run_id, ExitReason.TIMEOUT))
        code = await _wait(run.popen)
        for timer in timers:
            timer.cancel()
        with contextlib.suppress(ProcessLookupError):  # as cgroup.kill does: nothing of the run stays
            os.killpg(run.popen.pid, signal.SIGKILL)
        del self.runs[message.run_id]
        end_ns = time.time_ns()
        self.send(Exited(message.run_id, run.reason, code if code >= 0 else 128 - code, 0.01, 4096, end_ns))
        self.send(Removed(message.run_id, end_ns, time.time_ns()))


async def _wait(popen):
    loop = asyncio.get_running_loop()
    fd, gone = os.pidfd_open(popen.pid), asyncio.Event()
    loop.add_reader(fd, gone.set)
    await gone.wait()
    loop.remove_reader(fd)
    os.close(fd)
    return popen.wait()


def _listeners():
    made = []
    for index in range(StartedFd.STDIN):
        family = socket.AF_INET6 if index in (StartedFd.EGRESS_V6, StartedFd.METADATA_V6) else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM if index == StartedFd.DNS_UDP else socket.SOCK_STREAM)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        if index != StartedFd.DNS_UDP:
            sock.listen()
        made.append(sock)
    return made


def _pipes():
    """Return the pipes of this process: an agent's stdio is one of them until somebody closes it."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the folder that was listed
            continue
    return Counter(target for target in found if target.startswith("pipe:"))


@dataclass
class Gateway:
    """What a test holds: the runtime's knobs, and a caller."""

    runtime: ScriptedRuntime
    client: aiohttp.ClientSession

    @property
    def url(self):
        return f"http://127.0.0.1:{self.runtime.ingress_port}"

    async def call(self, path, method="POST", **kwargs):
        """Return status, headers and body of a whole answer."""
        async with self.client.request(method, self.url + path, **kwargs) as response:
            return response.status, response.headers, await response.read()

    async def raw(self, request):
        """Send bytes; return reader and writer of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.runtime.ingress_port)
        writer.write(request)
        return reader, writer

    async def spans(self, invocation_id, name=None):
        """Return the spans of an invocation, read as `clrk trace --json` reads them."""
        connector = aiohttp.UnixConnector(str(self.runtime.state_dir / "admin.sock"))
        async with aiohttp.ClientSession(connector=connector) as client:
            async with client.get(f"http://clrk/v1/traces/{invocation_id}") as response:
                assert response.status == 200, await response.text()
                found = [json.loads(line) for line in (await response.text()).splitlines()]
        return [span for span in found if name in (None, span["name"])]

    async def span(self, invocation_id, name):
        """Return the one span of this name, as soon as it is recorded."""
        async with asyncio.timeout(20):
            while True:
                try:
                    found = await self.spans(invocation_id, name)
                except AssertionError:
                    found = []
                if found:
                    assert len(found) == 1
                    return found[0]
                await asyncio.sleep(0.02)

    def phase(self, invocation_id):
        """Return what the gateway remembers."""
        return self.runtime.app._parts.invocations.record(invocation_id).phase
