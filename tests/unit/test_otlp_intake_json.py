"""OTLP as JSON: it says the same as protobuf, and what is of the wrong type costs only itself."""

from __future__ import annotations

import base64
import json

import pytest
from agent_otlp import NOW, OTHER_TRACE, OWN_ATTRIBUTES, RUN_SPAN, SPAN_ID, TRACE, exported, read

from clrk.gateway.telemetry.receive_wire import MAX_ITEMS, ReceiveError, Signal
from clrk.gateway.telemetry.spans import SpanKind, Status, StatusCode


def json_traces(**fields):
    span = {
        "traceId": OTHER_TRACE.upper(), "spanId": SPAN_ID, "name": "work", "kind": 3,
        "startTimeUnixNano": str(NOW - 1000), "endTimeUnixNano": NOW, "unknownField": [{}],
    } | fields  # fmt: skip
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "mine"}}]}
    scope = {"scope": {"name": "lib"}, "spans": [span], "unknown": 1}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope], "schemaUrl": "https://x"}]}


def test_json_says_the_same_as_protobuf():
    attributes = [
        {"key": "s", "value": {"stringValue": "x"}},
        {"key": "i", "value": {"intValue": "5"}},
        {"key": "j", "value": {"intValue": 5}},
        {"key": "d", "value": {"doubleValue": 0.5}},
        {"key": "b", "value": {"bytesValue": base64.b64encode(b"\xff").decode()}},
        {"key": "a", "value": {"arrayValue": {"values": [{"stringValue": "x"}]}}},
        {"key": "invocation.id", "value": {"stringValue": "victim"}},
        {"key": "traceId", "value": {"stringValue": "an attribute of this name is no id"}},
    ]
    links = [{"traceId": OTHER_TRACE, "spanId": "b" * 16}]
    batch = read(json_traces(attributes=attributes, links=links, status={"code": 2, "message": "m"}))
    record = batch.items[0].record
    assert record.attributes == OWN_ATTRIBUTES | {
        "s": "x", "i": 5, "j": 5, "d": 0.5, "b": "/w==", "a": ["x"],
        "traceId": "an attribute of this name is no id",
    }  # fmt: skip
    assert (record.trace_id, record.span_id, record.parent_span_id) == (TRACE, SPAN_ID, RUN_SPAN)
    assert (record.kind, record.status) == (SpanKind.CLIENT, Status(StatusCode.ERROR, "m"))
    assert record.resource["service.name"] == "mine"
    sent, out = exported(batch)
    assert (sent.schema_url, out.links[0].trace_id.hex()) == ("https://x", TRACE)


@pytest.mark.parametrize(
    "fields",
    [
        {"traceId": 5}, {"traceId": "zz"}, {"traceId": ["ab"]}, {"spanId": "ab cd"}, {"spanId": {}},
        {"name": 5}, {"name": {}}, {"startTimeUnixNano": "soon"}, {"startTimeUnixNano": -1},
        {"startTimeUnixNano": 2**64}, {"startTimeUnixNano": 1e300}, {"attributes": {}}, {"attributes": [5]},
        {"attributes": [{"key": "k", "value": {"intValue": {}}}]},
        {"attributes": [{"key": "k", "value": {"stringValue": "a", "intValue": 1}}]},
        {"links": [None]}, {"links": "x"}, {"flags": -5}, {"flags": "x"}, {"droppedAttributesCount": 1.5},
    ],
)  # fmt: skip
def test_json_of_the_wrong_type_costs_the_item(fields):
    batch = read(json_traces(**fields))
    assert (len(batch.items), dict(batch.rejected)) == (0, {"not readable": 1})


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "x"}, {"attributes": [{"key": "k", "value": "x"}]}, {"status": []}, {"events": [[]]},
        {"attributes": [{"key": "k", "value": {"bytesValue": "\u00e9"}}]},
    ],
)  # fmt: skip
def test_json_of_the_wrong_type_that_protobuf_overlooks_does_no_harm(fields):
    record = read(json_traces(**fields)).items[0].record
    assert (record.trace_id, record.parent_span_id, record.kind) == (TRACE, RUN_SPAN, SpanKind.INTERNAL) or (
        "kind" not in fields and record.kind is SpanKind.CLIENT
    )
    assert record.attributes.items() >= OWN_ATTRIBUTES.items()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "5", "null", "{", '{"resourceSpans": {}}', '{"resourceSpans": [5]}',
        '{"resourceSpans": [{"scopeSpans": 5}]}', json.dumps({"resourceSpans": [{"scopeSpans": [{"schemaUrl": 1}]}]}),
        '{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "\\ud800"}]}]}]}',
        '{"resourceSpans": [{"schemaUrl": 5}]}', '{"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]}',
        "[" * 100_000, '{"x":' * 100_000, '{"resourceSpans": [{"resource": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_json_that_is_no_request(text):
    with pytest.raises(ReceiveError) as caught:
        read(text)
    assert caught.value.code == "malformed"


def test_empty_json_is_an_empty_request():
    for text in ("{}", '{"resourceSpans": null}', '{"resourceSpans": [{"scopeSpans": [{"spans": null}]}]}'):
        assert not read(text).items


def test_deep_and_wide_json_is_cheap():
    deep = '{"stringValue":"x"}'
    for _ in range(50):
        deep = '{"arrayValue":{"values":[' + deep + "]}}"
    wide = '{"key":"k","value":{}},' * 9000 + '{"key":"k"}'
    for attributes, reason in [
        ('[{"key":"k","value":' + deep + "}]", "not readable"),
        (f"[{wide}]", "over 8192 objects in one item"),
    ]:
        text = json.dumps(json_traces(attributes="HERE")).replace('"HERE"', attributes)
        batch = read(text)
        assert (len(batch.items), dict(batch.rejected)) == (0, {reason: 1})
    with pytest.raises(ReceiveError, match="objects in one request"):
        read('{"resourceSpans": [' + "{}," * 500_000 + "{}]}")
    with pytest.raises(ReceiveError, match="items in one request"):
        read('{"resourceSpans": [{"scopeSpans": [{"spans": [' + "0," * MAX_ITEMS + "0]}]}]}")


def test_a_signal_sent_to_another_path_is_nothing():
    assert not read(json_traces(), Signal.LOGS).items
