"""The folder in which the runtime keeps what outlives it: root's alone, and one runtime's at a time."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from clrk.core.errors import HostError


class StateDir:
    """Held while this process keeps its state there; the kernel lets go of it with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path) -> StateDir:
        """Make the folder if there is none, and lock it: two gateways must not write to one store.

        Raises: HostError, also for a folder in which others could put links for root to follow.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"make spec.stateDir {path}: {exc.strerror}") from exc
        try:
            info = os.fstat(fd)
            if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise HostError(f"spec.stateDir {path} must be root's, and nobody else may write there; chmod go-w it")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise HostError(f"spec.stateDir {path} is in use by another runtime; give each its own") from exc
        except HostError:
            os.close(fd)
            raise
        return cls(path, fd)

    def release(self) -> None:
        """Let go. The folder stays."""
        os.close(self._fd)
