"""What the pipeline makes of a span: exact names, exact types, nothing that can break a call."""

import json
import socket
import time

import pytest
from span_samples import MS, agent, config, gateway, identity, record, record_invocation

from clrk import __version__
from clrk.core.ids import SandboxId
from clrk.gateway.telemetry import attributes as attr
from clrk.gateway.telemetry import pipeline
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.query import SpanFilter
from clrk.gateway.telemetry.spans import Component, Identity, SpanEvent, SpanKind, Status, StatusCode


@pytest.fixture
async def telemetry(tmp_path):
    opened = Telemetry.open(tmp_path, config())
    yield opened
    await opened.close()


async def documents(telemetry):
    await telemetry.flush()
    return [json.loads(span.json) async for page in telemetry.store.spans(SpanFilter()) for span in page]


async def test_a_span_is_exactly_the_json_of_the_contract(telemetry):
    now = time.time_ns()
    who = identity(invocation_id="01a2041e-8f1b-7215-bede-e5329b18fce0")
    telemetry.record(
        who, component=Component.GATEWAY, name="chat m", kind=SpanKind.CLIENT, start_ns=now, end_ns=now + 2_000,
        attributes={attr.GEN_AI_USAGE_INPUT_TOKENS: 12, attr.CLRK_COST_USD: 0.5, attr.GEN_AI_REQUEST_STREAM: True,
                    attr.GEN_AI_RESPONSE_FINISH_REASONS: ["stop"]},
        status=Status(StatusCode.ERROR, "why"), events=[SpanEvent("e", now + 1_500, {"k": 1})],
        span_id="00f067aa0ba902b7",
    )  # fmt: skip
    (document,) = await documents(telemetry)
    assert document == {
        "trace_id": who.context.trace_id,
        "span_id": "00f067aa0ba902b7",
        "parent_span_id": who.context.span_id,
        "name": "chat m",
        "kind": "SPAN_KIND_CLIENT",
        "start_time_unix_nano": now,
        "end_time_unix_nano": now + 2_000,
        "status": {"code": "STATUS_CODE_ERROR", "message": "why"},
        "attributes": {
            "gen_ai.usage.input_tokens": 12,
            "clrk.cost.usd": 0.5,
            "gen_ai.request.stream": True,
            "gen_ai.response.finish_reasons": ["stop"],
            "invocation.id": "01a2041e-8f1b-7215-bede-e5329b18fce0",
            "agent.kind": "TaskAgent",
            "agent.namespace": "default",
            "agent.name": "support",
            "agent.uid": "11111111-2222-5333-8444-555555555555",
            "agent.revision": "0123456789ab",
            "clrk.sandbox.id": "deadbeef",
        },
        "events": [{"name": "e", "time_unix_nano": now + 1_500, "attributes": {"k": 1}}],
        "resource": {
            "service.name": "clrk",
            "service.version": __version__,
            "host.name": socket.gethostname(),
            "clrk.component": "gateway",
            "clrk.egress_gateway": "default",
        },
    }


async def test_the_tree_hangs_together(telemetry):
    who = identity()
    record_invocation(telemetry, who, remote_parent="00f067aa0ba902b7")
    spans = {document["name"]: document for document in await documents(telemetry)}
    dispatch, run = spans["ingress.dispatch"], spans["invoke_agent support"]
    assert dispatch["parent_span_id"] == "00f067aa0ba902b7"
    assert run["parent_span_id"] == dispatch["span_id"]
    assert spans["chat claude-sonnet-5"]["parent_span_id"] == run["span_id"] == who.context.span_id
    assert {span["trace_id"] for span in spans.values()} == {who.context.trace_id}
    assert all(span["attributes"]["invocation.id"] == who.invocation_id for span in spans.values())
    assert len({span["span_id"] for span in spans.values()}) == len(spans)


async def test_a_root_has_an_empty_parent_and_no_sandbox_means_no_attribute(telemetry):
    sample = identity()
    who = Identity(
        sample.invocation_id, "TaskAgent", "default", "a", "u", "r", SandboxId(""), "", sample.context,
    )  # fmt: skip
    record(telemetry, who, "ingress.dispatch", parent="")
    (document,) = await documents(telemetry)
    assert document["parent_span_id"] == ""
    assert "clrk.sandbox.id" not in document["attributes"]
    assert "clrk.egress_gateway" not in document["resource"]


async def test_attributes_of_a_span_never_replace_the_identity(telemetry):
    record(telemetry, identity(), invocation__id="forged", agent__name="someone-else", clrk__sandbox__id="x")
    (document,) = await documents(telemetry)
    assert document["attributes"]["agent.name"] == "support"
    assert document["attributes"]["invocation.id"] != "forged"
    assert document["attributes"]["clrk.sandbox.id"] == "deadbeef"


