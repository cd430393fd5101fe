"""Framing of the control socket: one packet, one message, its fds. Used by both ends."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from clrk.core.errors import ProtocolError
from clrk.core.messages import MAX_FDS, MAX_PACKET_SIZE, GatewayMessage, RuntimeMessage

M = TypeVar("M")

_ENCODER: Final = msgspec.msgpack.Encoder()
RUNTIME_MESSAGES: Final = msgspec.msgpack.Decoder(RuntimeMessage)  # what the gateway receives
GATEWAY_MESSAGES: Final = msgspec.msgpack.Decoder(GatewayMessage)  # what the runtime receives


def send(sock: socket.socket, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
    """Send one packet. The fds stay open here; the caller closes them.

    Raises: BlockingIOError when a non-blocking peer is not reading; OSError when it is gone; ValueError for a
        message that is over the packet size (a bug of the sender).
    """
    packet = _ENCODER.encode(message)
    if len(packet) > MAX_PACKET_SIZE or len(fds) > MAX_FDS:
        raise ValueError(f"{type(message).__name__}: {len(packet)} bytes, {len(fds)} fds: over the packet limit")
    socket.send_fds(sock, [packet], list(fds))


def receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> tuple[M, list[int]] | None:
    """Receive one packet, or None at the end of the stream. The caller owns the fds, which are close-on-exec.

    Raises: ProtocolError(code="control_packet") for anything malformed; its fds are closed.
        BlockingIOError when nothing is there; OSError when the peer is gone.
    """
    packet, fds, flags = _receive_packet(sock)
    if not packet and not fds:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("control_packet", "control packet over its size or fd limit")
        return decoder.decode(packet), fds
    except (msgspec.MsgspecError, ProtocolError) as exc:
        for fd in fds:
            os.close(fd)
        raise ProtocolError("control_packet", f"control packet: {exc}") from exc


def _receive_packet(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """socket.recv_fds, but with the flags honoured: that of Python 3.11 drops them, and the fds would outlive exec."""
    fds = array.array("i")
    space = socket.CMSG_LEN(MAX_FDS * fds.itemsize)
    packet, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_SIZE, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds), flags
