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
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from clrk.core.ids import new_invocation_id
from clrk.core.resources import MAX_BODY_BYTES, MAX_TIMEOUT_S, TaskAgent
from clrk.gateway.agents import AgentTable
from clrk.gateway.answer import Answer
from clrk.gateway.dispatch import Dispatch, Target, split_target
from clrk.gateway.envelope import EnvelopeError, Event, EventContext, check_body, event_attributes
from clrk.gateway.invocation import Order
from clrk.gateway.invocations import Invocations, Slot
from clrk.gateway.outcome import Outcome, Phase
from clrk.gateway.problem import Problem, read_body
from clrk.gateway.telemetry.spans import Recorder

_LOG: Final = logging.getLogger(__name__)
_BODY_IDLE_S: Final = 30.0
_BODY_TOTAL_S: Final = 300.0
_TRIGGER: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
CLI_TRIGGER: Final = "cli"


class Ingress:
    """Answers requests. One per gateway; handle and handle_run_task are aiohttp handlers."""

    def __init__(self, agents: AgentTable, invocations: Invocations, recorder: Recorder) -> None:
        self._agents = agents
        self._invocations = invocations
        self._recorder = recorder
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
            return Target(self._find(namespace, name), "", CLI_TRIGGER, path=f"/agents/{namespace}/{name}")

        return await self._answer(request, route)

    async def _answer(self, request: web.BaseRequest, route: Callable[[], Target]) -> web.StreamResponse:
        """Every answer carries an invocation id; every request that names an agent leaves a span."""
        self._open += 1
        self._idle.clear()
        try:
            return await self._answer_target(request, route)
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _answer_target(self, request: web.BaseRequest, route: Callable[[], Target]) -> web.StreamResponse:
        try:
            target = route()
        except Problem as problem:
            return problem.response(new_invocation_id())
        try:
            dispatch = Dispatch(request, target, self._invocations.claim_id(_one(request, "X-Clrk-Invocation-ID")))
        except Problem as problem:  # the refused id is somebody else's: this request gets its own
            dispatch = Dispatch(request, target, new_invocation_id())
            return self._refuse(dispatch, problem)
        try:
            response = await self._invoke(request, dispatch)
            dispatch.status = response.status
            return response
        except Problem as problem:
            return self._refuse(dispatch, problem, record=False)
        except (asyncio.CancelledError, ConnectionError):
            dispatch.disconnected = True
            dispatch.outcome = dispatch.outcome or Outcome(Phase.CANCELLED)
            raise
        except Exception:  # the root of a request: a bug of ours must not leave its caller without an answer
            if dispatch.status is not None:  # headers are out: aiohttp logs it and drops the connection
                raise
            _LOG.exception("request failed", extra={"invocation_id": dispatch.invocation_id})
            return self._refuse(dispatch, Problem(500, "the gateway failed; its log says why"), record=False)
        finally:
            dispatch.record(self._recorder)

    def _refuse(self, dispatch: Dispatch, problem: Problem, *, record: bool = True) -> web.Response:
        dispatch.status = problem.status
        if record:
            dispatch.record(self._recorder)
        return problem.response(dispatch.invocation_id)

    async def _invoke(self, request: web.BaseRequest, dispatch: Dispatch) -> web.StreamResponse:
        invocations, target = self._invocations, dispatch.target
        slot = invocations.admit(dispatch.invocation_id, target.agent, target.trigger)
        try:
            timeout_s = _timeout(request, target)
            event = await self._read_event(request, dispatch, slot)
            order = Order(
                identity=dispatch.identity,
                agent=target.agent,
                gateway=self._agents.gateway_of(target.agent),
                event=event,
                dispatch_span_id=dispatch.span_id,
                timeout_s=timeout_s,
            )
            invocation = invocations.start(order, slot)
        except BaseException as exc:
            slot.release()
            slot.answered()
            phase = Phase.REJECTED if isinstance(exc, Problem) else Phase.CANCELLED
            dispatch.outcome = Outcome(phase, message=exc.detail if isinstance(exc, Problem) else "")
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
        target, metadata = dispatch.target, dispatch.target.agent.metadata
        path, query = (target.path, "") if target.path else split_target(request)
        context = dispatch.identity.context
        try:
            attributes = event_attributes(
                tuple(request.headers.items()),
                EventContext(
                    namespace=metadata.namespace,
                    agent=metadata.name,
                    revision=dispatch.identity.agent_revision,
                    invocation_id=dispatch.invocation_id,
                    trigger=target.trigger,
                    traceparent=context.traceparent,
                    tracestate=context.tracestate,
                    method=request.method,
                    path=path,
                    query=query,
                    time=datetime.now(UTC),
                ),
            )
            await _continue(request)
            body = await read_body(
                request, limit=MAX_BODY_BYTES, idle_s=_BODY_IDLE_S, total_s=_BODY_TOTAL_S, charge=slot.charge
            )
            check_body(attributes.get("datacontenttype", ""), body)
        except EnvelopeError as exc:
            raise Problem(400, str(exc)) from exc
        return Event(attributes, body)

    # --- which agent ------------------------------------------------------------------------------------------------

    def _route(self, request: web.BaseRequest) -> Target:
        trigger = _one(request, "X-Clrk-Trigger") or "http"
        if not _TRIGGER.fullmatch(trigger):
            raise Problem(400, "X-Clrk-Trigger: a-z, 0-9 and -, a letter first, at most 32 characters")
        named = _one(request, "X-Clrk-TaskAgent")
        if named is not None:
            namespace, _, name = named.rpartition("/")
            if not _LABEL.fullmatch(name) or not _LABEL.fullmatch(namespace or "default"):
                raise Problem(400, "X-Clrk-TaskAgent: write namespace/name")
            return Target(self._find(namespace or "default", name), "", trigger)
        segments = split_target(request)[0].split("/")
        if len(segments) < 3 or segments[1] != "agents" or not segments[2]:
            raise Problem(400, "no agent named: use /agents/NAME, /agents/NAMESPACE/NAME or X-Clrk-TaskAgent")
        if len(segments) > 3 and self._agents.find(segments[2], segments[3]) is not None:
            return Target(self._find(segments[2], segments[3]), "/agents/{namespace}/{name}", trigger)
        if self._agents.find("default", segments[2]) is not None:
            return Target(self._find("default", segments[2]), "/agents/{name}", trigger)
        raise Problem(404, "no such agent on this host")

    def _find(self, namespace: str, name: str) -> TaskAgent:
        agent = self._agents.find(namespace, name)
        if agent is None:
            raise Problem(404, "no such agent on this host")
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
