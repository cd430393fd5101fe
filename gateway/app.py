"""The gateway put together: configuration in, listeners up, runs served, drained, closed.

Knows nothing of privileges and processes (main.py does), so tests run it inside their own process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web
from pydantic import ValidationError

from clrk.core.errors import ProtocolError
from clrk.core.gateway_config import GatewayConfig
from clrk.core.messages import (
    PROTOCOL_VERSION,
    Configure,
    ConfigureFd,
    Counters,
    Drain,
    Drained,
    Exited,
    Ready,
    ReloadRefused,
    Removed,
    RuntimeMessage,
    Spawned,
    Started,
    StartFailed,
)
from clrk.core.resources import TaskAgent
from clrk.gateway._aio import spawn
from clrk.gateway.admin.app import build_admin_app, build_health_app
from clrk.gateway.admin.page.app import add_page, page_url
from clrk.gateway.admin.page.token import PageToken
from clrk.gateway.admin.page.views import PageSources
from clrk.gateway.agent_status import AgentStates
from clrk.gateway.agents import AgentTable
from clrk.gateway.control_client import ControlClient, ControlError, close_fds
from clrk.gateway.daemons import Daemons
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.egress.upstream import is_local_address
from clrk.gateway.health import Health, RuntimeNews
from clrk.gateway.http_server import BoundedServer, BoundedSite
from clrk.gateway.identity import Identities
from clrk.gateway.ingress import Ingress
from clrk.gateway.invocations import Invocations
from clrk.gateway.policy_explain import PlannedCall, explain
from clrk.gateway.sandbox_run import Egress, TelemetrySink
from clrk.gateway.schedule_run import CRON_TRIGGER, ScheduledRuns
from clrk.gateway.scheduler import Scheduler
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.records import InvocationFilter, InvocationRecord

_LOG: Final = logging.getLogger(__name__)
_MAX_CONFIG_SIZE: Final = 64 * 1024 * 1024
_DRAIN_ANSWERS_S: Final = 5.0  # for answers that are still on their way to slow callers
_BACKLOG: Final = 1024
_KEEPALIVE_S: Final = 75.0
_MAX_ADMIN_CONNECTIONS: Final = 256  # on each of the two admin listeners
_CALLERS_SHARE: Final = 4  # one in so many descriptors
_MAX_RECALLED: Final = 256  # fires of an agent that a new gateway looks back at
_SHUTDOWN_S: Final = 2.0  # for handlers, when their runs are over


class EgressSide(Egress, Protocol):
    """What the app needs of EgressService."""

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use another configuration for runs that start from now on."""

    def report_budgets(self, day: str | None) -> dict[str, Any]:
        """Return what budgets have spent on a UTC day, None: today."""

    async def close(self) -> None:
        """Release what outlives a run."""


MakeEgress = Callable[[GatewayConfig, int, TelemetrySink], EgressSide]  # owns the fd of the flow records


