"""Tasks that outlive the call that started them: kept from the garbage collector, and never silent about a crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
_TASKS: Final[set[asyncio.Task[Any]]] = set()


def spawn(coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Start a task. A reference is kept until it ends; an exception that ends it is logged, and stays in the task."""
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _TASKS.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _TASKS.discard(task)
    if not task.cancelled() and (exc := task.exception()) is not None:
        _LOG.error("task %s crashed", task.get_name(), exc_info=exc)
