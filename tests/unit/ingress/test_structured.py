"""Events in structured mode, read from callers: what is one, what is none, and what of it is believed."""

import base64
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.envelope import EnvelopeError, Received
from clrk.gateway.structured import is_structured, read_binary, read_structured

REQUIRED = {"specversion": "1.0", "id": "42", "source": "/orders", "type": "com.example.order"}
ATTRIBUTES = {"id": "42", "source": "/orders", "type": "com.example.order"}


def event(**members):
    return json.dumps(REQUIRED | members).encode()


@pytest.mark.parametrize(
    ("content_type", "structured"),
    [
        ("application/cloudevents+json", True),
        ("Application/CloudEvents+JSON; charset=UTF-8", True),
        ("application/json", False),
        ("application/cloud", False),
        ("text/plain; a=application/cloudevents+json", False),
        ("nonsense", False),
        (None, False),
    ],
)
def test_the_content_type_decides(content_type, structured):
    headers = [] if content_type is None else [("content-TYPE", content_type)]
    assert is_structured(headers) is structured


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/cloudevents-batch+json", 400),
        ("application/cloudevents-batch", 400),
        ("application/cloudevents", 415),
        ("application/cloudevents+xml", 415),
        ("application/cloudevents+avro", 415),
        ("application/cloudevents+protobuf; charset=utf-8", 415),
    ],
)
def test_formats_that_are_not_read(content_type, status):
    with pytest.raises(EnvelopeError) as caught:
        is_structured([("Content-Type", content_type)])
    assert caught.value.status == status


def test_two_content_types_are_none():
    """Two readers could take different ones."""
    with pytest.raises(EnvelopeError):
        is_structured([("Content-Type", "text/plain"), ("content-type", "application/cloudevents+json")])


@pytest.mark.parametrize(
    ("members", "content_type", "body"),
    [
        ({}, "", b""),
        ({"data": None}, "", b""),
        ({"data": None, "datacontenttype": "application/json"}, "application/json", b""),
        ({"data": {"a": 1}}, "application/json", b'{"a":1}'),
        ({"data": [1, None], "datacontenttype": "application/vnd.x+json"}, "application/vnd.x+json", b"[1,null]"),
        ({"data": "text", "datacontenttype": "application/json"}, "application/json", b'"text"'),
        ({"data": "text"}, "application/json", b'"text"'),
        ({"data": "zażółć", "datacontenttype": "text/plain"}, "text/plain", "zażółć".encode()),
        ({"data": "ä", "datacontenttype": "text/plain; charset=latin-1"}, "text/plain; charset=latin-1", b"\xe4"),
        ({"data": "<x/>", "datacontenttype": "application/xml"}, "application/xml", b"<x/>"),
        ({"data_base64": "AP8=", "datacontenttype": "image/png"}, "image/png", b"\0\xff"),
        ({"data_base64": "AP8="}, "", b"\0\xff"),
        ({"data_base64": "e30=", "datacontenttype": "application/json"}, "application/json", b"{}"),
        ({"data_base64": ""}, "", b""),
    ],
)
def test_data(members, content_type, body):
    assert read_structured(event(**members)) == Received(ATTRIBUTES, content_type, body)


def test_numbers_of_data_are_kept_to_the_digit():
    raw = event()[:-1] + b', "data": {"n": 1.50, "big": 123456789012345678901234567890, "e": 1E+2} }'
    assert read_structured(raw).body == b'{"n":1.50,"big":123456789012345678901234567890,"e":1E+2}'


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), ("", ""), (True, "true"), (False, "false"), (0, "0"), (-7, "-7"), (2**31 - 1, "2147483647")],
)
def test_types_of_attributes_have_a_canonical_text(value, text):
    assert read_structured(event(extension=value)).attributes["extension"] == text


def test_null_is_absent():
    assert read_structured(event(subject=None, extension=None)).attributes == ATTRIBUTES


def test_time_is_in_utc():
    assert read_structured(event(time="2026-03-14T04:14:15+01:00")).attributes["time"] == "2026-03-14T03:14:15.000Z"


