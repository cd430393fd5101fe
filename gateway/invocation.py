"""One invocation: from StartRun until its sandbox is gone.

Theory of operation. `live()` is the one task that owns the run. The runtime's messages (Started, Spawned, StartFailed,
Exited, Removed) arrive through `on_message` and complete futures that `live` waits for in that order; the answer's side
(ingress.py) sees `started`, `stdout`, `posted` and `outcome`, and may `cancel`. After Exited nothing in the sandbox is
alive, so every pipe ends; `outcome` is set when the slot is free again and the run's span is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from clrk.core.errors import ClrkError, ProtocolError
from clrk.core.ids import SandboxId
from clrk.core.messages import (
    AgentKey,
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
from clrk.core.resources import EgressGateway, TaskAgent
from clrk.gateway import run_spans
from clrk.gateway._aio import spawn
from clrk.gateway.control_client import ControlError, close_fds
from clrk.gateway.envelope import Event, to_structured
from clrk.gateway.metadata import MetadataService, PostedAnswer
from clrk.gateway.outcome import Outcome, Phase, outcome_of
from clrk.gateway.pipes import Pipe
from clrk.gateway.run import Run, SandboxSockets
from clrk.gateway.telemetry.records import InvocationRecord
from clrk.gateway.telemetry.spans import Identity, Recorder

_LOG: Final = logging.getLogger(__name__)
START_DEADLINE_S: Final = 30.0
EXIT_GRACE_S: Final = 30.0  # beyond the agent's timeout, which the runtime enforces
REMOVED_DEADLINE_S: Final = 30.0
_LOG_DRAIN_S: Final = 2.0  # stderr that is still in the pipe when the agent has exited
_MAX_LINE_SIZE: Final = 16_384


class Commands(Protocol):
    """What an invocation says to the runtime."""

    def send(self, message: StartRun | StopRun) -> None:
        """Send, or raise ControlError."""


class RunEgress(Protocol):
    """The egress side of one run."""

    async def close(self) -> None:
        """End every connection of the run; its spans are recorded when this returns."""


class Egress(Protocol):
    """Serves the egress, DNS and OTLP listeners of a run."""

    def serve(self, run: Run) -> RunEgress:
        """Accept on the run's sockets until the result is closed."""


class TelemetrySink(Recorder, Protocol):
    """Spans, log lines and invocation records."""

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


@dataclass(frozen=True, slots=True)
class Order:
    """What to run. identity's context is that of `invoke_agent`; dispatch_span_id is its parent."""

    identity: Identity
    agent: TaskAgent
    gateway: EgressGateway | None
    event: Event
    dispatch_span_id: str
    timeout_s: float = 0.0

    @property
    def metadata_mode(self) -> bool:
        """Say whether the answer is posted instead of written to stdout."""
        return self.agent.spec.delivery.mode == "Metadata"


