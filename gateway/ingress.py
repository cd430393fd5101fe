"""Requests from callers (CONTRACT section 4): which agent, may it run, what is the event, what is the answer.

Any method on /agents/{name}[/rest] or /agents/{namespace}/{name}[/rest], or any path with X-Clrk-TaskAgent. The first
two overlap; an agent that exists by the longer reading wins. `clrk agents run-task` arrives through handle_run_task and
takes the same way from there on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Protocol

from aiohttp import web
from multidict import CIMultiDict

from clrk.core.ids import new_invocation_id
from clrk.core.resources import MAX_BODY_BYTES, MAX_TIMEOUT_S, TaskAgent
from clrk.gateway.agents import AgentTable
from clrk.gateway.answer import Answer
from clrk.gateway.dispatch import Dispatch, Target, http_origin, split_target
from clrk.gateway.envelope import (
    EnvelopeError,
    Event,
    Received,
    caller_attributes,
    event_attributes,
    request_id,
)
from clrk.gateway.invocation import Order
from clrk.gateway.invocations import Invocations, Slot
from clrk.gateway.outcome import CALLER_GONE, Outcome, Phase
from clrk.gateway.problem import Problem, read_body
from clrk.gateway.structured import is_structured, read_binary, read_structured
from clrk.gateway.telemetry.spans import Recorder

_LOG: Final = logging.getLogger(__name__)
_BODY_IDLE_S: Final = 30.0
_BODY_TOTAL_S: Final = 300.0
_TRIGGER: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
CLI_TRIGGER: Final = "cli"


class Headers(Protocol):
    """What is needed of a request's headers."""

    def getall(self, key: str, default: list[str], /) -> list[str]:
        """Return every value of a header, whatever its case."""


class IdentitySource(Protocol):
    """Finds out who the caller is (CONTRACT section 12): values of fields. Both raise Problem 400, 401, 413 or 503."""

    async def check_headers(self, agent: TaskAgent, headers: Headers) -> tuple[tuple[str, str], ...]:
        """Return what needs no body."""

    async def check_body(self, agent: TaskAgent, headers: Headers, body: bytes) -> tuple[tuple[str, str], ...]:
        """Return what is in the event's data, whose type is the Content-Type."""


