"""All invocations of this gateway: who may start, who is in flight, how each one ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Final

import msgspec

from clrk.core.ids import InvocationId, is_invocation_id, new_invocation_id
from clrk.core.messages import Exited, Removed, Spawned, Started, StartFailed, StopRun
from clrk.core.resources import TaskAgent
from clrk.gateway._aio import spawn
from clrk.gateway.control_client import close_fds
from clrk.gateway.invocation import Invocation, Order
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.problem import Problem
from clrk.gateway.sandbox_run import Commands, Egress, TelemetrySink
from clrk.gateway.telemetry.records import InvocationRecord

_LOG: Final = logging.getLogger(__name__)
_MAX_ENDED: Final = 1000  # records of ended invocations that are at hand before the store has them
_MAX_HELD_BYTES: Final = 512 * 1024 * 1024  # of bodies and collected answers, all invocations together
_RETRY_AFTER: Final = {"Retry-After": "1"}
RunMessage = Started | Spawned | StartFailed | Exited | Removed


class Invocations:
    """Admits, starts and records invocations. seen says whether an id is in the retention window of the store.

    Every change of a record goes to the telemetry sink; here are those in flight, and the last that have ended.
    """

    def __init__(
        self,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        *,
        seen: Callable[[str], bool],
        max_running: int,
    ) -> None:
        self.max_running = max_running
        self._commands = commands
        self._egress = egress
        self._telemetry = telemetry
        self._seen = seen
        self._draining = False
        self._held_bytes = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._live: dict[str, Invocation] = {}
        self._running: Counter[tuple[str, str]] = Counter()
        self._open: dict[str, InvocationRecord] = {}
        self._ended: OrderedDict[str, InvocationRecord] = OrderedDict()

    # --- admission --------------------------------------------------------------------------------------------------

    def claim_id(self, wanted: str | None) -> InvocationId:
        """Return the caller's id if it may be used, or a new one if none is wanted.

        Raises: Problem 400 or 409 (CONTRACT section 4).
        """
        if wanted is None:
            return new_invocation_id()
        if not is_invocation_id(wanted):
            raise Problem(400, "X-Clrk-Invocation-ID: not a canonical lower-case UUID")
        if self.record(wanted) is not None or self._seen(wanted):
            raise Problem(409, f"X-Clrk-Invocation-ID: {wanted} is the id of another invocation")
        return InvocationId(wanted)

    def admit(self, record: InvocationRecord, agent: TaskAgent) -> Slot:
        """Take a slot for one invocation, whose record is Pending. The slot must be released, or given to `start`.

        Raises: Problem 429 or 503; nothing is recorded then.
        """
        key = agent.key
        limit = agent.spec.max_concurrent
        if self._draining:
            raise Problem(503, "this host is draining", {**_RETRY_AFTER, "Connection": "close"})
        if limit and self._running[key] >= limit:
            raise Problem(429, f"the agent runs {limit} invocations, its maxConcurrent", _RETRY_AFTER)
        if self._running.total() >= self.max_running:
            raise Problem(503, f"the host runs {self.max_running} sandboxes, its maxSandboxes", _RETRY_AFTER)
        self._running[key] += 1
        self._idle.clear()
        self._keep(record)
        return Slot(self._hold, self._give_back, lambda: self._release(key))

    def reject(self, record: InvocationRecord, message: str, status: int = 0) -> None:
        """Record an invocation that was not admitted. status is what its caller was told, 0: there is none."""
        self._keep(_change(record, phase=Phase.REJECTED, ended_ns=time.time_ns(), message=message, status=status))

    def _hold(self, size: int) -> None:
        if self._held_bytes + size > _MAX_HELD_BYTES:
            raise Problem(503, "this host is short of memory", {**_RETRY_AFTER, "Connection": "close"})
        self._held_bytes += size

    def _give_back(self, size: int) -> None:
        self._held_bytes -= size

    def _release(self, key: tuple[str, str]) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._check_idle()

    # --- running ----------------------------------------------------------------------------------------------------

    def start(self, order: Order, slot: Slot) -> Invocation:
        """Begin a run; the slot is released when the run has ended."""
        invocation = Invocation(order, self._commands, self._egress, self._telemetry, slot.charge)
        invocation_id = order.identity.invocation_id
        self._live[invocation_id] = invocation

        if order.identity.caller_fields:
            self._update(invocation_id, identity=dict(order.identity.caller_fields))

        def ended(outcome: Outcome) -> None:
            self._note_start(invocation)
            slot.release()
            self.finish(invocation_id, outcome)

        invocation.on_end = ended
        invocation.started.add_done_callback(lambda _: self._note_start(invocation))
        _ = spawn(self._live_to_the_end(invocation), name=f"invocation {invocation_id}")
        return invocation

    def _note_start(self, invocation: Invocation) -> None:
        """Record Running. An end that comes in the same turn of the loop comes first: the callback is too late then."""
        invocation_id, started = invocation.identity.invocation_id, invocation.started
        record = self._open.get(invocation_id)
        if record is None or record.phase is not Phase.PENDING or not started.done() or started.exception() is not None:
            return
        self._update(invocation_id, phase=Phase.RUNNING, started_ns=time.time_ns())

    async def _live_to_the_end(self, invocation: Invocation) -> None:
        try:
            await invocation.live()
        finally:
            del self._live[invocation.identity.invocation_id]
            self._check_idle()

    def on_message(self, message: RunMessage, fds: list[int]) -> None:
        """Give a message to its invocation. A run that nobody knows is stopped: it must not live unattended.

        Raises: ProtocolError for a message that its invocation can not take.
        """
        invocation = self._live.get(message.run_id)
        if invocation is not None:
            invocation.on_message(message, fds)
            return
        close_fds(fds)
        if isinstance(message, Started):
            _LOG.warning("a run started that nobody waits for", extra={"invocation_id": message.run_id})
            self._commands.send(StopRun(message.run_id))

    # --- draining ---------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Say whether new invocations are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse new invocations from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Wait until no invocation is in flight and every sandbox is gone."""
        await self._idle.wait()

    def abandon_all(self) -> None:
        """End everything in flight as Failed: no word of it will come any more."""
        for invocation in list(self._live.values()):
            invocation.abandon()

    def _check_idle(self) -> None:
        if not self._live and not self._running:
            self._idle.set()

    # --- records ----------------------------------------------------------------------------------------------------

    def finish(self, invocation_id: str, outcome: Outcome) -> None:
        """Record how an admitted invocation ended; the first word counts."""
        if invocation_id in self._open:
            self._update(
                invocation_id,
                phase=outcome.phase,
                ended_ns=time.time_ns(),
                exit_code=outcome.exit_code,
                exit_reason=outcome.exit_reason,
                message=outcome.message,
            )

    def told(self, invocation_id: str, status: int) -> None:
        """Record the HTTP status that the caller got."""
        self._update(invocation_id, status=status)

    def record(self, invocation_id: str) -> InvocationRecord | None:
        """Return the record, or None when it is too long ago, in which case the store has it, or never was."""
        return self._open.get(invocation_id) or self._ended.get(invocation_id)

    def running(self, namespace: str, agent: str) -> int:
        """Return how many invocations of an agent are in flight."""
        return self._running[namespace, agent]

    def _update(self, invocation_id: str, **changes: Any) -> None:
        if (record := self.record(invocation_id)) is not None:
            self._keep(_change(record, **changes))

    def _keep(self, record: InvocationRecord) -> None:
        if record.phase.ended:
            self._open.pop(record.invocation_id, None)
            self._ended[record.invocation_id] = record
            while len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)
        else:
            self._open[record.invocation_id] = record
        self._telemetry.record_invocation(record)


def _change(record: InvocationRecord, **changes: Any) -> InvocationRecord:
    return msgspec.structs.replace(record, **changes)


class Slot:
    """The right to run one invocation and to hold its bytes, counted against maxConcurrent and the host's limits.

    The run ends with `release`; its bytes are held until the answer's end (`answered`) as well, whichever is later.
    """

    def __init__(
        self, hold: Callable[[int], None], give_back: Callable[[int], None], on_release: Callable[[], None]
    ) -> None:
        self._hold = hold
        self._give_back = give_back
        self._on_release = on_release
        self._held_bytes = 0
        self._released = False
        self._answered = False

    def charge(self, size: int) -> None:
        """Hold size bytes more.

        Raises: Problem 503 when the host is short of memory.
        """
        if not (self._released and self._answered):
            self._hold(size)
            self._held_bytes += size

    def release(self) -> None:
        """The run is over; a second time does nothing."""
        if not self._released:
            self._released = True
            self._on_release()
            self._settle()

    def answered(self) -> None:
        """The caller has its answer, or will never have it; a second time does nothing."""
        if not self._answered:
            self._answered = True
            self._settle()

    def _settle(self) -> None:
        if self._released and self._answered:
            self._give_back(self._held_bytes)
            self._held_bytes = 0