class App:
    """One gateway process. Runs until the runtime is gone or it has drained on request."""

    def __init__(self, control: socket.socket, state_dir: Path, make_egress: MakeEgress) -> None:
        self._control = ControlClient(control, self)
        self._state_dir = state_dir
        self._make_egress = make_egress
        self._configures: asyncio.Queue[tuple[Configure, list[int]]] = asyncio.Queue()
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._draining = False
        self._drained = False
        self._news = RuntimeNews()
        self._parts: _Parts | None = None

    async def run(self) -> str:
        """Serve until the end; returns why it came.

        Raises: ProtocolError when the runtime sends a configuration that can not be used.
        """
        self._control.start()
        configuring = spawn(self._follow_configuration(), name="configuration")
        configuring.add_done_callback(self._configuration_ended)
        try:
            return await asyncio.shield(self._over)
        finally:
            configuring.cancel()
            self._control.close()
            if self._parts is not None:
                await self._parts.close()

    def drain(self, *, then_exit: bool = False) -> None:
        """Refuse new invocations; when the last one has ended, tell the runtime Drained, or end."""
        if then_exit and (self._parts is None or self._drained):
            self._end("drained")
        elif then_exit or not self._draining:
            self._draining = True
            _ = spawn(self._drain(then_exit), name="drain")

    # --- the control socket -----------------------------------------------------------------------------------------

    def on_message(self, message: RuntimeMessage, fds: list[int]) -> None:
        """Take a message of the runtime.

        Raises: ProtocolError for one that can not come now.
        """
        match message:
            case Configure():
                self._configures.put_nowait((message, fds))
            case Drain():
                self.drain()
            case Counters():
                self._news.counters = message
            case ReloadRefused():
                self._news.refuse(message.problems)
            case Started() | Spawned() | StartFailed() | Exited() | Removed():
                if self._parts is None:
                    raise ProtocolError("control_order", f"{type(message).__name__} before Configure")
                if not self._parts.daemons.on_message(message, fds):
                    self._parts.invocations.on_message(message, fds)

    def on_gone(self, reason: str) -> None:
        """End: without the runtime there is nothing to serve."""
        self._end(reason)

    @property
    def counters(self) -> Counters:
        """The kernel's counters and the number of sandboxes, as the runtime last sent them."""
        return self._news.counters

    def _end(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)

    # --- configuration ----------------------------------------------------------------------------------------------

    async def _follow_configuration(self) -> None:
        while True:
            message, fds = await self._configures.get()
            try:
                await self._configure(message, fds)
            except ControlError as exc:
                self._end(str(exc))
            except BaseException:
                close_fds(fds)
                raise

    async def _configure(self, message: Configure, fds: list[int]) -> None:
        expected = len(ConfigureFd) if self._parts is None else 1
        if message.version != PROTOCOL_VERSION or len(fds) != expected:
            raise ProtocolError("control_configure", f"version {message.version}, {len(fds)} fds: expected {expected}")
        config = read_config(fds[ConfigureFd.CONFIG])
        if self._parts is None:
            self._parts = await _Parts.open(
                config=config, fds=fds, control=self._control, state_dir=self._state_dir,
                make_egress=self._make_egress, news=self._news,
            )  # fmt: skip
            if self._draining:
                self._parts.invocations.drain()
                self._parts.daemons.drain()
        else:
            self._parts.reconfigure(config)
        self._news.take(message.generation, message.notes)
        self._control.send(Ready(PROTOCOL_VERSION, message.generation))
        self._parts.daemons.reconfigure(config)  # from Ready on the runtime starts runs of this generation
        count = len(config.agents) + len(config.daemons)
        _LOG.info("ready: generation %d, %d agents", message.generation, count)

    def _configuration_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None and not self._over.done():
            self._over.set_exception(exc)

    async def _drain(self, then_exit: bool) -> None:
        if self._parts is not None:
            self._parts.invocations.drain()
            self._parts.daemons.drain()
            await self._parts.invocations.idle()
            await self._parts.daemons.idle()
            await self._parts.finish_answers(_DRAIN_ANSWERS_S)
            await self._parts.telemetry.flush()
        self._drained = True
        if then_exit:
            self._end("drained")
            return
        try:
            self._control.send(Drained())
        except ControlError as exc:
            self._end(str(exc))


def read_config(fd: int) -> GatewayConfig:
    """Read the memfd of Configure and close it.

    Raises: ProtocolError; its message holds no values, since the configuration holds a private key.
    """
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        raw = file.read(_MAX_CONFIG_SIZE + 1)
    try:
        return GatewayConfig.model_validate_json(raw)
    except ValidationError as exc:
        where = ", ".join(sorted({".".join(map(str, error["loc"])) for error in exc.errors(include_input=False)}))
        raise ProtocolError("control_configure", f"unusable configuration: {where}") from None


def _max_connections() -> int:
    """Return how many callers may be connected: most descriptors are for the sandboxes that they start."""
    return max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _CALLERS_SHARE)


def _address_of(fd: int) -> tuple[str, int]:
    sock = socket.socket(fileno=fd)
    try:
        host, port = sock.getsockname()[:2]
        return host, port
    finally:
        sock.detach()


