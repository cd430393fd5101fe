"""The tunnels of one run that are open, judged again whenever the rules change.

A tunnel is judged once, when it opens, and may stay open for months: rules that were taken away must end it. What the
new rules still allow is not touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clrk.gateway.egress.origin import Exit


class TunnelRevokedError(ConnectionAbortedError):
    """The rules that allowed the tunnel are gone; both sides were reset."""


class OpenTunnels:
    """One for each run, whatever its rules are."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Task[Any], Callable[[Exit], bool]] = {}
        self._revoked: set[asyncio.Task[Any]] = set()
        self._now: Exit | None = None  # once the rules have changed

    async def carry(self, still_allowed: Callable[[Exit], bool], work: Coroutine[Any, Any, None]) -> None:
        """Await the work in this task, until rules come that do not allow it. Raises: TunnelRevokedError."""
        task = asyncio.current_task()
        if task is None or (self._now is not None and not still_allowed(self._now)):  # changed while it was dialled
            work.close()
            raise TunnelRevokedError("the rules that allowed it are gone")
        self._open[task] = still_allowed
        try:
            await work
        except asyncio.CancelledError:
            if task in self._revoked and task.uncancel() == 0:  # else the run ends as well
                raise TunnelRevokedError("the rules that allowed it are gone") from None
            raise
        finally:
            del self._open[task]
            self._revoked.discard(task)

    def judge(self, way_out: Exit) -> None:
        """End what other rules do not allow."""
        self._now = way_out
        for task, still_allowed in list(self._open.items()):
            if task not in self._revoked and not still_allowed(way_out):
                self._revoked.add(task)
                task.cancel()
