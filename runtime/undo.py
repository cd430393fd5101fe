"""Steps that take back what a set-up did."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class Undo:
    """A stack of undo steps. Push a step before the act that it takes back; every step is idempotent."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: list[tuple[str, Callable[[], None]]] = []

    def push(self, name: str, step: Callable[[], None]) -> None:
        """Add a step, to run before those pushed earlier."""
        self._steps.append((name, step))

    def run(self) -> None:
        """Run each step once, newest first; a failing one is logged and does not stop the others.

        Raises: ExceptionGroup of what failed. A second call finds nothing to do.
        """
        failures: list[Exception] = []
        while self._steps:
            name, step = self._steps.pop()
            try:
                step()
            except Exception as exc:  # whatever it is, the other steps must run; it is raised below
                _LOG.error("undo %s: %s: %s", self._what, name, exc)
                failures.append(exc)
        if failures:
            raise ExceptionGroup(f"undo {self._what}", failures)
