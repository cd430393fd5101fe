"""One run of an agent in a sandbox: from StartRun until the sandbox is gone. What every kind of agent has.

Theory of operation. `live()` is the one task that owns the run. The runtime's messages (Started, Spawned, StartFailed,
Exited, Removed) arrive through `on_message` and complete futures that `live` waits for in that order. After Exited
nothing in the sandbox is alive, so every pipe ends. `invoke_agent` begins with Started, and whatever happens then, it
is recorded once: a run that got no sandbox has no such span. A subclass says what is asked for, what the agent's stdin
and stdout are for, and what its end means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final, Protocol

from clrk.core.egress_resources import EgressGateway
from clrk.core.errors import ClrkError, ProtocolError
from clrk.core.ids import SandboxId
from clrk.core.messages import (
    Exited,
    ExitReason,
    Removed,
    RuntimeMessage,
    Spawned,
    Started,
    StartedFd,
    StartFailed,
    StartFailure,
    StartRun,
    StopRun,
)
from clrk.core.resources import Agent
from clrk.gateway import run_spans
from clrk.gateway._aio import spawn
from clrk.gateway.control_client import ControlError, close_fds
from clrk.gateway.metadata import MetadataService
from clrk.gateway.otlp_receiver import AgentSink, OtlpReceiver
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.output_log import LogAllowance, OutputLog, log_to_end
from clrk.gateway.pipes import Pipe
from clrk.gateway.run import Run, SandboxSockets
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Identity, Recorder

_LOG: Final = logging.getLogger(__name__)
START_DEADLINE_S: Final = 30.0
EXIT_GRACE_S: Final = 30.0  # beyond what the runtime enforces
REMOVED_DEADLINE_S: Final = 30.0
_LOG_DRAIN_S: Final = 2.0  # output that is still in the pipe when the agent has exited


class Commands(Protocol):
    """What a run says to the runtime."""

    def send(self, message: StartRun | StopRun) -> None:
        """Send, or raise ControlError."""


class RunEgress(Protocol):
    """The egress side of one run."""

    def reconfigure(self, gateway: EgressGateway | None) -> None:
        """Go on by the configuration of now."""

    async def close(self) -> None:
        """End every connection of the run; its spans are recorded when this returns."""


class Egress(Protocol):
    """Serves the egress and DNS listeners of a run."""

    def serve(self, run: Run) -> RunEgress:
        """Accept on the run's sockets until the result is closed."""


class TelemetrySink(Recorder, AgentSink, Protocol):
    """Spans, log lines and invocation records, and what agents' own SDKs report."""

    def record_log(self, identity: Identity, stream: str, line: bytes, time_ns: int) -> None:
        """Keep one line of output."""

    def record_invocation(self, record: InvocationRecord) -> None:
        """Keep the record in place of an earlier one of the same invocation. Never raises, never blocks."""


