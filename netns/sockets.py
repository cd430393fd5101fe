"""Opens a namespace's listening sockets. The calling thread must be inside the namespace."""

from __future__ import annotations

import socket
from typing import Final

from clrk.core.errors import HostError

from .plan import LISTEN_BACKLOG, LISTENERS, ListenerPlan, Transport

SO_NETNS_COOKIE: Final = 71  # include/uapi/asm-generic/socket.h, Linux 5.14
_COOKIE_SIZE: Final = 8


def open_listeners() -> tuple[socket.socket, ...]:
    """Open the sockets of the plan, in the order of StartedFd.

    Returns: non-blocking, close-on-exec sockets; a socket belongs for ever to the namespace it was made in.
    Raises: HostError naming the address; nothing stays open then.
    """
    opened: list[socket.socket] = []
    try:
        for plan in LISTENERS.values():
            opened.append(_open(plan))
    except OSError as exc:
        for sock in opened:
            sock.close()
        failed = list(LISTENERS.values())[len(opened)]
        raise HostError(f"listen on {failed.transport.value} {failed.address}:{failed.port}: {exc.strerror}") from exc
    return tuple(opened)


def read_cookie(sock: socket.socket) -> int:
    """Return the cookie of the namespace that the socket belongs to.

    Raises: HostError on kernels before 5.14, which can not tell.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, _COOKIE_SIZE)
    except OSError as exc:
        raise HostError(f"getsockopt SO_NETNS_COOKIE: {exc.strerror}; needs Linux 5.14") from exc
    return int.from_bytes(raw, "little" if socket.htons(1) != 1 else "big")


def _open(plan: ListenerPlan) -> socket.socket:
    family = socket.AF_INET6 if plan.is_v6 else socket.AF_INET
    kind = socket.SOCK_STREAM if plan.transport is Transport.TCP else socket.SOCK_DGRAM
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        if plan.is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Neither SO_REUSEADDR nor SO_REUSEPORT: an agent could then share the port (KERNEL.md section 3).
        sock.bind((plan.address, plan.port))
        if plan.transport is Transport.TCP:
            sock.listen(LISTEN_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
