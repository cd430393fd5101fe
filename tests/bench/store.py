"""Fill a store with a million spans of 100,000 invocations, and time what the guide's debugging session asks of it.

    .venv/bin/python -P tests/bench/store.py [--spans 1000000] [--keep FOLDER]

Everything goes through the real writer, in the mix of a host with 20 agents over a day: LLM calls, plain HTTP, now and
then a denial or a failure, two lines of log per invocation. Each question is asked seven times through TraceStore on a
store that was closed and opened again; the table shows the median and the slowest.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from asked import Asked, finish, open_kept

from clrk.core.ids import InvocationId, SandboxId, new_invocation_id, new_span_id, new_trace_id
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.records import InvocationFilter, InvocationRecord
from clrk.gateway.telemetry.spans import (
    UNSET,
    Attributes,
    Component,
    Identity,
    SpanKind,
    Status,
    StatusCode,
    TraceContext,
)
from clrk.gateway.telemetry.store import TraceStore

SECOND = 1_000_000_000
AGENTS = 20
SPANS_EACH = 10
MODELS = ("claude-sonnet-5", "gpt-5-mini", "claude-haiku-5", "gemini-3-flash")
RARE_MODEL = "text-embedding-rare"
DAY_NS = 24 * 3600 * SECOND


class Filler:
    """Invents invocations. The order of time is kept, as it is in life."""

    def __init__(self, telemetry: Telemetry, invocations: int) -> None:
        self.telemetry = telemetry
        self.invocations = invocations
        self.random = random.Random(7)
        self.start_ns = time.time_ns() - DAY_NS

    async def fill(self) -> None:
        """Record everything; waits for the writer now and then, as the queue is bounded."""
        for number in range(self.invocations):
            self.invocation(number, self.start_ns + DAY_NS * number // self.invocations)
            if number % 200 == 0 and not await self.telemetry.store.flush(60):
                sys.exit("the disk does not follow")
        await self.telemetry.store.flush(60)

    def invocation(self, number: int, start_ns: int) -> None:
        """Record one invocation: about SPANS_EACH spans, two lines, its record twice."""
        chance = self.random
        who = Identity(
            invocation_id=new_invocation_id(), agent_kind="TaskAgent", agent_namespace="default",
            agent_name=f"agent-{int(chance.triangular(0, AGENTS, 0))}",
            agent_uid="11111111-2222-5333-8444-555555555555", agent_revision="0123456789ab",
            sandbox_id=SandboxId("deadbeef"), egress_gateway="default/default",
            context=TraceContext(new_trace_id(), new_span_id()),
        )  # fmt: skip
        failed, dispatch = chance.random() < 0.03, new_span_id()
        record = InvocationRecord(
            invocation_id=who.invocation_id, namespace="default", agent=who.agent_name, revision=who.agent_revision,
            trigger=chance.choice(("http", "http", "http", "cron", "cli")), phase=Phase.PENDING,
            trace_id=who.context.trace_id, dispatch_span_id=dispatch, run_span_id=who.context.span_id,
            created_ns=start_ns, caller=f"203.0.113.{chance.randrange(1, 255)}:40000",
        )  # fmt: skip
        self.telemetry.record_invocation(record)
        self.calls(who, start_ns)
        error = "the agent exited with code 1" if failed else ""
        phase = Phase.FAILED if failed else Phase.SUCCEEDED
        own = {attr.CLRK_PHASE: phase.value, attr.CLRK_EXIT_CODE: int(failed), attr.CLRK_CPU_TIME: 0.4}
        for name in (attr.SPAN_SANDBOX_ACQUIRE, attr.SPAN_SANDBOX_SPAWN, attr.SPAN_SANDBOX_TEARDOWN):
            self.span(who, name, start_ns, {attr.CLRK_SANDBOX_WARM: False}, kind=SpanKind.INTERNAL)
        run = attr.invoke_agent_span_name(who.agent_name)
        self.span(who, run, start_ns + 5_000_000, own, error, kind=SpanKind.INTERNAL, span_id=who.context.span_id)
        request: Attributes = {
            attr.CLRK_TRIGGER: record.trigger, attr.HTTP_REQUEST_METHOD: "POST", attr.URL_PATH: "/agents/x",
            attr.HTTP_RESPONSE_STATUS_CODE: 500 if failed else 200, attr.CLIENT_ADDRESS: "203.0.113.7",
        }  # fmt: skip
        self.span(who, attr.SPAN_INGRESS_DISPATCH, start_ns, request, error, kind=SpanKind.SERVER, span_id=dispatch)
        for text in (b"starting with the order that was asked about", b"done"):
            self.telemetry.record_log(who, "stderr", text, start_ns + 6_000_000)
        self.telemetry.record_invocation(
            replace_record(record, phase=phase, ended_ns=start_ns + 3 * SECOND, status=500 if failed else 200)
        )

    def calls(self, who: Identity, start_ns: int) -> None:
        """Record the egress calls, about half of the spans."""
        chance = self.random
        for index in range(SPANS_EACH - 5):
            at = start_ns + 10_000_000 * (index + 1)
            if index < 3:
                rare = chance.random() < 0.0001
                tokens = int(chance.lognormvariate(6.5, 1))
                self.span(who, "chat", at, llm(RARE_MODEL if rare else chance.choice(MODELS), tokens))
            elif chance.random() < 0.01:
                self.span(
                    who, attr.SPAN_EGRESS_DIAL_DENIED, at, {**HTTP, attr.CLRK_EGRESS_DENY_REASON: "no_rule"}, "no"
                )
            else:
                self.span(who, "GET tools.internal", at, HTTP, "timeout" if chance.random() < 0.01 else "")

    def span(
        self,
        who: Identity,
        name: str,
        start_ns: int,
        attributes: Attributes,
        error: str = "",
        *,
        kind: SpanKind = SpanKind.CLIENT,
        span_id: str | None = None,
    ) -> None:
        """Record one span of three milliseconds."""
        component = Component.GATEWAY if kind is SpanKind.CLIENT else Component.RUNTIME
        self.telemetry.record(
            who, component=component, name=name, kind=kind, start_ns=start_ns, end_ns=start_ns + 3_000_000,
            attributes=attributes, status=Status(StatusCode.ERROR, error) if error else UNSET,
            span_id=span_id or new_span_id(),
        )  # fmt: skip


def replace_record(record: InvocationRecord, **changes: object) -> InvocationRecord:
    """Return the record with changes."""

    return msgspec.structs.replace(record, **changes)


HTTP: Attributes = {
    attr.HTTP_REQUEST_METHOD: "GET", attr.URL_FULL: "http://tools.internal/orders/1042", attr.SERVER_PORT: 80,
    attr.SERVER_ADDRESS: "tools.internal", attr.HTTP_RESPONSE_STATUS_CODE: 200, attr.PROCESS_PID: 4711,
    attr.PROCESS_EXECUTABLE_NAME: "python3", attr.CLRK_REQ_BYTES: 812, attr.CLRK_RESP_BYTES: 20_411,
    attr.NETWORK_PEER_ADDRESS: "10.0.0.7", attr.NETWORK_PEER_PORT: 80, attr.CLRK_DST_NAME: "tools.internal",
}  # fmt: skip


def llm(model: str, tokens: int) -> Attributes:
    """Return the attributes of an LLM call."""
    return {
        **HTTP, attr.GEN_AI_OPERATION_NAME: "chat", attr.GEN_AI_SYSTEM: "anthropic",
        attr.GEN_AI_PROVIDER_NAME: "anthropic", attr.GEN_AI_REQUEST_MODEL: model, attr.GEN_AI_RESPONSE_MODEL: model,
        attr.GEN_AI_RESPONSE_ID: "msg_0123456789", attr.GEN_AI_RESPONSE_FINISH_REASONS: ["end_turn"],
        attr.GEN_AI_USAGE_INPUT_TOKENS: tokens, attr.GEN_AI_USAGE_OUTPUT_TOKENS: tokens // 4,
        attr.CLRK_COST_USD: tokens * 3e-6, attr.CLRK_BODY_USAGE_VISIBLE: True,
    }  # fmt: skip


Ask = Callable[[], Awaitable[str]]
Questions = list[tuple[str, Ask]]


def spans(store: TraceStore, limit: int | None = 50, order: str = "newest", **wanted: object) -> Ask:
    """Ask for spans, page by page."""

    async def ask() -> str:
        pages = store.spans(SpanFilter(**wanted), order=order, limit=limit)  # type: ignore[arg-type]  # table
        return str(sum([len(page) async for page in pages]))

    return ask


def listing(store: TraceStore, **wanted: object) -> Ask:
    """Ask for the first two pages of a listing."""
    chosen = InvocationFilter(**wanted)  # type: ignore[arg-type]  # table

    async def ask() -> str:
        found = await store.list_invocations(chosen, limit=50)
        if len(found) == 50:
            found += await store.list_invocations(chosen, limit=50, before=found[-1].position)
        return str(len(found))

    return ask


def about_invocations(store: TraceStore, agent: str) -> Questions:
    """Return what is asked to find an invocation."""
    now = time.time_ns()
    window = {"since_ns": now - 3600 * SECOND - DAY_NS // 2, "until_ns": now - DAY_NS // 2}
    return [
        ("invocations of the agent, newest", listing(store, agent=agent)),
        ("… in a window of an hour", listing(store, agent=agent, **window)),
        ("invocations, all agents", listing(store)),
        ("… that failed", listing(store, phase="Failed")),
        ("… with errors", listing(store, errors=True)),
        ("… with a denial", listing(store, denied=True)),
        ("… by a common model", listing(store, model=MODELS[0])),
        ("… by a rare model", listing(store, model=RARE_MODEL)),
        ("… by a model with wildcards", listing(store, model="*rare*")),
        ("… by a rare model and agent", listing(store, model=RARE_MODEL, agent=agent)),
        ("… of a system nobody used", listing(store, system="nobody")),
        ("… with 50,000 input tokens", listing(store, min_input_tokens=50_000)),
        ("… in a phase nobody is in", listing(store, phase="Timeout")),
        ("… of an agent that is not", listing(store, agent="nobody")),
    ]


def about_spans(store: TraceStore, agent: str) -> Questions:
    """Return what is asked to find a call."""
    hour = time.time_ns() - 3600 * SECOND
    return [
        ("spans of the agent in an hour, denied", spans(store, agent=agent, denied=True, since_ns=hour)),
        ("spans of the agent by model", spans(store, agent=agent, model=MODELS[1])),
        ("spans of the agent by a rare model", spans(store, agent=agent, model=RARE_MODEL)),
        ("spans with 50,000 input tokens", spans(store, min_input_tokens=50_000)),
        ("spans denied, all agents", spans(store, denied=True)),
        ("spans with errors, of the agent", spans(store, agent=agent, errors=True)),
        ("spans of a rare agent, oldest", spans(store, agent="agent-19", order="oldest")),
    ]


def about_one(store: TraceStore, who: InvocationRecord) -> Questions:
    """Return what is asked of one invocation, and what is asked on the way of every call."""
    one = who.invocation_id

    async def record() -> str:
        return str(int(await store.find_invocation(one) is not None))

    async def prefix() -> str:
        return str(len(await store.invocations(one[:8])))

    async def logs() -> str:
        return str(len(await store.logs(f"default/{who.agent}", invocation_id=one)))

    async def follow() -> str:
        return str(len(await store.logs(f"default/{who.agent}", tail=100)))

    async def seen() -> str:
        return str(int(store.seen_invocation(InvocationId("01a2041e-8f1b-7215-bede-e5329b18fce0"))))

    async def page() -> str:
        return str(len(await store.after("traces", await store.last_seq() - 512, 512)))

    return [
        ("the invocation: its record", record),
        ("the invocation: by the beginning of its id", prefix),
        ("the invocation: all its spans", spans(store, limit=None, order="oldest", invocation_id=one)),
        ("the trace: all its spans", spans(store, limit=None, order="oldest", trace_id=who.trace_id)),
        ("the invocation: its logs", logs),
        ("the last 100 lines of the agent", follow),
        ("is this id new?", seen),
        ("an exporter's page", page),
    ]


async def fill(folder: Path, count: int) -> None:
    """Make the store."""
    store = TraceStore(folder / "traces.db", retention_s=7 * 86_400.0, max_file_bytes=2**40)
    begun = time.perf_counter()
    await Filler(Telemetry(store, {}), count // SPANS_EACH).fill()
    await store.close()
    took, size = time.perf_counter() - begun, (folder / "traces.db").stat().st_size
    print(f"filled in {took:.0f} s ({count / took:.0f} spans/s), {size / 2**20:.0f} MiB, {size // count} bytes a span")


async def measure(folder: Path) -> int:
    """Open the store and ask; returns the number of questions that took too long."""
    store = await open_kept(folder)
    middle = InvocationFilter(until_ns=time.time_ns() - DAY_NS // 2)
    (sample,) = await store.list_invocations(middle, limit=1)
    who, asked = sample.record, Asked("question", "rows")
    for name, ask in (*about_invocations(store, who.agent), *about_spans(store, who.agent), *about_one(store, who)):
        await asked.ask(name, ask)
    await store.close()
    return asked.slow


def main() -> None:
    """Parse arguments, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="keep the store in this folder; one that is there is only asked")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="clrk-bench-store-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "traces.db").exists():
            asyncio.run(fill(folder, options.spans))
        slow = asyncio.run(measure(folder))
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    finish(slow)


if __name__ == "__main__":
    main()
