"""The DaemonAgents of this gateway: each is kept running as its restart policy says (CONTRACT section 3).

Theory of operation. One task for each name (`_Keeper`) follows what is wanted there: it starts a run, waits for its
end, waits the back-off, and starts the next. Whatever changes what is wanted (another revision, removal, drain)
sets `changed`, and the task looks again: it stops the run of now, SIGTERM first, and goes on with the next. So two runs
of one daemon never overlap. Other egress rules are given to the run of now, which goes on. All waiting is in monotonic
time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.gateway_config import GatewayConfig
from clrk.core.resources import DaemonAgent, DaemonAgentSpec
from clrk.core.route_resources import AIProviderRoute, MCPRoute
from clrk.gateway._aio import spawn
from clrk.gateway.agent_status import DaemonStatus
from clrk.gateway.agents import AgentTable
from clrk.gateway.daemon_run import DaemonRun, RunEnd
from clrk.gateway.invocations import RunMessage
from clrk.gateway.sandbox_run import Commands, Egress, StartRefused, TelemetrySink, cancel

_LOG: Final = logging.getLogger(__name__)
FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 60.0
STEADY_S: Final = 10.0  # a run of this length ends a row of failures

Pause = Callable[[asyncio.Event, float], Awaitable[None]]


async def pause(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, at most so long; loop time is monotonic."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run under a name. Equal values mean that a running daemon is left alone."""

    agent: DaemonAgent
    gateway: EgressGateway | None
    terms: str  # egress rules: where they differ, a run goes on by the new ones


class Daemons:
    """Keeps the daemons of the configuration running. clock and pause are monotonic; tests replace them."""

    def __init__(
        self,
        commands: Commands,
        egress: Egress,
        telemetry: TelemetrySink,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Pause = pause,
    ) -> None:
        self._commands = commands
        self._egress = egress
        self._telemetry = telemetry
        self._clock = clock
        self._pause = pause
        self._keepers: dict[tuple[str, str], _Keeper] = {}
        self._runs: dict[str, DaemonRun] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # --- what is wanted ---------------------------------------------------------------------------------------------

    def reconfigure(self, config: GatewayConfig) -> None:
        """Start what is new, stop what is gone, replace what has changed, and leave the rest alone."""
        table = AgentTable(config)
        wanted = {agent.key: wanted_of(agent, table.gateway_of(agent), config) for agent in table.daemons()}
        for key, keeper in self._keepers.items():
            keeper.want(wanted.get(key) if not self._draining else None)
        for key, value in wanted.items():
            if key not in self._keepers and not self._draining:
                self._begin(key, value)

    def _begin(self, key: tuple[str, str], wanted: Wanted) -> None:
        def gone() -> None:
            del self._keepers[key]
            if not self._keepers:
                self._idle.set()

        keeper = self._keepers[key] = _Keeper(wanted, self._start, self._pause, gone)
        self._idle.clear()
        _ = spawn(keeper.keep(), name=f"daemon {key[0]}/{key[1]}")

    def drain(self) -> None:
        """Stop every daemon, SIGTERM first, and start none any more."""
        self._draining = True
        for keeper in self._keepers.values():
            keeper.want(None)

    async def idle(self) -> None:
        """Wait until every daemon that is not wanted any more is gone."""
        await self._idle.wait()

    def abandon_all(self) -> None:
        """Take all runs for dead, since the runtime is gone."""
        self.drain()
        for run in list(self._runs.values()):
            run.abandon()

    # --- runs -------------------------------------------------------------------------------------------------------

    def _start(self, wanted: Wanted) -> DaemonRun:
        run = DaemonRun(
            wanted.agent, wanted.gateway,
            commands=self._commands, egress=self._egress, telemetry=self._telemetry, clock=self._clock,
        )  # fmt: skip
        self._runs[run.run_id] = run
        _ = spawn(self._live(run), name=f"daemon run {run.run_id}")
        return run

    async def _live(self, run: DaemonRun) -> None:
        try:
            await run.live()
        finally:
            del self._runs[run.run_id]
            run.gone.set()

    def on_message(self, message: RunMessage, fds: list[int]) -> bool:
        """Take a message of the runtime if it is about a daemon; False: it is not, and the fds are the caller's.

        Raises: ProtocolError for a message that the run can not take.
        """
        run = self._runs.get(message.run_id)
        if run is None:
            return False
        run.on_message(message, fds)
        return True

    # --- for people -------------------------------------------------------------------------------------------------

    def status(self, agent: DaemonAgent) -> DaemonStatus:
        """Return how a daemon stands."""
        keeper = self._keepers.get(agent.key)
        return keeper.status if keeper is not None else DaemonStatus("Stopped")

    def restarts(self) -> dict[str, int]:
        """Return how often each daemon was started again since this gateway began, by namespace/name."""
        return {"/".join(key): keeper.status.restarts for key, keeper in sorted(self._keepers.items())}

    def running(self) -> int:
        """Return how many daemons run now."""
        return sum(keeper.status.state == "Running" for keeper in self._keepers.values())