class Ingress:
    """Answers requests. One per gateway; handle and handle_run_task are aiohttp handlers."""

    def __init__(
        self, agents: AgentTable, invocations: Invocations, recorder: Recorder, identities: IdentitySource
    ) -> None:
        self._agents = agents
        self._invocations = invocations
        self._recorder = recorder
        self._identities = identities
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request on the ingress listener."""
        return await self._answer(request, lambda: self._route(request))

    async def handle_run_task(self, request: web.BaseRequest, namespace: str, name: str) -> web.StreamResponse:
        """Answer `clrk agents run-task`: as an HTTP caller, with trigger `cli` and X-Clrk-Timeout in seconds."""

        def route() -> Target:
            agent = self._find(namespace, name)
            return Target(agent, "", CLI_TRIGGER, path=f"/agents/{namespace}/{name}", by_operator=True)

        return await self._answer(request, route)

    async def _answer(self, request: web.BaseRequest, route: Callable[[], Target]) -> web.StreamResponse:
        """Every answer carries an invocation id; every request that names an agent leaves a span and a record."""
        self._open += 1
        self._idle.clear()
        try:
            return await self._answer_target(request, route())
        except Problem as problem:  # of route: there is no such agent that it could be kept for
            return problem.response(new_invocation_id())
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _answer_target(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        origin = http_origin(request, target.route, joins_trace=target.trigger != CLI_TRIGGER)
        dispatch = Dispatch(origin, target, new_invocation_id())
        try:
            if request.method == "CONNECT":  # what follows its head is a tunnel, not a body
                raise Problem(501, "this is no proxy: CONNECT asks for a tunnel", {"Connection": "close"})
            target = replace(target, trigger=_trigger(request, target))
            dispatch = Dispatch(origin, target, self._invocations.claim_id(_one(request, "X-Clrk-Invocation-ID")))
            dispatch.begin(self._recorder)  # before the record: from the span, a lost record can be made again
            slot = self._invocations.admit(dispatch.pending(), target.agent)
        except Problem as problem:  # a refused id is somebody else's: this request keeps its own
            return self._reject(dispatch, problem)
        try:
            response = await self._invoke(request, dispatch, slot)
            dispatch.status = response.status
            return response
        except Problem as problem:
            dispatch.status = problem.status
            return problem.response(dispatch.invocation_id)
        except (asyncio.CancelledError, ConnectionError):
            dispatch.disconnected = True
            dispatch.outcome = dispatch.outcome or CALLER_GONE
            raise
        except Exception:  # the root of a request: a bug of ours must not leave its caller without an answer
            if dispatch.status is not None:  # headers are out: aiohttp logs it and drops the connection
                raise
            _LOG.exception("request failed", extra={"invocation_id": dispatch.invocation_id})
            dispatch.status = 500
            return Problem(500, "the gateway failed; its log says why").response(dispatch.invocation_id)
        finally:
            dispatch.record(self._recorder)
            if dispatch.status is not None:
                self._invocations.told(dispatch.invocation_id, dispatch.status)

    def _reject(self, dispatch: Dispatch, problem: Problem) -> web.Response:
        dispatch.status = problem.status
        dispatch.outcome = Outcome(Phase.REJECTED, message=problem.detail)
        dispatch.record(self._recorder)
        self._invocations.reject(dispatch.pending(), problem.detail, problem.status)
        return problem.response(dispatch.invocation_id)

    async def _invoke(self, request: web.BaseRequest, dispatch: Dispatch, slot: Slot) -> web.StreamResponse:
        invocations, agent = self._invocations, dispatch.target.agent
        try:
            timeout_s = _timeout(request, dispatch.target)
            event = await self._read_event(request, dispatch, slot)
            order = Order(
                identity=dispatch.identity,
                agent=agent,
                gateway=self._agents.gateway_of(agent),
                event=event,
                dispatch_span_id=dispatch.span_id,
                timeout_s=timeout_s,
            )
            invocation = invocations.start(order, slot)
        except BaseException as exc:
            slot.release()
            slot.answered()
            dispatch.outcome = _outcome_before_start(exc)
            invocations.finish(dispatch.invocation_id, dispatch.outcome)
            raise
        answer = Answer(request, dispatch, invocation)
        try:
            return await answer.send()
        finally:
            dispatch.identity = invocation.identity  # by now it names the sandbox
            answer.close()  # after a complete answer, or a failure that was told, this changes nothing
            slot.answered()

    async def _read_event(self, request: web.BaseRequest, dispatch: Dispatch, slot: Slot) -> Event:
        """Read the event that the agent will get. A caller who is not who he must be, need not send its body."""
        agent = dispatch.target.agent
        head = _read_head(request)
        if not dispatch.target.by_operator:
            dispatch.identify(await self._identities.check_headers(agent, request.headers))
        received = await _read_body(request, head, slot)
        data_type = CIMultiDict({"Content-Type": received.content_type} if received.content_type else {})
        if not dispatch.target.by_operator:
            found = await self._identities.check_body(agent, data_type, received.body)
            dispatch.identify(dispatch.identity.caller_fields + found)
        path, query = (dispatch.target.path, "") if dispatch.target.path else split_target(request)
        context = dispatch.event_context(datetime.now(UTC), method=request.method, path=path, query=query)
        return Event(event_attributes(received, context, request_id(tuple(request.headers.items()))), received.body)

    # --- which agent ------------------------------------------------------------------------------------------------

    def _route(self, request: web.BaseRequest) -> Target:
        named = _one(request, "X-Clrk-TaskAgent")
        if named is not None:
            namespace, _, name = named.rpartition("/")
            if not _LABEL.fullmatch(name) or not _LABEL.fullmatch(namespace or "default"):
                raise Problem(400, "X-Clrk-TaskAgent: write namespace/name")
            return Target(self._find(namespace or "default", name))
        segments = split_target(request)[0].split("/")
        if len(segments) < 3 or segments[1] != "agents" or not segments[2]:
            raise Problem(400, "no agent named: use /agents/NAME, /agents/NAMESPACE/NAME or X-Clrk-TaskAgent")
        if len(segments) > 3 and self._agents.find(segments[2], segments[3]) is not None:
            return Target(self._find(segments[2], segments[3]), "/agents/{namespace}/{name}")
        if len(segments) > 3 and self._agents.find("default", segments[2]) is None:
            raise Problem(404, f"no agent {_show(*segments[2:4])} on this host, and no default/{segments[2][:63]}")
        return Target(self._find("default", segments[2]), "/agents/{name}")

    def _find(self, namespace: str, name: str) -> TaskAgent:
        agent = self._agents.find(namespace, name)
        if agent is None:
            raise Problem(404, f"no agent {_show(namespace, name)} on this host")
        if not isinstance(agent, TaskAgent):
            raise Problem(405, "a DaemonAgent runs by itself and takes no requests", {"Allow": ""})
        return agent


def _one(request: web.BaseRequest, header: str) -> str | None:
    """Return a header that may be given once.

    Raises: Problem 400 when it is given more often: two readers could take different ones.
    """
    values = request.headers.getall(header, [])
    if len(values) > 1:
        raise Problem(400, f"{header}: given more than once")
    return values[0] if values else None


def _trigger(request: web.BaseRequest, target: Target) -> str:
    """Return the trigger that the request names; run-task has its own."""
    trigger = _one(request, "X-Clrk-Trigger") if target.trigger != CLI_TRIGGER else None
    if trigger and not _TRIGGER.fullmatch(trigger):
        raise Problem(400, "X-Clrk-Trigger: a-z, 0-9 and -, a letter first, at most 32 characters")
    return trigger or target.trigger


def _outcome_before_start(exc: BaseException) -> Outcome:
    if isinstance(exc, Problem):
        return Outcome(Phase.REJECTED, message=exc.detail, has_run=False)
    if isinstance(exc, asyncio.CancelledError | ConnectionError):
        return replace(CALLER_GONE, has_run=False)
    return Outcome(Phase.FAILED, message="the gateway failed", has_run=False)


@dataclass(frozen=True, slots=True)
class _Head:
    headers: list[tuple[str, str]]
    attributes: dict[str, str]
    structured: bool


def _read_head(request: web.BaseRequest) -> _Head:
    """Read what the headers say of the event; nothing of the body is needed for what is wrong here.

    Raises: Problem 400 or 415.
    """
    headers = list(request.headers.items())
    try:
        return _Head(headers, caller_attributes(headers), is_structured(headers))
    except EnvelopeError as exc:
        raise Problem(exc.status, str(exc)) from exc


async def _read_body(request: web.BaseRequest, head: _Head, slot: Slot) -> Received:
    """Read the body.

    Raises: Problem 400, 408, 413, 417 or 503; ConnectionError when the caller has gone.
    """
    await _continue(request)
    body = await read_body(
        request, limit=MAX_BODY_BYTES, idle_s=_BODY_IDLE_S, total_s=_BODY_TOTAL_S, charge=slot.charge
    )
    try:
        if not head.structured:
            return read_binary(head.attributes, head.headers, body)
        received = read_structured(body)
    except EnvelopeError as exc:
        raise Problem(exc.status, str(exc)) from exc
    slot.charge(len(received.body))
    return received


def _timeout(request: web.BaseRequest, target: Target) -> float:
    """Return the caller's wish in seconds, never above the agent's own timeout; 0: the agent's."""
    text = _one(request, "X-Clrk-Timeout")
    if text is None:
        return 0.0
    try:
        wish = float(text)
    except ValueError:
        wish = math.nan
    if not 0 < wish <= MAX_TIMEOUT_S:
        raise Problem(400, f"X-Clrk-Timeout: seconds, above 0 and at most {MAX_TIMEOUT_S:.0f}")
    return min(wish, target.agent.spec.timeout)


async def _continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue` now that the request is admitted (RFC 9110, section 10.1.1)."""
    expectation = request.headers.get("Expect")
    if expectation is None:
        return
    if expectation.lower() != "100-continue":
        raise Problem(417, "Expect: only 100-continue")
    if request.transport is not None and not isinstance(request, web.Request):  # an Application has answered already
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _show(namespace: str, name: str) -> str:
    return f"{namespace[:63]}/{name[:63]}"
