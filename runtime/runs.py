"""The runs of agents: from StartRun to Removed, one task each. The gateway asks; nothing it says is believed.

Theory of operation. A run owns one sandbox from acquire to remove, and removes it whatever happens. It talks to the
one life of the gateway that asked for it; when that life ends, its runs are killed and removed in silence, because
their callers' connections died with it. A stop may come twice: with a grace first, and then without.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Final

import msgspec

from clrk.core import wire
from clrk.core.errors import ClrkError
from clrk.core.messages import (
    AgentKey,
    AgentKind,
    Exited,
    ExitReason,
    Removed,
    Spawned,
    Started,
    StartFailed,
    StartFailure,
    StartRun,
)
from clrk.core.resources import Agent, TaskAgent
from clrk.ebpf.header import HeaderFields, build_headers
from clrk.runtime.config.declared import Resources
from clrk.runtime.control_channel import ChannelClosedError, ControlChannel
from clrk.runtime.environment import build_environment
from clrk.runtime.pool import PoolExhaustedError, SandboxPool
from clrk.runtime.sandbox import Sandbox, SandboxExit
from clrk.runtime.state_volume import StateFullError

_LOG: Final = logging.getLogger(__name__)
DAEMON_GRACE_S: Final = 5.0  # CONTRACT section 3: between SIGTERM and SIGKILL
_HOST_IS_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN})
_MAX_REFUSALS: Final = 256  # at one time; each is a task until the gateway has read it
_MAX_MESSAGE_CHARS: Final = 1000  # of StartFailed.message


@dataclass(slots=True, eq=False)
class _Run:
    request: StartRun
    channel: ControlChannel
    resources: Resources  # a reload does not change what a run began with
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    kill: asyncio.Event = field(default_factory=asyncio.Event)  # implies stop
    grace_s: float = 0.0  # between stop and kill

    @property
    def agent(self) -> Agent | None:
        key = (self.request.agent.namespace, self.request.agent.name)
        if self.request.kind is AgentKind.DAEMON:
            return self.resources.daemons.get(key)
        return self.resources.agents.get(key)

    def end(self, grace_s: float = 0.0) -> None:
        """Have it end: at once, or after SIGTERM and a grace, which a second stop can only cut short."""
        if not grace_s:
            self.kill.set()
        elif not self.stop.is_set():
            self.grace_s = grace_s
        self.stop.set()


class _StartError(ClrkError):
    def __init__(self, reason: StartFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Runs:
    """All runs that exist, by run id."""

    def __init__(self, pool: SandboxPool, resources: Resources, *, max_runs: int) -> None:
        self._pool = pool
        self._resources = resources  # what the next run begins with
        pool.set_agents(resources.agents.values())
        self._max_runs = max_runs
        self._runs: dict[str, _Run] = {}
        self._tasks: dict[asyncio.Task[None], _Run] = {}
        self.draining = False

    @property
    def resources(self) -> Resources:
        """What the next run begins with, and what the pool prepares sandboxes for."""
        return self._resources

    @resources.setter
    def resources(self, resources: Resources) -> None:
        self._resources = resources
        self._pool.set_agents(resources.agents.values())

    def start(self, request: StartRun, channel: ControlChannel) -> None:
        """Begin a run; its messages go to channel. A second one with the same id is refused and changes nothing."""
        run = _Run(request, channel, self.resources)
        try:
            self._admit(run)  # here and not in the task: a StopRun may be the next message
        except _StartError as exc:
            work = self._fail(run, exc.reason, str(exc))
        else:
            work = self._live(run)
        task = asyncio.get_running_loop().create_task(work, name=f"run {request.run_id}")
        self._tasks[task] = run
        task.add_done_callback(self._ended)

    def stop(self, run_id: str, channel: ControlChannel, grace_s: float = 0.0) -> None:
        """End a run, if this life of the gateway has it."""
        run = self._runs.get(run_id)
        if run is not None and run.channel is channel:
            run.end(grace_s)

    def stop_daemons(self) -> None:
        """Begin the stop sequence of every daemon: the host's shutdown does not depend on the gateway for it."""
        for run in self._runs.values():
            if run.request.kind is AgentKind.DAEMON:
                run.end(DAEMON_GRACE_S)

    async def catch_up(self) -> None:
        """Return when few refusals are on their way: they are no runs, so max_runs does not bound them."""
        while len(self._tasks) > self._max_runs + _MAX_REFUSALS:
            await asyncio.wait(list(self._tasks), return_when=asyncio.FIRST_COMPLETED)

    async def stop_all(self, channel: ControlChannel | None = None) -> None:
        """Kill every run, or every run of one life of the gateway, and wait until all of them are removed."""
        chosen = {task: run for task, run in self._tasks.items() if channel is None or run.channel is channel}
        for run in chosen.values():
            run.end()
        if chosen:
            await asyncio.wait(list(chosen))

    def _ended(self, task: asyncio.Task[None]) -> None:
        run = self._tasks.pop(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            extra = {"run_id": run.request.run_id}
            _LOG.error("run %s crashed", run.request.run_id, exc_info=exc, extra=extra)

    # --- one run ----------------------------------------------------------------------------------------------------

    def _admit(self, run: _Run) -> None:
        """Refuse what can be refused without touching the host; else the id is taken."""
        key = run.request.agent
        if self.draining:
            raise _StartError(StartFailure.DRAINING, "the runtime is shutting down")
        if run.agent is None:
            raise _StartError(StartFailure.UNKNOWN_AGENT, f"no {run.request.kind} {key.namespace}/{key.name}")
        if run.request.run_id in self._runs:
            raise _StartError(StartFailure.SANDBOX_FAILED, "a run with this id exists")
        if not _is_consistent(run.request):
            raise _StartError(StartFailure.SANDBOX_FAILED, "only an invocation has a traceparent and a timeout")
        if run.request.kind is AgentKind.DAEMON and self._has_daemon(key):
            raise _StartError(StartFailure.SANDBOX_FAILED, f"{key.namespace}/{key.name} is running: a daemon runs once")
        if len(self._runs) >= self._max_runs:
            raise _StartError(StartFailure.POOL_EXHAUSTED, f"{self._max_runs} sandboxes run, limits.maxSandboxes")
        self._runs[run.request.run_id] = run

    def _has_daemon(self, key: AgentKey) -> bool:
        return any(run.request.kind is AgentKind.DAEMON and run.request.agent == key for run in self._runs.values())

    async def _live(self, run: _Run) -> None:
        try:
            await self._live_admitted(run)
        except Exception:
            # The gateway waits for an end of this run, and with it the caller.
            await self._fail(run, StartFailure.SANDBOX_FAILED, "an error in the runtime; its log has more")
            raise
        finally:
            if self._runs.get(run.request.run_id) is run:
                del self._runs[run.request.run_id]

    async def _live_admitted(self, run: _Run) -> None:
        acquire_start_ns = time.time_ns()
        try:
            sandbox = await self._pool.acquire(run.agent)
        except PoolExhaustedError as exc:
            await self._fail(run, StartFailure.POOL_EXHAUSTED, str(exc))
            return
        except (ClrkError, OSError) as exc:
            await self._fail(run, start_failure(exc), str(exc))
            return
        failure: Exception | None = None
        teardown_start_ns = 0
        try:
            ended = await self._live_in_sandbox(run, sandbox, acquire_start_ns)
            teardown_start_ns = time.time_ns()
            await self._tell(run, ended)
        except (ClrkError, OSError, ValueError) as exc:
            failure = exc
        finally:
            await self._remove(run, sandbox)
            self._runs.pop(run.request.run_id, None)  # before the gateway hears of it: its next word may be a new run
        if failure is not None:
            await self._fail(run, start_failure(failure), str(failure))
        else:
            await self._tell(run, Removed(run.request.run_id, teardown_start_ns, time.time_ns()))

    async def _live_in_sandbox(self, run: _Run, sandbox: Sandbox, acquire_start_ns: int) -> Exited:
        """Start the agent and wait for its end, its deadline or a stop, whichever comes first."""
        agent = run.agent
        assert agent is not None  # noqa: S101 - admitted
        if run.stop.is_set():
            raise _StartError(StartFailure.SANDBOX_FAILED, "stopped before it began")
        await self._hand_over(run, agent, sandbox, acquire_start_ns)
        environment = build_environment(agent, run.request, run.resources.secrets)
        spawned = await sandbox.spawn(agent=agent, environment=environment)
        times_ns = (spawned.spawn_start_ns, spawned.spawn_end_ns)
        await self._tell(run, Spawned(run.request.run_id, spawned.pid, *times_ns))
        timeout_s = None
        if isinstance(agent, TaskAgent):
            timeout_s = min(agent.spec.timeout, run.request.timeout_s or agent.spec.timeout)
        return await _await_end(run, sandbox, timeout_s)

    async def _hand_over(self, run: _Run, agent: Agent, sandbox: Sandbox, acquire_start_ns: int) -> None:
        """Register the sandbox with the kernel, and give its sockets and pipes to the gateway."""
        request = run.request
        is_task = request.kind is AgentKind.TASK
        header_v4, header_v6 = build_headers(
            HeaderFields(
                kind=wire.KIND_TASK_AGENT if is_task else wire.KIND_DAEMON_AGENT,
                namespace=agent.metadata.namespace,
                name=agent.metadata.name,
                uid=agent.uid,
                revision=agent.revision,
                invocation_id=request.run_id if is_task else None,
                sandbox_id=sandbox.sandbox_id,
                netns_name=sandbox.netns_name,
                traceparent=request.traceparent if is_task else None,
            )
        )
        sandbox.register_stamp(header_v4, header_v6)
        started = Started(
            run_id=request.run_id,
            sandbox_id=sandbox.sandbox_id,
            netns_name=sandbox.netns_name,
            netns_cookie=sandbox.netns_cookie,
            uid=sandbox.uid,
            header_v4=header_v4,
            header_v6=header_v6,
            warm=sandbox.warm,
            acquire_start_ns=acquire_start_ns,
            acquire_end_ns=time.time_ns(),
            ca_id=sandbox.ca_id,
        )
        stdio = sandbox.open_stdio()
        try:
            await run.channel.send(started, (*sandbox.listener_fds, *stdio))
        finally:
            for fd in stdio:
                os.close(fd)

    async def _remove(self, run: _Run, sandbox: Sandbox) -> None:
        try:
            await sandbox.remove()
        except (ClrkError, OSError, ExceptionGroup) as exc:  # leftovers are for the next start's reconcile
            extra = {"run_id": run.request.run_id, "sandbox_id": sandbox.sandbox_id}
            _LOG.error("sandbox %s not fully removed: %s", sandbox.sandbox_id, exc, extra=extra)

    async def _fail(self, run: _Run, reason: StartFailure, message: str) -> None:
        extra = {"run_id": run.request.run_id}
        _LOG.warning("run %s did not start: %s: %s", run.request.run_id, reason, message, extra=extra)
        await self._tell(run, StartFailed(run.request.run_id, reason, message[:_MAX_MESSAGE_CHARS]))

    async def _tell(self, run: _Run, message: msgspec.Struct) -> None:
        """Send, and treat a gateway that is gone as a stop: there is nobody left to run for."""
        try:
            await run.channel.send(message)
        except ChannelClosedError:
            run.end()


def _is_consistent(request: StartRun) -> bool:
    """Say whether the request is one of its kind: a daemon has no invocation, and so nothing that comes from one."""
    if request.kind is AgentKind.TASK:
        return bool(request.traceparent)
    return not (request.traceparent or request.tracestate or request.baggage or request.timeout_s)


def start_failure(exc: BaseException | None) -> StartFailure:
    """Tell a full state (507) and a host that is full, which passes (503), from a sandbox that can not be (502)."""
    if isinstance(exc, StateFullError):
        return StartFailure.STATE_FULL
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno in _HOST_IS_FULL:
            return StartFailure.POOL_EXHAUSTED
        exc = exc.__cause__
    return StartFailure.SANDBOX_FAILED


async def _await_end(run: _Run, sandbox: Sandbox, timeout_s: float | None) -> Exited:
    loop = asyncio.get_running_loop()
    exit_task = loop.create_task(sandbox.wait(), name="sandbox exit")
    stop_task = loop.create_task(run.stop.wait(), name="stop")
    kill_task = loop.create_task(run.kill.wait(), name="kill")
    ended_by: ExitReason | None = None
    try:
        await asyncio.wait((exit_task, stop_task), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not exit_task.done():
            ended_by = ExitReason.STOPPED if stop_task.done() else ExitReason.TIMEOUT
            if stop_task.done() and not run.kill.is_set():
                await sandbox.terminate()
                grace = (exit_task, kill_task)
                await asyncio.wait(grace, timeout=run.grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not exit_task.done():
            sandbox.kill()
        return _describe_exit(run.request.run_id, await exit_task, ended_by)
    finally:
        for task in (exit_task, stop_task, kill_task):
            task.cancel()


def _describe_exit(run_id: str, end: SandboxExit, ended_by: ExitReason | None) -> Exited:
    reason = ended_by or (ExitReason.OOM if end.oom else ExitReason.EXITED)
    return Exited(
        run_id=run_id,
        reason=reason,
        exit_code=end.exit_code,
        cpu_s=end.cpu_s,
        max_rss_bytes=end.max_rss_bytes,
        exit_ns=end.exit_ns,
    )
