"""What a fire leaves behind: its event, its span, its record and its lines, with real processes."""

import json
import logging
from datetime import UTC, datetime

import pytest
from gateway_caller import running_gateway
from scheduled_agents import NOON, SECOND, job
from scripted_agents import CURL, JSON

from clrk.core.messages import PROTOCOL_VERSION, Ready, StartRun
from clrk.gateway.telemetry.records import InvocationFilter

SCHEDULED = [
    job("echo", "0 0 1 1 *", "cat", scheduleInput={"report": "daily", "n": 1.50}),
    job("bare", "0 0 1 1 *", "cat"),
    job("failing", "0 0 1 1 *", "echo said; exit 3"),
    job("gated", "0 0 1 1 *", 'read -r < "$GATE"', maxConcurrent=1),
    job("poolless", "0 0 1 1 *"),
    job("posting", "0 0 1 1 *", f"{CURL} -w '%{{http_code}}' -d '{{}}' {JSON} $URL/v1/response", mode="Metadata"),
    job("unposted", "0 0 1 1 *", mode="Metadata"),
    job("chatty", "0 0 1 1 *", "head -c 3000000 /dev/zero | tr '\\0' '\\n'", timeout=10),
]


@pytest.fixture
async def scheduled(tmp_path):
    async with running_gateway(SCHEDULED, tmp_path) as running:
        yield running


async def fire(gateway, name):
    """Fire an agent's slot; return its record once it has ended and everything of it is recorded."""
    parts = gateway.runtime.app._parts
    known = set(parts.invocations._ended)
    parts.scheduler._fire(parts.agents.find("default", name), NOON)
    await gateway.runtime.until(lambda: set(parts.invocations._ended) - known)
    (invocation_id,) = set(parts.invocations._ended) - known
    await parts.scheduled.idle()
    await gateway.runtime.until(lambda: not parts.invocations._live)
    await parts.telemetry.flush()
    return parts.invocations.record(invocation_id)


async def logged(gateway, record):
    store = gateway.runtime.app._parts.telemetry.store
    lines = await store.logs(f"default/{record.agent}", invocation_id=record.invocation_id, tail=50)
    return {stream: [line.line for line in lines if line.stream == stream] for stream in ("stdout", "stderr")}


async def test_the_event_of_a_slot(scheduled):
    record = await fire(scheduled, "echo")
    (line,) = (await logged(scheduled, record))["stdout"]
    event = json.loads(line)
    run = await scheduled.span(record.invocation_id, "invoke_agent echo")
    assert event == {
        "specversion": "1.0",
        "id": record.invocation_id,
        "source": "clrk://default/echo",
        "type": "dev.apoxy.clrk.taskagent.invoke",
        "time": "2026-03-14T12:00:00.000Z",
        "subject": "cron",
        "datacontenttype": "application/json",
        "traceparent": f"00-{run['trace_id']}-{run['span_id']}-01",
        "invocationid": record.invocation_id,
        "clrkrevision": record.revision,
        "data": {"report": "daily", "n": 1.5},
    }


async def test_without_schedule_input_there_is_no_data(scheduled):
    record = await fire(scheduled, "bare")
    event = json.loads((await logged(scheduled, record))["stdout"][0])
    assert not {"data", "data_base64", "datacontenttype"} & set(event)


async def test_span_and_record_of_a_fire(scheduled):
    record = await fire(scheduled, "echo")
    assert (record.trigger, record.phase, record.caller, record.status) == ("cron", "Succeeded", "", 0)
    assert (record.exit_code, record.exit_reason, record.message) == (0, "exited", "")
    assert record.created_ns <= record.started_ns <= record.ended_ns
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert (dispatch["kind"], dispatch["parent_span_id"]) == ("SPAN_KIND_SERVER", "")
    assert (dispatch["trace_id"], dispatch["span_id"]) == (record.trace_id, record.dispatch_span_id)
    assert dispatch["status"]["code"] == "STATUS_CODE_UNSET"
    own = {"clrk.trigger": "cron", "clrk.phase": "Succeeded"}
    assert {
        key: value for key, value in dispatch["attributes"].items() if not key.startswith(("agent.", "invocation."))
    } == own | {"clrk.sandbox.id": "0badcafe"}
    run = await scheduled.span(record.invocation_id, "invoke_agent echo")
    assert (run["span_id"], run["parent_span_id"]) == (record.run_span_id, record.dispatch_span_id)
    store = scheduled.runtime.app._parts.telemetry.store
    (kept,) = await store.list_invocations(InvocationFilter(agent="default/echo", trigger="cron"), limit=10)
    assert kept.record == record