def wanted_of(agent: DaemonAgent, gateway: EgressGateway | None, config: GatewayConfig) -> Wanted:
    """Say what is to run, and by which rules: a daemon may live for months, and its rules change meanwhile."""
    if gateway is None:
        return Wanted(agent, None, "")
    routes: list[EgressL4Route | AIProviderRoute | MCPRoute] = [*config.routes, *config.ai_routes, *config.mcp_routes]
    policies = [one for one in config.credential_policies if one.metadata.namespace == gateway.metadata.namespace]
    capture = gateway.spec.otlp.capture_body if gateway.spec.otlp is not None else None
    ca_pem = config.upstream_ca_pem.get(f"{gateway.metadata.namespace}/{gateway.metadata.name}", "")
    parts = [
        gateway.spec.model_dump_json(exclude={"otlp"}),
        capture.model_dump_json() if capture is not None else "",
        *(
            f"{route.kind}/{route.metadata.name} {route.spec.model_dump_json()}"
            for route in routes
            if _applies(route, gateway)
        ),
        *(policy.spec.model_dump_json() for policy in policies),
        ca_pem,
    ]
    return Wanted(agent, gateway, "\n".join(parts))


def _applies(route: EgressL4Route | AIProviderRoute | MCPRoute, gateway: EgressGateway) -> bool:
    return (route.metadata.namespace, route.spec.gateway_ref.name) == (
        gateway.metadata.namespace,
        gateway.metadata.name,
    )


def _same(one: Wanted | None, other: Wanted | None) -> bool:
    """Say whether a run of one may stay for the other. A gateway that comes or goes is in the run's identity."""
    if one is None or other is None:
        return one is other
    return (one.agent.revision, one.gateway is None) == (other.agent.revision, other.gateway is None)


