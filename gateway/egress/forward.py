"""What changes in a head on its way through: hop-by-hop headers, trace context, framing. Order and case are kept. Pure.

Source: RFC 9110, section 7.6.1 (Connection); RFC 9112, sections 6.1 and 7.1; W3C Trace Context, section 3.
"""

from __future__ import annotations

import re
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.http1 import Head, Request, Response
from clrk.gateway.telemetry.spans import TraceContext

_HOP_BY_HOP: Final = frozenset(("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"))
# A Connection header that names one of these wants to cut the message open somewhere else than we read it.
_NOT_NOMINABLE: Final = frozenset(("host", "content-length", "content-type", "authorization", "cookie"))
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)(?::([0-9]{1,5}))?")
_ABSOLUTE: Final = re.compile(r"(https?)://([^/?#]*)([/?].*)?", re.IGNORECASE)


def split_target(request: Request, scheme: str) -> tuple[str, str, str]:
    """Return (host header, path, query) of a request for this connection.

    Shape: host is "" for an HTTP/1.0 request without Host. query is without `?`.
    Raises: ProtocolError(host | target): what two servers could read differently.
    """
    hosts = request.values("host")
    if len(hosts) > 1 or (not hosts and request.minor == 1):
        raise ProtocolError("host", "a request has exactly one Host header")
    host, target = (hosts[0] if hosts else ""), request.target
    if (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        if absolute[1].lower() != scheme or absolute[2].lower() != host.lower():
            raise ProtocolError("target", "the request target names another host than the Host header")
        target = absolute[3] or "/"
        target = target if target.startswith("/") else "/" + target
    elif not (target.startswith("/") or (target == "*" and request.method == "OPTIONS")):
        raise ProtocolError("target", "the request target is not a path")
    if "#" in target:
        raise ProtocolError("target", "a fragment in the request target")
    path, _, query = target.partition("?")
    return host, path, query


def split_host(host: str) -> tuple[str, int | None]:
    """Return (name in lower case without brackets and trailing dot, port). Raises: ProtocolError(host)."""
    found = _HOST.fullmatch(host)
    if found is None or (found[2] is not None and not 0 < int(found[2]) < 65_536):
        raise ProtocolError("host", "the Host header is not host[:port]")
    name = found[1].removeprefix("[").removesuffix("]").removesuffix(".").lower()
    return name, int(found[2]) if found[2] is not None else None


def wants_websocket(request: Request) -> bool:
    """Say whether the request asks to become a WebSocket (RFC 6455, section 4.1): the only upgrade that passes."""
    return "upgrade" in request.tokens("connection") and request.tokens("upgrade") == ["websocket"]


def check_connection(head: Head) -> frozenset[str]:
    """Return the header names that Connection nominates. Raises: ProtocolError(connection)."""
    nominated = frozenset(head.tokens("connection"))
    if nominated & _NOT_NOMINABLE:
        raise ProtocolError("connection", "Connection names a header that is not hop-by-hop")
    return nominated


def request_headers(
    request: Request, *, host: str, context: TraceContext, upgrade: bool, length: int | None, plain: bool
) -> list[tuple[str, str]]:
    """Return the headers to send upstream.

    Shape: host fills in for a missing Host header. length replaces Content-Length when the body was rewritten.
        plain asks for an answer without content coding (RFC 9110, section 12.5.3), whatever the agent accepts.
        The context's baggage goes out only where the agent sends none.
    """
    dropped = _HOP_BY_HOP | check_connection(request) | {"expect"}
    kept: list[tuple[str, str]] = []
    ours = {"traceparent": context.traceparent, "tracestate": context.tracestate}
    if not request.values("baggage"):
        ours["baggage"] = context.baggage
    if plain:
        ours["accept-encoding"] = "identity"
        dropped |= {"accept-encoding"}
    for name, value in request.headers:
        lower = name.lower()
        if lower in ours:
            if fresh := ours.pop(lower):
                kept.append((name, fresh))
        elif lower in ("traceparent", "tracestate"):
            continue  # a second one
        elif lower == "transfer-encoding":
            kept.append((name, "chunked"))
        elif lower == "content-length" and length is not None:
            kept.append((name, str(length)))
        elif upgrade and lower in ("connection", "upgrade"):
            kept.append((name, "Upgrade" if lower == "connection" else "websocket"))
        elif lower not in dropped:
            kept.append((name, value))
    if not request.values("host"):
        kept.insert(0, ("Host", host))
    kept.extend((name, value) for name, value in ours.items() if value)
    return kept


def response_headers(
    response: Response, *, chunked: bool, drop_length: bool, drop_coding: bool, close: bool
) -> list[tuple[str, str]]:
    """Return the headers that the agent gets.

    Shape: chunked says that we send chunks; drop_length that the upstream's Content-Length no longer holds; drop_coding
        that its Content-Encoding was undone; close that the connection ends with this response. Alt-Svc goes: it would
        send the agent to UDP, which goes nowhere.
    """
    dropped = _HOP_BY_HOP | frozenset(response.tokens("connection")) | {"alt-svc"}
    if response.status == 101:
        dropped -= {"connection", "upgrade"}
    if drop_coding:
        dropped |= {"content-encoding"}
    kept: list[tuple[str, str]] = []
    coded = False
    for name, value in response.headers:
        lower = name.lower()
        if chunked and not coded and (lower == "transfer-encoding" or (drop_length and lower == "content-length")):
            kept.append(("Transfer-Encoding" if lower == "content-length" else name, "chunked"))
            coded = True
        elif lower not in dropped and not (drop_length and lower == "content-length"):
            kept.append((name, value))
    if close:
        kept.append(("Connection", "close"))
    return kept
