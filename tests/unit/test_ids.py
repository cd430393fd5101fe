"""Identifiers: their forms, and what no random number may make of them."""

import re

import pytest

from clrk.core import ids


@pytest.mark.parametrize(("make", "size"), [(ids.new_span_id, 16), (ids.new_trace_id, 32)])
def test_trace_and_span_ids_are_lower_case_hex_and_never_zero(make, size, monkeypatch):
    made = {make() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(rf"[0-9a-f]{{{size}}}", one) for one in made)
    monkeypatch.setattr(ids.os, "urandom", bytes)
    assert make() == "1".rjust(size, "0")


def test_an_invocation_id_is_a_uuid_of_version_7_in_the_order_of_time():
    made = [ids.new_invocation_id() for _ in range(1000)]
    assert all(ids.is_invocation_id(one) and one[14] == "7" and one[19] in "89ab" for one in made)
    assert [one[:13] for one in made] == sorted(one[:13] for one in made)
    assert len(set(made)) == 1000