class _Keeper:
    """Follows what is wanted under one name."""

    def __init__(
        self, wanted: Wanted, start: Callable[[Wanted], DaemonRun], pause: Pause, on_gone: Callable[[], None]
    ) -> None:
        self.status = DaemonStatus("Starting", since_ns=time.time_ns())
        self._name = "/".join(wanted.agent.key)
        self._wanted: Wanted | None = wanted
        self._start = start
        self._pause = pause
        self._on_gone = on_gone
        self._changed = asyncio.Event()
        self._run: DaemonRun | None = None

    def want(self, wanted: Wanted | None) -> None:
        """Run something else from now on, or nothing."""
        before, self._wanted = self._wanted, wanted
        if not _same(before, wanted):
            self._changed.set()
        elif before is not None and wanted is not None and before.terms != wanted.terms and self._run is not None:
            self._run.use_gateway(wanted.gateway)
            _LOG.info("daemon %s: other egress rules", self._name, extra={"agent": self._name})

    async def keep(self) -> None:
        """Keep running what is wanted; return when nothing is."""
        try:
            while (wanted := self._wanted) is not None:
                self._changed.clear()
                await self._keep_one(wanted)
            self._tell(logging.INFO, "Stopped", "not wanted any more")
        finally:
            self._on_gone()

    async def _keep_one(self, wanted: Wanted) -> None:
        """Run one revision again and again, until another wish ends that."""
        spec = wanted.agent.spec
        delay_s, failures = FIRST_DELAY_S, 0
        self.status = DaemonStatus("Starting", last_exit=self.status.last_exit)
        self._tell(logging.INFO, "Starting", f"revision {wanted.agent.revision}")
        while True:
            end = await self._run_once(self._wanted or wanted)  # the rules may be others by now
            if self._changed.is_set():
                return
            if (reason := _rests(spec, end, failures)) is not None:
                self._tell(logging.WARNING, "Stopped", reason)
                await self._changed.wait()
                return
            if not end.lifetime_over:
                failures += 1
                delay_s = FIRST_DELAY_S if end.lived_s >= STEADY_S else delay_s
                await self._back_off(delay_s)
                delay_s = min(delay_s * 2, MAX_DELAY_S)
                if self._changed.is_set():
                    return
            self._tell(logging.INFO, "Starting", "again", restarts=self.status.restarts + 1)

    async def _back_off(self, delay_s: float) -> None:
        why = f"{self.status.last_exit}; next start in {delay_s:.0f} s"
        self._tell(logging.WARNING, "BackOff", why, next_start_ns=time.time_ns() + int(delay_s * 1e9))
        await self._pause(self._changed, delay_s)

    async def _run_once(self, wanted: Wanted) -> RunEnd:
        run = self._run = self._start(wanted)
        watches = (self._tell_running(run), self._stop_in_time(run, wanted.agent.spec.max_lifetime_seconds))
        tasks = [spawn(watch, name=f"daemon {self._name} watch") for watch in watches]
        try:
            await run.gone.wait()
        finally:
            self._run = None
            for task in tasks:
                await cancel(task)
        self.status = msgspec.structs.replace(self.status, last_exit=run.end.text, sandbox_id="")
        return run.end

    async def _tell_running(self, run: DaemonRun) -> None:
        try:
            await asyncio.shield(run.started)
        except StartRefused:
            return
        if self.status.state == "Starting":
            self._tell(logging.INFO, "Running", f"in sandbox {run.identity.sandbox_id}")
            self.status = msgspec.structs.replace(self.status, sandbox_id=run.identity.sandbox_id)

    async def _stop_in_time(self, run: DaemonRun, lifetime_s: int) -> None:
        """Stop the run when something else is wanted, or when its lifetime is over."""
        if lifetime_s:
            await self._pause(self._changed, lifetime_s)
        else:
            await self._changed.wait()
        changed = self._changed.is_set()
        why = "it is not wanted as it is" if changed else f"maxLifetimeSeconds is {lifetime_s}"
        self._tell(logging.INFO, "Stopping", why, sandbox_id=self.status.sandbox_id)
        run.stop(lifetime_over=not changed)

    def _tell(
        self,
        level: int,
        state: str,
        why: str,
        *,
        restarts: int | None = None,
        next_start_ns: int = 0,
        sandbox_id: str = "",
    ) -> None:
        """Note another state, for `clrk` and in the log."""
        self.status = DaemonStatus(
            state,
            restarts=self.status.restarts if restarts is None else restarts,
            since_ns=time.time_ns(),
            next_start_ns=next_start_ns,
            last_exit=self.status.last_exit,
            sandbox_id=sandbox_id,
        )
        _LOG.log(level, "daemon %s: %s: %s", self._name, state, why, extra={"agent": self._name})


def _rests(spec: DaemonAgentSpec, end: RunEnd, failures: int) -> str | None:
    """Say why there is no next run, or None. A lifetime that is over is no failure and does not count."""
    if spec.restart_policy == "Never" or (spec.restart_policy == "OnFailure" and end.outcome.succeeded):
        return f"{end.text}; restartPolicy is {spec.restart_policy}"
    if not end.lifetime_over and spec.max_restarts and failures >= spec.max_restarts:
        return f"{end.text}; maxRestarts is {spec.max_restarts}"
    return None
