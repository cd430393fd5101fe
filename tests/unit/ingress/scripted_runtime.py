"""A runtime for tests of the gateway: real control socket, real processes with pipes, no sandbox.

Speaks the control protocol as clrk-runtime does, and can be told to misbehave. Listeners are on loopback.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from dataclasses import dataclass

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
from clrk.core.resources import RuntimeSpec
from clrk.gateway.app import App

METADATA_HOST = {"Host": "169.254.169.254"}


@dataclass
class _Process:
    popen: subprocess.Popen
    reason: ExitReason = ExitReason.EXITED


class NoEgress:
    """Stands where EgressService does: these agents call nobody."""

    def __init__(self):
        self.served = []
        self.closed = []
        self.reconfigured = []

    def serve(self, run):
        self.served.append(run)
        return _NoRunEgress(self, run)

    def reconfigure(self, config):
        self.config = config

    def report_budgets(self, day):
        return {"day": day, "items": []}

    async def close(self):
        pass


class _NoRunEgress:
    def __init__(self, egress, run):
        self._egress, self._run = egress, run

    def reconfigure(self, gateway):
        self._egress.reconfigured.append(gateway)

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
        async with asyncio.timeout(25):
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
