"""Synthetic addresses keep their meaning for the life of a sandbox."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from clrk.gateway.names import MAX_NAMES, SYNTHETIC_V4, SYNTHETIC_V6, NameTable, NameTableFullError, is_synthetic


def test_a_name_has_the_same_addresses_at_every_call() -> None:
    names = NameTable()
    first = names.bind("api.openai.com")
    names.bind("api.anthropic.com")
    assert names.bind("api.openai.com") == first
    assert names.name_of(first[0]) == names.name_of(first[1]) == "api.openai.com"


def test_addresses_never_handed_out_mean_nothing() -> None:
    names = NameTable()
    v4, v6 = names.bind("a.example")
    for address in (v4 + 1, v4 - 1, v6 + 1, v6 - 1, ip_address("8.8.8.8"), ip_address("2001:db8::1")):
        assert names.name_of(address) is None
    assert is_synthetic(v4 + 1)
    assert not is_synthetic(ip_address("8.8.8.8"))


def test_the_limit_refuses_new_names_and_keeps_the_old() -> None:
    names = NameTable(limit=2)
    a = names.bind("a")
    names.bind("b")
    with pytest.raises(NameTableFullError):
        names.bind("c")
    assert names.bind("a") == a


def test_all_names_fit_the_ranges() -> None:
    assert SYNTHETIC_V4.num_addresses > MAX_NAMES
    assert SYNTHETIC_V6.num_addresses > MAX_NAMES
