"""CONTRACT section 5, row by row; section 6 and 7 for the answer and for binary mode."""

import base64
import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.envelope import (
    EnvelopeError,
    Event,
    EventContext,
    Received,
    caller_attributes,
    check_body,
    content_type_of,
    event_attributes,
    request_id,
    response_event,
    rfc3339,
    to_binary_headers,
    to_structured,
)

CONTEXT = EventContext(
    namespace="team",
    agent="echo",
    revision="0123456789ab",
    invocation_id="01890000-0000-7000-8000-000000000001",
    trigger="http",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    tracestate="vendor=1",
    method="POST",
    path="/agents/team/echo/a%20b",
    query="x=1&y=%20",
    time=datetime(2026, 3, 14, 3, 14, 15, 926535, UTC),
)


def attributes(*headers, **changes):
    received = Received(caller_attributes(headers), content_type_of(headers))
    return event_attributes(received, dataclasses.replace(CONTEXT, **changes), request_id(headers))


def structured(body, content_type=None):
    given = attributes(*([("Content-Type", content_type)] if content_type else []))
    return json.loads(to_structured(Event(given, body)))


def test_every_attribute_without_caller_headers():
    assert attributes() == {
        "specversion": "1.0",
        "id": CONTEXT.invocation_id,
        "source": "clrk://team/echo",
        "type": "dev.apoxy.clrk.taskagent.invoke",
        "time": "2026-03-14T03:14:15.926Z",
        "subject": "http",
        "traceparent": CONTEXT.traceparent,
        "tracestate": "vendor=1",
        "invocationid": CONTEXT.invocation_id,
        "clrkrevision": "0123456789ab",
        "httpmethod": "POST",
        "httpurl": "/agents/team/echo/a%20b",
        "httpquery": "x=1&y=%20",
    }


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("ce-id", "a"), ("X-Clrk-Execution-ID", "b"), ("X-Request-Id", "c")], "a"),
        ([("x-request-id", "c"), ("x-clrk-execution-id", "b")], "b"),
        ([("X-Request-Id", "c")], "c"),
        ([("X-Request-Id", "")], CONTEXT.invocation_id),
        ([("X-Request-Id", "\udcff")], CONTEXT.invocation_id),
        ([("X-Clrk-Execution-ID", " "), ("X-Request-Id", "c")], "c"),
    ],
)
def test_id(headers, expected):
    assert attributes(*headers)["id"] == expected


@pytest.mark.parametrize("name", ["source", "type", "subject"])
def test_caller_may_set(name):
    assert attributes((f"CE-{name.title()}", "urn:x"))[name] == "urn:x"


@pytest.mark.parametrize("trigger", ["http", "cron", "cli"])
def test_subject_is_the_trigger(trigger):
    assert attributes(trigger=trigger)["subject"] == trigger


@pytest.mark.parametrize(
    "name",
    ["specversion", "traceparent", "tracestate", "invocationid", "clrkrevision", "httpmethod", "httpurl", "httpquery"],
)
def test_caller_can_not_set(name):
    assert attributes((f"ce-{name}", "forged")) == attributes()


@pytest.mark.parametrize("name", ["clrkidentity", "tracestate"])
def test_caller_can_not_add(name):
    assert name not in attributes((f"ce-{name}", "forged"), tracestate="")


def test_malformed_value_of_a_reserved_name_is_passed_over():
    assert attributes(("ce-traceparent", "%zz")) == attributes()


def test_datacontenttype_is_the_content_type_and_nothing_else():
    given = attributes(("Content-Type", "application/json; x=y"), ("ce-datacontenttype", "text/plain"))
    assert given["datacontenttype"] == "application/json; x=y"
    assert "datacontenttype" not in attributes(("ce-datacontenttype", "text/plain"))


def test_extensions_keep_their_hyphens():
    assert attributes(("ce-x-tenant-id", "acme"))["x-tenant-id"] == "acme"


@pytest.mark.parametrize("header", ["X-Tenant-Id", "Authorization", "Cookie", "Host", "x-ce-id", "ce"])
def test_other_headers_are_dropped(header):
    assert attributes((header, "value")) == attributes()