class _Parts:
    """Everything that exists only with a configuration."""

    def __init__(
        self,
        config: GatewayConfig,
        telemetry: Telemetry,
        egress: EgressSide,
        control: ControlClient,
        news: RuntimeNews,
    ) -> None:
        self.telemetry = telemetry
        self.egress = egress
        self._config = config
        self.agents = AgentTable(config)
        self.invocations = Invocations(
            control, egress, telemetry,
            seen=telemetry.seen_invocation, max_running=config.runtime.limits.max_sandboxes,
        )  # fmt: skip
        self.identities = Identities(config)
        self.ingress = Ingress(self.agents, self.invocations, telemetry, self.identities)
        self.scheduled = ScheduledRuns(self.agents, self.invocations, telemetry)
        self.scheduler = Scheduler(self.scheduled.fire, self._recall_fires)
        self.daemons = Daemons(control, egress, telemetry)
        self.states = AgentStates(
            self.invocations, lambda: news.counters.warm_agents, fires=self.scheduler, daemons=self.daemons
        )
        self.health = Health(news, telemetry, lambda: not self.invocations.draining)
        self._runners: list[web.BaseRunner] = []

    @classmethod
    async def open(
        cls,
        *,
        config: GatewayConfig,
        fds: list[int],
        control: ControlClient,
        state_dir: Path,
        make_egress: MakeEgress,
        news: RuntimeNews,
    ) -> _Parts:
        telemetry = Telemetry.open(state_dir, config)
        telemetry.watch_host(lambda: news.counters)
        parts = cls(config, telemetry, make_egress(config, fds[ConfigureFd.FLOWS], telemetry), control, news)
        await parts._listen(fds, PageToken.of(state_dir))
        parts.scheduler.start(parts.agents.tasks())
        return parts

    async def _recall_fires(self, agent: TaskAgent) -> list[InvocationRecord]:
        await self.telemetry.flush()  # at a first start there is no store before
        wanted = InvocationFilter(agent="/".join(agent.key), trigger=CRON_TRIGGER)
        found = await self.telemetry.store.list_invocations(wanted, limit=_MAX_RECALLED)
        return [entry.record for entry in found if not entry.record.caller]  # a caller may name its trigger `cron`

    def _explain(self, namespace: str, name: str, call: PlannedCall) -> dict[str, Any] | None:
        agent = self.agents.find(namespace, name)
        if agent is None:
            return None
        guard = AddressGuard(self._config.host_addresses, is_local_address)
        return explain(self._config, self.agents.gateway_of(agent), call, guard.refusal)

    async def _listen(self, fds: list[int], token: PageToken) -> None:
        listen = _address_of(fds[ConfigureFd.ADMIN_TCP])
        admin = build_admin_app(
            store=self.telemetry.store,
            catalogue=self.agents,
            run_task=self.ingress.handle_run_task,
            health=self.health,
            states=self.states,
            recall=self.invocations.record,
            page_url=page_url(listen, token),
            budgets=self.egress.report_budgets,
            explain=self._explain,
        )
        health = build_health_app(lambda: not self.invocations.draining, self.telemetry.render_prometheus)
        sources = PageSources(
            self.telemetry.store, self.agents, self.states, self.health, self.egress.report_budgets
        )  # fmt: skip
        add_page(health, sources, token, listen[1])
        # A caller that goes away must cancel its handler: that is how its run is stopped.
        ingress = BoundedServer(self.ingress.handle, max_connections=_max_connections(), keepalive_timeout=_KEEPALIVE_S)
        runners = {
            ConfigureFd.INGRESS: web.ServerRunner(ingress, shutdown_timeout=_SHUTDOWN_S),
            ConfigureFd.ADMIN_UNIX: web.AppRunner(
                admin, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S
            ),
            ConfigureFd.ADMIN_TCP: web.AppRunner(health, access_log=None, shutdown_timeout=_SHUTDOWN_S),
        }
        for index, runner in runners.items():
            await self._site(runner, fds[index])

    async def _site(self, runner: web.BaseRunner, fd: int) -> None:
        await runner.setup()
        self._runners.append(runner)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        if isinstance(runner, web.AppRunner):  # anybody on this host can connect, and must not use up the descriptors
            limit = min(_MAX_ADMIN_CONNECTIONS, _max_connections())
            await BoundedSite(runner, sock, backlog=_BACKLOG, max_connections=limit).start()
        else:
            await web.SockSite(runner, sock, backlog=_BACKLOG).start()

    def reconfigure(self, config: GatewayConfig) -> None:
        self._config = config
        self.agents.replace(config)
        self.identities.reconfigure(config)
        self.scheduler.reload(self.agents.tasks())
        self.invocations.max_running = config.runtime.limits.max_sandboxes
        self.telemetry.reconfigure(config)
        self.egress.reconfigure(config)

    async def finish_answers(self, timeout_s: float) -> None:
        """Let answers that are on their way arrive, within reason."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.ingress.idle()
                await self.scheduled.idle()
                await self.daemons.idle()
        except TimeoutError:
            _LOG.warning("answers to slow callers are cut off")

    async def close(self) -> None:
        self.invocations.drain()
        await self.scheduler.close()
        self.invocations.abandon_all()
        self.daemons.abandon_all()
        await self.finish_answers(_SHUTDOWN_S)
        for runner in self._runners:
            await runner.cleanup()
        await self.identities.close()
        await self.egress.close()
        await self.telemetry.close()
