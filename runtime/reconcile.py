"""Claims an instance on this host, and removes what a predecessor that died left behind."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.netns.reconcile import remove_leftovers as remove_namespaces
from clrk.runtime.cgroup import Cgroups

_LOG: Final = logging.getLogger(__name__)
LOCK_NAME: Final = "runtime.lock"


class InstanceLock:
    """Held while this process is the instance's runtime; the kernel lets go of it with the process."""

    def __init__(self, layout: HostLayout, fd: int) -> None:
        self._layout = layout
        self._fd = fd

    @classmethod
    def take(cls, layout: HostLayout) -> InstanceLock:
        """Make the run folder and take its lock.

        Raises: HostError when another runtime has it, naming its pid.
        """
        path = layout.run_dir / LOCK_NAME
        while True:
            try:
                layout.run_dir.mkdir(mode=0o755, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:  # the last holder removed the folder between the two
                continue
            except OSError as exc:
                raise HostError(f"make {path}: {exc.strerror}") from exc
            _lock(fd, layout)
            if _is_still(path, fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
                return cls(layout, fd)
            os.close(fd)  # the last holder removed it while we waited for nobody: lock the file that is there now

    def release(self) -> None:
        """Remove the file and, if nothing else is in it, the run folder; then let go."""
        try:
            (self._layout.run_dir / LOCK_NAME).unlink()
            self._layout.run_dir.rmdir()
        except OSError as exc:
            _LOG.warning("run folder %s stays: %s", self._layout.run_dir, exc.strerror)
        os.close(self._fd)


def find_runtime(layout: HostLayout) -> int | None:
    """Return the pid of the instance's runtime, None when there is none."""
    try:
        with (layout.run_dir / LOCK_NAME).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read(32))
    except (FileNotFoundError, ValueError):
        pass  # none, or one that is starting: it will read what it finds
    return None


def _lock(fd: int, layout: HostLayout) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise HostError(
            f"a runtime of instance {layout.instance!r} is running already (pid {holder}); stop it, or start "
            "another one beside it with --instance NAME"
        ) from exc


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def remove_leftovers(layout: HostLayout, cgroups: Cgroups) -> None:
    """Kill and remove what is left of this instance, by its own name prefix only. Call with the lock held.

    Raises: ExceptionGroup of what could not be removed.
    """
    sandboxes = cgroups.remove_leftovers()  # first: the processes in them hold everything else
    namespaces = remove_namespaces(layout.netns_prefix)
    remove_socket(layout.admin_socket)
    if sandboxes or namespaces:
        _LOG.warning(
            "the last runtime did not end cleanly: removed %d cgroups and %d namespaces",
            len(sandboxes),
            len(namespaces),
        )


def remove_socket(path: Path) -> None:
    """Remove a socket file; anything else at its place stays.

    Raises: HostError when something else is there.
    """
    if path.is_socket():
        path.unlink()
    elif path.exists():
        raise HostError(f"{path} is in the way and is not a socket; move it elsewhere")