def test_empty_optional_attributes_are_absent():
    given = attributes(tracestate="", query="")
    assert "tracestate" not in given
    assert "httpquery" not in given


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("plain", "plain"),
        ("  spaces around  ", "spaces around"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),  # the example of the HTTP binding
        ("%2525", "%25"),  # exactly one round
        ("%41%62", "Ab"),  # unnecessary encoding is accepted
        ('"a b"', "a b"),
        ('"a\\"b\\\\c"', 'a"b\\c'),
        ('"%20"', " "),
        ('in"side', 'in"side'),
        ("", ""),
    ],
)
def test_values_are_decoded(raw, value):
    assert attributes(("ce-note", raw))["note"] == value


@pytest.mark.parametrize(
    "raw",
    [
        "%", "%4", "100%", "%zz", "%C0%A0", "%ff", "%ED%A0%80", "%00", "%0A", "%0d%0aX-Evil: 1", "%7F", "%C2%80",
        "%EF%BF%BE", "%EF%B7%90", "%F0%9F%BF%BF", "caf\u00e9", "\udcff", '"open', '"a"b"', '"', "a\tb",
    ],
)  # fmt: skip
def test_malformed_values_are_refused(raw):
    with pytest.raises(EnvelopeError):
        attributes(("ce-note", raw))


@pytest.mark.parametrize("header", ["ce-", "ce--a", "ce-a_b", "ce-a.b", "ce-a!", "ce-data", "ce-data_base64", "ce-ä"])
def test_malformed_names_are_refused(header):
    with pytest.raises(EnvelopeError):
        attributes((header, "value"))


@pytest.mark.parametrize("name", ["id", "source", "type", "subject", "time"])
def test_attributes_that_must_not_be_empty(name):
    with pytest.raises(EnvelopeError):
        attributes((f"ce-{name}", ""))


def test_the_same_attribute_twice_is_refused():
    with pytest.raises(EnvelopeError, match="more than once"):
        attributes(("ce-note", "a"), ("CE-Note", "b"))


@pytest.mark.parametrize("raw", ["a%20b", "<x>", "a%5Eb", "x%7By%7D", "%C2%A0"])
def test_source_must_be_a_uri_reference(raw):
    with pytest.raises(EnvelopeError):
        attributes(("ce-source", raw))


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("2026-01-31T08:15:00Z", "2026-01-31T08:15:00Z"),
        ("2026-01-31T08:15:00.123456789Z", "2026-01-31T08:15:00.123456789Z"),
        ("2026-01-31T10:15:00+02:00", "2026-01-31T08:15:00.000Z"),
    ],
)
def test_time_is_utc(raw, value):
    assert attributes(("ce-time", raw))["time"] == value


@pytest.mark.parametrize(
    "raw", ["now", "2026-01-31", "2026-01-31T08:15:00", "2026-02-30T08:15:00Z", "0001-01-01T00:00:00+23:00", "1e9"]
)
def test_time_must_be_rfc_3339(raw):
    with pytest.raises(EnvelopeError):
        attributes(("ce-time", raw))


def test_our_time_is_utc_whatever_the_zone():
    assert rfc3339(datetime(2026, 1, 1, 2, 0, tzinfo=timezone(timedelta(hours=2)))) == "2026-01-01T00:00:00.000Z"


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"])
def test_json_body_becomes_data(content_type):
    assert structured(b'{"a": [1, 2.50, null]}', content_type)["data"] == {"a": [1, 2.5, None]}


