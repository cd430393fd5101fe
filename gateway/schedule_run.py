"""Invocations that nobody asked for: what a schedule fires (CONTRACT sections 3 and 13).

There is no caller: no answer, no status. What the agent writes is kept as log lines; in Metadata mode what it posts is
taken and dropped. The span and the record are those of any invocation.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Final

import msgspec

from clrk.core.ids import new_invocation_id
from clrk.core.resources import TaskAgent
from clrk.gateway._aio import spawn
from clrk.gateway.agents import AgentTable
from clrk.gateway.dispatch import Dispatch, Origin, Target
from clrk.gateway.envelope import Event, Received, event_attributes
from clrk.gateway.invocation import Invocation, Order
from clrk.gateway.invocations import Invocations, Slot
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.problem import Problem
from clrk.gateway.telemetry.spans import Recorder

_LOG: Final = logging.getLogger(__name__)
CRON_TRIGGER: Final = "cron"


class ScheduledRuns:
    """Starts runs that nobody waits for."""

    def __init__(self, agents: AgentTable, invocations: Invocations, recorder: Recorder) -> None:
        self._agents = agents
        self._invocations = invocations
        self._recorder = recorder
        self._tasks: set[asyncio.Task[None]] = set()

    def fire(self, agent: TaskAgent, slot_ns: int) -> None:
        """Invoke the agent for one slot of its schedule. One that is refused leaves a record that says why."""
        dispatch = Dispatch(Origin(), Target(agent, trigger=CRON_TRIGGER), new_invocation_id())
        dispatch.begin(self._recorder)  # before the record, as for a request
        try:
            slot = self._invocations.admit(dispatch.pending(), agent)
        except Problem as problem:
            dispatch.outcome = Outcome(Phase.REJECTED, message=problem.detail, has_run=False)
            dispatch.record(self._recorder)
            self._invocations.reject(dispatch.pending(), problem.detail)
            _LOG.warning(
                "scheduled run of %s/%s refused: %s", *agent.key, problem.detail,
                extra={"invocation_id": dispatch.invocation_id},
            )  # fmt: skip
            return
        try:
            invocation = self._start(dispatch, slot, slot_ns)
        except BaseException:
            slot.release()
            slot.answered()
            self._invocations.finish(dispatch.invocation_id, Outcome(Phase.FAILED, message="the gateway failed"))
            raise
        task = spawn(self._follow(dispatch, invocation, slot), name=f"scheduled {dispatch.invocation_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Wait until every run that was fired has ended and is recorded."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, dispatch: Dispatch, slot: Slot, slot_ns: int) -> Invocation:
        agent = dispatch.target.agent
        event = _event(dispatch, slot_ns)
        slot.charge(len(event.body))
        order = Order(
            identity=dispatch.identity,
            agent=agent,
            gateway=self._agents.gateway_of(agent),
            event=event,
            dispatch_span_id=dispatch.span_id,
            unattended=True,
        )
        return self._invocations.start(order, slot)

    async def _follow(self, dispatch: Dispatch, invocation: Invocation, slot: Slot) -> None:
        try:
            dispatch.outcome = await asyncio.shield(invocation.outcome)
        finally:
            dispatch.identity = invocation.identity  # by now it names the sandbox
            slot.answered()
            dispatch.record(self._recorder)


def _event(dispatch: Dispatch, slot_ns: int) -> Event:
    """Return the event of a slot: its time is the slot's, its data scheduleInput."""
    data = dispatch.target.agent.spec.schedule_input
    body = msgspec.json.encode(data) if data is not None else b""
    context = dispatch.event_context(datetime.fromtimestamp(slot_ns // 10**9, UTC))
    return Event(event_attributes(Received({}, "application/json" if body else "", body), context), body)
