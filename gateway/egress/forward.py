"""What changes in a head on its way through: hop-by-hop headers, trace context, framing. Order and case are kept. Pure.

Source: RFC 9110, section 7.6.1 (Connection); RFC 9112, sections 6.1 and 7.1; W3C Trace Context, section 3.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.http1 import Body, Head, Request, Response, render_head
from clrk.gateway.telemetry.spans import TraceContext

_HOP_BY_HOP: Final = frozenset(("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"))
_NOT_OURS: Final = _HOP_BY_HOP | {"traceparent", "tracestate"}
_NOT_THEIRS: Final = _HOP_BY_HOP | {"alt-svc"}
# What a client may find changed against a direct connection, and nothing else. The differential run holds us to it.
CHANGED_IN_REQUESTS: Final = _HOP_BY_HOP - {"transfer-encoding"} | {"traceparent", "tracestate", "baggage"}
CHANGED_IN_RESPONSES: Final = _HOP_BY_HOP - {"transfer-encoding"} | {"alt-svc"}
# A Connection header that names one of these wants to cut the message open somewhere else than we read it.
_NOT_NOMINABLE: Final = frozenset(("host", "content-length", "content-type", "authorization", "cookie"))
# What these name is HTTP again, or TLS: behind it would be requests that nobody judges (h2c smuggling).
_NEVER_AN_UPGRADE: Final = re.compile(r"(?:h2|h2c|h3|https?|tls|ssl)(?:[-/].*)?")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)(?::([0-9]{1,5}))?")
_ABSOLUTE: Final = re.compile(r"(https?)://([^/?#]*)([/?].*)?", re.IGNORECASE)


_KEEP_ALIVE: Final = re.compile(r"timeout=([0-9]{1,9})")
POOL_IDLE_S: Final = 30.0
_ON_ITS_WAY_S: Final = 1.0  # so much earlier than the upstream we let go: its end may be on its way


class Framing(Enum):
    """How a response's body goes on to the agent."""

    AS_SENT = auto()  # by its Content-Length, by the end of the connection, or there is none
    CHUNKED = auto()  # in the chunks that it came in
    REWRITTEN = auto()  # in chunks of ours: its length may not be what the upstream says
    DECODED = auto()  # up to the end of the connection, since the agent knows no chunks


def split_target(request: Request, scheme: str) -> tuple[str, str, str]:
    """Return (host header, path, query) of a request for this connection.

    Shape: host is "" for an HTTP/1.0 request without Host. query is without `?`.
    Raises: ProtocolError(host | target): what two servers could read differently.
    """
    hosts = request.values("host")
    if len(hosts) > 1 or (not hosts and request.minor == 1) or "" in hosts:
        raise ProtocolError("host", "a request has exactly one Host header, and it names a host")
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


def asked_upgrade(request: Request, *, is_open: bool) -> str:
    """Return the protocol that the connection is to become (RFC 9110, section 7.8), in lower case; "" for none.

    Shape: is_open says that every request to the destination is allowed. Elsewhere only a WebSocket passes (RFC 6455,
        section 4.1): what is said after the change is not judged any more. HTTP and TLS pass nowhere. An upgrade that
        does not pass is not asked for, and the request is one like any other, as the protocol foresees.
    """
    asked = request.tokens("upgrade")
    if len(asked) != 1 or request.minor == 0 or "upgrade" not in request.tokens("connection"):
        return ""
    if asked[0] == "websocket":
        return asked[0] if request.method == "GET" else ""
    return asked[0] if is_open and _NEVER_AN_UPGRADE.fullmatch(asked[0]) is None else ""


def kept_for_s(response: Response) -> float:
    """Return for how long the connection may be idle and then carry another request; 0 or less for not at all.

    Source: the `timeout` of Keep-Alive, as Apache httpd and Node.js send it (RFC 2068, section 19.7.1.1).
    """
    said = [int(found[1]) for word in response.tokens("keep-alive") if (found := _KEEP_ALIVE.fullmatch(word))]
    return min(POOL_IDLE_S, *(timeout - _ON_ITS_WAY_S for timeout in said)) if said else POOL_IDLE_S


def check_connection(head: Head) -> frozenset[str]:
    """Return the header names that Connection nominates. Raises: ProtocolError(connection)."""
    nominated = frozenset(head.tokens("connection"))
    if nominated & _NOT_NOMINABLE:
        raise ProtocolError("connection", "Connection names a header that is not hop-by-hop")
    return nominated


