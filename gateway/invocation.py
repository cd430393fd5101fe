"""One invocation: a run of a TaskAgent, the event that it is for, and the answer that it gives.

The answer's side (answer.py) sees `started`, `stdout`, `posted` and `outcome`, and may `cancel`. `outcome` is set when
the slot is free again and the run's span is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from clrk.core.egress_resources import EgressGateway
from clrk.core.messages import AgentKey, Exited, ExitReason, StartRun
from clrk.core.resources import TaskAgent
from clrk.gateway._aio import spawn
from clrk.gateway.envelope import Event, to_structured
from clrk.gateway.metadata import MetadataService, PostedAnswer
from clrk.gateway.outcome import CALLER_GONE, Outcome, outcome_of
from clrk.gateway.output_log import LogAllowance, LoggedPipe
from clrk.gateway.pipes import Pipe
from clrk.gateway.sandbox_run import EXIT_GRACE_S, Commands, Egress, SandboxRun, TelemetrySink, cancel
from clrk.gateway.telemetry.spans import Identity


@dataclass(frozen=True, slots=True)
class Order:
    """What to run. identity's context is that of `invoke_agent`; dispatch_span_id is its parent."""

    identity: Identity
    agent: TaskAgent
    gateway: EgressGateway | None
    event: Event
    dispatch_span_id: str
    timeout_s: float = 0.0
    unattended: bool = False  # nobody waits for an answer

    @property
    def metadata_mode(self) -> bool:
        """Say whether the answer is posted instead of written to stdout."""
        return self.agent.spec.delivery.mode == "Metadata"

    @property
    def logs_stdout(self) -> bool:
        """Say whether stdout is kept as log lines, since it is no answer to anybody."""
        return self.metadata_mode or self.unattended


class Invocation(SandboxRun):
    """A run and its answer; see the head of this file."""

    def __init__(
        self,
        order: Order,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        charge: Callable[[int], None],
    ) -> None:
        super().__init__(
            order.identity.invocation_id, order.identity, order.agent, order.gateway,
            parent_span_id=order.dispatch_span_id, commands=commands, egress=egress, telemetry=telemetry,
            allowance=LogAllowance(),
        )  # fmt: skip
        self.order = order
        self.charge = charge  # for every byte of an answer that is held in memory; raises Problem when that is short
        self.posted: asyncio.Future[PostedAnswer] = asyncio.get_running_loop().create_future()
        self.stdout: Pipe | None = None  # the answer in Stdin mode, logged as it is read; None before `started`
        self.on_end: Callable[[Outcome], None] = lambda _: None  # called right before `outcome` is set
        self._stdout_released = False

    # --- the answer's side ------------------------------------------------------------------------------------------

    def cancel(self, outcome: Outcome = CALLER_GONE) -> None:
        """Kill the run, which then ends with this outcome. Nothing happens when it has ended."""
        if self._cancelled is None and not self.outcome.done():
            self._cancelled = outcome
            self._stop_run()

    def release_stdout(self) -> None:
        """Say that nobody reads stdout any more; an agent that still writes gets EPIPE. Whoever awaits must say so."""
        self._stdout_released = True
        if self.stdout is not None and not self.order.logs_stdout:
            self.stdout.close()

    # --- the run ----------------------------------------------------------------------------------------------------

    def _start_request(self) -> StartRun:
        metadata, context = self.order.agent.metadata, self.identity.context
        return StartRun(
            run_id=self.run_id,
            agent=AgentKey(metadata.namespace, metadata.name),
            traceparent=context.traceparent,
            tracestate=context.tracestate,
            baggage=context.baggage,
            timeout_s=self.order.timeout_s,
        )

    def _metadata_service(self) -> MetadataService:
        return MetadataService(
            self.order.event, metadata_mode=self.order.metadata_mode, on_answer=self._on_answer, charge=self.charge
        )

    def _use_stdio(self, stack: contextlib.AsyncExitStack, stdin: int, stdout: int) -> None:
        events = Pipe(stdin)
        stack.callback(events.close)
        if self.order.logs_stdout:
            self.stdout = Pipe(stdout)
            stack.callback(self.stdout.close)
            self._log_until_closed(stack, "stdout", self.stdout)
        else:
            self.stdout = LoggedPipe(stdout, self._output_log("stdout"))
        if self._stdout_released:
            self.release_stdout()
        feed = spawn(self._feed(events), name=f"stdin {self.run_id}")
        stack.push_async_callback(cancel, feed)

    async def _feed(self, stdin: Pipe) -> None:
        """Write the event to stdin, then close it. In Metadata mode stdin is empty."""
        if not self.order.metadata_mode:
            if await stdin.write_all(to_structured(self.order.event)):
                await stdin.write_all(b"\n")
        stdin.close()

    def _on_answer(self, answer: PostedAnswer) -> None:
        if not self.posted.done():
            self.posted.set_result(answer)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_open(self) -> None:
        self._expect_exit_within(self._timeout_s + EXIT_GRACE_S, ExitReason.TIMEOUT)

    @property
    def _timeout_s(self) -> float:
        return self.order.timeout_s or self.order.agent.spec.timeout

    def _judge(self, exited: Exited) -> Outcome:
        lacks_answer = self.order.metadata_mode and not self.posted.done()
        return outcome_of(exited, self._cancelled, lacks_answer, self._timeout_s)

    def _on_finish(self, outcome: Outcome) -> None:
        self.on_end(outcome)

    def _on_lost(self) -> None:
        self.release_stdout()
