"""The CloudEvents HTTP binding with the official SDK on both ends, over real HTTP: callers, agents, answers."""

import json
from datetime import UTC, datetime

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_binary, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from scripted_runtime import METADATA_HOST
from test_metadata import ask, sandbox

FORMAT = JSONFormat()
STRUCTURED = {"Accept": "application/cloudevents+json"}
MODES = pytest.mark.parametrize("send", [to_binary, to_structured])
ATTRIBUTES = {
    "id": "A234-1234",
    "source": "https://example.com/orders?x=1#y",
    "type": "com.example.order.created",
    "subject": "order/7 “quoted” 100% \U0001f600",
    "time": datetime(2026, 3, 14, 3, 14, 15, 926000, UTC),
    "dataschema": "https://example.com/schema",
    "tenant": 'acme "inc" €',
}
DATA = [
    ("application/json", {"a": [1, 2.5, None, "é"], "b": {}}),
    ("application/vnd.example+json", {"a": True}),
    ("text/plain", "zażółć gęślą jaźń\n"),
    ("text/xml; charset=utf-8", "<a/>"),
    ("application/octet-stream", bytes(range(256))),
    ("image/png", b"\x89PNG\r\n\x1a\n"),
    ("application/json", None),
]


def made(content_type, data, **attributes):
    return CloudEvent(ATTRIBUTES | attributes | {"datacontenttype": content_type}, data)


def same_data(event, content_type, data):
    """Say whether the event's data is what was sent: octets may come as such, or as the value that they stand for."""
    got = event.get_data()
    if isinstance(data, str) and isinstance(got, bytes):
        got = got.decode()
    return got == (data if data is not None else got) and (data is not None or not got)


async def call(gateway, message, agent="echo", **headers):
    status, answer, body = await gateway.call(f"/agents/{agent}", data=message.body, headers=message.headers | headers)
    assert status == 200, body
    return answer, body


@MODES
@pytest.mark.parametrize(("content_type", "data"), DATA)
async def test_what_the_sdk_sends_is_what_the_sdk_reads_on_stdin(gateway, send, content_type, data):
    sent = made(content_type, data)
    _, body = await call(gateway, send(sent, FORMAT))
    got = FORMAT.read(None, body)
    for name, value in sent.get_attributes().items():
        if name != "datacontenttype" or data is not None:
            assert got.get_attributes()[name] == value
    assert same_data(got, content_type, data)


@MODES
@pytest.mark.parametrize(("content_type", "data"), DATA)
async def test_the_sdk_reads_the_metadata_service_in_both_modes(gateway, send, content_type, data):
    message = send(made(content_type, data), FORMAT)
    async with sandbox(gateway, "probe", data=message.body, headers=message.headers) as (url, _, _):
        _, headers, body = await ask(gateway, f"{url}/v1/event")
        binary = from_binary(HTTPMessage(dict(headers), body), FORMAT)
        _, headers, body = await ask(gateway, f"{url}/v1/event", headers=METADATA_HOST | STRUCTURED)
        structured = from_structured(HTTPMessage(dict(headers), body), FORMAT)
    assert binary.get_attributes() == structured.get_attributes()
    assert binary.get_attributes().items() >= ATTRIBUTES.items()
    assert same_data(binary, content_type, data)
    assert same_data(structured, content_type, data)


@MODES
async def test_the_sdk_reads_a_wrapped_answer(gateway, send):
    answer, body = await call(gateway, send(made("application/json", {}), FORMAT), "echo", **STRUCTURED)
    event = from_structured(HTTPMessage(dict(answer), body), FORMAT)
    assert event.get_type() == "dev.apoxy.clrk.taskagent.response"
    assert event.get_id() == "A234-1234.response"
    assert event.get_source() == "clrk://default/echo"
    assert event.get_extension("relationid") == "A234-1234"
    assert event.get_datacontenttype() == "application/json"
    assert FORMAT.read(None, json.dumps(event.get_data())).get_id() == "A234-1234"


async def test_attributes_of_other_types_arrive_as_their_text(gateway):
    """Core, section 3.1: what is no string in JSON has a canonical string."""
    event = {"specversion": "1.0", "id": "1", "source": "/x", "type": "t", "count": -5, "final": True}
    _, body = await call(
        gateway, HTTPMessage({"Content-Type": "application/cloudevents+json"}, json.dumps(event).encode())
    )
    got = FORMAT.read(None, body)
    assert (got.get_extension("count"), got.get_extension("final")) == ("-5", "true")


async def test_in_structured_mode_the_event_speaks_and_not_the_headers(gateway):
    """HTTP binding, section 3.2: a sender may repeat attributes as headers; the event is in the body."""
    message = to_structured(made("text/plain", "x"), FORMAT)
    _, body = await call(gateway, message, **{"ce-id": "header", "ce-more": "header"})
    got = FORMAT.read(None, body)
    assert (got.get_id(), got.get_extension("more")) == ("A234-1234", None)


@MODES
async def test_nobody_speaks_for_clrk(gateway, send):
    forged = dict.fromkeys(["traceparent", "tracestate", "invocationid", "clrkrevision", "clrkidentity"], "forged")
    answer, body = await call(gateway, send(made("text/plain", "x", **forged), FORMAT))
    got = FORMAT.read(None, body)
    assert got.get_extension("invocationid") == answer["X-Clrk-Invocation-ID"]
    assert b"forged" not in body


async def test_a_batch_is_refused(gateway):
    batch = b"[" + FORMAT.write(made("application/json", {})) + b"]"
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    status, _, body = await gateway.call("/agents/echo", data=batch, headers=headers)
    assert (status, json.loads(body)["detail"]) == (
        400, "one request is one invocation: send the events of a batch one by one",
    )  # fmt: skip
    assert len(gateway.runtime.received) == 1


async def test_identity_and_data_of_a_structured_event_are_its_own(gateway):
    """A body extractor looks at the event's data, as it does at the body of a plain request."""
    parts, runtime = gateway.runtime.app._parts, gateway.runtime
    (echo,) = [agent for agent in runtime.config.agents if agent.key == ("default", "echo")]
    spec = echo.spec.model_dump(by_alias=True) | {
        "identity": {"extractors": [{"type": "Body", "jsonPath": "$.user", "field": "user"}]}
    }
    known = type(echo).model_validate(echo.model_dump(by_alias=True) | {"spec": spec})
    parts.agents.replace(runtime.config.model_copy(update={"agents": [known]}))
    for send in (to_binary, to_structured):
        message = send(made("application/json", {"user": "jane"}), FORMAT)
        answer, body = await call(gateway, message)
        assert json.loads(body)["clrkidentity"] == '{"user":"jane"}'
        invocation_id = answer["X-Clrk-Invocation-ID"]
        assert parts.invocations.record(invocation_id).identity == {"user": "jane"}
        for name in ("ingress.dispatch", "invoke_agent echo"):
            assert (await gateway.span(invocation_id, name))["attributes"]["agent.identity.user"] == "jane"