class StartRefused(ClrkError):
    """The run did not start."""

    def __init__(self, reason: StartFailure, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class SandboxRun(ABC):
    """See the head of this file. identity's context is that of `invoke_agent`, parent_span_id is its parent."""

    def __init__(
        self,
        run_id: str,
        identity: Identity,
        agent: Agent,
        gateway: EgressGateway | None,
        *,
        parent_span_id: str,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        allowance: LogAllowance,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.run_id = run_id
        self.identity = identity
        self.started: asyncio.Future[None] = loop.create_future()
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self._agent = agent
        self._gateway = gateway
        self._parent_span_id = parent_span_id
        self._commands = commands
        self._egress = egress
        self._run_egress: RunEgress | None = None  # while the run is open
        self._telemetry = telemetry
        self._allowance = allowance
        self._start_ns = time.time_ns()
        self._cancelled: Outcome | None = None  # how it ends when we end it
        self._warm = False
        self._has_begun = False  # there is an `invoke_agent` span to end
        self._start: asyncio.Future[tuple[Started, list[int]]] = loop.create_future()
        self._exit: asyncio.Future[Exited] = loop.create_future()
        self._removed: asyncio.Future[Removed] = loop.create_future()
        self._exit_timer: asyncio.TimerHandle | None = None

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @abstractmethod
    def _start_request(self) -> StartRun:
        """Return what to ask of the runtime."""

    @abstractmethod
    def _metadata_service(self) -> MetadataService:
        """Return what answers on the metadata listeners."""

    @abstractmethod
    def _use_stdio(self, stack: contextlib.AsyncExitStack, stdin: int, stdout: int) -> None:
        """Take the two fds, and use them until the stack is closed, when the agent is dead."""

    @abstractmethod
    def _judge(self, exited: Exited) -> Outcome:
        """Say what the end of the agent means."""

    @abstractmethod
    def _on_open(self) -> None:
        """Everything is served; the agent's first instruction may have been executed."""

    @abstractmethod
    def _on_finish(self, outcome: Outcome) -> None:
        """Called once, right before `outcome` is set."""

    @abstractmethod
    def _on_lost(self) -> None:
        """Let go of what waits for the agent's output: there may be no end of it."""

    # --- the runtime's side -----------------------------------------------------------------------------------------

    def on_message(self, message: RuntimeMessage, fds: list[int]) -> None:
        """Take a message about this run; the fds are ours from now on.

        Raises: ProtocolError for a message that can not come now; the fds are then still the caller's.
        """
        match message:
            case Started() if len(fds) == len(StartedFd) and not self._start.done():
                self.identity = replace(self.identity, sandbox_id=SandboxId(message.sandbox_id))
                self._warm = message.warm
                self._begin()
                self._start.set_result((message, fds))
            case StartFailed() if not self._start.done():
                self._start.set_exception(StartRefused(message.reason, message.message))
            case StartFailed() if not self._exit.done():  # it had a sandbox, but not a process
                self._exit.set_exception(StartRefused(message.reason, message.message))
            case Spawned():
                run_spans.record_spawn(self._telemetry, self.identity, message, warm=self._warm)
            case Exited() if not self._exit.done():
                self._exit.set_result(message)
            case Removed() if not self._removed.done():
                self._removed.set_result(message)
            case _:
                raise ProtocolError("control_order", f"{type(message).__name__} with {len(fds)} fds: not expected now")

    def abandon(self) -> None:
        """Take it that the run is over: the runtime is gone, and its sandboxes with it."""
        lost = ControlError("the runtime is gone")
        if not self._start.done():
            self._start.set_exception(StartRefused(StartFailure.SANDBOX_FAILED, str(lost)))
        if not self._exit.done():
            self._exit.set_result(self._unheard(ExitReason.STOPPED))
        if not self._removed.done():
            self._removed.set_exception(lost)
            self._removed.exception()  # seen, also when nobody comes to wait for it
        self._on_lost()  # the other end of a pipe may outlive the runtime for a moment

    def _begin(self) -> None:
        self._has_begun = True
        run_spans.begin_run(
            self._telemetry, self.identity, start_ns=self._start_ns, parent_span_id=self._parent_span_id
        )

    # --- the run ----------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Run to the end. Every way out sets `started` and `outcome`."""
        try:
            started, fds = await self._request_start()
            await self._live_in_sandbox(started, fds)
        except StartRefused as refused:
            self._refuse(refused)
        except BaseException:  # a bug or the end of the process: somebody waits, and the agent must not stay
            self._refuse(StartRefused(StartFailure.SANDBOX_FAILED, "the gateway failed"))
            self._on_lost()
            self._stop_run()
            raise
        finally:
            if self._exit_timer is not None:
                self._exit_timer.cancel()

    async def _request_start(self) -> tuple[Started, list[int]]:
        try:
            self._commands.send(self._start_request())
            async with asyncio.timeout(START_DEADLINE_S):
                return await asyncio.shield(self._start)
        except ControlError as exc:
            raise StartRefused(StartFailure.SANDBOX_FAILED, str(exc)) from exc
        except TimeoutError:
            if self._start.done():  # it came in the same turn of the loop
                return self._start.result()
            self._stop_run()
            raise StartRefused(StartFailure.SANDBOX_FAILED, f"no sandbox within {START_DEADLINE_S:.0f} s") from None

    async def _live_in_sandbox(self, started: Started, fds: list[int]) -> None:
        run_spans.record_acquire(self._telemetry, self.identity, started)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._open(stack, started, fds)
            except (ClrkError, OSError) as exc:
                _LOG.exception("serving the sandbox failed", extra=self._extra())
                self._stop_run()
                raise StartRefused(StartFailure.SANDBOX_FAILED, f"serving the sandbox: {exc}") from exc
            if self._cancelled is not None:  # the StopRun may have come before the runtime knew the run
                self._stop_run()
            self._on_open()
            self.started.set_result(None)
            exited = await asyncio.shield(self._exit)
            self._finish(self._judge(exited), exited)
        await self._wait_removed()

    async def _open(self, stack: contextlib.AsyncExitStack, started: Started, fds: list[int]) -> None:
        sockets, (stdin, stdout, stderr) = take_fds(fds)
        stack.callback(sockets.close)
        receiver = OtlpReceiver(self.identity, self._telemetry)
        stack.push_async_callback(receiver.close)
        await receiver.serve(sockets.otlp)
        errors = Pipe(stderr)
        stack.callback(errors.close)
        self._use_stdio(stack, stdin, stdout)
        run = Run(
            identity=self.identity, agent=self._agent, gateway=self._gateway, netns_cookie=started.netns_cookie,
            header_v4=started.header_v4, header_v6=started.header_v6, sockets=sockets, ca_id=started.ca_id,
        )  # fmt: skip
        self._run_egress = egress = self._egress.serve(run)
        stack.push_async_callback(egress.close)
        metadata = self._metadata_service()
        stack.push_async_callback(metadata.close)
        await metadata.serve(sockets.metadata_v4, sockets.metadata_v6)
        self._log_until_closed(stack, "stderr", errors)

    # --- output -----------------------------------------------------------------------------------------------------

    def _output_log(self, stream: str) -> OutputLog:
        def keep(line: bytes) -> None:
            now_ns = time.time_ns()
            if dropped := self._allowance.take_dropped():
                note = f"{dropped} bytes of output before this were over the limit and are not kept"
                self._telemetry.record_log(self.identity, "clrk", note.encode(), now_ns)
            self._telemetry.record_log(self.identity, stream, line, now_ns)

        return OutputLog(keep, self._allowance)

    def _log_until_closed(self, stack: contextlib.AsyncExitStack, stream: str, pipe: Pipe) -> None:
        """Keep what the agent writes to a pipe that is only logged."""
        task = spawn(log_to_end(pipe, self._output_log(stream)), name=f"{stream} {self.run_id}")
        stack.push_async_callback(_settle, task)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _expect_exit_within(self, seconds: float, reason: ExitReason) -> None:
        """Take the agent for dead if the runtime has not said so by then; it will be told once more."""

        def give_up() -> None:
            if not self._exit.done():
                _LOG.error("no word of the agent's exit", extra=self._extra())
                self._stop_run()
                self._exit.set_result(self._unheard(reason))

        if self._exit_timer is not None:
            self._exit_timer.cancel()
        self._exit_timer = asyncio.get_running_loop().call_later(seconds, give_up)

    def _unheard(self, reason: ExitReason) -> Exited:
        """Return an end that nobody told us of: nothing of it was measured."""
        return Exited(self.run_id, reason, 137, 0.0, 0, time.time_ns())

    async def _wait_removed(self) -> None:
        try:
            async with asyncio.timeout(REMOVED_DEADLINE_S):
                removed = await asyncio.shield(self._removed)
        except ControlError:  # the runtime is gone; its next start removes what is left
            return
        except TimeoutError:
            _LOG.error("sandbox not removed", extra=self._extra())
            return
        run_spans.record_teardown(self._telemetry, self.identity, removed, warm=self._warm)

    def _refuse(self, refused: StartRefused) -> None:
        if not self.started.done():
            self.started.set_exception(refused)
            self.started.exception()  # marks it as seen: who waited may have gone
        rejected = refused.reason in (StartFailure.POOL_EXHAUSTED, StartFailure.DRAINING, StartFailure.STATE_FULL)
        phase = Phase.REJECTED if rejected else Phase.FAILED
        end = self._cancelled or Outcome(phase, message=refused.message)
        self._finish(replace(end, has_run=False), failure=refused.reason)

    def _finish(
        self, outcome: Outcome, exited: Exited | None = None, failure: StartFailure = StartFailure.SANDBOX_FAILED
    ) -> None:
        if self.outcome.done():
            return
        if self._has_begun:
            run_spans.record_run(
                self._telemetry, self.identity, outcome, exited,
                start_ns=self._start_ns, parent_span_id=self._parent_span_id, failure=failure,
            )  # fmt: skip
        self._on_finish(outcome)
        self.outcome.set_result(outcome)

    def _stop_run(self, grace_s: float = 0.0) -> None:
        with contextlib.suppress(ControlError):  # the runtime is gone, and its sandboxes with it
            self._commands.send(StopRun(self.run_id, grace_s))

    def _extra(self) -> dict[str, str]:
        """Return what a log line of ours says about the run."""
        return {
            "run_id": self.run_id,
            "agent": f"{self.identity.agent_namespace}/{self.identity.agent_name}",
            "sandbox_id": self.identity.sandbox_id,
        }


def take_fds(fds: list[int]) -> tuple[SandboxSockets, tuple[int, int, int]]:
    """Make sockets of Started's fds; returns them and stdin, stdout, stderr.

    Raises: OSError when one is no socket; then all are closed.
    """
    stdio = (fds[StartedFd.STDIN], fds[StartedFd.STDOUT], fds[StartedFd.STDERR])
    made: list[socket.socket] = []
    try:
        for index in range(StartedFd.STDIN):
            made.append(socket.socket(fileno=fds[index]))
            made[-1].setblocking(False)
    except OSError:
        for sock in made:
            sock.detach()
        close_fds(fds)
        raise
    return SandboxSockets(*made), stdio


async def _settle(task: asyncio.Task[None]) -> None:
    """Let a log reader reach the end of its pipe, which is near: no writer is alive."""
    _, pending = await asyncio.wait([task], timeout=_LOG_DRAIN_S)
    if pending:
        await cancel(task)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait([task])
