"""The members of an object as they stand in it: exactly those that every reader finds, or none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.mcp.members import MALFORMED, SameNameError, read_items, read_members, write_members


def test_values_stand_as_they_were_sent() -> None:
    assert read_members(b' {"a" : 1.50 ,\n"\\u0062":{"a":2,"a":[3]},"c":"\\""}\t') == {
        "a": b"1.50", "b": b'{"a":2,"a":[3]}', "c": b'"\\""',
    }  # fmt: skip
    assert read_members(b" { } ") == {}
    assert read_items(b" [1, {} ,[2]]", 3) == [b"1", b"{}", b"[2]"]


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}', b'{"a":12,"a":1}', b'{"a":1,"a":12}', b'{"a":1,"b":2,"a":1}', b'{"a":1,"\\u0061":2}',
        b'{"a":"x","a":"x","b":1}', b'{"a":{"b":1},"a":{"b":1}}', b'{"a":1,"b":2,"a":1,"b":2}',
        b'{"a":1,"a":1,"b":2,"b":2}',
    ],
)  # fmt: skip
def test_two_members_of_one_name(raw: bytes) -> None:
    with pytest.raises(SameNameError):
        read_members(raw)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"a":1}x', b'{"a":NaN}', b'{"a":[1,]}', b"{'a':1}", b"{" * 100_000]
)
def test_what_is_no_object(raw: bytes) -> None:
    with pytest.raises(MALFORMED):
        read_members(raw)


def test_more_than_can_be_read_in_time() -> None:
    with pytest.raises(ValueError, match="over 2 items"):
        read_items(b"[1,2,3]", 2)
    with pytest.raises(ValueError, match="over 2 MiB"):
        read_items(b"[" + b"1," * (1 << 20) + b"1]", 3)
    with pytest.raises(ValueError, match="over 4096 members"):
        read_members(json.dumps({str(at): at for at in range(4097)}).encode())
    with pytest.raises(ValueError, match="names"):
        read_members(b'{"a":[' + b'{"b":1},' * 500_001 + b"1]}")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\\n{}é', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\,:', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    pairs=st.lists(st.tuples(st.text('ab"\\', max_size=2), VALUES), max_size=5),
    space=st.sampled_from(["", " ", "\n\t"]),
    ascii_only=st.booleans(),
)
def test_any_object(pairs: list, space: str, ascii_only: bool) -> None:
    text = ",".join(
        f"{space}{json.dumps(name)}{space}:{space}{json.dumps(value, ensure_ascii=ascii_only)}{space}"
        for name, value in pairs
    )
    raw = (space + "{" + text + "}" + space).encode()
    if len(dict(pairs)) < len(pairs):
        with pytest.raises(SameNameError):
            read_members(raw)
        return
    found = read_members(raw)
    assert {name: json.loads(value) for name, value in found.items()} == dict(pairs)
    assert json.loads(write_members(found)) == dict(pairs)
