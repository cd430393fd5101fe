"""W3C Trace Context and Baggage: what is taken from a caller, and what is ignored.

CONFORMANCE has a row for each case of W3C's own suite (w3c/trace-context, test/test.py) that a receiver decides.
"""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.core.messages import AgentKey, StartRun
from clrk.gateway.trace_context import (
    MAX_BAGGAGE_SIZE,
    MAX_TRACESTATE_SIZE,
    parse_baggage,
    parse_trace_context,
    parse_tracestate,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (GOOD, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"00-{TRACE}-{SPAN}-ff", 3),  # flags that we do not know are not passed on
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", 1),
        (f" {GOOD}\t", 1),
    ],
)
def test_taken(header, flags):
    context = parse_trace_context([header])
    assert context is not None
    assert (context.trace_id, context.span_id, context.flags) == (TRACE, SPAN, flags)
    assert context.traceparent == f"00-{TRACE}-{SPAN}-{flags:02x}"


@pytest.mark.parametrize(
    "header",
    [
        "", "garbage", f"ff-{TRACE}-{SPAN}-01", f"{GOOD}-extra", f"{GOOD}-", f"01-{TRACE}-{SPAN}-01x", GOOD.upper(),
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}", f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1", f"0-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-0g", f"00_{TRACE}_{SPAN}_01", GOOD + "\n",
    ],
)  # fmt: skip
def test_ignored(header):
    assert parse_trace_context([header], ["a=1"]) is None


def test_two_headers_are_ignored():
    assert parse_trace_context([GOOD, GOOD]) is None


