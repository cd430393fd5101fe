"""Triggers and delivery with the real daemon: schedules, run-task, events in both modes, whole answers."""

from __future__ import annotations

import calendar
import json
import time
from datetime import UTC, datetime

import aiohttp
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from stack import SOURCE, Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

FORMAT = JSONFormat()


def test_the_next_fire_of_a_schedule_is_shown(daemon: Daemon) -> None:
    agents = {agent["name"]: agent for agent in json.loads(daemon.clrk("agents", "list", "-o", "json"))}
    shown = agents["leapling"]
    now = datetime.now(UTC)
    years = (year for year in range(now.year, now.year + 9) if calendar.isleap(year))
    leap_days = (datetime(year, 2, 29, tzinfo=UTC) for year in years)
    assert datetime.fromtimestamp(shown["nextFireTimeUnixNano"] / 1e9, UTC) == next(
        day for day in leap_days if day > now
    )
    assert (shown["lastFireTimeUnixNano"], shown["skippedFires"]) == (None, 0)
    assert agents["deaf"]["nextFireTimeUnixNano"] is None


@pytest.mark.parametrize("send", [to_binary, to_structured])
async def test_an_event_of_the_sdk_and_its_wrapped_answer(daemon: Daemon, caller: aiohttp.ClientSession, send) -> None:
    source = "print(json.dumps(event))"
    event = CloudEvent(
        {"id": "e-1", "source": "/sdk", "type": "test", "tenant": "acme", "datacontenttype": "text/plain"}, source
    )
    message = send(event, FORMAT)
    headers = message.headers | {"accept": "application/cloudevents+json"}
    async with caller.post(f"{daemon.url}/agents/python", data=message.body, headers=headers) as answer:
        assert answer.status == 200
        wrapped = from_structured(HTTPMessage(dict(answer.headers), await answer.read()), FORMAT)
    assert (wrapped.get_id(), wrapped.get_extension("relationid")) == ("e-1.response", "e-1")
    seen = json.loads(wrapped.get_data())
    assert (seen["id"], seen["source"], seen["type"], seen["tenant"]) == ("e-1", "/sdk", "test", "acme")
    assert (seen["data"], seen["datacontenttype"]) == (source, "text/plain")


async def test_a_failure_is_a_status_when_answers_are_not_streamed(
    daemon: Daemon, caller: aiohttp.ClientSession
) -> None:
    source = "print('half an answer', flush=True); sys.exit(7)"
    async with caller.post(f"{daemon.url}/agents/whole", data=source, headers=SOURCE) as answer:
        assert answer.status == 500
        assert answer.headers["X-Clrk-Exit-Code"] == "7"
        assert b"half an answer" not in await answer.read()
    async with caller.post(f"{daemon.url}/agents/whole", data="print('all of it')", headers=SOURCE) as answer:
        assert (answer.status, await answer.read()) == (200, b"all of it\n")
        assert answer.headers["Content-Length"] == "10"


def test_a_record_has_its_phases_times_and_caller(daemon: Daemon) -> None:
    before = time.time_ns()
    daemon.clrk("agents", "run-task", "deaf")
    shown = json.loads(daemon.clrk("agents", "invocations", "deaf", "-o", "json", "--limit", "1"))
    assert (shown["phase"], shown["trigger"], shown["exitCode"], shown["caller"]) == ("Succeeded", "cli", 0, "uid 0")
    times = [before, *(shown[f"{name}TimeUnixNano"] for name in ("created", "start", "end")), time.time_ns()]
    assert times == sorted(times)
    root = [span for span in daemon.spans_when_complete(shown["invocation"]) if span["name"] == "ingress.dispatch"]
    assert [(span["parent_span_id"], span["attributes"]["clrk.trigger"]) for span in root] == [("", "cli")]
