"""The modules of a process that lives long, out of the garbage collector's sight."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import what stays until the process ends: no collection looks at it meanwhile, and none ever after.

    Modules are a hundred thousand objects and no garbage. Each full collection would go through them all, with the
    event loop held up meanwhile.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
