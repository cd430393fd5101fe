"""systemd's readiness protocol (sd_notify(3)): one datagram to the socket that NOTIFY_SOCKET names."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

_LOG: Final = logging.getLogger(__name__)


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send for example `READY=1`; without a supervisor nothing happens. Never raises: it is only a courtesy."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
    except OSError as exc:
        _LOG.warning("supervisor not notified of %s: %s", state, exc)
