"""One life of the gateway: a child in its own view of the file system, with one socket to the runtime."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError
from clrk.runtime.control_channel import ControlChannel
from clrk.runtime.gateway_view import bwrap_arguments

_LOG: Final = logging.getLogger(__name__)
_MODULE: Final = "clrk.gateway.main"
# What an operator may set for the gateway: resolver and TLS trust, logging. OTEL_* goes with the configuration: in the
# process's own environment, libraries would read it, and send an exporter's credentials with other requests.
_PASSED_PREFIXES: Final = ("CLRK_GATEWAY_",)
_PASSED_NAMES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR", "TZ", "PYTHONASYNCIODEBUG", "JOURNAL_STREAM")
_MAX_DELAY_S: Final = 30.0
_STABLE_S: Final = 10.0


class RestartDelay:
    """How long to wait before the next start: none after a life of 10 s, else doubling from half a second."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        """Return the delay in seconds after a gateway that lived this long."""
        if lived_s >= _STABLE_S:
            self._next_s = 0.0
        delay_s, self._next_s = self._next_s, min(max(0.5, self._next_s * 2), _MAX_DELAY_S)
        return delay_s


@dataclass(slots=True)
class GatewayProcess:
    """A running gateway. Its exit closes the channel's far end."""

    channel: ControlChannel
    _process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, state_dir: Path, uid: int, environ: Mapping[str, str] = os.environ) -> GatewayProcess:
        """Start it; it drops to uid by itself and then waits for Configure.

        Shape: state_dir is the gateway's only writable folder; made here, owned by uid.
        Raises: HostError when it can not be started.
        Privileges: root.
        """
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise HostError("bwrap is not installed: apt-get install bubblewrap")
        _make_state_dir(state_dir, uid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # -s: HOME is the gateway's to write, and Python would load modules from there while it is still root.
            command = [sys.executable, "-P", "-s", "-m", _MODULE, "--uid", str(uid), "--gid", str(uid)]
            command += ["--control-fd", str(theirs.fileno()), "--state-dir", str(state_dir)]
            try:
                # In a memfd: forty mounts in `ps` and the journal would hide what runs.
                with os.fdopen(os.memfd_create("bwrap-options"), "wb") as options:
                    options.write(b"".join(os.fsencode(word) + b"\0" for word in bwrap_arguments(state_dir)))
                    options.seek(0)
                    process = subprocess.Popen(  # the parent-death signal is tied to this thread: the main one
                        [bwrap, "--args", str(options.fileno()), "--", *command],
                        stdin=subprocess.DEVNULL,
                        stdout=2,
                        env=_environment(state_dir, environ),
                        pass_fds=(theirs.fileno(), options.fileno()),
                        process_group=0,  # Ctrl-C is for the runtime, which drains first
                    )
            except OSError as exc:
                ours.close()
                raise HostError(f"start the gateway: {exc.strerror}: {exc.filename}") from exc
        _LOG.info("gateway started: pid %d, uid %d", process.pid, uid)
        return cls(ControlChannel(ours), process)

    @property
    def pid(self) -> int:
        """Process id in the initial pid namespace."""
        return self._process.pid

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Close the channel when the process is gone: somebody else may hold the far end, whom it passed that to."""
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self._process.pid)

        def on_exit() -> None:
            loop.remove_reader(pidfd)
            self.channel.close()

        loop.add_reader(pidfd, on_exit)
        try:
            yield
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    async def stop(self, grace_s: float) -> str:
        """Close its channel, which makes it end; after grace_s by SIGKILL. Reaps it.

        Returns: how it ended, for the log.
        """
        try:
            self.channel.close()
            if self._process.poll() is None:
                await self._wait_exit(grace_s)
        finally:
            if self._process.poll() is None:
                self._process.kill()  # bwrap's death is that of its pid namespace
            code = self._process.wait()  # at once: the child is dead or dying of SIGKILL
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _wait_exit(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(pidfd, gone.set)
        try:
            async with asyncio.timeout(timeout_s):
                await gone.wait()
        except TimeoutError:
            _LOG.warning("gateway did not end within %.1f s: killed", timeout_s)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)


def _make_state_dir(state_dir: Path, uid: int) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(state_dir, 0o700)
        if state_dir.stat().st_uid != uid:  # also after a change of uidRange: the store is kept
            for folder, _, files in os.walk(state_dir):
                for path in (folder, *(os.path.join(folder, name) for name in files)):
                    os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as exc:
        raise HostError(f"state folder of the gateway {state_dir}: {exc.strerror}: {exc.filename}") from exc


def _environment(state_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    passed = {
        name: value for name, value in environ.items() if name.startswith(_PASSED_PREFIXES) or name in _PASSED_NAMES
    }
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(state_dir),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        **passed,
    }