@pytest.mark.parametrize(
    ("name", "phase", "message", "error"),
    [
        ("failing", "Failed", "the agent exited with code 3", "failed"),
        ("unposted", "Failed", "the agent exited without posting an answer", "failed"),
        ("poolless", "Rejected", "scripted", "rejected"),
    ],
)
async def test_a_fire_that_fails(scheduled, name, phase, message, error):
    record = await fire(scheduled, name)
    assert (record.phase, record.message) == (phase, message)
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert dispatch["status"] == {"code": "STATUS_CODE_ERROR", "message": message}
    assert (dispatch["attributes"]["error.type"], dispatch["attributes"]["clrk.phase"]) == (error, phase)


async def test_a_posted_answer_is_taken_and_dropped(scheduled):
    record = await fire(scheduled, "posting")
    assert record.phase == "Succeeded"
    assert (await logged(scheduled, record))["stdout"] == ["204"]
    assert scheduled.runtime.app._parts.invocations._held_bytes == 0


async def test_output_that_nobody_waits_for_is_read_to_its_end(scheduled):
    record = await fire(scheduled, "chatty")
    assert (record.phase, record.exit_code) == ("Succeeded", 0)  # with a pipe full and nobody reading it would hang


async def test_at_max_concurrent_the_fire_is_rejected_and_says_so(scheduled):
    parts = scheduled.runtime.app._parts
    gated = parts.agents.find("default", "gated")
    parts.scheduler._fire(gated, NOON)
    await scheduled.runtime.until(lambda: scheduled.runtime.runs)
    record = await fire_refused(scheduled, gated)
    assert (record.phase, record.trigger, record.started_ns, record.status) == ("Rejected", "cron", 0, 0)
    assert record.message == "the agent runs 1 invocations, its maxConcurrent"
    dispatch = await scheduled.span(record.invocation_id, "ingress.dispatch")
    assert dispatch["attributes"]["error.type"] == "rejected"
    assert len([m for m in scheduled.runtime.received if isinstance(m, StartRun)]) == 1
    scheduled.runtime.open_gate()
    await parts.scheduled.idle()


async def fire_refused(gateway, refused):
    parts = gateway.runtime.app._parts
    known = set(parts.invocations._ended)
    parts.scheduler._fire(refused, NOON)
    (invocation_id,) = set(parts.invocations._ended) - known
    return parts.invocations.record(invocation_id)


async def test_a_restart_remembers_and_a_forged_trigger_is_no_fire(scheduled):
    record = await fire(scheduled, "echo")
    await scheduled.call("/agents/echo", headers={"X-Clrk-Trigger": "cron"})
    parts = scheduled.runtime.app._parts
    await parts.telemetry.flush()
    assert [entry.invocation_id for entry in await parts._recall_fires(parts.agents.find("default", "echo"))] == [
        record.invocation_id
    ]


async def test_reload_reaches_the_scheduler(scheduled):
    runtime, parts = scheduled.runtime, scheduled.runtime.app._parts
    before = parts.scheduler.status(parts.agents.find("default", "bare"))[0]
    runtime.config = runtime.config.model_copy(update={"agents": [job("bare", "0 0 2 2 *")]})
    runtime.configure(2)
    await runtime.until(lambda: runtime.received[-1] == Ready(PROTOCOL_VERSION, 2))
    after = parts.scheduler.status(parts.agents.find("default", "bare"))[0]
    assert before != after
    assert datetime.fromtimestamp(after / SECOND, UTC).strftime("%m-%d") == "02-02"
    assert parts.scheduler.status(SCHEDULED[0]) == (None, None, None)


async def test_the_end_of_the_gateway_leaves_no_fire_unaccounted(scheduled, caplog):
    """The runtime dies while a scheduled run is in flight: its record says so before the gateway ends."""
    parts = scheduled.runtime.app._parts
    parts.scheduler._fire(parts.agents.find("default", "gated"), NOON)
    await scheduled.runtime.until(lambda: scheduled.runtime.runs)
    (invocation_id,) = parts.invocations._open
    await parts.close()
    record = parts.invocations.record(invocation_id)
    assert (record.phase, record.message) == ("Failed", "the run was stopped by the host")
    assert [entry for entry in caplog.records if entry.levelno >= logging.ERROR] == []
