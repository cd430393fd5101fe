"""Listening sockets of the host, bound by the runtime and served by the gateway: its restarts lose no connection."""

from __future__ import annotations

import errno
import grp
import os
import select
import socket
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.core.resources import RuntimeSpec
from clrk.runtime.reconcile import remove_socket

_SO_DETACH_FILTER: Final = 27  # include/uapi/asm-generic/socket.h
_BACKLOG: Final = 1024
_ADMIN_GROUP: Final = "clrk"


@dataclass(slots=True)
class HostListeners:
    """Non-blocking listening sockets. Close them with `close`, which removes the admin socket's file too."""

    ingress: socket.socket
    admin_tcp: socket.socket
    admin_unix: socket.socket
    _layout: HostLayout
    _undo: ExitStack
    _addresses: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        self._addresses = (format_address(self.ingress), format_address(self.admin_tcp))

    @classmethod
    def open(cls, layout: HostLayout, spec: RuntimeSpec) -> HostListeners:
        """Bind and listen.

        Raises: HostError naming the address; nothing stays open then.
        """
        with ExitStack() as undo:
            ingress = undo.enter_context(_listen_tcp(spec.ingress.listen, "spec.ingress.listen"))
            admin_tcp = undo.enter_context(_listen_tcp(spec.admin.listen, "spec.admin.listen"))
            admin_unix = undo.enter_context(_listen_unix(layout))
            undo.callback(layout.admin_socket.unlink, missing_ok=True)
            return cls(ingress, admin_tcp, admin_unix, layout, undo.pop_all())

    def restore(self) -> None:
        """Open anew what no longer listens: a gateway shares the sockets and can shut them down for its successors.

        Raises: HostError naming the address.
        """
        if not _is_listening(self.ingress):
            _close(self.ingress)
            self.ingress = self._undo.enter_context(_listen_tcp(self._addresses[0], "spec.ingress.listen"))
        if not _is_listening(self.admin_tcp):
            _close(self.admin_tcp)
            self.admin_tcp = self._undo.enter_context(_listen_tcp(self._addresses[1], "spec.admin.listen"))
        if not _is_listening(self.admin_unix):
            self.admin_unix.close()
            self.admin_unix = self._undo.enter_context(_listen_unix(self._layout))

    def tcp(self) -> tuple[socket.socket, socket.socket]:
        """Return ingress and admin."""
        return self.ingress, self.admin_tcp

    def close(self) -> None:
        """Stop listening. Idempotent."""
        for sock in self.tcp():
            _close(sock)
        self._undo.close()


def _close(sock: socket.socket) -> None:
    """Close at once: a gateway may have connected it to somebody who never reads, and asked to linger."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    sock.close()


def _is_listening(sock: socket.socket) -> bool:
    """Try as a caller does: a unix socket that was shut down still calls itself listening."""
    if sock.fileno() < 0 or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)  # one that drops every caller's SYN, say
    except OSError as exc:
        if exc.errno != errno.ENOENT:  # locked
            return False
    with select.epoll() as poll:
        poll.register(sock, select.EPOLLRDHUP)
        return not poll.poll(0)


def format_address(sock: socket.socket) -> str:
    """Return `127.0.0.1:8080` or `[::1]:8080`."""
    host, port, *_ = sock.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_tcp(address: str, field: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for TIME_WAIT
        sock.bind((host, int(port)))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"listen on {address} ({field}): {exc.strerror}") from exc
    return sock


def _listen_unix(layout: HostLayout) -> socket.socket:
    path = layout.admin_socket
    remove_socket(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        before = os.umask(0o177)  # nobody may connect before the mode is set
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        if (gid := _admin_gid()) is not None:
            os.chown(path, 0, gid)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"listen on {path}: {exc.strerror}") from exc
    return sock


def _admin_gid() -> int | None:
    """Return the gid of the group whose members may use `clrk`, if the host has it; root may in any case."""
    try:
        return grp.getgrnam(_ADMIN_GROUP).gr_gid
    except KeyError:
        return None
