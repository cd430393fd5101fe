"""The views of the page: what each address answers. Reads the store and the tables of agents, changes nothing."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from clrk.core.resources import Agent, DaemonAgent
from clrk.gateway.admin.budgets import ReadBudgets, no_budgets, parse_day
from clrk.gateway.admin.catalogue import AgentCatalogue, agent_detail
from clrk.gateway.admin.page.details import ALONE, IN_WATERFALL, Text, details_of
from clrk.gateway.admin.page.listing import (
    PAGE_ROWS,
    PHASES,
    TRIGGERS,
    given_fields,
    parse_listing,
    show_before,
)
from clrk.gateway.admin.page.reading import (
    PAGE_ROWS as SPAN_ROWS,
)
from clrk.gateway.admin.page.reading import (
    SpanSet,
    decode_span,
    find_span,
    lay_out,
    read_spans,
)
from clrk.gateway.admin.page.rendering import path, render
from clrk.gateway.admin.page.waterfall import Axis, Place, Row
from clrk.gateway.admin.parameters import ParameterError
from clrk.gateway.agent_status import AgentStatusSource
from clrk.gateway.budget_ledger import LedgerError
from clrk.gateway.health import HealthSource
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.query import LogLine, SpanFilter
from clrk.gateway.telemetry.records import InvocationSummary
from clrk.gateway.telemetry.store import StoreError, TraceStore

_FLUSH_S: Final = 1.0
_MAX_LOG_LINES: Final = 500
_MAX_CALLS: Final = 50
_UNFINISHED: Final = frozenset({Phase.PENDING, Phase.RUNNING})
_INVOCATION: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PREFIX: Final = re.compile(r"[0-9a-f-]{1,36}")
_TRACE: Final = re.compile(r"[0-9a-f]{32}")
_SPAN: Final = re.compile(r"[0-9a-f]{16}")
_NUMBER: Final = re.compile(r"\d{1,9}", re.ASCII)
_ALARMING: Final = re.compile(r"drop|fail|damaged|bad_|lost|error|malformed|overflow")


@dataclass(frozen=True, slots=True)
class PageSources:
    """What the page shows."""

    store: TraceStore
    catalogue: AgentCatalogue
    status: AgentStatusSource
    health: HealthSource
    budgets: ReadBudgets = no_budgets


class Views:
    """The handlers."""

    def __init__(self, sources: PageSources) -> None:
        self._store = sources.store
        self._catalogue = sources.catalogue
        self._status = sources.status
        self._health = sources.health
        self._budgets = sources.budgets
        self._boot = f"{time.time_ns():x}"
        self._commit: asyncio.Event | None = None
        self._commits = 0

    def add_to(self, router: web.UrlDispatcher, index: Callable[[web.Request], web.Response | None]) -> None:
        """Register the addresses; index may answer `/` before the list of invocations does."""

        async def root(request: web.Request) -> web.StreamResponse:
            return index(request) or await self.invocations(request)

        router.add_get("/", root)
        router.add_get("/find", self.find)
        router.add_get("/invocations/{invocation}", self.invocation)
        router.add_get("/invocations/{invocation}/spans/{span}", self.span)
        router.add_get("/traces/{trace}", self.trace)
        router.add_get("/traces/{trace}/spans/{span}", self.span)
        router.add_get("/agents", self.agents)
        router.add_get("/agents/{namespace}/{name}", self.agent)
        router.add_get("/agents/{namespace}/{name}/logs", self.logs)
        router.add_get("/budgets", self.budgets)
        router.add_get("/health", self.health)

    # --- invocations ------------------------------------------------------------------------------------------------

    async def invocations(self, request: web.Request) -> web.Response:
        """The list, newest first."""
        mistake, rows, older = "", list[InvocationSummary](), ""
        query = {name: value for name, value in request.query.items() if value}
        given, paged = given_fields(query), "before" in query
        moves = bool(given["since"] or given["until"])  # a window that moves with the clock changes by itself
        tag = await self._fresh(request, moves=moves)
        if tag is None:
            return web.Response(status=304)
        try:
            listing = parse_listing(query, time.time_ns())
        except ParameterError as exc:
            mistake = str(exc)
        else:
            rows = await self._store.list_invocations(listing.wanted, limit=PAGE_ROWS + 1, before=listing.before)
            older = show_before(rows[PAGE_ROWS - 1]) if len(rows) > PAGE_ROWS else ""
        response = await _html(
            "invocations.html", 400 if mistake else 200, view="Invocations", live=not paged and not mistake,
            given=given, filtered=any(given.values()), mistake=mistake, rows=rows[:PAGE_ROWS], older=older,
            paged=paged, phases=PHASES, triggers=TRIGGERS, agents=self._catalogue.all(),
        )  # fmt: skip
        response.headers["ETag"] = tag
        return response

    async def find(self, request: web.Request) -> web.Response:
        """Go to the invocation that begins with what was entered."""
        prefix = request.query.get("id", "").strip().lower()
        if not _PREFIX.fullmatch(prefix):
            return await _problem(400, "No invocation id", "An id is hex digits and -, or their beginning.")
        await self._store.flush(_FLUSH_S)
        found = await self._store.invocations(prefix)
        if not found:
            return await _problem(404, "Not found", f"No invocation begins with {prefix}.")
        if len(found) > 1:
            return await _problem(300, "Several", f"Several invocations begin with {prefix}:", found)
        return web.Response(status=303, headers={"Location": path("invocations", found[0])})

    async def invocation(self, request: web.Request) -> web.Response:
        """One invocation: facts, waterfall, log."""
        invocation = request.match_info["invocation"]
        if not _INVOCATION.fullmatch(invocation):
            return await _problem(404, "Not found", "That is no invocation id.")
        tag = await self._fresh(request)
        if tag is None:
            return web.Response(status=304)
        summary = await self._store.find_invocation(invocation)
        spans = await read_spans(self._store, SpanFilter(invocation_id=invocation))
        if summary is None and not spans.raw:
            return await _problem(404, "Not found", f"No invocation {invocation} in the store.")
        lines = list[LogLine]()
        if summary is not None:
            agent = f"{summary.record.namespace}/{summary.record.agent}"
            lines = await self._store.logs(agent, invocation_id=invocation, tail=_MAX_LOG_LINES)
        response = await asyncio.to_thread(
            _waterfall_page, spans, _offset(request), summary=summary, lines=lines, base=("invocations", invocation)
        )
        response.headers["ETag"] = tag
        return response

    async def trace(self, request: web.Request) -> web.Response:
        """One trace: the calls of a DaemonAgent belong to no invocation."""
        trace = request.match_info["trace"]
        spans = SpanSet([], False)
        if _TRACE.fullmatch(trace):
            await self._store.flush(_FLUSH_S)
            spans = await read_spans(self._store, SpanFilter(trace_id=trace))
        if not spans.raw:
            return await _problem(404, "Not found", "No such trace in the store.")
        return await asyncio.to_thread(_waterfall_page, spans, _offset(request), base=("traces", trace))

    async def span(self, request: web.Request) -> web.Response:
        """One span, whole."""
        span_id = request.match_info["span"]
        if (trace := request.match_info.get("trace")) is not None:
            base, wanted, form = ("traces", trace), SpanFilter(trace_id=trace), _TRACE
        else:
            invocation = request.match_info["invocation"]
            base, wanted, form = ("invocations", invocation), SpanFilter(invocation_id=invocation), _INVOCATION
        document = None
        if form.fullmatch(base[1]) and _SPAN.fullmatch(span_id):
            await self._store.flush(_FLUSH_S)
            document = await find_span(self._store, wanted, span_id)
        if document is None:
            return await _problem(404, "Not found", "No such span in the store.")
        resource = [(key, Text.cut(value, ALONE.value)) for key, value in sorted(document["resource"].items())]
        return await _html(
            "span.html", view="Invocations", base=base, row=_alone(document), it=details_of(document, ALONE),
            resource=resource,
        )  # fmt: skip

    # --- agents -----------------------------------------------------------------------------------------------------

    async def agents(self, _request: web.Request) -> web.Response:
        """Every agent with its state."""
        rows = [(agent, self._status.agent_status(agent)) for agent in self._catalogue.all()]
        return await _html("agents.html", view="Agents", rows=rows)

    async def agent(self, request: web.Request) -> web.Response:
        """One agent."""
        agent = self._find(request)
        if agent is None:
            return await _problem(404, "Not found", "No such agent in the present configuration.")
        calls = list[Row]()
        if isinstance(agent, DaemonAgent):
            await self._store.flush(_FLUSH_S)
            wanted = SpanFilter(agent=f"{agent.metadata.namespace}/{agent.metadata.name}")
            async for spans in self._store.spans(wanted, order="newest", limit=_MAX_CALLS):
                calls += [_alone(decode_span(span.json)) for span in spans]
        return await _html(
            "agent.html", view="Agents", agent=agent, status=self._status.agent_status(agent), calls=calls,
            spec=json.dumps(agent_detail(agent)["spec"], indent=2, ensure_ascii=False),
        )  # fmt: skip

    async def logs(self, request: web.Request) -> web.Response:
        """The last lines of an agent, also of one that is gone from the configuration."""
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        await self._store.flush(_FLUSH_S)
        lines = await self._store.logs(f"{namespace}/{name}", tail=_MAX_LOG_LINES)
        if not lines and self._find(request) is None:
            return await _problem(404, "Not found", "No such agent, and no lines of one.")
        return await _html("logs.html", view="Agents", namespace=namespace, name=name, lines=lines)

    # --- budgets ----------------------------------------------------------------------------------------------------

    async def budgets(self, request: web.Request) -> web.Response:
        """What was spent on a day, and what is left."""
        try:
            report = self._budgets(parse_day(request.query))
        except ParameterError as exc:
            return await _problem(400, "No such day", str(exc))
        except LedgerError as exc:
            return await _problem(503, "The ledger of budgets can not be read", str(exc))
        return await _html("budgets.html", view="Budgets", report=report, live="day" not in request.query)

    # --- health -----------------------------------------------------------------------------------------------------

    async def health(self, _request: web.Request) -> web.Response:
        """How the daemon stands; also when the store can not be read, for that is when one looks."""
        health = await self._health.health()
        counters = dict(self._store.counters)
        store: dict[str, Any] = {
            "path": self._store.path, "queued": self._store.queued_bytes, "counters": counters,
            "follows": await self._store.flush(_FLUSH_S), "size": await asyncio.to_thread(self._store_size),
            "last_seq": 0, "error": "",
        }  # fmt: skip
        try:
            store["last_seq"] = await self._store.last_seq()
        except StoreError as exc:
            store["error"] = str(exc)
        alarming = {name for name in (*counters, *health.counters.values) if _ALARMING.search(name)}
        return await _html(
            "health.html", view="Health", h=health, store=store, agents=len(self._catalogue.all()), alarming=alarming
        )

    def _store_size(self) -> int:
        files = self._store.path.parent.glob(f"{self._store.path.name}*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def _find(self, request: web.Request) -> Agent | None:
        return self._catalogue.find(request.match_info["namespace"], request.match_info["name"])

    async def _fresh(self, request: web.Request, *, moves: bool = False) -> str | None:
        """Return the tag of the store as it is now; None when the browser has seen this state."""
        self._count_commits()
        tag = f'"{self._boot}-{self._commits}"'
        if not moves and request.headers.get("If-None-Match") == tag:
            return None
        await self._store.flush(_FLUSH_S)
        self._count_commits()
        return f'"{self._boot}-{self._commits}"'

    def _count_commits(self) -> None:
        if (event := self._store.committed) is not self._commit:  # each commit has an event of its own
            self._commit = event
            self._commits += 1


def _waterfall_page(
    spans: SpanSet,
    offset: int,
    *,
    base: tuple[str, str],
    summary: InvocationSummary | None = None,
    lines: list[LogLine] | None = None,
) -> web.Response:
    """Lay out and render. Runs in a thread: thousands of spans must not hold up calls."""
    record = summary.record if summary is not None else None
    falls = lay_out(spans, offset, record, time.time_ns())
    rows = [(row, details_of(document, IN_WATERFALL)) for row, document in falls.rows]
    live = record is not None and record.phase in _UNFINISHED
    name = record.agent if record is not None else base[1]
    html = render(
        "invocation.html", view="Invocations", heading=name, live=live, r=record,
        t=summary.totals if summary is not None else None, trace_id=base[1] if base[0] == "traces" else "",
        rows=rows, total=falls.total, unread=spans.unread, ticks=falls.ticks, first=falls.first, more=falls.more,
        page_rows=SPAN_ROWS, base=base, lines=lines, max_lines=_MAX_LOG_LINES,
    )  # fmt: skip
    return web.Response(text=html, content_type="text/html")


def _alone(document: dict[str, Any]) -> Row:
    start_ns = document["start_time_unix_nano"]
    return Row(document, Place(0, 0, 0), Axis(start_ns, max(start_ns + 1, document["end_time_unix_nano"])), 0)


def _offset(request: web.Request) -> int:
    raw = request.query.get("offset", "0")
    return int(raw) if _NUMBER.fullmatch(raw) else 0


async def _html(template: str, http_status: int = 200, **values: Any) -> web.Response:
    html = await asyncio.to_thread(render, template, **values)
    return web.Response(status=http_status, text=html, content_type="text/html")


async def _problem(status: int, title: str, says: str, choices: list[str] | None = None) -> web.Response:
    return await _html("problem.html", status, view="", title=title, says=says, choices=choices or [])


async def unreadable(exc: StoreError) -> web.Response:
    """Return the page for a store that can not be read."""
    return await _problem(503, "The trace store can not be read", str(exc))


async def not_found() -> web.Response:
    """Return the page for an address that is none."""
    return await _problem(404, "Not found", "There is nothing at this address.")