@pytest.mark.parametrize(
    "state",
    ["a=1", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7", "a=1 , b=2", "fw529a3039@dt=x;y", "a=1,,b=2", "k/*_-=v v v"],
)
def test_state_is_kept_to_the_letter(state):
    assert parse_tracestate([state]) == state


def test_state_headers_are_joined_in_order():
    assert parse_tracestate(["a=1", "b=2"]) == "a=1,b=2"


@pytest.mark.parametrize("state", ["A=1", "a", "=1", "a=", "a=b=c", "a=1,a=2", "a=\u00e9", "@x=1", "a@=1", " ", ","])
def test_malformed_state_is_dropped_and_the_parent_kept(state):
    context = parse_trace_context([GOOD], [state])
    assert context is not None
    assert context.tracestate == ""


def test_too_many_members():
    assert parse_tracestate([",".join(f"k{i}=1" for i in range(32))])
    assert parse_tracestate([",".join(f"k{i}=1" for i in range(33))]) == ""


def test_a_long_state_loses_long_members_first_then_the_last():
    long = "long=" + "x" * 200
    short = [f"s{i}={'y' * 40}" for i in range(12)]
    kept = parse_tracestate([",".join([long, *short])])
    assert len(kept) <= MAX_TRACESTATE_SIZE
    assert kept == ",".join(short[: kept.count(",") + 1])


@given(st.lists(st.text(st.characters(max_codepoint=0x7F)), max_size=3))
def test_any_state_fits_the_control_socket(values):
    state = parse_tracestate(values)
    assert len(state) <= MAX_TRACESTATE_SIZE
    assert all(0x20 <= ord(char) <= 0x7E for char in state)


KEY_240 = "t" + "a" * 240
KEY_14 = "v" + "b" * 13
VALUE_ALL = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) not in ",=") + "z"
STATE_ALL = "0123456789abcdefghijklmnopqrstuvwxyz_-*/=1"
# name, traceparent headers, tracestate headers, is the parent taken?, tracestate passed on
CONFORMANCE = [
    ("both_missing", [], [], False, ""),
    ("traceparent_alone", [GOOD], [], True, ""),
    ("tracestate_alone", [], ["foo=1"], False, ""),
    ("traceparent_duplicated", [GOOD, GOOD.replace("7", "8")], [], False, ""),
    ("version_0xcc", [f"cc-{TRACE}-{SPAN}-01"], [], True, ""),
    ("version_0xcc_more", [f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like"], ["a=1"], True, "a=1"),
    ("version_0xcc_dot", [f"cc-{TRACE}-{SPAN}-01.what-the-future-will-not-be-like"], [], False, ""),
    ("version_0xff", [f"ff-{TRACE}-{SPAN}-01"], [], False, ""),
    ("version_illegal_characters", [f".0-{TRACE}-{SPAN}-01"], [], False, ""),
    ("version_illegal_characters_2", [f"0.-{TRACE}-{SPAN}-01"], [], False, ""),
    ("version_too_long", [f"000-{TRACE}-{SPAN}-01"], [], False, ""),
    ("version_too_short", [f"0-{TRACE}-{SPAN}-01"], [], False, ""),
    ("trace_id_all_zero", [f"00-{'0' * 32}-{SPAN}-01"], ["a=1"], False, ""),
    ("trace_id_illegal_characters", [f"00-.{TRACE[1:]}-{SPAN}-01"], [], False, ""),
    ("trace_id_too_long", [f"00-{TRACE}0-{SPAN}-01"], [], False, ""),
    ("trace_id_too_short", [f"00-{TRACE[1:]}-{SPAN}-01"], [], False, ""),
    ("parent_id_all_zero", [f"00-{TRACE}-{'0' * 16}-01"], [], False, ""),
    ("parent_id_illegal_characters", [f"00-{TRACE}-.{SPAN[1:]}-01"], [], False, ""),
    ("parent_id_too_long", [f"00-{TRACE}-{SPAN}0-01"], [], False, ""),
    ("parent_id_too_short", [f"00-{TRACE}-{SPAN[1:]}-01"], [], False, ""),
    ("trace_flags_illegal_characters", [f"00-{TRACE}-{SPAN}-.0"], [], False, ""),
    ("trace_flags_too_long", [f"00-{TRACE}-{SPAN}-001"], [], False, ""),
    ("trace_flags_too_short", [f"00-{TRACE}-{SPAN}-1"], [], False, ""),
    ("ows_handling", [f"\t {GOOD} \t"], ["foo=1 \t , \t bar=2, \t baz=3"], True, "foo=1,bar=2,baz=3"),
    ("tracestate_empty_header", [GOOD], ["foo=1", ""], True, "foo=1,"),
    ("tracestate_multiple_headers", [GOOD], ["foo=1,bar=2", "rojo=1,congo=2", "baz=3"], True,
     "foo=1,bar=2,rojo=1,congo=2,baz=3"),
    ("tracestate_duplicated_keys", [GOOD], ["foo=1,foo=2"], True, ""),
    ("tracestate_duplicated_keys_over_headers", [GOOD], ["foo=1", "foo=2"], True, ""),
    ("tracestate_all_allowed_in_a_key", [GOOD], [STATE_ALL], True, STATE_ALL),
    ("tracestate_all_allowed_in_a_value", [GOOD], [f"foo={VALUE_ALL}"], True, f"foo={VALUE_ALL}"),
    *(
        (f"tracestate_key_illegal {key!r}", [GOOD], [f"{key}=1"], True, "")
        for key in ["foo ", "FOO", "foo.bar", "foo@", "@foo", "foo@@bar", "foo@bar@baz", "\u00e9", "foo@1x"]
    ),
    ("tracestate_member_count_limit", [GOOD], [",".join(f"bar{i:02}={i:02}" for i in range(32))], True,
     ",".join(f"bar{i:02}={i:02}" for i in range(32))),
    ("tracestate_over_the_member_count", [GOOD], [",".join(f"bar{i:02}={i:02}" for i in range(33))], True, ""),
    ("tracestate_key_length_limit", [GOOD], ["z" * 256 + "=1"], True, "z" * 256 + "=1"),
    ("tracestate_key_too_long", [GOOD], ["z" * 257 + "=1"], True, ""),
    ("tracestate_tenant_length_limit", [GOOD], [f"{KEY_240}@{KEY_14}=1"], True, f"{KEY_240}@{KEY_14}=1"),
    ("tracestate_tenant_too_long", [GOOD], [f"{KEY_240}a@{KEY_14}=1"], True, ""),
    ("tracestate_vendor_too_long", [GOOD], [f"t@{KEY_14}b=1"], True, ""),
    *((f"tracestate_value_illegal {value!r}", [GOOD], [f"foo={value}"], True, "") for value in ["bar=baz", "", "a\tb"]),
    ("tracestate_value_too_long", [GOOD], ["foo=" + "v" * 257], True, ""),
]  # fmt: skip


@pytest.mark.parametrize(("parents", "states", "taken", "state"), [row[1:] for row in CONFORMANCE],
                         ids=[row[0] for row in CONFORMANCE])  # fmt: skip
def test_conformance(parents, states, taken, state):
    context = parse_trace_context(parents, states)
    assert (context is not None) is taken
    if context is not None:
        assert (context.trace_id, context.span_id, context.tracestate) == (TRACE, SPAN, state)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([], ""),
        ([""], ""),
        ([" , "], ""),
        (["userId=alice"], "userId=alice"),
        (["userId=Am%C3%A9lie,serverNode=DF 28;p=1;q , isProduction=false"],
         "userId=Am%C3%A9lie,serverNode=DF 28;p=1;q , isProduction=false"),
        (["a=1", "b=2"], "a=1,b=2"),
        (["a=1,\tb=2"], "a=1, b=2"),
        (["a="], "a="),
        ([",".join(f"k{i}=1" for i in range(64))], ",".join(f"k{i}=1" for i in range(64))),
        ([",".join(f"k{i}=1" for i in range(65))], ""),
        (["a=" + "x" * (MAX_BAGGAGE_SIZE - 2)], "a=" + "x" * (MAX_BAGGAGE_SIZE - 2)),
        (["a=" + "x" * (MAX_BAGGAGE_SIZE - 1)], ""),
        (["no value"], ""),
        (["=1"], ""),
        (["a=1,b"], ""),
        (["a=\r\nb"], ""),
        (["a=\u00e9"], ""),
        (["(a)=1"], ""),
    ],
)  # fmt: skip
def test_baggage(values, kept):
    assert parse_baggage(values) == kept


@given(st.lists(st.text(st.characters(max_codepoint=0x100)) | st.just("a=1"), max_size=3))
def test_any_baggage_fits_the_control_socket(values):
    request = StartRun(
        "01a204d5-e05e-77b2-88e9-f0e1062a62a2", AgentKey("n", "a"), GOOD, parse_tracestate(values),
        baggage=parse_baggage(values),
    )  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=StartRun) == request
