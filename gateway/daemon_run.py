"""One run of a DaemonAgent: no event, no answer, and no end but its own or the one that it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from clrk.core.egress_resources import EgressGateway
from clrk.core.ids import InvocationId, new_span_id, new_trace_id
from clrk.core.messages import AgentKey, AgentKind, Exited, ExitReason, StartRun
from clrk.core.resources import DaemonAgent
from clrk.gateway.agents import identity_of
from clrk.gateway.metadata import MetadataService
from clrk.gateway.outcome import Outcome, Phase, outcome_of
from clrk.gateway.output_log import DAEMON_WINDOW_S, LogAllowance
from clrk.gateway.pipes import Pipe
from clrk.gateway.sandbox_run import EXIT_GRACE_S, Commands, Egress, SandboxRun, TelemetrySink
from clrk.gateway.telemetry.spans import TraceContext

STOP_GRACE_S: Final = 5.0  # CONTRACT section 3: between SIGTERM and SIGKILL
_KILLED: Final = 137


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended. lifetime_over: it was asked to, since its time was up. lived_s: monotonic, 0 if it never ran."""

    outcome: Outcome
    lived_s: float
    lifetime_over: bool

    @property
    def text(self) -> str:
        """What happened, for people."""
        outcome = self.outcome
        if not outcome.has_run:
            return f"it did not start: {outcome.message}"
        return outcome.message or f"it exited with code {outcome.exit_code}"


class DaemonRun(SandboxRun):
    """See the head of this file. `gone` is set when nothing of the run is left, and `end` is there from then on."""

    def __init__(
        self,
        agent: DaemonAgent,
        gateway: EgressGateway | None,
        *,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        identity = identity_of(agent, InvocationId(""), TraceContext(new_trace_id(), new_span_id()))
        super().__init__(
            str(uuid.uuid4()), identity, agent, gateway,
            parent_span_id="", commands=commands, egress=egress, telemetry=telemetry,
            allowance=LogAllowance(DAEMON_WINDOW_S),
        )  # fmt: skip
        self.gone = asyncio.Event()
        self._clock = clock
        self._opened_s: float | None = None
        self._lived_s = 0.0
        self._is_stopping = False
        self._lifetime_over = False

    def stop(self, *, lifetime_over: bool) -> None:
        """Ask the agent to end: SIGTERM, and SIGKILL to everything after STOP_GRACE_S. A second time does nothing."""
        if not self._is_stopping and not self.outcome.done():
            self._is_stopping, self._lifetime_over = True, lifetime_over
            self._stop_run(STOP_GRACE_S)
            self._expect_exit_within(STOP_GRACE_S + EXIT_GRACE_S, ExitReason.STOPPED)

    def use_gateway(self, gateway: EgressGateway | None) -> None:
        """Go on by other egress rules, those of the configuration of now."""
        self._gateway = gateway
        if self._run_egress is not None and not self.outcome.done():
            self._run_egress.reconfigure(gateway)

    @property
    def end(self) -> RunEnd:
        """How it ended."""
        return RunEnd(self.outcome.result(), self._lived_s, self._lifetime_over)

    # --- the run ----------------------------------------------------------------------------------------------------

    def _start_request(self) -> StartRun:
        metadata = self._agent.metadata
        return StartRun(self.run_id, AgentKey(metadata.namespace, metadata.name), kind=AgentKind.DAEMON)

    def _metadata_service(self) -> MetadataService:
        return MetadataService(None, metadata_mode=False, on_answer=lambda _: None, charge=lambda _: None)

    def _use_stdio(self, stack: contextlib.AsyncExitStack, stdin: int, stdout: int) -> None:
        os.close(stdin)  # nobody ever says anything there
        pipe = Pipe(stdout)
        stack.callback(pipe.close)
        self._log_until_closed(stack, "stdout", pipe)

    def _on_open(self) -> None:
        self._opened_s = self._clock()
        if self._is_stopping:  # the runtime may not have known the run when it was told
            self._stop_run(STOP_GRACE_S)

    def _judge(self, exited: Exited) -> Outcome:
        if not self._is_stopping or exited.reason is ExitReason.OOM:
            return outcome_of(exited, None, False)
        code, reason = exited.exit_code, exited.reason.value
        if code == _KILLED:
            message = f"it did not end within {STOP_GRACE_S:.0f} s of SIGTERM, and was killed"
            return Outcome(Phase.FAILED, code, message, exit_reason=reason)
        return Outcome(Phase.SUCCEEDED, code, f"it ended as asked, with code {code}", exit_reason=reason)

    def _on_finish(self, outcome: Outcome) -> None:
        if self._opened_s is not None:
            self._lived_s = self._clock() - self._opened_s

    def _on_lost(self) -> None:
        """Its pipes are only logged, and that has a deadline."""
