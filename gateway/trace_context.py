"""W3C Trace Context and Baggage: read `traceparent`, `tracestate` and `baggage` from a caller. Pure.

Source: W3C Trace Context (Recommendation 2021-11-23; the random flag from Level 2), sections 3.2, 3.3 and 4; W3C
Baggage (Candidate Recommendation 2024-05-30), section 3.
Anything malformed is ignored, never an error: a broken tracer in front of us must not cost anybody their answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from clrk.core.ids import SpanId, TraceId
from clrk.gateway.telemetry.spans import TraceContext

MAX_TRACESTATE_SIZE: Final = 512  # what the control socket carries; W3C 3.3.1.5 asks for at least this
MAX_BAGGAGE_SIZE: Final = 8192  # W3C Baggage 3.3.2: what must be passed on, and what the control socket carries
_MAX_BAGGAGE_MEMBERS: Final = 64
_MAX_MEMBERS: Final = 32
_LONG_MEMBER: Final = 128  # members above this go first when the list is too long (W3C 3.3.1.5)
_KNOWN_FLAGS: Final = 0x03  # sampled, random; others MUST be zero when passed on (3.2.2.5.2)

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER_KEY: Final = re.compile(r"[a-z0-9][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}")
_MEMBER_VALUE: Final = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")

# 3.3.1: a token, "=", a value, properties. What is in the value is between those who write and read it.
_BAGGAGE_MEMBER: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ *=[\x20-\x2b\x2d-\x7e]*")


def parse_trace_context(traceparent: Sequence[str], tracestate: Sequence[str] = ()) -> TraceContext | None:
    """Return the caller's context, or None when there is none that counts.

    Shape: each argument is every value of that header, in order. More than one traceparent is as good as none (4.3).
    """
    if len(traceparent) != 1 or (found := _TRACEPARENT.fullmatch(traceparent[0].strip(" \t"))) is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None  # 3.2.2.1: ff is invalid; version 00 has exactly four fields, later ones may add some
    if trace_id == "0" * 32 or span_id == "0" * 16:
        return None
    return TraceContext(TraceId(trace_id), SpanId(span_id), int(flags, 16) & _KNOWN_FLAGS, parse_tracestate(tracestate))


def parse_tracestate(values: Sequence[str]) -> str:
    """Return the list to pass on, or "" when it is malformed as a whole (3.3.1.1).

    Shape: a valid list within the size limit comes back to the letter; several headers are joined with a comma.
    """
    joined = ",".join(values).strip(" \t")
    members = [member.strip(" \t") for member in joined.split(",")]
    present = [member for member in members if member]  # empty members are allowed (3.3.1.1)
    if len(present) > _MAX_MEMBERS or not all(_is_member(member) for member in present):
        return ""
    if len({member.partition("=")[0] for member in present}) != len(present):
        return ""  # 3.3.1.3: one entry per key
    if len(joined) <= MAX_TRACESTATE_SIZE and "\t" not in joined:
        return joined if present else ""
    return _fit(present)


def parse_baggage(values: Sequence[str]) -> str:
    """Return the baggage to pass on as it is, or "" when it is malformed or over the limits. It needs no traceparent.

    Shape: values is every value of the header, in order; several are joined with a comma (RFC 9110, section 5.3).
    """
    joined = ",".join(values).replace("\t", " ").strip(" ")
    if len(joined) > MAX_BAGGAGE_SIZE:
        return ""
    members = [member.strip(" ") for member in joined.split(",")]
    present = [member for member in members if member]
    if len(present) > _MAX_BAGGAGE_MEMBERS or not all(_BAGGAGE_MEMBER.fullmatch(member) for member in present):
        return ""
    return joined if present else ""


def _is_member(member: str) -> bool:
    key, separator, value = member.partition("=")
    return bool(separator) and _MEMBER_KEY.fullmatch(key) is not None and _MEMBER_VALUE.fullmatch(value) is not None


def _fit(members: list[str]) -> str:
    """Drop whole members until the list fits: long ones first, then from the end (3.3.1.5)."""
    kept = list(members)
    for index in range(len(kept) - 1, -1, -1):
        if len(",".join(kept)) <= MAX_TRACESTATE_SIZE:
            break
        if len(kept[index]) > _LONG_MEMBER:
            del kept[index]
    while len(",".join(kept)) > MAX_TRACESTATE_SIZE:
        kept.pop()
    return ",".join(kept)
