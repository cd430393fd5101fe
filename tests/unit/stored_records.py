"""Records as the gateway makes them, and what of them a store lists."""

import time

import msgspec

from clrk.core.ids import SpanId, new_trace_id
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.records import InvocationFilter, InvocationRecord
from clrk.gateway.telemetry.spans import Identity, TraceContext

OTLP = b"\n\x00 a serialised message, which the store does not look into"


def pending(who, **changes):
    return msgspec.structs.replace(
        InvocationRecord(
            invocation_id=who.invocation_id, namespace=who.agent_namespace, agent=who.agent_name, revision="r1",
            trigger="http", phase=Phase.PENDING, trace_id=who.context.trace_id, dispatch_span_id="d" * 16,
            run_span_id=who.context.span_id, created_ns=time.time_ns(), caller="203.0.113.7:40000",
        ),
        **changes,
    )  # fmt: skip


def daemon(name="watcher"):
    return Identity(
        invocation_id="", agent_kind="DaemonAgent", agent_namespace="default", agent_name=name, agent_uid="u",
        agent_revision="r", sandbox_id="deadbeef", egress_gateway="default/default",
        context=TraceContext(new_trace_id(), SpanId("")), caller_fields=(),
    )  # fmt: skip


async def names(store, wanted=None, **options):
    await store.flush()
    return [
        msgspec.json.decode(s.json)["name"]
        async for page in store.spans(wanted or SpanFilter(), **options)
        for s in page
    ]


async def listed(store, limit=50, before=None, **wanted):
    await store.flush()
    found = await store.list_invocations(InvocationFilter(**wanted), limit=limit, before=before)
    return [summary.record.invocation_id for summary in found]
