"""Keeps a gateway running: start, Configure, serve what it asks for, and start the next one when it dies.

The listening sockets are the runtime's, so callers who come while there is no gateway wait in the backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from clrk.core.errors import ClrkError, HostError, ProtocolError
from clrk.core.gateway_config import GatewayConfig
from clrk.core.messages import (
    PROTOCOL_VERSION,
    Configure,
    Counters,
    Drain,
    Drained,
    GatewayMessage,
    Ready,
    ReloadRefused,
    StartRun,
    StopRun,
)
from clrk.runtime.config.declared import Resources
from clrk.runtime.config.notes import notes_of
from clrk.runtime.control_channel import ChannelClosedError, ControlChannel
from clrk.runtime.gateway_config import open_memfd
from clrk.runtime.gateway_process import GatewayProcess, RestartDelay
from clrk.runtime.listeners import HostListeners
from clrk.runtime.runs import Runs

_LOG: Final = logging.getLogger(__name__)
_READY_DEADLINE_S: Final = 60.0  # imports on a busy two-core machine
_STOP_GRACE_S: Final = 5.0
_LAST_WORDS_S: Final = 0.3  # for a gateway that ends by itself to log why
_COUNTERS_INTERVAL_S: Final = 1.0
_MAX_TOLD: Final = 63
_MAX_PROBLEM_BYTES: Final = 512  # so many fit a packet


class GatewaySupervisor:
    """One gateway after another. `resources` is what runs are started with."""

    def __init__(
        self,
        *,
        start_process: Callable[[], GatewayProcess],
        build_config: Callable[[Resources], GatewayConfig],
        listeners: HostListeners,
        flows_fd: int,
        counters: Callable[[], Counters],
        resources: Resources,
        trust: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.resources = resources
        self.runs: Runs | None = None  # set before run(); both need the other
        self.ready = asyncio.Event()  # set at the first Ready, never cleared
        self.drained = asyncio.Event()
        self._start_process = start_process
        self._build_config = build_config
        self._listeners = listeners
        self._flows_fd = flows_fd
        self._counters = counters
        self._trust = trust  # called with the CA, as PEM text, for which the gateway is ready
        self._generation = 0
        self._announced: dict[int, tuple[Resources, str]] = {}  # configured, not yet confirmed by Ready
        self._live: ControlChannel | None = None
        self._draining = False

    async def run(self) -> None:
        """Supervise until cancelled, when the gateway is stopped, or until it dies while draining.

        Raises: HostError when it can not be started at all the first time.
        """
        delay = RestartDelay()
        while True:
            started_s = time.monotonic()
            why = await self._live_once()
            if self._draining:
                return
            if not self.ready.is_set():
                raise HostError(f"the gateway did not become ready: {why}; its own messages are above")
            wait_s = delay.after(time.monotonic() - started_s)
            if wait_s:
                _LOG.warning("next gateway start in %.1f s", wait_s)
                await asyncio.sleep(wait_s)

    async def _live_once(self) -> str:
        """Start a gateway and serve it until it is gone; return why it is."""
        try:
            self._listeners.restore()
            process = self._start_process()
        except HostError as exc:  # out of processes or memory for now
            _LOG.error("gateway not started: %s", exc)
            return str(exc)
        try:
            with process.watched():
                why = await self._serve_one(process)
            await self._bury(process, why)
        except asyncio.CancelledError:
            await process.stop(_STOP_GRACE_S)
            raise
        return why

    async def reload(self, resources: Resources, notes: Sequence[str] = ()) -> None:
        """Announce other resources, and what of them has to wait; runs use them from the gateway's Ready on."""
        self.resources = resources  # should this gateway die before it is ready, the next begins with these
        if self._live is not None:
            try:
                await self._configure(self._live, first=False, notes=notes)
            except ChannelClosedError as exc:  # run() buries it
                _LOG.warning("reload: for the next gateway: %s", exc)

    async def refuse_reload(self, problems: Sequence[str]) -> None:
        """Tell the gateway why a reload changed nothing, for those who ask there."""
        if self._live is not None:
            with contextlib.suppress(ChannelClosedError):  # run() buries it; the log has the problems
                await self._live.send(ReloadRefused(_told(problems)))

    async def drain(self) -> None:
        """Ask the gateway to refuse new invocations; `drained` is set when none is left, or there is no gateway."""
        self._draining = True
        if self._live is None:
            self.drained.set()
            return
        try:
            await self._live.send(Drain())
        except ChannelClosedError:
            self.drained.set()

    # --- one life ---------------------------------------------------------------------------------------------------

    async def _serve_one(self, process: GatewayProcess) -> str:
        """Talk to one gateway until it is gone or has to go; return why."""
        channel = process.channel
        try:
            await self._configure(channel, first=True)
            async with asyncio.timeout(_READY_DEADLINE_S):
                first = await channel.receive()
            if first is None:
                return "it ended before it was ready"
            if not isinstance(first, Ready):
                raise ProtocolError("control_order", f"{type(first).__name__} before Ready")
            self._on_message(first, channel)
            self._live = channel
            counters = asyncio.get_running_loop().create_task(self._send_counters(channel), name="counters")
            try:
                while (message := await channel.receive()) is not None:
                    self._on_message(message, channel)
                    await self._take_breath()
            finally:
                counters.cancel()
        except TimeoutError:
            return f"not ready within {_READY_DEADLINE_S:.0f} s"
        except ClrkError as exc:
            return str(exc)
        return "it closed the control socket"

    async def _take_breath(self) -> None:
        """A gateway that never stops talking, or asks and does not read the answers, holds up nobody but itself."""
        await asyncio.sleep(0)  # receive() does not wait while there is a packet
        if self.runs is not None:
            await self.runs.catch_up()

    def _on_message(self, message: GatewayMessage, channel: ControlChannel) -> None:
        runs = self.runs
        assert runs is not None  # noqa: S101 - wired before run()
        match message:
            case StartRun():
                runs.start(message, channel)
            case StopRun():
                runs.stop(message.run_id, channel, message.grace_s)
            case Ready(version=version, generation=generation):
                if version != PROTOCOL_VERSION or generation not in self._announced:
                    raise ProtocolError("control_ready", f"Ready for version {version}, generation {generation}")
                resources, ca_cert_pem = self._announced[generation]
                self._trust(ca_cert_pem)
                runs.resources = resources
                self._announced = {key: value for key, value in self._announced.items() if key >= generation}
                self.ready.set()
            case Drained():
                if not self._draining:  # else the next gateway's shutdown would not wait for what is in flight
                    raise ProtocolError("control_order", "Drained before Drain")
                self.drained.set()

    async def _configure(self, channel: ControlChannel, *, first: bool, notes: Sequence[str] = ()) -> None:
        self._generation += 1
        generation, resources = self._generation, self.resources
        config = await asyncio.to_thread(self._build_config, resources)
        self._announced[generation] = (resources, config.ca_cert_pem)
        memfd = await asyncio.to_thread(open_memfd, config)
        sockets = self._listeners
        rest = (self._flows_fd, sockets.ingress.fileno(), sockets.admin_unix.fileno(), sockets.admin_tcp.fileno())
        try:
            message = Configure(PROTOCOL_VERSION, generation, _told([*notes, *notes_of(resources)]))
            await channel.send(message, (memfd, *(rest if first else ())))
        finally:
            os.close(memfd)

    async def _bury(self, process: GatewayProcess, why: str) -> None:
        """Take away everything that belonged to a gateway that is gone: its runs first."""
        self._live = None
        self._announced.clear()
        how = await process.stop(_LAST_WORDS_S)
        _LOG.error("gateway pid %d is gone: %s (%s)", process.pid, why, how)
        if self.runs is not None:
            await self.runs.stop_all(process.channel)
        if self._draining:
            self.drained.set()  # with the gateway, everything in flight is gone

    async def _send_counters(self, channel: ControlChannel) -> None:
        last: Counters | None = None
        while True:
            try:
                if (counters := self._counters()) != last:
                    await channel.send(counters)
                    last = counters
            except ChannelClosedError:
                return
            except ClrkError as exc:  # telemetry only
                _LOG.warning("kernel counters: %s", exc)
            await asyncio.sleep(_COUNTERS_INTERVAL_S)


def _told(lines: Sequence[str]) -> list[str]:
    """Return what the gateway is told of them. Names of files hold whatever bytes: what is no text becomes `?`."""
    told = [
        line.encode("utf-8", "replace")[:_MAX_PROBLEM_BYTES].decode("utf-8", "ignore") for line in lines[:_MAX_TOLD]
    ]
    more = len(lines) - len(told)
    return [*told, f"and {more} more: `clrk-runtime check` has them all"] if more else told