class Invocation:
    """A run and its answer; see the head of this file."""

    def __init__(
        self,
        order: Order,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        charge: Callable[[int], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.order = order
        self.identity = order.identity
        self.charge = charge  # for every byte of an answer that is held in memory; raises Problem when that is short
        self.started: asyncio.Future[None] = loop.create_future()
        self.posted: asyncio.Future[PostedAnswer] = loop.create_future()
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.stdout: Pipe | None = None  # the answer in Stdin mode; None before `started`
        self.on_end: Callable[[Outcome], None] = lambda _: None  # called right before `outcome` is set
        self._commands = commands
        self._egress = egress
        self._telemetry = telemetry
        self._start_ns = time.time_ns()
        self._cancelled = False
        self._start: asyncio.Future[tuple[Started, list[int]]] = loop.create_future()
        self._exit: asyncio.Future[Exited] = loop.create_future()
        self._removed: asyncio.Future[Removed] = loop.create_future()
        self._warm = False
        self._stdout_released = False

    # --- the runtime's side -----------------------------------------------------------------------------------------

    def on_message(self, message: RuntimeMessage, fds: list[int]) -> None:
        """Take a message about this invocation; the fds are ours from now on.

        Raises: ProtocolError for a message that can not come now; the fds are then still the caller's.
        """
        match message:
            case Started() if len(fds) == len(StartedFd) and not self._start.done():
                self.identity = replace(self.identity, sandbox_id=SandboxId(message.sandbox_id))
                self._warm = message.warm
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
            now_ns = time.time_ns()
            self._exit.set_result(Exited(self.identity.invocation_id, ExitReason.STOPPED, 137, 0.0, 0, now_ns))
        if not self._removed.done():
            self._removed.set_exception(lost)
            self._removed.exception()  # seen, also when nobody comes to wait for it
        self.release_stdout()  # its other end may outlive the runtime for a moment

    # --- the answer's side ------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Kill the run: nobody waits for its answer. Nothing happens when it has ended."""
        if not self._cancelled and not self.outcome.done():
            self._cancelled = True
            self._stop_run()

    def release_stdout(self) -> None:
        """Say that nobody reads stdout any more; an agent that still writes gets EPIPE. Whoever awaits must say so."""
        self._stdout_released = True
        if self.stdout is not None and not self.order.metadata_mode:
            self.stdout.close()

    # --- the run ----------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Run to the end. Every way out sets `started` and `outcome`."""
        try:
            started, fds = await self._request_start()
            await self._live_in_sandbox(started, fds)
        except StartRefused as refused:
            self._refuse(refused)
        except (
            BaseException
        ):  # a bug or the end of the process: the caller must hear of it, and the agent must not stay
            self._refuse(StartRefused(StartFailure.SANDBOX_FAILED, "the gateway failed"))
            self.release_stdout()
            self._stop_run()
            raise

    async def _request_start(self) -> tuple[Started, list[int]]:
        order = self.order
        context = self.identity.context
        key = AgentKey(order.agent.metadata.namespace, order.agent.metadata.name)
        try:
            self._commands.send(
                StartRun(
                    run_id=self.identity.invocation_id,
                    agent=key,
                    traceparent=context.traceparent,
                    tracestate=context.tracestate,
                    baggage=context.baggage,
                    timeout_s=order.timeout_s,
                )
            )
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
                _LOG.exception("serving the sandbox failed", extra={"invocation_id": self.identity.invocation_id})
                self._stop_run()
                raise StartRefused(StartFailure.SANDBOX_FAILED, f"serving the sandbox: {exc}") from exc
            if self._cancelled:  # the StopRun may have come before the runtime knew the run
                self._stop_run()
            self.started.set_result(None)
            exited = await self._wait_exit()
            self._finish(outcome_of(exited, self._cancelled, self._lacks_answer()), exited)
        await self._wait_removed()

    async def _open(self, stack: contextlib.AsyncExitStack, started: Started, fds: list[int]) -> None:
        sockets, stdio = take_fds(fds)
        stack.callback(sockets.close)
        # No OTLP receiver in this version: an SDK that is pointed there is refused at once, not left waiting.
        sockets.otlp.shutdown(socket.SHUT_RDWR)
        stdin, stdout, stderr = (Pipe(fd) for fd in stdio)
        self.stdout = stdout
        for pipe in (stdin, stderr) if not self.order.metadata_mode else (stdin, stdout, stderr):
            stack.callback(pipe.close)
        if self._stdout_released:
            self.release_stdout()
        order = self.order
        run = Run(
            identity=self.identity, agent=order.agent, gateway=order.gateway, netns_cookie=started.netns_cookie,
            header_v4=started.header_v4, header_v6=started.header_v6, sockets=sockets,
        )  # fmt: skip
        egress = self._egress.serve(run)
        stack.push_async_callback(egress.close)
        metadata = MetadataService(
            order.event, metadata_mode=order.metadata_mode, on_answer=self._on_answer, charge=self.charge
        )
        stack.push_async_callback(metadata.close)
        await metadata.serve(sockets.metadata_v4, sockets.metadata_v6)
        self._pump(stack, stdin, stdout, stderr)

    def _pump(self, stack: contextlib.AsyncExitStack, stdin: Pipe, stdout: Pipe, stderr: Pipe) -> None:
        name = self.identity.invocation_id
        logs = [spawn(self._log_lines("stderr", stderr), name=f"stderr {name}")]
        if self.order.metadata_mode:
            logs.append(spawn(self._log_lines("stdout", stdout), name=f"stdout {name}"))
        stack.push_async_callback(_settle, logs)
        feed = spawn(self._feed(stdin), name=f"stdin {name}")
        stack.push_async_callback(_cancel, feed)

    async def _feed(self, stdin: Pipe) -> None:
        """Write the event to stdin, then close it. In Metadata mode stdin is empty."""
        if not self.order.metadata_mode:
            if await stdin.write_all(to_structured(self.order.event)):
                await stdin.write_all(b"\n")
        stdin.close()

    async def _log_lines(self, stream: str, pipe: Pipe) -> None:
        """Keep lines; one that is too long becomes several."""
        rest = b""
        while chunk := await pipe.read():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _MAX_LINE_SIZE:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._log_line(stream, line)
        if rest:
            self._log_line(stream, rest)

    def _log_line(self, stream: str, line: bytes) -> None:
        for start in range(0, len(line) or 1, _MAX_LINE_SIZE):
            self._telemetry.record_log(self.identity, stream, line[start : start + _MAX_LINE_SIZE], time.time_ns())

    def _on_answer(self, answer: PostedAnswer) -> None:
        if not self.posted.done():
            self.posted.set_result(answer)

    def _lacks_answer(self) -> bool:
        return self.order.metadata_mode and not self.posted.done()

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _wait_exit(self) -> Exited:
        timeout_s = self.order.timeout_s or self.order.agent.spec.timeout
        try:
            async with asyncio.timeout(timeout_s + EXIT_GRACE_S):
                return await asyncio.shield(self._exit)
        except TimeoutError:
            _LOG.error("no word of the agent's exit", extra={"invocation_id": self.identity.invocation_id})
            self._stop_run()
            return Exited(self.identity.invocation_id, ExitReason.TIMEOUT, 137, 0.0, 0, time.time_ns())

    async def _wait_removed(self) -> None:
        try:
            async with asyncio.timeout(REMOVED_DEADLINE_S):
                removed = await asyncio.shield(self._removed)
        except ControlError:  # the runtime is gone; its next start removes what is left
            return
        except TimeoutError:
            _LOG.error("sandbox not removed", extra={"invocation_id": self.identity.invocation_id})
            return
        run_spans.record_teardown(self._telemetry, self.identity, removed, warm=self._warm)

    def _refuse(self, refused: StartRefused) -> None:
        if not self.started.done():
            self.started.set_exception(refused)
            self.started.exception()  # marks it as seen: the caller may have gone
        rejected = refused.reason in (StartFailure.POOL_EXHAUSTED, StartFailure.DRAINING)
        phase = Phase.CANCELLED if self._cancelled else Phase.REJECTED if rejected else Phase.FAILED
        self._finish(Outcome(phase, message=refused.message, has_run=False))

    def _finish(self, outcome: Outcome, exited: Exited | None = None) -> None:
        if self.outcome.done():
            return
        if exited is not None:
            run_spans.record_run(
                self._telemetry, self.identity, outcome, exited,
                start_ns=self._start_ns, parent_span_id=self.order.dispatch_span_id,
            )  # fmt: skip
        self.on_end(outcome)
        self.outcome.set_result(outcome)

    def _stop_run(self) -> None:
        with contextlib.suppress(ControlError):  # the runtime is gone, and its sandboxes with it
            self._commands.send(StopRun(self.identity.invocation_id))


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


async def _settle(tasks: list[asyncio.Task[None]]) -> None:
    """Let log readers reach the end of their pipes, which is near: no writer is alive."""
    _, pending = await asyncio.wait(tasks, timeout=_LOG_DRAIN_S)
    for task in pending:
        await _cancel(task)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