def request_headers(
    request: Request,
    *,
    host: str,
    context: TraceContext,
    upgrade: str,
    length: int | None,
    plain: bool,
    expect: bool,
) -> list[tuple[str, str]]:
    """Return the headers to send upstream.

    Shape: host fills in for a missing Host header. length replaces Content-Length when the body was rewritten.
        plain asks for an answer without content coding (RFC 9110, section 12.5.3), whatever the agent accepts.
        expect lets the agent's Expect pass: nobody has answered it yet.
        The context's baggage goes out only where the agent sends none.
    """
    dropped = _NOT_OURS | check_connection(request)
    # Each of these stands where the agent's first one stood, or at the end; "" takes it away.
    ours: dict[str, str] = {}
    if options := [*(["Upgrade"] if upgrade else ()), *(["TE"] if "trailers" in request.tokens("te") else ())]:
        ours = {"connection": ", ".join(options)}
        ours |= {"te": "trailers"} if "TE" in options else {}
    if request.values("transfer-encoding"):
        ours["transfer-encoding"] = "chunked"
    elif length is not None:
        ours["content-length"] = str(length)
    ours["traceparent"], ours["tracestate"] = context.traceparent, context.tracestate
    if not request.values("baggage"):
        ours["baggage"] = context.baggage
    if plain:
        ours["accept-encoding"] = "identity"
        dropped |= {"accept-encoding"}
    if upgrade:
        dropped -= {"upgrade"}
    if not expect:
        dropped |= {"expect"}
    kept: list[tuple[str, str]] = [] if request.values("host") else [("Host", host)]
    for name, value in request.headers:
        lower = name.lower()
        if lower in ours:
            if fresh := ours.pop(lower):
                kept.append((name, fresh))
        elif lower not in dropped:
            kept.append((name, value))
    kept += [("Connection" if name == "connection" else name, value) for name, value in ours.items() if value]
    return kept


def render_response(response: Response, *, framing: Framing, drop_coding: bool = False, close: bool = False) -> bytes:
    """Return the head that the agent gets; see response_headers."""
    headers = response_headers(response, framing=framing, drop_coding=drop_coding, close=close)
    return render_head(f"HTTP/1.1 {response.status} {response.reason}", headers)


def choose_framing(request: Request, response: Response, body: Body, *, rewrites: bool, governed: bool) -> Framing:
    """Decide how the response's body goes on: as it came, unless somebody may change it, or the agent can not read it.

    Shape: rewrites says that its length may change; governed that somebody may end it anywhere, which can be done only
        between chunks of ours.
    """
    if body.done or body.until_close:
        stands = request.method == "HEAD" or response.status == 304  # for what GET would have got
        return Framing.CHUNKED if stands and response.values("transfer-encoding") else Framing.AS_SENT
    if (body.chunked or rewrites) and request.minor == 0:
        return Framing.DECODED
    if rewrites or (body.chunked and governed):
        return Framing.REWRITTEN
    return Framing.CHUNKED if body.chunked else Framing.AS_SENT


def response_headers(
    response: Response, *, framing: Framing, drop_coding: bool = False, close: bool = False
) -> list[tuple[str, str]]:
    """Return the headers that the agent gets.

    Shape: framing says how the body goes on; drop_coding that the upstream's Content-Encoding was undone; close that
        the connection ends with this response. Alt-Svc goes: it would send the agent to UDP, which goes nowhere.
    Raises: ProtocolError(connection).
    """
    dropped = _NOT_THEIRS | check_connection(response)
    if response.status == 101:
        dropped -= {"connection", "upgrade"}
    if response.status < 200:
        dropped |= {"content-length"}
    if drop_coding:
        dropped |= {"content-encoding"}
    if framing is Framing.REWRITTEN or framing is Framing.DECODED:
        dropped |= {"content-length"}
    coded = framing is not Framing.CHUNKED and framing is not Framing.REWRITTEN
    kept: list[tuple[str, str]] = []
    for name, value in response.headers:
        lower = name.lower()
        if not coded and (lower == "transfer-encoding" or (lower == "content-length" and lower in dropped)):
            kept.append(("Transfer-Encoding" if lower == "content-length" else name, "chunked"))
            coded = True
        elif close and lower == "connection":
            kept.append((name, "close"))  # where the upstream said so, or something else
            close = False
        elif lower not in dropped:
            kept.append((name, value))
    if close:
        kept.append(("Connection", "close"))
    return kept
