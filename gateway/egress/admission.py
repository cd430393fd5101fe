"""Decide whether a request goes out, and where: framing, names, policy, trace context. Nothing is sent before this."""

from __future__ import annotations

from dataclasses import dataclass

from clrk.core.errors import ProtocolError
from clrk.gateway.credentials import Credential
from clrk.gateway.egress import forward
from clrk.gateway.egress.failure import DialDeniedError
from clrk.gateway.egress.governed import govern_guarded
from clrk.gateway.egress.guarded import recognise_guarded
from clrk.gateway.egress.http1 import Body, Request, request_body
from clrk.gateway.egress.origin import Exit, Origin
from clrk.gateway.egress.record import Call, request_attributes
from clrk.gateway.egress.refusal import RefusedError, status_of
from clrk.gateway.egress.upstream import Target
from clrk.gateway.govern import Governor
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.policy import HTTP_ONLY
from clrk.gateway.policy_names import parse_ip
from clrk.gateway.policy_requests import judge_request
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.spans import TraceContext
from clrk.gateway.trace_context import parse_trace_context


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go out.

    Shape: context is what the upstream continues: our span. upgrade: "" for none. enforces False: what the governor
        says is noted, and the request goes out.
    """

    request: Request
    head: RequestHead
    target: Target
    body: Body
    interpreter: Interpreter | None
    governor: Governor | None
    context: TraceContext
    upgrade: str
    credentials: tuple[Credential, ...] = ()
    enforces: bool = True


def admit(way_out: Exit, origin: Origin, request: Request, call: Call) -> Admitted:
    """Judge one request. Side effects: sets the span's parent and HTTP attributes. Raises: RefusedError."""
    destination = origin.destination
    verified = origin.name or str(destination.address)
    try:
        host, path, query = forward.split_target(request, origin.scheme)
        name, port = forward.split_host(host) if host else (None, None)
        forward.check_connection(request)
        body = request_body(request)
    except ProtocolError as exc:
        raise RefusedError(status_of(exc.code), f"bad_request_{exc.code}", str(exc)) from exc
    head = RequestHead(request.method, origin.scheme, verified, destination.port, path, query, request.headers)
    # refused or not, the span says what was asked for
    call.attributes.update(request_attributes(head, way_out.spans.redactor))
    _check_names(origin, name, port)
    is_open = _check_policy(way_out, origin, head, call)
    interpreter = recognise_guarded(way_out.recognise, head)
    governor = govern_guarded(way_out.govern, head, interpreter, enforces=way_out.policy.enforces)
    # What is judged stays HTTP: behind a change of protocol nobody counts.
    may_change = governor is None or not way_out.policy.enforces
    return Admitted(
        request=request,
        head=head,
        target=origin.target,
        body=body,
        interpreter=interpreter,
        governor=governor,
        context=_continue_trace(way_out, request, call),
        upgrade=forward.asked_upgrade(request, is_open=is_open) if may_change else "",
        credentials=_credentials(way_out, origin.target, request, call),
        enforces=way_out.policy.enforces,
    )


def _credentials(way_out: Exit, target: Target, request: Request, call: Call) -> tuple[Credential, ...]:
    """Return what the request gets on its way out (CONTRACT section 12): over TLS only, and to the host itself only.

    Whoever dialled an address chose it: a server name beside it is the agent's word, and gets nothing.
    """
    host = target.name or str(target.address)
    if target.server_name != host or not (found := way_out.credentials.of(host, target.port)):
        return ()
    if request.method == "TRACE":  # RFC 9110, section 9.3.8: its answer is the request, credentials among it
        raise RefusedError(403, "trace_with_credentials", f"a TRACE to {host} would show the agent its credentials")
    if any(one.refuses_payload(request.headers) for one in found):
        what = "its body is a stream that the agent signed, chunk by chunk, which the gateway can not sign anew"
        raise RefusedError(400, "signed_stream", f"{what}: send an unsigned one (STREAMING-UNSIGNED-PAYLOAD-TRAILER)")
    call.attributes[attr.CLRK_CREDENTIAL_POLICIES] = tuple(credential.policy for credential in found)
    return found