def test_what_a_caller_can_not_set_is_passed_over():
    ours = ["traceparent", "tracestate", "invocationid", "clrkrevision", "clrkidentity"]
    forged = dict.fromkeys([*ours, "httpmethod", "httpurl", "httpquery"], "forged")
    assert read_structured(event(**forged)).attributes == ATTRIBUTES


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"event"',
        b"{",
        b"{}",
        b"\xff",
        event() + b"{}",
        b"[" * 100_000,
        json.dumps({key: value for key, value in REQUIRED.items() if key != "specversion"}).encode(),
        json.dumps({key: value for key, value in REQUIRED.items() if key != "id"}).encode(),
        json.dumps({key: value for key, value in REQUIRED.items() if key != "source"}).encode(),
        json.dumps({key: value for key, value in REQUIRED.items() if key != "type"}).encode(),
        event(specversion="0.3"),
        event(specversion=1.0),
        event(id=""),
        event(id=None),
        event(source="with space"),
        event(time="noon"),
        event(subject=""),
        event(extension=1.5),
        event(extension=2**31),
        event(extension=-(2**31) - 1),
        event(extension=[]),
        event(extension={}),
        event(extension="\x00"),
        event(extension="\x85"),
        event(extension="\ud800"),
        event(**{"Extension": "x"}),
        event(**{"": "x"}),
        event(**{"a.b": "x"}),
        event(**{"é": "x"}),
        event(data={}, data_base64="e30="),
        event(data_base64="!"),
        event(data_base64="e30"),
        event(data_base64=5),
        event(data_base64="AP8=", datacontenttype="application/json"),
        event(data={}, datacontenttype="text/plain"),
        event(data=5, datacontenttype="application/xml"),
        event(data="ä", datacontenttype="text/plain; charset=ascii"),
        event(data="ä", datacontenttype="text/plain; charset=ebcdic-unknown"),
        event(data="\ud800", datacontenttype="text/plain"),
        event(datacontenttype=""),
        event(datacontenttype="nonsense"),
        event(datacontenttype="text/plain\r\nX: y"),
        event(datacontenttype=5),
    ],
)
def test_what_is_no_cloudevent(raw):
    with pytest.raises(EnvelopeError) as caught:
        read_structured(raw)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_an_error(raw):
    with pytest.raises(EnvelopeError):
        read_structured(raw)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*REQUIRED, "data", "data_base64", "datacontenttype", "x", "Y"]), _JSON))
def test_any_members_are_an_event_or_an_error(members):
    raw = json.dumps(members | REQUIRED | {"x": "y"}).encode()
    try:
        received = read_structured(raw)
    except EnvelopeError:
        return
    assert received.attributes == ATTRIBUTES | {"x": "y"}
    if "data_base64" in members and members["data_base64"] is not None:
        assert received.body == base64.b64decode(members["data_base64"])
    elif members.get("data") is not None and "json" in received.content_type:
        assert msgspec.json.decode(received.body) == json.loads(json.dumps(members["data"]))


def test_binary_mode_keeps_the_body():
    headers = [("Content-Type", "application/json"), ("ce-id", "1")]
    assert read_binary({"id": "1"}, headers, b" { } ") == Received({"id": "1"}, "application/json", b" { } ")
    with pytest.raises(EnvelopeError):
        read_binary({}, headers, b"{")


@pytest.mark.parametrize("number", ["1e999999999", "-1e999999999", "9" * 5000, "1" + "0" * 30_000])
def test_numbers_that_nobody_can_read_are_no_attributes(number):
    raw = event()[:-1] + f', "count": {number}}}'.encode()
    with pytest.raises(EnvelopeError, match="count: an attribute is"):
        read_structured(raw)


def test_attributes_are_bounded_and_data_is_not():
    assert len(read_structured(event(data=["a" * 100_000])).body) == 100_004
    assert len(read_structured(event(data_base64="AAAA" * 50_000)).body) == 150_000
    for members in ({"a" * 70_000: "x"}, {"x": "a" * 70_000}, {f"a{number}": 1 for number in range(8000)}):
        with pytest.raises(EnvelopeError, match="over 65536 bytes"):
            read_structured(event(**members))
    twice = event(data="a" * 70_000)[:-1] + b', "data": 1}'
    with pytest.raises(EnvelopeError, match="over 65536 bytes"):
        read_structured(twice)
