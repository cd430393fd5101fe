"""The admin API: HTTP and JSON on the unix socket for `clrk`; on TCP health, and the page (page/app.py).

Who may open the socket may see every trace and run every agent (group `clrk`); the API itself asks nobody who they are.
Listings are `{"items": […]}`, streams are NDJSON, errors are problem+json (RFC 9457).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from clrk import __version__
from clrk.core.resources import MAX_BODY_BYTES, Agent
from clrk.gateway.admin.budgets import BudgetsView, ReadBudgets, no_budgets
from clrk.gateway.admin.catalogue import AgentCatalogue, agent_detail, agent_summary, exporter_document
from clrk.gateway.admin.invocations import Recall, await_outcome
from clrk.gateway.admin.listings import encode_lines, follow_lines, list_invocations
from clrk.gateway.admin.parameters import MAX_LIMIT, ParameterError, parse_filter
from clrk.gateway.admin.policy import ExplainCall, PolicyView, no_policy
from clrk.gateway.admin.scrape import Scrape
from clrk.gateway.agent_status import AgentStatusSource
from clrk.gateway.budget_ledger import LedgerError
from clrk.gateway.health import HealthSource
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.store import StoreError, TraceStore

RunTask = Callable[[web.Request, str, str], Awaitable[web.StreamResponse]]

_MAX_WAIT_S: Final = 60.0
_FLUSH_S: Final = 1.0
_DEFAULT_TAIL: Final = 1000
_MAX_NAMED: Final = 4  # invocations that an ambiguous beginning is answered with
_ID_PREFIX: Final = re.compile(r"[0-9a-f-]{1,36}")


def build_admin_app(
    *,
    store: TraceStore,
    catalogue: AgentCatalogue,
    run_task: RunTask,
    health: HealthSource,
    states: AgentStatusSource,
    recall: Recall = lambda _: None,
    page_url: str = "",
    budgets: ReadBudgets = no_budgets,
    explain: ExplainCall = no_policy,
) -> web.Application:
    """Return the application for the unix socket.

    Shape: run_task(request, namespace, name) answers `POST /v1/agents/{namespace}/{name}/run` exactly as the ingress
    answers an invocation; recall returns what the gateway remembers of one, without it the store alone is asked;
    page_url opens the page, with its token; budgets returns what was spent on a UTC day; explain says
    what would happen to a call of an agent.
    """
    api = _AdminApi(store=store, catalogue=catalogue, run_task=run_task, health=health, states=states, recall=recall)
    app = web.Application(middlewares=[_problems], client_max_size=MAX_BODY_BYTES)

    async def page(_request: web.Request) -> web.Response:
        return web.json_response({"url": page_url})

    app.router.add_get("/v1/page", page)
    app.router.add_get("/v1/agents/{namespace}/{name}/explain", PolicyView(explain).__call__)
    app.router.add_get("/v1/budgets", BudgetsView(budgets).__call__)
    app.router.add_get("/v1/status", api.status)
    app.router.add_get("/v1/agents", api.agents)
    app.router.add_get("/v1/agents/{namespace}/{name}", api.agent)
    app.router.add_get("/v1/agents/{namespace}/{name}/invocations", api.agent_invocations)
    app.router.add_get("/v1/agents/{namespace}/{name}/logs", api.logs)
    app.router.add_post("/v1/agents/{namespace}/{name}/run", api.run)
    app.router.add_get("/v1/traces", api.traces)
    app.router.add_get("/v1/traces/{invocation}", api.trace)
    app.router.add_get("/v1/invocations", api.invocations)
    app.router.add_get("/v1/invocations/{invocation}", api.invocation)
    return app


def build_health_app(
    ready: Callable[[], bool], metrics: Callable[[], tuple[bytes, str]] | None = None
) -> web.Application:
    """Return the application for the TCP listener: it says whether we live and serve, and what we measure.

    Shape: metrics returns Prometheus text and its Content-Type; it is called in a thread. The page is added to it.
    """

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    if metrics is not None:
        app.router.add_get("/metrics", Scrape(metrics).__call__)
    return app


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ParameterError as exc:
        return _problem(400, str(exc))
    except (StoreError, LedgerError) as exc:
        return _problem(503, str(exc))
    except web.HTTPException as exc:
        unsaid = exc.reason == HTTPStatus(exc.status).phrase  # aiohttp's own: nobody has said what is wrong
        detail = f"{request.method} {request.path}: {exc.reason}" if unsaid else exc.reason
        return _problem(exc.status, detail, dict(exc.headers))


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    kept = {key: value for key, value in (headers or {}).items() if key.lower() == "allow"}
    return web.json_response(body, status=status, content_type="application/problem+json", headers=kept)


class _AdminApi:
    """The handlers."""

    def __init__(
        self,
        *,
        store: TraceStore,
        catalogue: AgentCatalogue,
        run_task: RunTask,
        health: HealthSource,
        states: AgentStatusSource,
        recall: Recall,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._run_task = run_task
        self._health = health
        self._states = states
        self._recall = recall

    async def status(self, _request: web.Request) -> web.Response:
        writable = await self._store.flush(_FLUSH_S)
        health = await self._health.health()
        agents = len(self._catalogue.all())
        body = {
            "version": __version__,
            "ready": health.ready,
            "startedTimeUnixNano": health.started_ns,
            "agents": agents,
            "configuration": {
                "generation": health.generation,
                "agents": agents,
                "refusals": health.refusals,
                "problems": health.reload_problems,
                "notes": health.reload_notes,
            },
            "sandboxes": health.counters.sandboxes,
            "kernel": health.counters.values,
            "store": {
                "path": str(self._store.path),
                "writable": writable,
                "lastSeq": await self._store.last_seq() if writable else 0,
                "queuedBytes": self._store.queued_bytes,
                "counters": dict(self._store.counters),
            },
            "exporters": [exporter_document(exporter) for exporter in health.exporters],
        }
        return web.json_response(body)

    async def agents(self, _request: web.Request) -> web.Response:
        agents = self._catalogue.all()
        return web.json_response({"items": [agent_summary(one, self._states.agent_status(one)) for one in agents]})

    async def agent(self, request: web.Request) -> web.Response:
        agent = self._find(request)
        await self._store.flush(_FLUSH_S)
        spending = msgspec.to_builtins(await self._store.spending(*agent.key))
        return web.json_response(agent_detail(agent, self._states.agent_status(agent)) | {"spending": spending})

    async def invocations(self, request: web.Request) -> web.Response:
        await self._store.flush(_FLUSH_S)
        return web.json_response(await list_invocations(self._store, request.query))

    async def agent_invocations(self, request: web.Request) -> web.Response:
        """Those of an agent that is gone from the configuration stay readable."""
        agent = f"{request.match_info['namespace']}/{request.match_info['name']}"
        await self._store.flush(_FLUSH_S)
        return web.json_response(await list_invocations(self._store, {**request.query, "agent": agent}))

    async def run(self, request: web.Request) -> web.StreamResponse:
        return await self._run_task(request, request.match_info["namespace"], request.match_info["name"])

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Lines of an agent that is gone from the configuration stay readable: no look-up in the catalogue."""
        agent = f"{request.match_info['namespace']}/{request.match_info['name']}"
        tail = _number(request, "tail", _DEFAULT_TAIL, MAX_LIMIT)
        invocation = ""
        await self._store.flush(_FLUSH_S)
        if prefix := request.query.get("invocation", ""):
            invocation = await self._resolve(prefix)
        if request.query.get("follow") == "true":
            return await _ndjson(request, follow_lines(self._store, agent, invocation, int(tail)), at_once=True)
        lines = await self._store.logs(agent, invocation_id=invocation, tail=int(tail))

        async def chunks() -> AsyncIterator[bytes]:
            yield encode_lines(lines)

        return await _ndjson(request, chunks())

    async def traces(self, request: web.Request) -> web.StreamResponse:
        """Without a limit: everything, oldest first, as a stream. With one: the newest, oldest of them first."""
        wanted, limit = parse_filter(request.query, time.time_ns())
        await self._store.flush(_FLUSH_S)
        return await _ndjson(request, self._newest(wanted, limit) if limit is not None else self._all(wanted))

    async def trace(self, request: web.Request) -> web.StreamResponse:
        await self._store.flush(_FLUSH_S)
        invocation = await self._resolve(request.match_info["invocation"])
        return await _ndjson(request, self._all(SpanFilter(invocation_id=invocation)))

    async def invocation(self, request: web.Request) -> web.Response:
        wait_s = _number(request, "wait", 0.0, _MAX_WAIT_S)
        invocation = request.match_info["invocation"]
        await self._store.flush(_FLUSH_S)
        outcome = await await_outcome(self._store, self._recall, invocation, wait_s)
        if outcome is None:
            return _problem(404, f"no invocation {invocation[:64]} in the store")
        return web.json_response(outcome)

    async def _all(self, wanted: SpanFilter) -> AsyncIterator[bytes]:
        async for page in self._store.spans(wanted):
            yield b"".join(span.json + b"\n" for span in page)

    async def _newest(self, wanted: SpanFilter, limit: int) -> AsyncIterator[bytes]:
        newest = [span.json async for page in self._store.spans(wanted, order="newest", limit=limit) for span in page]
        for raw in reversed(newest):
            yield raw + b"\n"

    async def _resolve(self, prefix: str) -> str:
        """Return the invocation id that begins with prefix."""
        if not _ID_PREFIX.fullmatch(prefix):
            raise ParameterError(f"invocation: write an id, or its beginning (hex digits and -), not {prefix[:64]!r}")
        found = await self._store.invocations(prefix)
        if not found:
            raise web.HTTPNotFound(reason=f"no invocation {prefix} in the store")
        if len(found) > 1:
            several = ", ".join(found[:_MAX_NAMED]) + (", …" if len(found) > _MAX_NAMED else "")
            raise web.HTTPConflict(reason=f"{prefix} is the beginning of {several}; write more of it")
        return found[0]

    def _find(self, request: web.Request) -> Agent:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        agent = self._catalogue.find(namespace, name)
        if agent is None:
            raise web.HTTPNotFound(reason=f"no agent {json.dumps(f'{namespace}/{name}')}")
        return agent


def _number(request: web.Request, name: str, default: float, maximum: float) -> float:
    raw = request.query.get(name)
    if raw is None:
        return default
    if not re.fullmatch(r"\d{1,9}(\.\d{1,3})?", raw, re.ASCII) or float(raw) > maximum:
        raise ParameterError(f"{name}: write a number from 0 to {maximum:g}, not {raw[:40]!r}")
    return float(raw)


async def _ndjson(request: web.Request, chunks: AsyncIterator[bytes], *, at_once: bool = False) -> web.StreamResponse:
    """Stream lines. The first is read before the head goes out, so that a store error is a status and not a cut.

    Shape: at_once sends the head now, where the first line may be hours away.
    """
    first: bytes | None = b"" if at_once else await anext(chunks, None)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    if first is not None:
        if first:
            await response.write(first)
        try:
            async for chunk in chunks:
                await response.write(chunk)
        except StoreError:  # half an answer must not look like a whole one: no terminator, but an abort
            if request.transport is not None:
                request.transport.abort()
            return response
    await response.write_eof()
    return response