def test_json_body_is_kept_to_the_digit_on_one_line():
    event = Event(
        {"datacontenttype": "application/json"}, b'{\n "n" : 1.10,\r\n "big": 12345678901234567890, "e": 1E400}'
    )
    raw = to_structured(event)
    assert raw.endswith(b',"data":{"n":1.10,"big":12345678901234567890,"e":1E400}}')
    assert b"\n" not in raw


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("text/plain", "grüße".encode(), "grüße"),
        ("TEXT/csv;charset=UTF-8", b"a,b\n", "a,b\n"),
        ('text/plain; charset="iso-8859-1"', b"gr\xfc\xdfe", "grüße"),
    ],
)
def test_text_body_becomes_a_string(content_type, body, text):
    assert structured(body, content_type)["data"] == text


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (None, b"{}"),
        ("application/octet-stream", b"\x00\xff"),
        ("application/x-www-form-urlencoded", b"a=1"),
        ("text/plain", b"\xff\xfe not utf-8"),
        ("text/plain; charset=klingon", b"x"),
        ("text/plain; charset=unicode_escape", b"\\n"),
        ("text/plain; charset=a\\0b", b"x"),
        ("no media type", b"x"),
        ("application/jsonx", b"{}"),
    ],
)
def test_any_other_body_becomes_base64(content_type, body):
    event = structured(body, content_type)
    assert base64.b64decode(event["data_base64"]) == body
    assert "data" not in event


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain"])
def test_empty_body_gives_neither(content_type):
    assert not {"data", "data_base64"} & set(structured(b"", content_type))


@pytest.mark.parametrize(
    "body", [b"{", b"{'a':1}", b"[1,]", b"NaN", b"{} {}", b'"\xff"', b'"\x01"', b"\xef\xbb\xbf{}", b"[" * 100_000]
)
def test_broken_json_is_refused(body):
    with pytest.raises(EnvelopeError):
        check_body("application/json", body)


@pytest.mark.parametrize(("content_type", "body"), [("application/json", b""), ("text/plain", b"{"), ("", b"{")])
def test_bodies_that_need_no_json(content_type, body):
    check_body(content_type, body)


def test_binary_headers():
    event = Event(attributes(("ce-x-tenant-id", "a%20%E2%82%AC"), ("Content-Type", "text/plain")), b"hi")
    headers = dict(to_binary_headers(event))
    assert headers["ce-x-tenant-id"] == "a%20%E2%82%AC"
    assert headers["Content-Type"] == "text/plain"
    assert headers["ce-specversion"] == "1.0"
    assert "ce-datacontenttype" not in headers


def test_response_event():
    request = Event(attributes(("ce-id", "42"), ("ce-source", "urn:caller")))
    event = json.loads(to_structured(response_event(request, "clrk://team/echo", "text/plain", b"hi", CONTEXT.time)))
    assert event == {
        "specversion": "1.0",
        "id": "42.response",
        "source": "clrk://team/echo",
        "type": "dev.apoxy.clrk.taskagent.response",
        "time": "2026-03-14T03:14:15.926Z",
        "datacontenttype": "text/plain",
        "relationid": "42",
        "invocationid": CONTEXT.invocation_id,
        "traceparent": CONTEXT.traceparent,
        "data": "hi",
    }


def test_an_answer_that_is_no_json_travels_as_bytes():
    event = Event({"datacontenttype": "application/json"}, b"oops {")
    assert base64.b64decode(json.loads(to_structured(event))["data_base64"]) == b"oops {"


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")))


@given(st.dictionaries(st.from_regex(re.compile(r"x[a-z0-9]{1,8}", re.ASCII), fullmatch=True), text), st.binary())
def test_binary_headers_come_back_as_they_were(extensions, body):
    sent = Event(attributes() | extensions, body)
    headers = to_binary_headers(sent)
    assert all(re.fullmatch(r"[\x20-\x7e]*", value) for _, value in headers)
    received = attributes(*[(n, v) for n, v in headers if n.startswith("ce-x")])
    assert received == {**attributes(), **extensions}


@given(text, st.binary())
def test_structured_mode_is_json_that_holds_the_body(value, body):
    event = json.loads(to_structured(Event({"specversion": "1.0", "note": value}, body)))
    assert event["note"] == value
    assert base64.b64decode(event.get("data_base64", "")) == body


@given(st.text(st.characters(max_codepoint=255)))
def test_any_header_value_is_taken_or_refused(raw):
    try:
        value = attributes(("ce-note", raw))["note"]
    except EnvelopeError:
        return
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", value)
    if '"' not in raw:
        assert value == unquote(raw.strip(" \t"), errors="strict")
