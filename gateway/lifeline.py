"""The gateway dies with the runtime even when its event loop hangs: a thread that only watches the control socket.

The parent-death signal alone is not enough. The gateway's parent is the monitor of bwrap, which has no CAP_KILL, and
the kernel sends that signal with the dying parent's rights (kernel/signal.c, check_kill_permission): it is lost.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import Final

GRACE_S: Final = 10.0  # for the orderly end that the closed socket brings about as well


def watch_lifeline(control_fd: int, grace_s: float = GRACE_S) -> None:
    """Kill this process grace_s after the far end of control_fd has closed, if it still lives then."""
    fd = os.dup(control_fd)  # the number stays ours whatever the event loop does with its own
    threading.Thread(target=_watch, args=(fd, grace_s), name="lifeline", daemon=True).start()


def _watch(fd: int, grace_s: float) -> None:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP and POLLERR are always reported
    while not poll.poll():
        continue
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
