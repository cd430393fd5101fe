"""Read the server name and the protocols out of the beginning of a TLS connection. Pure: nothing is consumed.

Source: RFC 8446, sections 4.1.2 (ClientHello) and 5.1 (records); RFC 6066, section 3 (server_name); RFC 7301, section
3.1 (application_layer_protocol_negotiation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from clrk.core.errors import ProtocolError

MAX_HELLO_SIZE: Final = 16 * 1024  # with post-quantum key shares real ones stay below 4 KiB
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_HOST_NAME: Final = 0
_NAME: Final = re.compile(rb"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What we need of a ClientHello.

    Shape: server_name in lower case without a trailing dot, None when there is none; alpn as offered, () without.
    """

    server_name: str | None
    alpn: tuple[bytes, ...] = ()

    @property
    def only_http2(self) -> bool:
        """Say whether the client means to speak HTTP and does not offer HTTP/1."""
        return b"h2" in self.alpn and not {b"http/1.1", b"http/1.0"} & set(self.alpn)


class _Cursor:
    """Bounded reads. Raises: ProtocolError(client_hello) past the end."""

    __slots__ = ("at", "end", "raw")

    def __init__(self, raw: bytes, at: int = 0, end: int | None = None) -> None:
        self.raw, self.at, self.end = raw, at, len(raw) if end is None else end

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        if self.end - self.at < size:
            raise ProtocolError("client_hello", "a length passes the end", self.at)
        self.at += size
        return self.raw[self.at - size : self.at]

    def block(self, length_size: int) -> _Cursor:
        return _Cursor(self.take(self.number(length_size)))

    @property
    def more(self) -> bool:
        return self.at < self.end


def parse_client_hello(peeked: bytes) -> ClientHello | None:
    """Return the hello, or None when more bytes are needed.

    Shape: peeked begins with the first TLS record. Raises: ProtocolError(client_hello) when it is none. Terminal.
    """
    message = _join_records(peeked)
    if len(message) >= 1 and message[0] != _CLIENT_HELLO:
        raise ProtocolError("client_hello", "the first handshake message is no ClientHello")
    if len(message) < 4:
        return None
    length = int.from_bytes(message[1:4], "big")
    if length > MAX_HELLO_SIZE:
        raise ProtocolError("client_hello", f"ClientHello of {length} bytes")
    if len(message) < 4 + length:
        return None
    return _read_hello(_Cursor(message, 4, 4 + length))


def _join_records(peeked: bytes) -> bytes:
    """Return the handshake bytes of the first message, the last record perhaps cut.

    What follows the message is not looked at: with early data (RFC 8446, section 4.2.10) other records do.
    """
    at, message = 0, b""
    while at < len(peeked) and not (len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big")):
        if peeked[at] != _HANDSHAKE or (len(peeked) > at + 1 and peeked[at + 1] != 3):
            raise ProtocolError("client_hello", "not a TLS handshake record", at)
        if len(peeked) < at + 5:
            break
        length = int.from_bytes(peeked[at + 3 : at + 5], "big")
        if not 0 < length <= 2**14:
            raise ProtocolError("client_hello", f"TLS record of {length} bytes", at)
        message += peeked[at + 5 : at + 5 + length]
        at += 5 + length
    return message


def _read_hello(body: _Cursor) -> ClientHello:
    body.take(2 + 32)  # legacy_version, random
    body.block(1)  # legacy_session_id
    body.block(2)  # cipher_suites
    body.block(1)  # legacy_compression_methods
    found: dict[int, _Cursor] = {}
    extensions = body.block(2) if body.more else body
    while extensions.more:
        kind, data = extensions.number(2), extensions.take(extensions.number(2))
        if kind in (_SERVER_NAME, _ALPN):
            if kind in found:  # RFC 8446, section 4.2: one of each type
                raise ProtocolError("client_hello", "two extensions of one type")
            found[kind] = _Cursor(data)
    name = _host_name(found[_SERVER_NAME]) if _SERVER_NAME in found else None
    return ClientHello(name, _protocols(found[_ALPN]) if _ALPN in found else ())


def _protocols(data: _Cursor) -> tuple[bytes, ...]:
    names, found = data.block(2), []
    while names.more:
        found.append(names.take(names.number(1)))
    if data.more or not all(found):
        raise ProtocolError("client_hello", "the protocols are no list of names")
    return tuple(found)


def _host_name(data: _Cursor) -> str:
    names = data.block(2)
    kind, name = names.number(1), names.take(names.number(2))
    if kind != _HOST_NAME or names.more or data.more:
        raise ProtocolError("client_hello", "server_name is not one host name")
    if len(name) > 255 or _NAME.fullmatch(name) is None:
        raise ProtocolError("client_hello", "server_name is not a host name")
    return name.decode("ascii").rstrip(".").lower()
