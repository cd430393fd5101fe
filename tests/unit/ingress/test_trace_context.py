"""W3C Trace Context: what is taken from a caller, and what is ignored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.trace_context import MAX_TRACESTATE_SIZE, parse_trace_context, parse_tracestate

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