async def test_hostile_values_are_bounded_and_kept_printable_as_json(telemetry):
    record(
        telemetry, identity(), "x" * 20_000, long="y" * 100_000, surrogate="a\udc80b", big=10**40, small=-(10**40),
        nan=float("nan"), inf=float("inf"), fine=1.5, many=["z"] * 10_000, error="\ud800" * 10,
    )  # fmt: skip
    (document,) = await documents(telemetry)
    attributes = document["attributes"]
    assert len(document["name"]) == len(attributes["long"]) == pipeline.MAX_VALUE_CHARS
    assert attributes["surrogate"] == "a?b"
    assert (attributes["big"], attributes["small"]) == (2**63 - 1, -(2**63))
    assert "nan" not in attributes
    assert "inf" not in attributes
    assert attributes["fine"] == 1.5
    assert len(attributes["many"]) == pipeline.MAX_ATTRIBUTES
    assert document["status"]["message"] == "?" * 10


async def test_ten_thousand_attributes_leave_room_for_the_identity(telemetry):
    record(telemetry, identity(), **{f"k{index}": index for index in range(10_000)})
    (document,) = await documents(telemetry)
    assert len(document["attributes"]) == pipeline.MAX_ATTRIBUTES + 7
    assert document["attributes"]["agent.name"] == "support"


async def test_an_end_before_the_start_is_a_span_of_no_length(telemetry):
    now = time.time_ns()
    record(telemetry, identity(), start_ns=now, length_ns=-3_000)
    (document,) = await documents(telemetry)
    assert document["end_time_unix_nano"] == now


async def test_what_can_not_be_a_span_is_counted_and_does_not_raise(telemetry, caplog):
    record(telemetry, None, "no identity")
    record(telemetry, identity(), wrong=object())
    assert await documents(telemetry) == []
    assert telemetry.store.counters["dropped_bad_item"] == 2
    assert "could not be recorded" in caplog.text


async def test_log_lines_are_cut_and_bounded_per_invocation(telemetry):
    noisy, quiet, now = identity(), identity(), time.time_ns()
    telemetry.record_log(noisy, "stdout", b"x" * 100_000, now)
    for _ in range(100):
        telemetry.record_log(noisy, "stdout", b"y" * pipeline.MAX_LINE_BYTES, now)
    telemetry.record_log(quiet, "stderr", b"still heard", now)
    await telemetry.flush()
    lines = await telemetry.store.logs("default/support", invocation_id=noisy.invocation_id)
    assert len(lines[0].line) == pipeline.MAX_LINE_BYTES
    assert sum(len(line.line) for line in lines[:-1]) == pipeline.MAX_LOG_BYTES
    assert lines[-1].stream == "clrk"
    assert "limit" in lines[-1].line
    assert telemetry.store.counters["dropped_log_lines"] == 101 - (len(lines) - 1)
    (line,) = await telemetry.store.logs("default/support", invocation_id=quiet.invocation_id)
    assert (line.stream, line.line) == ("stderr", "still heard")


async def test_resource_attributes_of_the_environment_are_added_but_do_not_replace_ours(tmp_path):
    environment = {
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=prod,Team.Name=a%20b,host.name=liar, ,=x,broken",
        "OTEL_SERVICE_NAME": "clrk-eu",
    }
    telemetry = Telemetry.open(tmp_path, config(environment=environment))
    record(telemetry, identity())
    (document,) = await documents(telemetry)
    assert document["resource"]["deployment.environment.name"] == "prod"
    assert document["resource"]["Team.Name"] == "a b"
    assert document["resource"]["host.name"] == socket.gethostname()
    assert document["resource"]["service.name"] == "clrk-eu"
    await telemetry.close()


async def test_seen_invocation_answers_at_once_for_what_was_just_recorded(telemetry):
    who = identity()
    assert not telemetry.seen_invocation(who.invocation_id)
    record(telemetry, who)
    assert telemetry.seen_invocation(who.invocation_id)


async def test_close_twice_and_reconfigure_do_no_harm(tmp_path):
    telemetry = Telemetry.open(tmp_path, config([gateway("http://127.0.0.1:1")], [agent()]))
    telemetry.reconfigure(config([gateway("http://127.0.0.1:2")], retention=60))
    telemetry.reconfigure(config())
    record(telemetry, identity(), start_ns=time.time_ns() - MS)
    await telemetry.close()
    await telemetry.close()
    again = Telemetry.open(tmp_path, config())
    assert [document["name"] for document in await documents(again)] == ["GET tools.internal"]
    await again.close()