def _check_names(origin: Origin, host: str | None, port: int | None) -> None:
    """Require that what was dialled, SNI and Host agree (RFC 9110, section 15.5.20)."""
    destination, sni = origin.destination, origin.server_name
    if destination.name is not None and sni is not None and sni != destination.name:
        raise RefusedError(421, "sni_mismatch", f"dialled {destination.name}, but TLS asked for {sni}")
    expected = origin.name or (str(destination.address) if origin.is_tls else None)
    if host is not None and expected is not None and host != expected and not _same_address(host, expected):
        raise RefusedError(421, "host_mismatch", f"connected to {expected}, but Host is {host}")
    if port is not None and port != destination.port:
        raise RefusedError(421, "port_mismatch", f"connected to port {destination.port}, but Host has {port}")


def _same_address(host: str, expected: str) -> bool:
    """Say whether both are one IPv6 address: it has more spellings than one (RFC 5952, section 1)."""
    return ":" in host and parse_ip(host) == parse_ip(expected)


def _check_policy(way_out: Exit, origin: Origin, head: RequestHead, call: Call) -> bool:
    """Return whether every request to the destination is allowed. Raises: RefusedError when this one is not."""
    destination = origin.destination
    # A real address was chosen by the agent, so no name that it presents may vouch for it.
    address = None if destination.name is not None else destination.address
    if way_out.is_open(destination.name, address, destination.port):
        return True
    verdict, method = judge_request(way_out.policy, destination.name, address, head)
    if way_out.policy.holds(verdict):
        what = f"{method} {destination.host}:{destination.port}"
        message = f"{what} is not allowed ({verdict.reason}); add a rule to an EgressL4Route to allow it"
        raise RefusedError(403, verdict.reason, message, rule=verdict.rule, hint=verdict.hint)
    if not verdict.allowed:
        way_out.spans.would_deny(call, verdict.reason, verdict.rule, verdict.hint)
    return False


def allows(way_out: Exit, origin: Origin, head: RequestHead) -> bool:
    """Say whether the rules of now allow a request that was admitted before."""
    destination = origin.destination
    address = None if destination.name is not None else destination.address
    verdict, _ = judge_request(way_out.policy, destination.name, address, head)
    return not way_out.policy.holds(verdict)


def admit_tunnel(way_out: Exit, origin: Origin, call: Call, sni: str | None = None) -> Target:
    """Decide where a tunnel goes. Raises: DialDeniedError."""
    destination = origin.destination
    if destination.name is not None and origin.server_name not in (None, destination.name):
        raise DialDeniedError("sni_mismatch", f"dialled {destination.name}, TLS asked for {origin.server_name}")
    address = None if destination.name is not None else destination.address
    policy = way_out.policy
    verdict = policy.tunnel(destination.name, address, destination.port)
    if policy.holds(verdict):
        what = f"{destination.host}:{destination.port} is not allowed ({verdict.reason})"
        raise DialDeniedError(verdict.reason, what, verdict.hint, verdict.rule)
    if not verdict.allowed:
        way_out.spans.would_deny(call, verdict.reason, verdict.rule, verdict.hint)
    if way_out.http_only(destination.host, origin.server_name, sni):
        if policy.enforces:
            what = f"{destination.host}:{destination.port} has an MCPRoute or a budget, which judge HTTP only"
            raise DialDeniedError(HTTP_ONLY, what)
        way_out.spans.would_deny(call, HTTP_ONLY)
    return origin.target


def allows_tunnel(way_out: Exit, origin: Origin, sni: str | None) -> bool:
    """Say whether the rules of now allow a tunnel that is open already."""
    destination, policy = origin.destination, way_out.policy
    address = None if destination.name is not None else destination.address
    if policy.holds(policy.tunnel(destination.name, address, destination.port)):
        return False
    return not (policy.enforces and way_out.http_only(destination.host, origin.server_name, sni))


def _continue_trace(way_out: Exit, request: Request, call: Call) -> TraceContext:
    """Find the span's parent: the agent's own span if it is of the run's trace, else the run.

    A daemon's calls have no trace in common: its own span is the parent, whatever its trace, else there is none.
    """
    own = parse_trace_context(request.values("traceparent"), request.values("tracestate"))
    identity = way_out.spans.identity
    run = identity.context
    joins = own is not None and (not identity.invocation_id or own.trace_id == run.trace_id)
    parent = way_out.spans.place(call, own if joins else None)
    return TraceContext(parent.trace_id, call.span_id, parent.flags, parent.tracestate, run.baggage)
